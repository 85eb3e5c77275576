"""Sparse, then quantized, in every order that makes sense: zeros stay exact zeros to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import IncompatibleModeError
from modewright.layers.masks import mask_of, masked_layers
from support.models import Mlp

Steps = list[Any]
SPARSE: dict[str, Any] = {
    "magnitude": ("sparse_magnitude", {"ignore": ["head"]}),
    "sparsegpt": ("sparsegpt", {"min_tokens": 1}),
    "alps": ("alps", {"min_tokens": 1, "epochs": 1}),
    "unstructured": ("wanda", {"min_tokens": 1, "pattern": "unstructured"}),
}
GPTQ = ("gptq", {"min_tokens": 1})
LEARNED = ("learned_rounding", {"iterations": 4, "rate": 0.2})
LSQ = ("lsq", {"epochs": 1})
CALIBRATED: dict[str, Steps] = {
    "max": ["max_calibrate"],
    "mse": ["mse"],
    "hqq": ["hqq"],
    "gptq": [GPTQ],
    "corrected gptq": [("gptq", {"min_tokens": 1, "correct_inputs": True})],
    "learned rounding": [LEARNED],
    "learned rounding by adam": [
        ("learned_rounding", {"iterations": 4, "rate": 0.2, "optimizer": "adam"})
    ],
    "all": ["mse", GPTQ, LEARNED, LSQ],
    "awq": ["awq", GPTQ],
    "smoothquant": ["smoothquant", "mse"],
    "bias correction": ["mse", "bias_correction"],
}
SCHEMES = ("w4a16", "w4a16_asym", "w2a16", "w8a8", "nvfp4", "mxfp4")


def network() -> nn.Module:
    torch.manual_seed(0)
    return Mlp(features=16, hidden=32, classes=4)


def data() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(16, 16, generator=draw) + 0.3 for _ in range(4)]


def applied(steps: Steps, model: nn.Module | None = None) -> nn.Module:
    model = network() if model is None else model
    for step in steps:
        name = step if isinstance(step, str) else step[0]
        uses = modewright.default_registry[name].uses_calibration
        kwargs = {"calibration": data()} if uses else {}
        model = modewright.apply_mode(model, step, mode_kwargs=kwargs)
    return model


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: mask_of(m) for n, m in masked_layers(model).items()}  # type: ignore[misc]


def weights(model: nn.Module, names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the layers multiply with: seen from outside, by running rows of the identity."""
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        with torch.no_grad():
            size = names[name].shape[1]
            found[name] = (layer(torch.eye(size)) - layer(torch.zeros(1, size))).t()
    return found


def assert_zeros(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    for name, value in weights(model, kept).items():
        assert not value[~kept[name]].any(), name
        assert value[kept[name]].any(), name


def assert_restores(model: nn.Module, path: Path) -> None:
    modewright.save(model, path)
    restored = modewright.restore(network(), path)
    x = data()[0]
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), model.eval()(x))


def quantized_chains() -> list[Any]:
    """Every chain for two schemes, and the longest one for all."""
    pairs = [(chain, scheme) for chain in CALIBRATED for scheme in ("w4a16_asym", "w2a16")]
    pairs += [("all", scheme) for scheme in SCHEMES if ("all", scheme) not in pairs]
    return [pytest.param(CALIBRATED[c], scheme, id=f"{c}-{scheme}") for c, scheme in pairs]


@pytest.mark.parametrize(("chain", "scheme"), quantized_chains())
def test_zeros_stay_when_sparse_weights_are_quantized(
    chain: Steps, scheme: str, tmp_path: Path
) -> None:
    model = applied([SPARSE["sparsegpt"]])
    kept = masks(model)
    inputs = scheme not in ("w8a8", "nvfp4", "mxfp4")  # rows of the identity are exact there
    quantize = ("quantize", {"scheme": scheme, "ignore": ["head"]})

    applied([quantize, *chain], model)

    for name, layer in masked_layers(model).items():
        assert torch.equal(mask_of(layer), kept[name])  # type: ignore[arg-type]
        assert not layer.quantized_parameter("weight")[~kept[name]].any()  # type: ignore[operator]
    if inputs and "bias_correction" not in chain:
        assert_zeros(model, kept)
    assert_restores(model, tmp_path / "quantized.safetensors")

    applied(["compress"], model)
    assert not masked_layers(model)
    for name in kept:
        packed = model.get_submodule(name).read_parameter("weight")  # type: ignore[operator]
        assert not packed[~kept[name]].any()
    assert_restores(model, tmp_path / "packed.safetensors")


@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize(
    "rest",
    [
        ["export_sparse"],
        [("quantize", {"scheme": "w4a16_asym"}), GPTQ, "export_quantize"],
        [("quantize", {"scheme": "w4a16_asym"}), GPTQ, "export_quantize", "export_sparse"],
        [("quantize", {"scheme": "w4a16_asym"}), GPTQ, "compress", "decompress"],
        ["export_sparse", ("quantize", {"scheme": "w4a16"}), "max_calibrate", "compress"],
        [
            ("quantize", {"scheme": "w4a16", "targets": ["blocks.0.*"]}),
            "max_calibrate",
            "compress",
        ],
    ],
    ids=lambda rest: "-".join(s if isinstance(s, str) else s[0] for s in rest),
)
def test_chain_is_applied_saved_restored_and_run(sparse: Any, rest: Steps, tmp_path: Path) -> None:
    model = applied([sparse])
    kept = masks(model)
    assert len(kept) == 4

    applied(rest, model)

    for name in kept:
        layer = model.get_submodule(name)
        assert not layer.weight[~kept[name]].any()
    assert_zeros(model, kept)
    assert_restores(model, tmp_path / "chain.safetensors")


def test_a_sparse_model_is_trained_saved_and_restored_with_its_zeros(tmp_path: Path) -> None:
    model = applied([SPARSE["sparsegpt"]])
    kept = masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for batch in data():
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()

    assert_zeros(model, kept)
    assert_restores(model, tmp_path / "trained.safetensors")
    restored = modewright.restore(network(), tmp_path / "trained.safetensors")
    assert all(torch.equal(mask, masks(restored)[name]) for name, mask in kept.items())


def test_a_sparse_quantized_model_is_trained_with_its_zeros() -> None:
    model = applied([SPARSE["sparsegpt"], ("quantize", {"scheme": "w4a16"}), "max_calibrate"])
    kept = masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in data():
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()

    assert_zeros(model, kept)


QUANTIZED = ("quantize", {"scheme": "w4a16"})
REFUSED: dict[str, tuple[Steps, Any, str]] = {
    "a rotation mixes weights": ([SPARSE["magnitude"]], "rotate", "mixes weights"),
    "so it does later": ([SPARSE["magnitude"], QUANTIZED], "hadamard", "mixes weights"),
    "a branch of low rank": ([SPARSE["magnitude"], QUANTIZED], "svdquant", "is dense"),
    "quantized before": ([QUANTIZED], "sparse_magnitude", "make the model sparse first"),
    "quantized and calibrated": ([QUANTIZED, "mse"], "alps", "make the model sparse first"),
    "packed": ([QUANTIZED, "compress"], "wanda", "cannot be changed"),
    "sparse already": ([SPARSE["magnitude"]], "sparsegpt", "would not be kept"),
    "nothing to fold": ([QUANTIZED], "export_sparse", "cannot close 'quantize'"),
    "folded under quantizers": (
        [SPARSE["magnitude"], QUANTIZED],
        "export_sparse",
        "Apply 'export_quantize' first",
    ),
}


@pytest.mark.parametrize(("before", "mode", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_keep_zeros_is_refused_with_the_reason(
    before: Steps, mode: str, reason: str
) -> None:
    model = applied(before)

    with pytest.raises(IncompatibleModeError, match=reason):
        applied([mode], model)
