# SPDX-License-Identifier: Apache-2.0
"""Packed layers under ``torch.compile``: one operator, and the weight that belongs to each call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.runtime.backends import linear, operator, using
from modewright.runtime.packed_weight import TENSORS, PackedWeight
from support.library_recipes import llama, windows
from support.packed_weights import WEIGHTS, group, random_weight

AOT_DYNAMIC = "test_aot_dispatch_dynamic"
SCHEMES = ("w4a16", "w8a8", "w8a8_static", "w4a8", "fp8", "nvfp4", "mxfp8", "mxfp4", "w3a16")
OPERATOR = torch.ops.modewright.packed_linear.default


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


def packed(model: nn.Module, scheme: str = "w4a16") -> Any:
    data = {"calibration": [torch.ones(2, 64)]} if scheme == "w8a8_static" else None
    modes: list[Any] = [("quantize", {"scheme": scheme}), "max_calibrate", "compress"]
    return modewright.apply_mode(model, modes, mode_kwargs=data).eval()


def two_layers() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))


def operators_in(graph: torch.fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.target is OPERATOR]


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_torch_finds_nothing_wrong_with_it(weight: tuple[str, dict[str, Any]]) -> None:
    made = random_weight(weight[0], 48, 128, **weight[1])
    spec = made.spec
    how = (spec.format, spec.shape, spec.granularity, spec.group_size, spec.block_size)
    tensors = [getattr(made, name) for name in TENSORS]
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_static", AOT_DYNAMIC]
    if made.scale.dtype == torch.float8_e4m3fn:
        checks.remove("test_schema")  # torch cannot compare tensors of that dtype there
    for shape in ((128,), (3, 128), (2, 0, 128), (2, 5, 128)):
        x = torch.randn(shape)
        given = (x, *tensors, torch.ones(48), None, None, *how, spec.scale_format, spec.scale_dtype)
        torch.library.opcheck(OPERATOR, given, test_utils=checks)
        expected = linear(made, x, torch.ones(48))
        assert torch.equal(OPERATOR(*given), expected)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 200])
def test_a_compiled_model_computes_the_same(scheme: str, rows: int) -> None:
    model, x = packed(two_layers(), scheme), torch.randn(rows, 64)

    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_the_kernels_serve_and_not_the_unpacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = packed(two_layers()), torch.randn(3, 64)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)

    assert [name for name in seen if "packed_linear" in name] == ["modewright.packed_linear"] * 2
    assert len(seen) == 3  # and the activation between them


def test_one_compiled_block_multiplies_each_layer_by_its_own_weight() -> None:
    """Torch compiles blocks that look alike once, and calls that with the tensors of each."""
    blocks = nn.ModuleList(packed(nn.Sequential(nn.Linear(64, 64))) for _ in range(4))
    x = torch.randn(2, 64)

    def run(block: nn.Module, x: torch.Tensor) -> Any:
        return block(x)

    with torch.no_grad():
        fast = compiled(run)
        results = [fast(block, x) for block in blocks]
        expected = [block(x) for block in blocks]

    for result, one in zip(results, expected, strict=True):
        assert torch.equal(result, one)
    assert not torch.equal(expected[0], expected[1])


def test_any_number_of_rows_takes_one_graph() -> None:
    model = packed(two_layers())
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)

    with torch.no_grad():
        for rows in (3, 200, 40):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(fast(x), model(x))
    assert counter.frame_count == 1


def test_what_was_written_or_replaced_later_is_seen() -> None:
    first, second = packed(two_layers()), packed(nn.Sequential(*two_layers()).requires_grad_(False))
    with torch.no_grad():
        second[0].weight_packed.fill_(0x77)
        fast, x = compiled(first), torch.randn(2, 64)
        assert torch.equal(fast(x), first(x))
        first.load_state_dict(second.state_dict())
        assert torch.equal(fast(x), second(x))
        state = {name: tensor.clone() for name, tensor in packed(two_layers()).state_dict().items()}
        first.load_state_dict(state, assign=True)
        assert torch.equal(fast(x), packed(two_layers())(x))
        first[0].weight_scale.mul_(2)
        first[2].weight_scale = first[2].weight_scale * 2
        assert torch.equal(fast(x), first(x))
        assert not torch.equal(fast(x), second(x))


def test_nothing_keeps_a_weight_alive() -> None:
    operator._weights.clear()
    weight = random_weight("int4", 64, 128, **group(64))
    with torch.no_grad():
        fast = compiled(lambda w, x: linear(w, x, None))
        fast(weight, torch.randn(1, 128))
    kept = [held for held, _ in operator._weights.values()]
    assert [type(held) for held in kept] == [PackedWeight]
    assert kept[0].packed.data_ptr() == weight.packed.data_ptr()  # nothing was copied

    del weight, kept
    torch.compiler.reset()
    gc.collect()
    assert len(operator._weights) == 0


def test_a_moved_weight_is_prepared_once() -> None:
    operator._weights.clear()
    weight = random_weight("int4", 64, 128, **group(64))
    other = weight.map(torch.clone)
    with torch.no_grad():
        fast = compiled(lambda w, x: linear(w, x, None))
        for held in (weight, other, weight, other):
            fast(held, torch.randn(1, 128))
            fast(held, torch.randn(1, 128))
    assert len(operator._weights) == 2


def test_a_gradient_still_flows() -> None:
    model = packed(two_layers().requires_grad_(False))
    x = torch.randn(2, 64, requires_grad=True)
    cast(torch.Tensor, compiled(model)(x)).sum().backward()
    found, x.grad = x.grad, None
    model(x).sum().backward()

    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_runs_without_modewright(strict: bool) -> None:
    model, x = packed(two_layers()), torch.randn(3, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=strict)

        assert not operators_in(exported.graph)
        with using("portable"):
            torch.testing.assert_close(exported.module()(x), model(x))


def test_casting_and_sharing_memory_keep_it_right() -> None:
    model, x = packed(two_layers()).bfloat16(), torch.randn(3, 64, dtype=torch.bfloat16)
    fast = compiled(model)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        model.share_memory()
        assert torch.equal(fast(x), model(x))


def test_a_language_model_is_compiled_whole() -> None:
    pytest.importorskip("transformers")
    modes: list[Any] = [("quantize", {"scheme": "w8a16"}), "max_calibrate", "compress"]
    model = modewright.apply_mode(llama(), modes).eval()
    ids = windows()[0][:2]
    with torch.no_grad(), using("portable"):
        expected = model(ids).logits
        torch.testing.assert_close(compiled(model)(ids).logits, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchs_own_compiler_takes_it() -> None:
    model, x = packed(two_layers()), torch.randn(2, 64)
    layer = model[0]
    with torch.no_grad():
        fast = torch.compile(lambda x: F.gelu(layer(x)) * 2 + 1, fullgraph=True)
        torch.testing.assert_close(fast(x), F.gelu(layer(x)) * 2 + 1)
