# SPDX-License-Identifier: Apache-2.0
"""Packed layers as modules: what reading them gives, what they unpack, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ConfigError
from modewright.runtime.backends import using
from modewright.runtime.layers import LayerRecord, PackedExperts, PackedLayer, PackedParameter
from modewright.runtime.packed_spec import PackedSpec
from modewright.runtime.packed_weight import PackedWeight
from support.models import FusedExperts


def packed(layer: nn.Module, scheme: str = "w4a16_asym", **config: Any) -> Any:
    model = nn.Sequential(layer)
    config = {"scheme": scheme, "targets": [type(layer).__name__], **config}
    modes = [("quantize", config), ("compress", {"scale_dtype": "float32"})]
    return modewright.apply_mode(model, modes)[0]


def experts(transposed: bool) -> Any:
    torch.manual_seed(0)
    return packed(FusedExperts(4, 8, 6, transposed))


def test_reading_a_weight_gives_what_it_stands_for() -> None:
    torch.manual_seed(0)
    layer = packed(nn.Linear(8, 4))

    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (4, 8)
    assert torch.equal(layer.weight, layer.packed_weight().dequantize())
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert "uint4 group 64" in repr(layer)
    assert "weight" not in dict(layer.named_parameters())


def test_a_packed_weight_is_one_object_while_its_tensors_are() -> None:
    layer = packed(nn.Linear(8, 4))
    weight = layer.packed_weight()

    assert layer.packed_weight() is weight
    layer.load_state_dict({n: t.clone() for n, t in layer.state_dict().items()}, assign=True)
    assert layer.packed_weight() is not weight
    assert layer.packed_weight().packed is layer.weight_packed


def test_tensors_that_do_not_fit_are_an_error_when_it_runs() -> None:
    layer = packed(nn.Linear(8, 4))
    layer.weight_packed = torch.zeros(4, 3, dtype=torch.uint8)

    with pytest.raises(ConfigError, match="packed of a packed weight"):
        layer(torch.ones(1, 8))


def test_another_weight_is_refused() -> None:
    layer = packed(nn.Linear(8, 4))

    with pytest.raises(ConfigError, match="decompress"):
        layer.weight = nn.Parameter(torch.ones(4, 8))
    layer.bias = nn.Parameter(torch.ones(4))


def test_gradients_flow_to_the_input() -> None:
    layer = packed(nn.Linear(8, 4))
    x = torch.ones(2, 8, requires_grad=True)
    layer(x).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 8))


def test_an_embedding_unpacks_only_rows_that_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = packed(nn.Embedding(50, 8, padding_idx=0))
    expected = layer.weight[torch.tensor([[3, 7], [3, 0]])]
    monkeypatch.setattr(PackedWeight, "dequantize", None)

    assert torch.equal(layer(torch.tensor([[3, 7], [3, 0]])), expected)


def test_an_embedding_that_limits_norms_still_does() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(5, 8, max_norm=0.5)
    layer = packed(plain)

    assert bool((layer(torch.arange(5)).norm(dim=-1) <= 0.5 + 1e-5).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_unpacked_one_at_a_time(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = experts(transposed)
    whole = {name: layer.quantized_parameter(name) for name in layer.record.parameters}
    seen: list[int] = []
    one = PackedExperts.expert

    def expert(self: PackedExperts, name: str, number: int) -> torch.Tensor:
        seen.append(number)
        return one(self, name, number)

    monkeypatch.setattr(PackedExperts, "expert", expert)
    monkeypatch.setattr(PackedExperts, "quantized_parameter", None)
    for name, value in whole.items():
        lazy = getattr(layer, name)
        assert lazy.shape == value.shape
        assert lazy.dtype == value.dtype
        assert lazy.device == value.device
        assert len(lazy) == 4
        for number in (0, 3, -1):
            assert torch.equal(lazy[number], value[number])
        assert torch.equal(lazy[torch.tensor(2)], value[2])
    assert seen == [0, 3, -1, 2] * 2


def test_experts_are_unpacked_together_for_everything_else() -> None:
    layer = experts(False)
    whole, lazy = layer.quantized_parameter("down_proj"), layer.down_proj
    x = torch.ones(4, 1, 6)

    assert torch.equal(lazy[1:3], whole[1:3])
    assert torch.equal(lazy[[0, 2]], whole[[0, 2]])
    assert torch.equal(torch.bmm(x, lazy.transpose(1, 2)), torch.bmm(x, whole.transpose(1, 2)))
    assert torch.equal(lazy * 2, whole * 2)
    assert type(lazy + 0) is torch.Tensor
    assert torch.equal(torch.stack([lazy, lazy]), torch.stack([whole, whole]))
    assert float(lazy.sum()) == float(whole.sum())


def test_recurrent_layers_keep_no_unpacked_weights() -> None:
    torch.manual_seed(0)
    layer = packed(nn.LSTM(6, 5, batch_first=True))
    x = torch.ones(2, 3, 6)
    with using("portable"):
        first, _ = layer(x)
    for changed in (layer, layer.double().float()):
        kept = zip(changed._flat_weights_names, changed._flat_weights, strict=True)
        assert all((weight is None) == name.startswith("weight") for name, weight in kept)
    assert torch.equal(layer(x)[0], first)


RECORD = LayerRecord({"weight": PackedParameter(PackedSpec("int4", (6, 4)), (6, 2, 2), (0, 1, 2))})


def test_a_record_is_json() -> None:
    assert LayerRecord.from_dict(RECORD.as_dict()) == RECORD


@pytest.mark.parametrize(
    ("shape", "order", "row_axes"),
    [
        ((6, 5), (0, 1), 1),
        ((6, 4), (0, 0), 1),
        ((6, 4), (0, 1), 0),
        ((6, 4), (0, 1), 3),
        ((6, -4), (0, 1), 1),
        ((6, 4), (0, 1, 2), 1),
    ],
)
def test_a_parameter_that_is_no_such_matrix_is_refused(
    shape: tuple[int, ...], order: tuple[int, ...], row_axes: int
) -> None:
    with pytest.raises(ConfigError, match="is no matrix"):
        PackedParameter(PackedSpec("int4", (6, 4)), shape, order, row_axes)


@pytest.mark.parametrize(
    ("shape", "order", "row_axes"),
    [
        ((6, 4), (0, 1), 1),
        ((4, 6), (1, 0), 1),
        ((2, 3, 4), (0, 1, 2), 2),
        ((2, 4, 3), (0, 2, 1), 2),
    ],
)
def test_a_parameter_and_its_matrix_hold_the_same(
    shape: tuple[int, ...], order: tuple[int, ...], row_axes: int
) -> None:
    parameter = PackedParameter(PackedSpec("int4", (6, 4)), shape, order, row_axes)
    tensor = torch.arange(24.0).reshape(shape)

    assert parameter.to_matrix(tensor).shape == (6, 4)
    assert torch.equal(parameter.from_matrix(parameter.to_matrix(tensor)), tensor)


def test_layers_that_were_quantized_otherwise_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    modes = [("quantize", {"scheme": "w8a16", "targets": ["0"]}), "compress"]
    model = modewright.apply_mode(model, modes)

    assert isinstance(model[0], PackedLayer)
    assert type(model[1]) is nn.Linear
