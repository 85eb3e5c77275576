# SPDX-License-Identifier: Apache-2.0
"""Layers with a forward of their own run it, on quantized weights and inputs."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import modewright
from modewright.errors import ConfigError
from modewright.quantization.layers import (
    QUANTIZED_CLASSES,
    QuantizedLayer,
    insert_quantizers,
    layer_kind,
    register_layer,
    remove_quantizers,
)
from modewright.quantization.schemes import SCHEMES


class OwnForward(nn.Linear):
    """Multiplies by itself, and reads its weight twice."""

    def forward(self, input: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        return gain * (input @ self.weight.t()) + 0 * self.weight.sum()


class CallsSuper(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class OwnConv(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight)


def seeded(cls: Any, *args: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(cls(*args))


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2


def plain_counterpart(model: nn.Sequential, x: torch.Tensor, scheme: str) -> torch.Tensor:
    """What a plain linear layer with the same weight and no bias computes in that scheme."""
    plain = nn.Sequential(nn.Linear(*reversed(model[0].weight.shape), bias=False))
    plain[0].weight = nn.Parameter(model[0].weight.detach().clone())
    return modewright.quantize(plain, scheme)(x)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "nvfp4"])
def test_a_subclass_with_its_own_forward_computes_with_quantized_tensors(scheme: str) -> None:
    model, x = seeded(OwnForward, 16, 4), inputs(3, 16)
    expected = plain_counterpart(model, x, scheme)
    keys = list(model.state_dict())
    modewright.quantize(model, scheme)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0](input=x, gain=3.0), 3 * expected)
    assert isinstance(model[0], OwnForward)
    assert [k for k in model.state_dict() if "quantizer" not in k] == keys
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is OwnForward


def test_a_forward_that_calls_that_of_its_base_class_is_quantized_once() -> None:
    model, x = seeded(CallsSuper, 8, 4), inputs(3, 8)
    model[0].bias = None
    expected = 2 * plain_counterpart(model, x, "w8a8")
    modewright.quantize(model, "w8a8")
    assert torch.equal(model(x), expected)


def test_a_convolution_with_its_own_forward_is_quantized() -> None:
    model, x = seeded(OwnConv, 3, 4, 3, 1, 0, 1, 1, False), inputs(2, 3, 6, 6)
    plain = copy.deepcopy(model)
    plain[0].__class__ = nn.Conv2d
    modewright.quantize(plain, "w8a8")
    modewright.quantize(model, "w8a8")
    torch.testing.assert_close(model(x), plain(x))


def test_the_weight_is_the_parameter_but_while_the_forward_runs() -> None:
    model = seeded(OwnForward, 8, 4)
    weight = model[0].weight
    modewright.quantize(model, "w4a16")
    assert model[0].weight is weight
    assert dict(model.named_parameters())["0.weight"] is weight
    model(inputs(1, 8))
    assert model[0].weight is weight


def test_an_error_in_the_forward_leaves_the_parameter_readable() -> None:
    model = seeded(OwnForward, 8, 4)
    modewright.quantize(model, "w4a16")
    with pytest.raises(RuntimeError):
        model(inputs(1, 9))
    assert isinstance(model[0].weight, nn.Parameter)


def test_gradients_reach_the_parameter() -> None:
    model = seeded(OwnForward, 8, 4)
    modewright.quantize(model, "w8a8")
    model(inputs(3, 8)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_a_parameter_can_be_replaced_and_loaded() -> None:
    model, x = seeded(OwnForward, 8, 4), inputs(3, 8)
    modewright.apply_mode(model, ("quantize", {"scheme": "w8a16"}))
    model[0].weight = nn.Parameter(torch.zeros(4, 8))
    assert torch.equal(model(x), torch.zeros(3, 4))
    state = {"0.weight": torch.ones(4, 8), "0.bias": torch.zeros(4)}
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(x), x.sum(-1, keepdim=True).expand(3, 4))


def test_copies_and_casts_work() -> None:
    model, x = seeded(OwnForward, 8, 4), inputs(3, 8)
    modewright.quantize(model, "w8a8")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with torch.no_grad():
        copied[0].weight.zero_()
    assert copied(x).abs().sum() == 0
    assert model(x).abs().sum() > 0
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_threads_do_not_see_each_others_forward() -> None:
    model, x = seeded(OwnForward, 8, 4), inputs(3, 8)
    modewright.quantize(model, "w4a16")
    expected, outside = model(x), []

    def own(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: outside.append(self.weight))
        thread.start()
        thread.join()
        return input @ self.weight.t()

    OwnForward.forward, kept = own, OwnForward.forward
    try:
        assert torch.equal(model(x), expected)
    finally:
        OwnForward.forward = kept
    assert isinstance(outside[0], nn.Parameter)


def test_a_forward_patched_onto_an_instance_runs_with_quantized_tensors() -> None:
    model, x = seeded(nn.Linear, 8, 4), inputs(3, 8)
    expected = 3 * plain_counterpart(model, x, "w8a8")
    patch = types.MethodType(lambda self, x: 3 * x @ self.weight.t(), model[0])
    model[0].forward = patch
    modewright.quantize(model, "w8a8")
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is nn.Linear
    assert model[0].forward is patch


@pytest.mark.parametrize("cls", [nn.Linear, OwnForward])
def test_a_quantized_layer_can_be_pruned(cls: Any) -> None:
    model, x = seeded(cls, 8, 4), inputs(3, 8)
    modewright.quantize(model, "w8a16")
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    pruned = model(x)
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() == 16
    assert torch.equal(model(x), pruned)


# --- hooks of accelerate -------------------------------------------------------------------------


def hooked(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu", io_same_device=True))
    return model


@pytest.mark.parametrize("cls", [nn.Linear, OwnForward])
def test_a_layer_with_a_hook_of_accelerate_computes_what_one_without_does(cls: Any) -> None:
    model, x = seeded(cls, 8, 4), inputs(3, 8)
    expected = modewright.quantize(seeded(cls, 8, 4), "w8a8")(x)
    modewright.quantize(hooked(model), "w8a8")
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is cls
    assert model[0]._old_forward.__func__ is cls.forward
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("hook_first", [True, False])
def test_a_hook_may_come_and_go_while_the_layer_is_quantized(hook_first: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = seeded(nn.Linear, 8, 4), inputs(3, 8)
    if hook_first:
        modewright.quantize(hooked(model), "w8a8")
        expected = model(x)
        hooks.remove_hook_from_module(model[0])
    else:
        modewright.quantize(model, "w8a8")
        expected = model(x)
        hooked(model)
    assert torch.equal(model(x), expected)
    modewright.apply_mode(model, "export_quantize")
    assert type(model[0]) is nn.Linear
    assert torch.isfinite(model(x)).all()


def test_a_layer_whose_weight_is_offloaded_is_skipped_with_the_reason() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    accelerate.cpu_offload(model[0], torch.device("cpu"))
    modewright.quantize(model, "w8a16")
    skipped = modewright.mode_state(model)["modes"][0]["metadata"]["skipped"]
    assert [entry["module"] for entry in skipped] == ["0"]
    assert "accelerate" in skipped[0]["reason"]


# --- layers whose own forward is run -------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
        {"bias": False},
    ],
    ids=["one layer", "bidirectional", "without bias"],
)
def test_recurrent_layers_compute_with_every_weight_rounded(
    kind: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = kind(6, 5, **options).eval()
    x = inputs(4, 3, 6)
    expected = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    names = [name for name, _ in expected.named_parameters() if "weight" in name]
    assert list(model.quantized_parameters()) == names
    for name in names:
        setattr(expected, name, nn.Parameter(model.quantized_parameter(name).detach()))
        assert not torch.equal(getattr(model, name), getattr(expected, name))
    assert torch.equal(model(x)[0], expected(x)[0])
    folded = modewright.apply_mode(model, "export_quantize")
    assert type(folded) is kind
    assert torch.equal(folded(x)[0], expected(x)[0])


def test_the_projection_of_an_lstm_is_rounded_too() -> None:
    model = nn.LSTM(6, 5, proj_size=3)
    modewright.quantize(model, "w8a16")
    assert "weight_hr_l0" in model.quantized_parameters()


def test_the_sequence_that_enters_a_recurrent_layer_is_rounded_packed_or_not() -> None:
    torch.manual_seed(0)
    model, x = nn.GRU(6, 5).eval(), inputs(4, 1, 6)
    modewright.quantize(model, "w8a8")
    packed, _ = model(pack_sequence([x[:, 0]]))
    assert isinstance(packed, PackedSequence)
    torch.testing.assert_close(packed.data, model(x)[0][:, 0])
    model.input_quantizer.enabled = False
    assert not torch.equal(packed.data, model(x)[0][:, 0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_copy_and_move_while_they_are_quantized(kind: Any) -> None:
    model, x = kind(6, 5), inputs(4, 3, 6)
    modewright.quantize(model, "w8a8")
    model(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(copy.deepcopy(model)(x)[0], model(x)[0])
    assert model.double()(x.double())[0].dtype == torch.float64
    assert all(isinstance(weight, nn.Parameter) for weight in model._flat_weights)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_compute_with_both_weights_rounded(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind(6, 5), inputs(3, 6)
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    for name in ("weight_ih", "weight_hh"):
        setattr(plain, name, nn.Parameter(model.quantized_parameter(name).detach()))
    first = [out if isinstance(out, torch.Tensor) else out[0] for out in (model(x), plain(x))]
    assert torch.equal(*first)


def test_a_bilinear_layer_is_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Bilinear(4, 5, 3)
    a, b = inputs(2, 4), inputs(2, 5)
    plain = copy.deepcopy(model)
    modewright.quantize(model, "w8a16")
    plain.weight = nn.Parameter(model.quantized_weight().detach())
    assert torch.equal(model(a, b), plain(a, b))


@pytest.mark.parametrize("own_forward", [False, True])
def test_bags_of_embeddings_are_quantized_where_they_are_named(own_forward: bool) -> None:
    class Bag(nn.EmbeddingBag):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.embedding_bag(input, self.weight, mode="sum")

    torch.manual_seed(0)
    model = nn.Sequential(Bag(6, 4) if own_forward else nn.EmbeddingBag(6, 4, mode="sum"))
    modewright.quantize(model, "w8a8", config={"targets": ["EmbeddingBag"]})
    ids = torch.tensor([[0, 2], [5, 1]])
    torch.testing.assert_close(model(ids), model[0].quantized_weight()[ids].sum(1))


# --- layers of third parties ---------------------------------------------------------------------


class Scaled(nn.Module):
    """A layer of somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return F.linear(x, self.table), 1


def test_a_registered_layer_is_quantized_calibrated_restored_and_folded() -> None:
    class QuantizedScaled(QuantizedLayer):
        @classmethod
        def parameter_names(cls, module: nn.Module) -> tuple[str, ...]:
            return ("table",)

    assert layer_kind(Scaled()) is None
    register_layer(Scaled)(QuantizedScaled)
    try:
        torch.manual_seed(0)
        model, x = Scaled(), inputs(3, 8)
        plain = copy.deepcopy(model)
        modewright.quantize(model, "w8a8_static", calibration=[x])
        assert set(model.state_dict()) == {
            "table", "table_quantizer.scale", "input_quantizer.scale",
        }  # fmt: skip
        rounded = F.linear(model.input_quantizer(x), model.quantized_parameter("table"))
        assert torch.equal(model(x)[0], rounded)
        assert model(x)[1] == 1
        restored = modewright.restore_from_mode_state(plain, modewright.mode_state(model))
        assert set(restored.state_dict()) == set(model.state_dict())
        assert type(modewright.apply_mode(model, "export_quantize")) is Scaled
    finally:
        del QUANTIZED_CLASSES[Scaled]


def test_what_is_no_layer_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match="subclass of QuantizedLayer"):
        register_layer(Scaled)(Scaled)  # type: ignore[type-var]


def test_inserting_and_removing_leaves_nothing_behind() -> None:
    for module in (nn.Linear(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)):
        cls, attributes = type(module), set(vars(module))
        remove_quantizers(insert_quantizers(module, SCHEMES["w8a8"]))
        assert type(module) is cls
        assert set(vars(module)) == attributes
        assert not any("quantizer" in name for name, _ in module.named_modules())
