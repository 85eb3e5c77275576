# SPDX-License-Identifier: Apache-2.0
"""Quantizing, calibrating and folding whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ApplyModeError, DataError, IncompatibleModeError
from modewright.quantization.convert import quantizers
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.passes.ranges import NO_DATA
from modewright.quantization.quantizer import Quantizer


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    return layers.to(dtype)


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


def test_static_scales_are_the_largest_magnitude_seen_over_127() -> None:
    plain = modewright.quantize(model(), "w8a16")  # what runs beside quantized activations
    seen: dict[str, float] = {}
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(
                    name, max(seen.get(name, 0.0), inputs[0].abs().max().item())
                )
            )
    with torch.no_grad():
        for batch in batches():
            plain(batch)

    converted = modewright.quantize(model(), "w8a8_static", calibration=batches())

    scales = {
        n.removesuffix(".input_quantizer"): q.scale.item()
        for n, q in quantizers(converted).items()
        if n.endswith("input_quantizer") and q.scale is not None
    }
    assert scales == pytest.approx({name: amax / 127 for name, amax in seen.items()})


def test_the_order_and_the_cut_of_the_data_do_not_matter() -> None:
    whole = modewright.quantize(model(), "w8a8_static", calibration=[torch.cat(batches())])
    parts = modewright.quantize(model(), "w8a8_static", calibration=batches()[::-1])

    for name, tensor in whole.state_dict().items():  # products of other sizes may round otherwise
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-6, atol=0)


def test_weight_scales_are_per_channel_and_per_group() -> None:
    converted = modewright.quantize(
        model(), "w8a16", config={"rules": [{"targets": ["2"], "weights": {"group_size": 4}}]}
    )

    shapes = {n: tuple(t.shape) for n, t in converted.state_dict().items() if "scale" in n}
    assert shapes == {
        "0.weight_quantizer.scale": (10, 1),
        "2.weight_quantizer.scale": (6, 3),
        "4.weight_quantizer.scale": (3, 1),
    }
    first = converted.state_dict()["0.weight_quantizer.scale"]
    assert torch.equal(first.flatten(), model()[0].weight.detach().abs().amax(1) / 127)


def test_an_asymmetric_format_has_a_zero_point() -> None:
    rule = {"targets": ["Linear"], "weights": {"symmetric": False, "num_bits": 4}}
    converted = modewright.quantize(model(), "w8a16", config={"rules": [rule]})

    zero_point = converted.state_dict()["0.weight_quantizer.zero_point"]
    assert zero_point.shape == (10, 1)
    assert torch.equal(zero_point, zero_point.round())
    assert zero_point.min() >= 0
    assert zero_point.max() <= 15


def test_calibrated_and_uncalibrated_weights_give_the_same_outputs() -> None:
    data = batches(1)[0]
    before = modewright.apply_mode(model(), ("quantize", {"scheme": "w4a16"}))
    expected = before(data)

    assert torch.equal(modewright.apply_mode(before, "max_calibrate")(data), expected)


def test_static_activations_without_data_say_what_to_do() -> None:
    with pytest.raises(ApplyModeError, match="mode_kwargs=") as caught:
        modewright.quantize(model(), "w8a8_static")

    assert isinstance(caught.value.cause, DataError)
    assert "0.input_quantizer" in str(caught.value)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.used(data)


def test_a_layer_that_saw_no_data_is_an_error_that_names_it() -> None:
    untouched = Branching()

    with pytest.raises(ApplyModeError, match=r"saw no data: unused\.input_quantizer"):
        modewright.quantize(untouched, "w8a8_static", calibration=batches())

    assert type(untouched.used) is nn.Linear


def test_a_layer_that_saw_no_data_may_stay_dynamic_and_is_listed() -> None:
    converted = modewright.apply_mode(
        Branching(),
        [("quantize", {"scheme": "w8a8_static"}), ("max_calibrate", {"require_data": False})],
        mode_kwargs={"calibration": batches()},
    )

    assert "unused.input_quantizer.scale" not in converted.state_dict()
    skipped = modewright.mode_state(converted)["modes"][-1]["metadata"]["skipped"]
    assert skipped == [{"module": "unused.input_quantizer", "reason": NO_DATA}]
    assert torch.isfinite(converted.unused(batches(1)[0])).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(bad: float) -> None:
    broken = model()
    with torch.no_grad():
        broken[2].weight[0, 0] = bad

    with pytest.raises(ApplyModeError, match=r"weight of '2' cannot be quantized"):
        modewright.quantize(broken, "w8a16")


def test_data_that_is_not_finite_is_an_error_that_names_the_quantizer() -> None:
    data = [torch.full((1, 6), math.nan)]

    with pytest.raises(ApplyModeError, match=r"'0\.input_quantizer' observed"):
        modewright.quantize(model(), "w8a8_static", calibration=data)


def test_folding_gives_the_same_outputs_from_plain_layers() -> None:
    data = batches(1)[0]
    converted = modewright.quantize(model(), "w4a16")
    expected = converted(data)

    folded = modewright.apply_mode(converted, "export_quantize")

    assert torch.equal(folded(data), expected)
    assert [type(m) for m in folded] == [type(m) for m in model()]
    assert list(folded.state_dict()) == list(model().state_dict())
    assert not any(isinstance(m, (QuantizedLayer, Quantizer)) for m in folded.modules())


def test_folding_lists_the_layers_whose_activations_are_plain_again() -> None:
    converted = modewright.quantize(model(), "w8a8")

    modewright.apply_mode(converted, "export_quantize")

    skipped = modewright.mode_state(converted)["modes"][-1]["metadata"]["skipped"]
    assert [entry["module"] for entry in skipped] == ["0", "2", "4"]
    assert "no longer quantized" in skipped[0]["reason"]


def test_a_folded_model_may_be_quantized_again_and_a_quantized_one_may_not() -> None:
    converted = modewright.quantize(model(), "w8a16")

    with pytest.raises(IncompatibleModeError, match="export_quantize"):
        modewright.quantize(converted, "w4a16")

    folded = modewright.apply_mode(converted, "export_quantize")
    assert modewright.last_mode(modewright.quantize(folded, "w4a16")) == "max_calibrate"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(indices))


def test_a_tied_weight_stays_tied_when_it_is_folded() -> None:
    indices = torch.arange(12)
    targets = {"targets": ["Linear", "Embedding"]}
    converted = modewright.quantize(Tied(), "w4a16", config=targets)
    expected = converted(indices)

    folded = modewright.apply_mode(converted, "export_quantize")

    assert folded.head.weight is folded.embedding.weight
    assert torch.equal(folded(indices), expected)


def test_a_tied_head_is_left_alone_when_its_embedding_is() -> None:
    tied = nn.Sequential(Tied(), nn.Linear(12, 2))
    converted = modewright.quantize(tied, "w4a16")

    assert set(modewright.mode_state(converted)["modes"][0]["metadata"]["layers"]) == {"1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_what_they_are(dtype: torch.dtype) -> None:
    converted = modewright.quantize(model(dtype), "w8a8")

    assert converted(batches(1)[0].to(dtype)).dtype == dtype
    assert converted[0].weight.dtype == dtype
    folded = modewright.apply_mode(converted, "export_quantize")
    assert folded[0].weight.dtype == dtype


def test_a_model_can_be_trained_through_its_quantizers() -> None:
    converted = modewright.quantize(model(), "w8a8_static", calibration=batches())
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    data, target = batches(1)[0], torch.zeros(4, 3)

    losses = []
    for _ in range(20):
        loss = (converted(data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]


def test_quantizing_costs_little_at_eight_bits_and_more_at_four() -> None:
    data = torch.cat(batches())
    expected = model()(data)

    def error(scheme: str, **config: Any) -> float:
        converted = modewright.quantize(model(), scheme, calibration=batches(), config=config)
        return ((converted(data) - expected).norm() / expected.norm()).item()

    assert error("w8a16") < error("w8a8") < error("w4a16")
    assert error("w8a8") < 0.02
    assert error("w4a16") < 0.2
    assert error("w8a8_static") < 0.03


def test_calibration_leaves_no_observer_behind_even_after_a_failure() -> None:
    converted = modewright.apply_mode(model(), ("quantize", {"scheme": "w8a8_static"}))

    with pytest.raises(ApplyModeError):
        modewright.apply_mode(
            converted, "max_calibrate", mode_kwargs={"calibration": [torch.ones(1, 99)]}
        )

    assert all(q.observer is None and q.scale is None for q in quantizers(converted).values())


def test_a_quantizer_says_what_it_is() -> None:
    converted = modewright.quantize(model(), "w4a16")

    assert "Quantizer(int4 group 64)" in repr(converted)


def test_a_model_that_is_one_layer_is_quantized_saved_and_restored(tmp_path: Path) -> None:
    data = batches(1)[0]

    def layer() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(6, 4)

    plan = modewright.plan(layer(), ("quantize", {"scheme": "w4a16"}))
    assert "the model itself" in str(plan)

    converted = modewright.quantize(layer(), "w8a8_static", calibration=[data])
    path = modewright.save(converted, tmp_path / "layer.safetensors")
    restored = modewright.restore(layer(), path)

    assert isinstance(restored, QuantizedLayer)
    assert torch.equal(restored(data), converted(data))
    folded = modewright.apply_mode(restored, "export_quantize")
    assert type(folded) is nn.Linear
