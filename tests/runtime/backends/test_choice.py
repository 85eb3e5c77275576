# SPDX-License-Identifier: Apache-2.0
"""Which backend is chosen, and what the product promises whatever is chosen."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from modewright.errors import ConfigError
from modewright.runtime.backends import Case, backends, choose, linear, using
from modewright.runtime.backends.base import Backend
from modewright.runtime.backends.choice import SWITCH
from modewright.runtime.backends.measure import fastest
from modewright.runtime.backends.survey import survey
from modewright.runtime.native.library import SWITCH as NATIVE
from modewright.runtime.packed_weight import PackedSpec
from support.packed_weights import group, random_weight


def case(fmt: str, rows: int, act: str | None = None, device: str = "cpu") -> Case:
    grouped = group(64) if fmt != "int8" else {}
    return Case(PackedSpec(fmt, (64, 128), **grouped), device, torch.float32, act, rows)


@pytest.mark.parametrize(
    ("fmt", "rows", "act", "expected"),
    [
        ("int4", 1, None, "int4pack"),
        ("int4", 64, None, "int4pack"),
        ("int4", 200, None, "buffered"),
        ("int8", 1, None, "int8pack"),
        ("int8", 64, "int8_token", "onednn-int8"),
        ("int3", 1, None, "portable"),
    ],
)
def test_without_the_own_kernel_torch_serves_by_the_number_of_rows(
    fmt: str, rows: int, act: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NATIVE, "0")
    if expected == "onednn-int8" and not torch.cpu._is_vnni_supported():
        expected = "buffered"

    assert choose(case(fmt, rows, act)).name == expected


def test_without_copies_only_those_serve_that_make_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, "0")

    assert choose(case("int4", 1), copies=False).name == "buffered"


def test_what_nobody_else_takes_the_portable_one_does() -> None:
    assert choose(case("int4", 1, device="meta")).name == "portable"


def test_using_restricts_the_choice_and_then_no_longer() -> None:
    weight, x = random_weight("int4", 64, 128, **group(64)), torch.randn(2, 128)
    before = linear(weight, x, None)

    with using("portable"):
        exact = linear(weight, x, None)

    assert torch.equal(exact, F.linear(x, weight.dequantize()))
    assert torch.equal(linear(weight, x, None), before)
    with pytest.raises(ConfigError, match="no backend 'cublas'"), using("cublas"):
        pass


def test_gradients_flow_to_the_activations() -> None:
    weight = random_weight("int4", 64, 128, **group(64))
    x = torch.randn(2, 128, requires_grad=True)

    linear(weight, x, None).sum().backward()

    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))


def test_a_bias_gets_its_gradient_where_the_input_needs_none() -> None:
    weight, x = random_weight("int4", 64, 128, **group(64)), torch.randn(2, 128)
    bias = torch.zeros(64, requires_grad=True)

    linear(weight, x, bias).sum().backward()

    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((64,), 2.0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_product_computes_with_its_input() -> None:
    weight, x = random_weight("int4", 64, 128, **group(64)), torch.randn(2, 128)
    bias = torch.zeros(64)
    with torch.no_grad():
        traced = torch.jit.trace(lambda rows: linear(weight, rows, bias), (x,), check_trace=False)

    torch.testing.assert_close(traced(2 * x), F.linear(2 * x, weight.dequantize()))


def test_activations_of_another_width_or_device_are_errors() -> None:
    weight = random_weight("int4", 64, 128, **group(64))

    with pytest.raises(ConfigError, match=r"expected activations \[..., 128\].*received \[2, 64\]"):
        linear(weight, torch.randn(2, 64), None)
    if choose(case("int4", 2)).name == "native":
        with pytest.raises(ConfigError, match=r"expected a bias \[64\]"):
            linear(weight, torch.randn(2, 128), torch.zeros(63))
    with pytest.raises(ConfigError, match="expected activations on cpu"):
        linear(weight, torch.empty(2, 128, device="meta"), None)


def test_what_is_kept_for_a_weight_goes_with_it() -> None:
    weight = random_weight("int4", 64, 128, **group(64))
    for name in ("native", "int4pack", "buffered", "portable"):
        with using(name):
            linear(weight, torch.randn(2, 128), None)
    gone = weakref.ref(weight)

    del weight
    gc.collect()

    assert gone() is None


@pytest.mark.parametrize("name", ["native", "int4pack", "buffered", "portable"])
def test_a_weight_that_is_loaded_in_place_is_prepared_anew(name: str) -> None:
    x = torch.randn(2, 128)
    weight, other = (random_weight("int4", 64, 128, seed=seed, **group(64)) for seed in (0, 1))
    linear(weight, x, None)
    with using(name):
        linear(weight, x, None)
        expected = linear(other, x, None)
        for part, tensor in weight.tensors().items():
            tensor.copy_(other.tensors()[part])

        assert torch.equal(linear(weight, x, None), expected)
    torch.testing.assert_close(linear(weight, x, None), linear(other, x, None))


def test_weights_made_for_inference_are_multiplied_too() -> None:
    with torch.inference_mode():
        weight, x = random_weight("int4", 64, 128, **group(64)), torch.randn(2, 128)
        assert torch.equal(linear(weight, x, None), linear(weight, x, None))


def test_measuring_picks_one_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "measure")
    weight, x = random_weight("uint4", 64, 128, **group(64)), torch.randn(2, 128)

    result = linear(weight, x, None)

    exact = F.linear(x, weight.dequantize())
    assert (result - exact).norm() < 0.02 * exact.norm()
    assert choose(case("uint4", 2), measure=True).refuses(case("uint4", 2)) is None


def test_the_fastest_is_the_one_that_took_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from modewright.runtime.backends import measure

    slow, fast = backends()["portable"], backends()["buffered"]

    def seconds(backend: Backend, *rest: object) -> float:
        return 2.0 if backend is slow else 1.0

    monkeypatch.setattr(measure, "_timed", seconds)

    assert fastest(case("int4", 3), (slow, fast)) is fast


def test_the_survey_names_a_reason_for_every_backend_that_was_passed_over() -> None:
    found = survey()

    names = list(backends())
    for row in found.rows:
        assert list(row.refusals) == names[: names.index(row.backend)]
        assert all(row.refusals.values())
    assert {row.backend for row in survey("cuda").rows} >= {"portable", "int-mm"}
