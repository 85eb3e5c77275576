# SPDX-License-Identifier: Apache-2.0
"""What a walk keeps of its finished blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.calibration import block_progress
from modewright.calibration.block_progress import BlockProgress
from modewright.quantization.passes import gptq, learned_rounding
from support.language_models import WORDS, save_tiny_llama, tiny_recipe, write_text


class Part(nn.Module):
    """A weight, a buffer of every fate, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("made", None)
        self.register_buffer("dropped", torch.ones(2))
        self.register_buffer("codes", torch.tensor([1, 2], dtype=torch.uint8))
        self.register_buffer("scalar", torch.tensor(-0.0), persistent=False)


def part() -> Part:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Part()


def finished() -> Part:
    module = part()
    module.made = torch.tensor([[torch.nan, 1.0]])
    module.dropped = None
    module.codes = torch.tensor([7, 255], dtype=torch.uint8)
    with torch.no_grad():
        module.inner.weight += 1
    return module


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_block_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"inner": {"error": 0.1 + 0.2, "skipped": "why"}}
    BlockProgress(tmp_path / "new", "same").keep("layers.0", finished(), entry)

    module = part()
    module.inner.weight.requires_grad_(False)
    bias, scalar = module.inner.bias, module.scalar
    found = BlockProgress(tmp_path / "new", "same").load("layers.0", module)

    expected = finished()
    assert found == entry
    assert torch.equal(module.inner.weight, expected.inner.weight)
    assert not module.inner.weight.requires_grad
    assert isinstance(module.inner.weight, nn.Parameter)
    assert module.made[0, 0].isnan()
    assert module.made[0, 1] == 1
    assert module.dropped is None
    assert torch.equal(module.codes, expected.codes)
    assert module.inner.bias is bias  # equal ones stay, so that whoever shares them still does
    assert module.scalar is scalar


def test_only_the_right_block_of_the_right_walk_is_taken(tmp_path: Path) -> None:
    BlockProgress(tmp_path, "same").keep("layers.0", finished(), {})
    module = part()
    assert BlockProgress(tmp_path, "same").load("layers.1", module) is None
    assert BlockProgress(tmp_path, "other").load("layers.0", module) is None
    assert BlockProgress(tmp_path / "nowhere", "same").load("layers.0", module) is None
    assert module.made is None


@pytest.mark.parametrize("where", [0, 8, 40, "fingerprint", "metadata", -1, "cut", "empty"])
def test_a_damaged_block_is_not_taken(tmp_path: Path, where: int | str) -> None:
    progress = BlockProgress(tmp_path, "same")
    progress.keep("layers.0", finished(), {"inner": {"error": 0.5}})
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    if where == "cut":
        data = data[:-3]
    elif where == "empty":
        data = bytearray()
    elif where == "metadata":
        data = data.replace(b"0.5", b"0.7")
    elif where == "fingerprint":
        data = data.replace(b"same", b"some")
    else:
        data[int(where)] ^= 255
    path.write_bytes(data)

    module = part()
    assert progress.load("layers.0", module) is None
    assert module.made is None
    progress.keep("layers.0", finished(), {})
    assert progress.load("layers.0", module) == {}


def test_a_file_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = BlockProgress(tmp_path, "same")
    progress.keep("layers.0", finished(), {"kept": {}})

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(block_progress, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        progress.keep("layers.0", part(), {})

    assert only_file(tmp_path).suffix == ".safetensors"
    assert progress.load("layers.0", part()) == {"kept": {}}


@pytest.mark.parametrize("kind", ["buffer", "parameter", "parameter that was None"])
def test_a_block_with_tensors_that_have_no_place_is_not_taken(tmp_path: Path, kind: str) -> None:
    def build() -> nn.Module:
        return nn.Linear(2, 2, bias=kind != "parameter that was None")

    module = build()
    if kind == "buffer":
        module.register_buffer("extra", torch.ones(2))
    else:
        name = "extra" if kind == "parameter" else "bias"
        module.register_parameter(name, nn.Parameter(torch.ones(2)))
    BlockProgress(tmp_path, "same").keep("", module, {})

    again = build()
    weight = again.weight.clone()  # type: ignore[operator]
    assert BlockProgress(tmp_path, "same").load("", again) is None
    assert torch.equal(again.weight, weight)  # type: ignore[arg-type]
    assert BlockProgress(tmp_path, "same").load("", module) == {}


def test_a_block_without_parameters_can_be_kept(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(2, affine=False)
    module.running_mean += 1  # type: ignore[operator]
    BlockProgress(tmp_path, "same").keep("", module, {})
    again = nn.BatchNorm1d(2, affine=False)
    assert BlockProgress(tmp_path, "same").load("", again) == {}
    assert torch.equal(again.running_mean, module.running_mean)  # type: ignore[arg-type]


# Modes that go on where they were killed.

BATCHES = [torch.randint(3, len(WORDS), (2, 40), generator=torch.Generator().manual_seed(0))]
WORK = {"gptq": (gptq, "_solve_layer", 7), "learned_rounding": (learned_rounding, "_solve", 1)}


def quantized(seed: int = 0, scheme: str = "w4a16") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    step = ("quantize", {"scheme": scheme, "ignore": ["lm_head"]})
    done: nn.Module = modewright.apply_mode(model, [step])
    return done


def counted(monkeypatch: pytest.MonkeyPatch, mode: str) -> list[int]:
    """Count what a mode solves; one block adds as many as ``WORK`` says."""
    module, name, _ = WORK[mode]
    inner: Callable[..., Any] = getattr(module, name)
    calls: list[int] = []

    def solve(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, name, solve)
    return calls


def convert(model: nn.Module, mode: str, folder: Path, data: Any = BATCHES, **more: Any) -> None:
    config = {"gptq": {}, "learned_rounding": {"iterations": 3}}[mode]
    kwargs = {"calibration": data, "checkpoint": folder, **more}
    modewright.apply_mode(model, [(mode, config)], mode_kwargs=kwargs)


def kill_at(number: int) -> Callable[[int, int | None], None]:
    def on_batch(done: int, total: int | None) -> None:
        if done == number:
            raise KeyboardInterrupt

    return on_batch


@pytest.mark.parametrize("mode", WORK)
def test_a_killed_mode_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    whole, model, each = quantized(), quantized(), WORK[mode][2]
    convert(whole, mode, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert(model, mode, tmp_path / "killed", on_batch=kill_at(2))
    assert len(list((tmp_path / "killed").iterdir())) == 2

    solved = counted(monkeypatch, mode)
    told: list[int] = []
    again = quantized()
    convert(again, mode, tmp_path / "killed", on_batch=lambda done, total: told.append(done))

    assert len(solved) == each
    assert told == [1, 2, 3]
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert modewright.mode_state(whole)["modes"] == modewright.mode_state(again)["modes"]


@pytest.mark.parametrize("change", ["weights", "data", "scheme", "scales", "function"])
def test_another_conversion_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    convert(quantized(), "gptq", tmp_path)
    solved = counted(monkeypatch, "gptq")
    convert(quantized(), "gptq", tmp_path)
    assert not solved

    model = quantized(seed=change == "weights", scheme="w8a16" if change == "scheme" else "w4a16")
    if change == "scales":
        modewright.apply_mode(model, ["max_calibrate"])
    data: Any = [batch.flip(1) for batch in BATCHES] if change == "data" else BATCHES
    if change == "function":
        data = lambda m: [m(batch) for batch in BATCHES]  # noqa: E731
    convert(model, "gptq", tmp_path, data)
    assert len(solved) == 3 * 7


def test_modes_that_cannot_go_on_take_the_folder_and_leave_it(tmp_path: Path) -> None:
    steps = [("max_calibrate", {}), ("awq", {"steps": 2}), "export_quantize"]
    kwargs = {"calibration": BATCHES, "checkpoint": tmp_path / "none"}
    modewright.apply_mode(quantized(), steps, mode_kwargs=kwargs)
    assert not (tmp_path / "none").exists()


def test_a_killed_run_goes_on_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = save_tiny_llama(tmp_path / "llama"), tmp_path / "out"
    quantize = {"mode": "quantize", "config": {"scheme": "w4a16"}}
    recipe = tiny_recipe(write_text(tmp_path / "text.txt"), steps=[quantize, "gptq"])

    def kill(name: str, done: int, total: int | None) -> None:
        if name == "gptq" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modewright.optimize(folder, recipe, output=output, on_progress=kill)
    assert len(list((tmp_path / "out.partial").rglob("block-*.safetensors"))) == 1

    solved = counted(monkeypatch, "gptq")
    result = modewright.optimize(folder, recipe, output=output)
    assert len(solved) == 7
    assert result.restored_identical
    assert not (tmp_path / "out.partial").exists()
