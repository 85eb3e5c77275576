# SPDX-License-Identifier: Apache-2.0
"""Fused layers: what is fused, that it computes the same, and that it can be taken back."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import CheckpointError
from modewright.runtime.backends import using
from modewright.runtime.layers.fused import fuse, fuse_as_recorded, unfuse
from modewright.runtime.layers.fused.base import FusedLayer
from modewright.runtime.native.between import Between, between
from support.library_recipes import llama, windows

needs_library = pytest.mark.skipif(between() is None, reason="no kernel library")


def outputs(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(windows()[0], **kwargs).logits
    return logits


def past_name(model: Any) -> str:
    """Return the name of the argument for a cache, which newer versions call ``cache``."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class Calls:
    """Counts the calls of kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for name in ("rms_norm", "silu_gate_", "attend"):
            own = getattr(Between, name)
            monkeypatch.setattr(Between, name, self._counting(name, own))

    def _counting(self, name: str, own: Any) -> Any:
        def call(*args: Any) -> Any:
            self.seen.append(name)
            return own(*args)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@needs_library
def test_a_fused_model_computes_the_same_by_kernels(calls: Calls) -> None:
    model = llama()
    expected = outputs(model)
    kinds = fuse(model)
    found = outputs(model)

    assert sorted(set(kinds.values())) == ["attention", "block", "rms_norm", "silu_gate"]
    assert len(kinds) == 4 * 5 + 1
    assert calls.seen.count("rms_norm") == 9
    assert calls.seen.count("silu_gate_") == 4
    attends = between() is not None and between().attends  # type: ignore[union-attr]
    assert calls.seen.count("attend") == (4 if attends else 0)
    assert torch.allclose(found, expected, atol=1e-5)


@needs_library
def test_a_model_in_bfloat16_is_fused_and_closer_to_exact(calls: Calls) -> None:
    exact, plain, model = outputs(llama()), llama().bfloat16(), llama().bfloat16()
    kinds = fuse(model)
    found, before = outputs(model), outputs(plain)

    assert kinds == fuse(llama())
    assert calls.seen.count("rms_norm") == 9
    assert calls.seen.count("silu_gate_") == 4
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= (before.float() - exact).norm()


def test_what_was_fused_can_be_taken_back() -> None:
    model = llama()
    before = [type(module) for module in model.modules()]
    expected = outputs(model)
    fuse(model)
    unfuse(model)

    assert [type(module) for module in model.modules()] == before
    assert torch.equal(outputs(model), expected)


def test_the_config_stays_as_it_is() -> None:
    model: Any = llama()
    before = model.config.to_dict()
    fuse(model)
    layer = model.model.layers[0].self_attn

    assert layer.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == before
    layer.config = copy.deepcopy(model.config)
    assert layer.config.hidden_size == model.config.hidden_size


@needs_library
@pytest.mark.parametrize("case", ["gradient", "portable", "float16", "switched off"])
def test_where_the_kernels_do_not_serve_layers_run_their_own_forward(
    case: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = llama(), llama()
    fuse(model)
    if case == "float16":
        model, plain = model.half(), plain.half()
    if case == "switched off":
        monkeypatch.setenv("MODEWRIGHT_NATIVE", "0")
    ids = windows()[0]
    if case == "gradient":
        found, expected = (m(ids).logits for m in (model, plain))
        found.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    else:
        with using(*(["portable"] if case == "portable" else ["native", "portable"])):
            found, expected = outputs(model), outputs(plain)

    assert torch.equal(found, expected)
    assert calls.seen == []


@needs_library
@pytest.mark.parametrize("case", ["padding", "a past", "eager", "not causal"])
def test_attention_that_is_more_than_causal_is_left_to_transformers(
    case: str, calls: Calls
) -> None:
    model, plain = llama(), llama()
    fuse(model)
    found = []
    for each in (model, plain):
        own: Any = each
        ids = windows()[0]
        if case == "padding":
            mask = torch.ones_like(ids)
            mask[:, :5] = 0
            found.append(outputs(own, attention_mask=mask)[:, 5:])
        elif case == "a past":
            with torch.no_grad():
                past = {past_name(own): own(ids[:, :8], use_cache=True).past_key_values}
                found.append(own(ids[:, 8:], **past).logits)
        elif case == "eager":
            own.set_attn_implementation("eager")
            found.append(outputs(own))
        else:
            for layer in own.model.layers:
                layer.self_attn.is_causal = False
            found.append(outputs(own))

    assert "attend" not in calls.seen
    assert torch.allclose(found[0], found[1], atol=1e-5)


@needs_library
def test_generation_is_the_same() -> None:
    model, plain = llama(), llama()
    fuse(model)
    prompt = windows()[0][:, :20]
    found = [
        own.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        for own in (model, plain)
    ]

    assert torch.equal(*found)


def test_a_hook_on_the_gate_sees_what_the_gate_puts_out() -> None:
    model: Any = llama()
    fuse(model)
    mlp = model.model.layers[0].mlp
    kept = []
    mlp.gate_proj.register_forward_hook(lambda m, i, o: kept.append((i[0].clone(), o)))
    outputs(model)

    seen, output = kept[0]
    assert torch.equal(output, nn.functional.linear(seen, mlp.gate_proj.weight))


class ShiftedRMSNorm(nn.Module):
    """As some models have it: the weight is what is added to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_layers_that_only_look_alike_are_left_alone() -> None:
    patched = nn.RMSNorm(8, eps=1e-6)
    patched.forward = lambda x: x * 2  # type: ignore[method-assign]
    model = nn.Sequential(ShiftedRMSNorm(), nn.RMSNorm(8), nn.RMSNorm((2, 8), eps=1e-6), patched)

    for own in (model, model.bfloat16()):
        assert fuse(own) == {}
    assert fuse(nn.Sequential(nn.RMSNorm(8, eps=1e-6))) == {"0": "rms_norm"}
    assert fuse(nn.Sequential(nn.RMSNorm(8, eps=1e-6)).bfloat16()) == {"0": "rms_norm"}


def test_only_blocks_with_the_layers_that_are_named_are_fused() -> None:
    kinds = fuse(llama(), ["model.layers.2.mlp.up_proj", "lm_head"])

    assert len(kinds) == 5
    assert all(f"{path}.".startswith("model.layers.2.") for path in kinds)


def test_weights_get_their_gradients_where_the_input_needs_none() -> None:
    model, plain = llama(), llama()
    fuse(model)
    for own in (model, plain):
        for name, parameter in own.named_parameters():
            parameter.requires_grad_("norm" in name or "gate_proj" in name)
        own(windows()[0]).logits.square().sum().backward()

    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-3, atol=1e-4)


def test_autocast_is_followed() -> None:
    model, plain = llama(), llama()
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = outputs(model), outputs(plain)

    assert found.dtype == expected.dtype
    assert (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@needs_library
def test_a_norm_of_torch_is_the_same(calls: Calls) -> None:
    norm = nn.RMSNorm(24, eps=1e-5)
    x = torch.randn(2, 5, 24).transpose(0, 1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        expected = norm(x)
        fuse(norm)

        assert torch.allclose(norm(x), expected, atol=1e-6)
    assert calls.seen == ["rms_norm"]


def test_an_input_of_another_width_is_the_error_that_it_was() -> None:
    norm = nn.RMSNorm(24, eps=1e-5)
    fuse(norm)

    with torch.no_grad(), pytest.raises(RuntimeError, match="24"):
        norm(torch.randn(2, 48))


def test_a_record_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(CheckpointError, match="'0' as 'rms_norm'; the model has a Linear"):
        fuse_as_recorded(model, {"0": "rms_norm"})
    with pytest.raises(CheckpointError, match="'norm' as 'rms_norm'; the model has nothing"):
        fuse_as_recorded(model, {"norm": "rms_norm"})
    with pytest.raises(CheckpointError, match="'0' as 'everything'"):
        fuse_as_recorded(model, {"0": "everything"})


def test_compress_fuses_and_restores_and_decompress_takes_it_back() -> None:
    modes: list[Any] = [("quantize", {"scheme": "w8a16"}), "max_calibrate", "compress"]
    model = modewright.apply_mode(llama(), modes)
    state = modewright.mode_state(model)
    kinds = state["modes"][-1]["metadata"]["fused"]
    other = modewright.restore_from_mode_state(llama(), state)
    other.load_state_dict(model.state_dict())

    assert len(kinds) == 20  # the norm behind the blocks is in none
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(outputs(other), outputs(model))
    plain = modewright.apply_mode(model, "decompress")
    assert not any(isinstance(m, FusedLayer) for m in plain.modules())


def test_compress_leaves_what_is_between_as_it_is_if_asked() -> None:
    modes: list[Any] = [("quantize", {"scheme": "w8a16"}), "max_calibrate"]
    model = modewright.apply_mode(llama(), [*modes, ("compress", {"fuse": False})])

    assert not any(isinstance(m, FusedLayer) for m in model.modules())


def test_a_fused_model_can_be_copied() -> None:
    model = llama()
    fuse(model)

    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
