# SPDX-License-Identifier: Apache-2.0
"""Where scales come from: weights, calibration data, or each tensor; and folding them in."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.errors import ApplyModeError, DataError, MatchError
from modewright.quantization.quantizer import Quantizer

STATIC = [("quantize", {"scheme": "w8a8_static"})]


class Branches(nn.Module):
    """One branch is taken only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 4)
        self.seldom = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, both: bool = False) -> torch.Tensor:
        x = F.relu(self.always(x))
        return self.seldom(x) if both else x


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches()


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) * (i + 1) for i in range(count)]


def both(data: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"x": x, "both": True} for x in data]


def metadata(model: nn.Module, index: int = -1) -> dict[str, Any]:
    found: dict[str, Any] = modewright.mode_state(model)["modes"][index]["metadata"]
    return found


def calibrate(model: nn.Module, data: object, **config: Any) -> nn.Module:
    return modewright.apply_mode(
        model, [("max_calibrate", config)], mode_kwargs={"calibration": data}
    )


def test_static_scales_are_the_largest_magnitude_seen_over_127() -> None:
    model, seen = branches(), {}
    modewright.apply_mode(model, STATIC)
    calibrate(model, both(batches()))

    plain = branches()
    with torch.no_grad():
        for layer in (plain.always, plain.seldom):
            amax = layer.weight.abs().amax(1, keepdim=True)
            layer.weight.copy_((layer.weight / (amax / 127)).round() * (amax / 127))
    for name, layer in plain.named_children():
        layer.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].abs().max())
        )
    with torch.no_grad():
        for batch in both(batches()):
            plain(**batch)
    for name in ("always", "seldom"):
        scale = model.get_submodule(name).input_quantizer.scale
        assert scale.shape == (1, 1)
        assert torch.equal(scale.squeeze(), max(seen[name]) / 127)


def test_an_unsigned_static_scale_covers_what_was_seen() -> None:
    model, data = branches(), batches()
    rules = [{"targets": ["always"], "input_activations": {"symmetric": False}}]
    modewright.apply_mode(model, [("quantize", {"scheme": "w8a8_static", "rules": rules})])
    calibrate(model, both(data))
    low, high = torch.cat(data).min(), torch.cat(data).max()
    quantizer = model.always.input_quantizer
    torch.testing.assert_close(quantizer.scale.squeeze(), (high - low) / 255)
    assert quantizer.zero_point.squeeze() == (-low / ((high - low) / 255)).round()


def test_a_static_scale_does_not_follow_the_tensor() -> None:
    model = branches()
    modewright.apply_mode(model, STATIC)
    calibrate(model, both(batches()))
    largest = model.always.input_quantizer.scale * 127
    far = torch.full((1, 4), 1e6)
    assert torch.equal(model.always.input_quantizer(far), largest.expand(1, 4))


def test_a_dynamic_scale_does() -> None:
    model = branches()
    modewright.quantize(model, "w8a8")
    quantizer = model.always.input_quantizer
    tokens = torch.tensor([[127.0, 0.4, -3.0, 0.0], [1.27, 0.011, 0.0, -0.5]])
    assert quantizer.scale is None
    torch.testing.assert_close(
        quantizer(tokens), torch.tensor([[127.0, 0.0, -3.0, 0.0], [1.27, 0.01, 0.0, -0.5]])
    )


def test_weights_have_scales_by_channel_and_group() -> None:
    model = nn.Sequential(nn.Linear(130, 3), nn.ConvTranspose2d(3, 5, 2))
    config = {"scheme": "w4a16", "rules": [{"targets": ["1"], "scheme": "w8a16"}]}
    modewright.apply_mode(model, [("quantize", config), "max_calibrate"])
    assert metadata(model)["scales"] == {
        "0.weight_quantizer": {"scale": [3, 3]},
        "1.weight_quantizer": {"scale": [5, 1]},
    }
    kernel = model[1].weight.abs().amax(dim=(0, 2, 3)) / 127
    assert torch.equal(model[1].weight_quantizer.scale.squeeze(), kernel)


@pytest.mark.parametrize(
    ("scheme", "shapes"),
    [
        ("w4a16_asym", {"scale": [3, 3], "zero_point": [3, 3]}),
        ("fp8_w8a16", {"scale": [3, 1]}),
        ("fp8_block", {"scale": [1, 2]}),
        ("mxfp4_w4a16", {"scale": [3, 5]}),
        ("nvfp4_w4a16", {"scale": [3, 9], "global_scale": []}),
    ],
)
def test_the_record_says_what_scales_there_are(scheme: str, shapes: dict[str, list[int]]) -> None:
    model = nn.Sequential(nn.Linear(130, 3))
    modewright.quantize(model, scheme)
    quantizer = model[0].weight_quantizer
    assert metadata(model)["scales"] == {"0.weight_quantizer": shapes}
    assert {name: list(buffer.shape) for name, buffer in quantizer.named_buffers()} == shapes


def test_two_level_scales_are_fp8_numbers_times_the_scale_of_the_tensor() -> None:
    model = nn.Sequential(nn.Linear(130, 3))
    by_max = {"targets": ["0"], "weights": {"scale_rule": "max"}}
    modewright.quantize(model, "nvfp4_w4a16", config={"rules": [by_max]})
    quantizer = model[0].weight_quantizer
    weight = model[0].weight.detach()
    assert quantizer.global_scale == weight.abs().max() / (6 * 448)
    assert torch.equal(quantizer.scale.to(torch.float8_e4m3fn).float(), quantizer.scale)
    first = weight[:, :16].abs().amax(dim=1) / 6 / quantizer.global_scale
    assert torch.equal(quantizer.scale[:, 0], first.to(torch.float8_e4m3fn).float())
    assert quantizer.scale.max() == 448


def test_four_over_six_leaves_room_for_a_scale_half_as_large_again() -> None:
    model = nn.Sequential(nn.Linear(130, 3))
    modewright.quantize(model, "nvfp4_w4a16")
    quantizer = model[0].weight_quantizer
    weight = model[0].weight.detach()
    assert quantizer.global_scale == weight.abs().max() / (6 * 256)
    amax = weight[:, :16].abs().amax(dim=1) / quantizer.global_scale
    choices = torch.stack([(amax / top).to(torch.float8_e4m3fn).float() for top in (6, 4)])
    assert (quantizer.scale[:, 0] == choices).any(dim=0).all()


def test_missing_data_is_an_error_that_names_a_quantizer_and_a_way_out() -> None:
    model = branches()
    modewright.apply_mode(model, STATIC)
    with pytest.raises(ApplyModeError) as caught:
        modewright.apply_mode(model, "max_calibrate")
    assert isinstance(caught.value.cause, DataError)
    for word in ("2 activation quantizers", "'always.input_quantizer'", "calibration", "'w8a8'"):
        assert word in str(caught.value)
    assert model.always.weight_quantizer.scale is None
    assert modewright.last_mode(model) == "quantize"


def test_data_that_misses_a_layer_is_an_error_that_names_it() -> None:
    model = branches()
    modewright.apply_mode(model, STATIC)
    with pytest.raises(ApplyModeError, match=r"1 static quantizers saw no data") as caught:
        calibrate(model, batches())
    for word in ("seldom.input_quantizer", "`ignore`", "require_data=False"):
        assert word in str(caught.value)
    assert "always" not in str(caught.value)
    assert model.always.input_quantizer.observer is None


def test_a_quantizer_without_data_stays_dynamic_where_that_is_allowed() -> None:
    model = branches()
    modewright.apply_mode(model, STATIC)
    calibrate(model, batches(), require_data=False)
    assert model.seldom.input_quantizer.scale is None
    assert [entry["module"] for entry in metadata(model)["skipped"]] == ["seldom.input_quantizer"]
    assert "no calibration data" in metadata(model)["skipped"][0]["reason"]
    assert model(torch.ones(1, 4), both=True).isfinite().all()


def test_calibrating_without_static_activations_needs_no_data() -> None:
    model = branches()
    modewright.quantize(model, "w8a16")
    assert set(metadata(model)["scales"]) == {"always.weight_quantizer", "seldom.weight_quantizer"}


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_layer(
    bad: float, scheme: str
) -> None:
    model = branches()
    with torch.no_grad():
        model.seldom.weight[1, 2] = bad
    with pytest.raises(ApplyModeError, match=r"weight of 'seldom'.*NaN or infinite") as caught:
        modewright.quantize(model, scheme)
    assert isinstance(caught.value.cause, DataError)
    assert not modewright.is_converted(model)


def test_the_largest_finite_weights_have_scales() -> None:
    model = branches()
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        model.seldom.weight[1, :2] = torch.tensor([largest, -largest])
    rules = [{"targets": ["seldom"], "weights": {"symmetric": False}}]
    modewright.quantize(model, "w8a16", config={"rules": rules})
    assert model.seldom.weight_quantizer.scale.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
def test_data_that_is_not_finite_is_an_error_that_names_the_quantizer(bad: float) -> None:
    model, data = branches(), batches()
    data[1][0, 0] = bad
    with pytest.raises(ApplyModeError, match=re.escape("'always.input_quantizer' observed")):
        modewright.quantize(model, "w8a8_static", calibration=both(data))
    assert not modewright.is_converted(model)


def test_progress_of_calibration_is_told() -> None:
    model, seen = branches(), []
    modewright.apply_mode(
        model,
        [*STATIC, "max_calibrate"],
        mode_kwargs=[
            {},
            {"calibration": both(batches()), "on_batch": lambda *at: seen.append(at)},
        ],
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_calibrating_again_takes_the_new_data() -> None:
    model = branches()
    modewright.quantize(model, "w8a8_static", calibration=both(batches()))
    before = model.always.input_quantizer.scale.clone()
    calibrate(model, both([10 * x for x in batches()]))
    torch.testing.assert_close(model.always.input_quantizer.scale, 10 * before)


def test_a_function_can_run_the_model() -> None:
    model, data = branches(), both(batches())
    by_batches = modewright.quantize(branches(), "w8a8_static", calibration=data)

    def run(network: nn.Module) -> None:
        for batch in data:
            network(**batch)

    modewright.quantize(model, "w8a8_static", calibration=run)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, by_batches.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_have_float32_scales_and_stay_half(dtype: torch.dtype) -> None:
    model = branches().to(dtype)
    data = both([x.to(dtype) for x in batches()])
    modewright.quantize(model, "w8a8_static", calibration=data)
    for quantizer in (model.always.weight_quantizer, model.always.input_quantizer):
        assert quantizer.scale.dtype is torch.float32
    weight = model.always.weight
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    expected = ((weight.float() / scale).round() * scale).to(dtype)
    assert torch.equal(model.always.quantized_weight(), expected)
    assert model(**data[0]).dtype is dtype


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "not calibrated"])
def test_the_folded_model_computes_what_the_quantized_one_did(
    scheme: str, calibrated: bool
) -> None:
    model, batch = branches(), both(batches())[0]
    modes = [("quantize", {"scheme": scheme})] + ["max_calibrate"] * calibrated
    modewright.apply_mode(model, modes)
    before = model(**batch)
    modewright.apply_mode(model, "export_quantize")
    assert torch.equal(model(**batch), before)
    assert not any(isinstance(module, Quantizer) for module in model.modules())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5)),
        (lambda: nn.Linear(70, 5), (2, 70)),
    ],
    ids=["conv", "transposed conv", "ragged groups"],
)
def test_a_folded_weight_is_laid_out_like_any_other(make: Any, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(make()), torch.ones(shape)
    modewright.quantize(model, "w4a16")
    before = model(x)
    modewright.apply_mode(model, "export_quantize")
    weight = model[0].weight
    assert weight.is_contiguous()
    assert weight.untyped_storage().nbytes() == weight.numel() * 4
    assert torch.equal(model(x), before)


def test_folding_reports_the_layers_whose_activations_are_plain_again() -> None:
    model = branches()
    rules = [{"targets": ["seldom"], "scheme": "w8a16"}]
    modewright.quantize(model, "w8a8", config={"rules": rules})
    modewright.apply_mode(model, "export_quantize")
    assert metadata(model)["layers"] == ["always", "seldom"]
    assert [entry["module"] for entry in metadata(model)["skipped"]] == ["always"]


def test_folding_keeps_whether_a_weight_trains() -> None:
    model = branches()
    model.always.weight.requires_grad_(False)
    modewright.quantize(model, "w8a16")
    modewright.apply_mode(model, "export_quantize")
    assert not model.always.weight.requires_grad
    assert model.seldom.weight.requires_grad


def test_the_verb_applies_two_modes_and_takes_a_config() -> None:
    model = branches()
    returned = modewright.quantize(model, "w4a16", config={"ignore": ["seldom"]})
    assert returned is model
    recorded = modewright.mode_state(model)["modes"]
    assert [mode["name"] for mode in recorded] == ["quantize", "max_calibrate"]
    assert list(recorded[0]["metadata"]["layers"]) == ["always"]


def test_the_verb_says_which_pattern_matched_nothing() -> None:
    with pytest.raises(MatchError, match="'seldom'"):
        modewright.quantize(branches(), "w8a8", config={"ignore": ["sledom"]})
