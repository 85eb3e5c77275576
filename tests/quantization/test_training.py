# SPDX-License-Identifier: Apache-2.0
"""A quantized model is still a module: it is copied, cast, moved and trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import modewright
from modewright.quantization.convert import quantizers
from modewright.quantization.quantizer import Quantizer

X = torch.linspace(-2, 3, 24).reshape(4, 6)
SCHEMES = ["w8a8", "w8a8_static", "w4a16"]


def quantized(scheme: str, **config: object) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    modewright.quantize(model, scheme, calibration=[X], config=config)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_copy_computes_the_same_and_shares_nothing(scheme: str) -> None:
    model = quantized(scheme)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert type(twin[0]) is type(model[0])
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.data_ptr() for t in twin.state_dict().values()}
    assert modewright.mode_state(twin) == modewright.mode_state(model)
    modewright.apply_mode(twin, "export_quantize")
    assert isinstance(model[0].weight_quantizer, Quantizer)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_stay_float32_when_the_model_is_cast(scheme: str, dtype: torch.dtype) -> None:
    model = quantized(scheme, rules=[{"targets": ["2"], "weights": {"symmetric": False}}])
    before = {name: t for name, t in model.state_dict().items() if "quantizer" in name}
    assert any("zero_point" in name for name in before)
    model.to(dtype)
    after = model.state_dict()
    assert model[0].weight.dtype is dtype
    for name, tensor in before.items():
        assert after[name].dtype is torch.float32
        assert torch.equal(after[name], tensor)
    assert model(X.to(dtype)).dtype is dtype


def test_scales_go_to_the_device_of_the_model() -> None:
    model = quantized("w8a8_static").to(device="meta", dtype=torch.bfloat16)
    scales = [q.scale for q in quantizers(model).values()]
    assert [(s.device.type, s.dtype) for s in scales] == [("meta", torch.float32)] * 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_training_step_moves_every_parameter_and_lowers_the_loss(scheme: str) -> None:
    model = quantized(scheme).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    target, losses = torch.ones(4, 2), []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    assert losses[-1] < losses[0] / 2


def test_the_gradient_of_the_weight_is_that_of_the_rounded_weight() -> None:
    model = quantized("w8a16", ignore=["2"])
    plain = nn.Linear(6, 8)
    plain.load_state_dict({"weight": model[0].quantized_weight(), "bias": model[0].bias})
    model[0](X).square().sum().backward()
    plain(X).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, plain.weight.grad)


def test_gradients_reach_the_inputs() -> None:
    model, x = quantized("w8a8"), X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.ne(0).all()


def test_scales_are_no_parameters() -> None:
    model = quantized("w8a8_static")
    assert {name for name, _ in model.named_parameters()} == {
        "0.weight", "0.bias", "2.weight", "2.bias",
    }  # fmt: skip


def test_a_quantizer_describes_itself() -> None:
    model = quantized("w4a16")
    assert repr(model[0].weight_quantizer) == "Quantizer(int4 group 64)"
