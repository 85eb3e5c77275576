# SPDX-License-Identifier: Apache-2.0
"""compress and decompress: the same function, less memory, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modewright
from modewright.errors import ApplyModeError, CheckpointError, ConfigError
from modewright.modes.checkpoint import load_weights
from modewright.quantization.layers import QuantizedLayer
from modewright.quantization.schemes import SCHEMES
from modewright.runtime.backends import backends, using
from modewright.runtime.layers import PackedLayer
from support.models import CNN, FAMILIES, LM, MHA, MLP, MOE, RNN, Family


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Backends approximate; what they approximate is the portable one, which is exact."""
    with using("portable"):
        yield


EVERYTHING = {"targets": ["*"], "on_unmatched": "report"}
EXACT = ("compress", {"scale_dtype": "float32"})
WEIGHTS = [name for name, scheme in SCHEMES.items() if scheme.weights is not None]


def converted(family: Family, scheme: str, *modes: Any, **config: Any) -> nn.Module:
    config = {"scheme": scheme, **EVERYTHING, **config}
    kwargs = [{}] + [{"calibration": family.batches} for _ in modes]
    return modewright.apply_mode(family.make(), [("quantize", config), *modes], mode_kwargs=kwargs)


def layers(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def last_metadata(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = modewright.mode_state(model)["modes"][-1]["metadata"]
    return found


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", WEIGHTS)
@pytest.mark.parametrize("before", [[], ["max_calibrate"]], ids=["fresh", "calibrated"])
def test_a_packed_model_computes_what_the_fake_quantized_one_does(
    family: Family, scheme: str, before: list[str]
) -> None:
    model = converted(family, scheme, *before)
    expected = family.run(model)
    packed = modewright.apply_mode(model, EXACT)

    assert layers(packed, PackedLayer)
    if family is MOE:  # one expert's matrix lies elsewhere in memory: kernels sum in another order
        torch.testing.assert_close(family.run(packed), expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(family.run(packed), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", ["w4a16_asym", "w3a16", "nf4"])
def test_half_precision_of_scales_changes_little(family: Family, scheme: str) -> None:
    model = converted(family, scheme)
    expected = family.run(model)

    packed = modewright.apply_mode(model, "compress")

    torch.testing.assert_close(family.run(packed), expected, rtol=5e-3, atol=5e-3)


TRANSFORMS: dict[str, list[Any]] = {
    "chosen codes": [("gptq", {"min_tokens": 1})],
    "learned rounding": ["mse", ("learned_rounding", {"iterations": 3})],
    "learned scales": [("gptq", {"min_tokens": 1}), ("lsq", {"epochs": 1})],
    "input scale": [("smoothquant", {"fold": False})],
    "rotated": [("hadamard", {"size": 2, "weights_too": True})],
    "branch": [("svdquant", {"rank": 2})],
    "all": [
        ("smoothquant", {"fold": False}),
        ("hadamard", {"size": 2, "weights_too": True}),
        ("svdquant", {"rank": 2}),
    ],
    "bias": ["bias_correction"],
}


@pytest.mark.parametrize("family", [MLP, CNN, LM, MOE], ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", ["w4a16_asym", "w4a8", "w8a8_static"])
@pytest.mark.parametrize("modes", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_modes_did_goes_with_the_layer(family: Family, scheme: str, modes: list[Any]) -> None:
    if scheme == "w8a8_static":
        modes = ["max_calibrate", *modes]
    model = converted(family, scheme, *modes)
    expected = family.run(model)
    folded = modewright.apply_mode(copy.deepcopy(model), "export_quantize").state_dict()
    packed = modewright.apply_mode(model, EXACT)

    torch.testing.assert_close(family.run(packed), expected, rtol=1e-5, atol=1e-6)
    plain = modewright.apply_mode(packed, "decompress").state_dict()
    assert set(plain) == set(folded)
    assert all(torch.equal(plain[name], folded[name]) for name in folded)


@pytest.mark.parametrize("modes", [TRANSFORMS["chosen codes"], TRANSFORMS["learned rounding"]])
def test_codes_are_packed_as_they_were_chosen(modes: list[Any]) -> None:
    model = converted(MLP, "w3a16", *modes)
    chosen = {
        name: (layer.weight_quantizer.codes, layer.weight_quantizer.scale)
        for name, layer in layers(model, QuantizedLayer).items()
        if layer.weight_quantizer.codes is not None
    }
    packed = modewright.apply_mode(model, EXACT)

    assert chosen
    for name, (codes, scale) in chosen.items():
        weight = packed.get_submodule(name).packed_weight()
        assert torch.equal(weight.codes(), codes)
        assert torch.equal(weight.scale, scale)


# --- and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8_block", "nvfp4"])
def test_decompressing_gives_what_folding_gives(family: Family, scheme: str) -> None:
    exported = modewright.apply_mode(converted(family, scheme), "export_quantize")
    plain = modewright.apply_mode(
        modewright.apply_mode(converted(family, scheme), EXACT), "decompress"
    )

    assert [type(m) for m in plain.modules()] == [type(m) for m in family.make().modules()]
    expected, found = exported.state_dict(), plain.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(family.run(plain), family.run(exported))


def test_workflow_is_complete_and_can_begin_anew() -> None:
    model = converted(MLP, "w4a16", "max_calibrate", "compress", "decompress")

    again = modewright.apply_mode(model, [("quantize", {"scheme": "w8a16"}), "compress"])
    assert [r["name"] for r in modewright.mode_state(again)["modes"]][-2:] == [
        "quantize",
        "compress",
    ]


@pytest.mark.parametrize("mode", ["quantize", "max_calibrate", "export_quantize", "rotate"])
def test_packed_weights_are_not_edited(mode: str) -> None:
    model = modewright.apply_mode(converted(MLP, "w4a16"), "compress")

    with pytest.raises(modewright.errors.IncompatibleModeError):
        modewright.apply_mode(model, mode)


# --- what is stored ------------------------------------------------------------------------------


def test_names_and_dtypes_of_what_is_stored() -> None:
    packed = modewright.apply_mode(converted(MLP, "w4a16_asym"), "compress")

    stored = {n: t.dtype for n, t in packed.state_dict().items() if n.startswith("head.")}
    assert stored == {
        "head.weight_packed": torch.uint8,
        "head.weight_scale": torch.float16,
        "head.weight_zero_point": torch.uint8,
        "head.bias": torch.float32,
    }
    static = modewright.apply_mode(converted(MLP, "w8a8_static", "max_calibrate"), "compress")
    assert {n for n in static.state_dict() if n.startswith("head.")} == {
        "head.weight_packed",
        "head.weight_scale",
        "head.input_scale",
        "head.bias",
    }
    small = modewright.apply_mode(converted(MLP, "nvfp4_w4a16"), "compress")
    assert small.head.weight_scale.dtype == torch.float8_e4m3fn
    assert small.head.weight_global_scale.shape == ()


def test_scales_that_half_precision_cannot_hold_are_stored_as_they_are() -> None:
    model = MLP.make()
    with torch.no_grad():
        model.head.weight.mul_(1e-7)
    modewright.quantize(model, "w4a16")
    expected = MLP.run(model)

    packed = modewright.apply_mode(model, "compress")

    assert packed.head.weight_scale.dtype == torch.float32
    assert packed.blocks[0].fc1.weight_scale.dtype == torch.float16
    torch.testing.assert_close(MLP.run(packed), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("before", [[], ["mse"], ["max_calibrate"]], ids=str)
def test_a_tied_weight_is_packed_and_stored_once(before: list[str], tmp_path: Path) -> None:
    packed = modewright.apply_mode(converted(LM, "w4a16_asym", *before), "compress")

    assert packed.embed.weight_packed is packed.head.weight_packed
    path = modewright.save(packed, tmp_path / "model.safetensors")
    assert modewright.inspect(path).tied["head.weight_packed"] == "embed.weight_packed"
    for model in (LM.make(), LM.cls):
        restored = modewright.restore(model, path).eval()
        assert restored.embed.weight_packed is restored.head.weight_packed
        assert restored.embed.weight_scale is restored.head.weight_scale
        assert torch.equal(LM.run(restored), LM.run(packed))


def test_tied_layers_stay_tied_where_they_are_moved_and_copied() -> None:
    packed = modewright.apply_mode(converted(LM, "w4a16_asym", "mse"), "compress")

    for model in (copy.deepcopy(packed), packed.bfloat16(), packed.to("meta")):
        assert model.embed.weight_packed is model.head.weight_packed
        assert model.embed.weight_scale is model.head.weight_scale


def test_shared_weights_whose_layers_were_changed_apart_are_packed_apart() -> None:
    rotated = ("hadamard", {"size": 2, "weights_too": True})
    model = converted(LM, "w4a16", rotated)
    expected = LM.run(model)
    packed = modewright.apply_mode(model, EXACT)

    assert packed.embed.weight_packed is not packed.head.weight_packed
    assert torch.equal(LM.run(packed), expected)


def test_what_stays_as_it_is_is_listed() -> None:
    model = converted(MHA, "w8a8")
    packed = modewright.apply_mode(model, "compress")

    skipped = {item["module"]: item["reason"] for item in last_metadata(packed)["skipped"]}
    assert skipped["cross"] == "torch hands its projections to one kernel as plain weights"
    assert skipped["cross.out_proj"] == "the attention layer that it belongs to is not packed"
    assert set(layers(packed, QuantizedLayer)) == set(skipped)
    assert set(layers(packed, PackedLayer)) >= {"encoder.layers.0.linear1", "head"}


def test_a_model_of_which_nothing_can_be_packed_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    modewright.quantize(model, "w8a8")

    with pytest.raises(ApplyModeError, match="would pack nothing") as caught:
        modewright.apply_mode(model, "compress")
    assert isinstance(caught.value.cause, ConfigError)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = MLP.make()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    modewright.apply_mode(model, ("quantize", {"scheme": "w4a16"}))

    with pytest.raises(ApplyModeError, match=r"weight of 'head'.*NaN"):
        modewright.apply_mode(model, "compress")


# --- restoring -----------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Notes the bytes of every tensor that an operation makes in real memory."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


class Wide(nn.Module):
    """A layer that is larger by far than all it is packed to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 512)
        self.layer = nn.Linear(512, 256)
        self.register_buffer("shift", torch.arange(512.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(ids) + self.shift)


def test_restoring_allocates_no_weight_in_full_precision(tmp_path: Path) -> None:
    model = Wide()
    config = {"scheme": "w4a16", "targets": ["Linear", "Embedding"]}
    modewright.apply_mode(model, [("quantize", config), "max_calibrate", "compress"])
    path = modewright.save(model, tmp_path / "model.safetensors")
    ids = torch.arange(10)

    with Allocations() as seen:
        # the class makes its parameters before it registers them; only that is let through
        restored = modewright.restore(Wide, path)

    weights = {n: t.nbytes for n, t in restored.state_dict().items()}
    assert max(weights.values()) == 256 * 512 // 2
    assert all(not t.is_meta for t in (*restored.parameters(), *restored.buffers()))
    assert torch.equal(restored(ids), model(ids))
    assert seen.largest <= 256 * 512 * 4


class Stubborn(nn.Module):
    """Reads the values of its parameters while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.limit = float(self.layer.weight.shape[0] + 0 * self.layer.weight.detach().sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).clamp(max=self.limit)


class Derived(Stubborn):
    """Has a buffer, in no checkpoint, that is made from a parameter."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(8, 8)
        self.register_buffer("limit", torch.ones_like(self.layer.weight[0]), persistent=False)


@pytest.mark.parametrize("cls", [Stubborn, Derived])
def test_a_class_that_needs_its_parameters_is_restored_too(
    cls: type[nn.Module], tmp_path: Path
) -> None:
    model = cls()
    modewright.apply_mode(model, [("quantize", {"scheme": "w8a16"}), "compress"])
    path = modewright.save(model, tmp_path / "model.safetensors")
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    assert torch.equal(modewright.restore(cls, path)(x), model(x))


DAMAGE: dict[str, tuple[list[str], Any]] = {
    "another format": (["head", "parameters", "weight", "spec", "format"], "int9"),
    "another width": (["head", "parameters", "weight", "spec", "format"], "int8"),
    "another shape": (["head", "parameters", "weight", "shape"], [4, 9]),
    "a huge shape": (["head", "parameters", "weight", "spec", "shape"], [4, 1 << 60]),
    "no parameters": (["head", "parameters"], {}),
    "an unknown parameter": (["head", "parameters"], {"__class__": {}}),
    "a word for a record": (["head"], "os.system"),
    "another class": (["norm"], {"parameters": {}}),
    "no layer": (["nowhere"], {"parameters": {}}),
    "an unknown activation": (["head", "activations"], {"input": {"format": "int8", "x": 1}}),
    "a negative rotation": (["head", "hadamard_size"], -1),
    "an unknown transform": (["head", "transforms"], {"forward": [1]}),
}


@pytest.mark.parametrize(("place", "value"), DAMAGE.values(), ids=DAMAGE)
def test_a_record_that_does_not_fit_is_an_error(
    place: list[str], value: Any, tmp_path: Path
) -> None:
    packed = modewright.apply_mode(converted(MLP, "w4a16"), "compress")
    state = modewright.mode_state(packed)
    entry = state["modes"][-1]["metadata"]["layers"]
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    model = MLP.make()

    def restore() -> None:
        modewright.restore_from_mode_state(model, state)
        # a record may fit the model, and not the weights
        load_weights(model, dict(packed.state_dict()), {}, where="the file")

    with pytest.raises((CheckpointError, ApplyModeError)):
        restore()
    assert type(model.norm) is nn.LayerNorm


@pytest.mark.parametrize("family", [MLP, RNN, MOE, CNN], ids=lambda family: family.name)
def test_train_flag_copies_and_casts(family: Family) -> None:
    packed = modewright.apply_mode(converted(family, "w4a16_asym").train(), "compress")
    assert all(module.training for module in packed.modules())
    packed.eval()
    expected = family.run(packed)

    copied = copy.deepcopy(packed)
    assert torch.equal(family.run(copied), expected)
    scales = {n: t.clone() for n, t in packed.state_dict().items() if n.endswith("_scale")}
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(packed).to(dtype)
        with torch.no_grad():
            result = cast(family.inputs.to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.1)
        assert scales
        assert all(torch.equal(cast.state_dict()[n], t) for n, t in scales.items())


@pytest.mark.parametrize("family", [MLP, LM, MOE], ids=lambda family: family.name)
@pytest.mark.parametrize("scheme", ["w4a16_asym", "w8a8", "w8a8_static", "w3a16", "fp8"])
def test_whatever_backend_serves_gives_nearly_the_same(family: Family, scheme: str) -> None:
    model = converted(family, scheme, "max_calibrate")
    expected = family.run(model)
    packed = modewright.apply_mode(model, "compress")

    with using(*backends()):
        found = family.run(packed)
    assert float((found - expected).norm() / expected.norm()) < 0.05
