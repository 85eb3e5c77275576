# SPDX-License-Identifier: Apache-2.0
"""Norms, gates and attention by the kernel library, against torch in float64."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modewright.runtime.activations import ActivationSpec
from modewright.runtime.native.between import Between, between
from modewright.runtime.native.library import SWITCH, Library, library
from support.kernel_library import each_isa, needs_library

pytestmark = needs_library


def kernels(isa: str) -> Between:
    return Between(cast(Library, library()), isa)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_isa
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 100, 576])
def test_a_norm_is_its_formula(isa: str, rows: int, width: int) -> None:
    x, weight = numbers(rows, width) * 3, numbers(width, seed=2)
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)

    assert torch.allclose(kernels(isa).rms_norm(x, weight, 1e-5).double(), exact, atol=1e-6)


@each_isa
@pytest.mark.parametrize("width", [1, 15, 100, 576])
def test_a_norm_in_bfloat16_is_rounded_once(isa: str, width: int) -> None:
    x, weight = (numbers(5, width) * 3).bfloat16(), numbers(width, seed=2).bfloat16()
    norm = kernels(isa).rms_norm
    exact = norm(x.float(), weight.float(), 1e-5)

    assert torch.equal(norm(x, weight, 1e-5), exact.bfloat16())
    assert torch.equal(norm(x, weight.float(), 1e-5), exact.bfloat16())
    assert torch.equal(norm(x.float(), weight, 1e-5), exact)


@each_isa
def test_a_norm_of_zeros_is_zero_and_nan_stays_in_its_row(isa: str) -> None:
    x = numbers(4, 40)
    x[0], x[2, 7] = 0.0, torch.nan
    y = kernels(isa).rms_norm(x, torch.ones(40), 1e-6)

    assert torch.equal(y[0], torch.zeros(40))
    assert y[2].isnan().all()
    assert y[[1, 3]].isfinite().all()


@each_isa
@given(count=st.integers(1, 100), size=st.floats(0.01, 100.0), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_gate_is_its_formula(isa: str, count: int, size: float, seed: int) -> None:
    gate, up = numbers(count, seed=seed) * size, numbers(count, seed=seed + 1)
    exact = F.silu(gate.double()) * up
    result = kernels(isa).silu_gate_(gate, up)

    assert result is gate
    assert torch.allclose(gate.double(), exact, rtol=1e-5, atol=1e-30)


@each_isa
@pytest.mark.parametrize("count", [1, 15, 16, 1000])
def test_a_gate_in_bfloat16_is_rounded_once(isa: str, count: int) -> None:
    gate, up = numbers(count).bfloat16() * 3, numbers(count, seed=2).bfloat16()
    exact = kernels(isa).silu_gate_(gate.float(), up.float())

    assert torch.equal(kernels(isa).silu_gate_(gate, up), exact.bfloat16())


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_what_is_not_finite(isa: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([torch.nan, torch.inf, -1e4, 9984, 0.0], dtype=dtype).repeat(7)
    result = kernels(isa).silu_gate_(gate, torch.ones(35, dtype=dtype))[:5]

    assert result[0].isnan()
    assert result[1:].tolist() == [torch.inf, pytest.approx(0.0, abs=1e-30), 9984, 0.0]


needs_attention = pytest.mark.skipif(
    not (between() and cast(Between, between()).attends), reason="no kernel for attention here"
)


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention by its definition, ``[batch, tokens, heads, features]``, float64."""
    times = query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(times, 1) for t in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * scaling
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(ahead, -torch.inf).softmax(-1) @ values).transpose(1, 2)


@needs_attention
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 150),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (3, 1)]),
    features=st.sampled_from([16, 48, 64, 80, 128]),
    size=st.sampled_from([0.1, 1.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_attention_is_its_definition(
    batch: int, tokens: int, heads: tuple[int, int], features: int, size: float
) -> None:
    made = cast(Between, between())
    query = (numbers(batch, tokens, heads[0], features) * size).transpose(1, 2)  # as layers pass it
    key = numbers(batch, heads[1], tokens, features, seed=2)
    value = numbers(batch, heads[1], tokens, features, seed=3)
    assert made.can_attend(query, key, value)
    result = made.attend(query, key, value, 0.3)

    assert result.shape == (batch, tokens, heads[0], features)
    assert torch.allclose(
        result.double(), exact_attention(query, key, value, 0.3), rtol=1e-4, atol=2e-5
    )


@needs_attention
@pytest.mark.parametrize("tokens", [255, 256, 257, 300, 700])
@pytest.mark.parametrize("features", [48, 64])
def test_attention_to_many_tokens_whose_scores_rise_and_fall(tokens: int, features: int) -> None:
    """What was added up is scaled anew when a larger score comes."""
    made = cast(Between, between())
    query, key, value = (numbers(1, 2, tokens, features, seed=s) for s in (1, 2, 3))
    query[..., 0] = 4.0
    for change in (torch.linspace(-20, 20, tokens), torch.linspace(20, -20, tokens)):
        key[..., 0] = change

        result = made.attend(query, key, value, 0.3)

        exact = exact_attention(query, key, value, 0.3)
        assert torch.allclose(result.double(), exact, rtol=1e-4, atol=5e-5)


@needs_attention
@pytest.mark.parametrize("size", [1e-30, 1e30, 1e36])
def test_attention_to_values_of_any_size(size: float) -> None:
    made = cast(Between, between())
    query, key, value = (numbers(1, 2, 70, 32, seed=s) for s in (1, 2, 3))
    value = value.clamp(-1, 1)

    result = made.attend(query, key, value * size, 0.2)

    exact = exact_attention(query, key, value, 0.2)
    assert torch.allclose(result.double() / size, exact, rtol=1e-4, atol=2e-5)


@needs_attention
def test_nothing_of_later_tokens_is_seen() -> None:
    made = cast(Between, between())
    query, key, value = (numbers(1, 2, 50, 32, seed=s) for s in (1, 2, 3))
    before = made.attend(query, key, value, 0.2)
    key[:, :, 40:], value[:, :, 40:] = torch.nan, torch.inf
    after = made.attend(query, key, value, 0.2)

    assert torch.allclose(before[:, :40], after[:, :40], rtol=1e-4, atol=2e-5)
    assert not after[:, 40:].isfinite().any()


@needs_attention
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((1, 2, 9, 24), (1, 2, 9, 24), (1, 2, 9, 24)),  # features
        ((1, 3, 9, 32), (1, 2, 9, 32), (1, 2, 9, 32)),  # heads that do not divide
        ((1, 2, 9, 32), (1, 2, 12, 32), (1, 2, 12, 32)),  # a past
        ((1, 2, 9, 32), (1, 2, 9, 32), (1, 2, 9, 16)),  # values of another size
    ],
)
def test_what_it_does_not_attend_to_it_says(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    made = cast(Between, between())

    assert not made.can_attend(numbers(*query), numbers(*key), numbers(*value))


def test_without_a_library_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")

    assert between() is None


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", ["fp8_e4m3", "int8"])
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 70),
    exponent=st.integers(-140, 120),
    spread=st.integers(0, 30),
    given_scale=st.sampled_from([None, 0.01, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_what_a_format_leaves_is_what_it_says(
    isa: str,
    to: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    exponent: int,
    spread: int,
    given_scale: float | None,
    seed: int,
) -> None:
    x = numbers(rows, width, seed=seed) * torch.exp2(numbers(rows, width, seed=seed + 1) * spread)
    x = (x * 2.0**exponent).nan_to_num(posinf=1.0, neginf=-1.0).to(dtype)
    x = torch.where(x.isfinite(), x, 1.0)
    scale = None if given_scale is None else torch.tensor([[given_scale]])
    kind = ActivationSpec(to, "token" if scale is None else "tensor", calibrated=scale is not None)

    assert kind.name is not None
    found = kernels(isa).round(x, kind.name, given_scale or 0.0)

    assert found is not None
    assert torch.equal(found, kind.simulate(x, scale))


@each_isa
@pytest.mark.parametrize("act", ["fp8_token", "int8_token"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_formats_have_no_word_for_are_left_to_others(
    isa: str, act: str, value: float
) -> None:
    x = numbers(70, 33)
    assert kernels(isa).round(x, act, 0.0) is not None
    x[65, 32] = value
    assert kernels(isa).round(x, act, 0.0) is None
