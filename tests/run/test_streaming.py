# SPDX-License-Identifier: Apache-2.0
"""A model is optimized block by block from its files, with the bits of an ordinary run."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modewright
from modewright.errors import ApplyModeError, CheckpointError, ConfigError, DataError, MatchError
from modewright.integrations.shards import Shards
from modewright.integrations.transformers import build_from_config, load_model
from modewright.modes.storage import read_manifest
from modewright.run.optimize import dry_run
from modewright.run.streaming.choice import is_streamed
from modewright.run.streaming.units import Units
from support.language_models import save_tiny_llama

DAMAGED = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.arange(32).view(2, 16)
PACKED = [
    {
        "mode": "quantize",
        "config": {
            "scheme": "w4a16_asym",
            "rules": [{"targets": ["Embedding", "lm_head"], "scheme": "w8a16"}],
        },
    },
    {"mode": "hqq"},
    {"mode": "compress"},
]


def recipe(steps: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": "streamed", "steps": steps, **more}


def with_quantize(*later: Any, **config: Any) -> list[Any]:
    return [{"mode": "quantize", "config": {"scheme": "w4a16", **config}}, *later]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama", tied=False, layers=4, shard_size=8000)


def convert_whole(llama: Path, steps: list[Any], folder: Path) -> nn.Module:
    """Load a model, apply the modes to all of it, and save it."""
    loaded = load_model(llama)
    model = modewright.apply_mode(loaded.model, modewright.load_recipe(recipe(steps)).modes())
    modewright.save(model, folder)
    return model.eval()


def digests(folder: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in read_manifest(folder).tensors.items()}


RECIPES: dict[str, list[Any]] = {
    "max": with_quantize("max_calibrate", "compress"),
    "hqq": PACKED,
    "mse": with_quantize({"mode": "mse", "config": {"importance": False}}, "compress"),
    "hadamard": with_quantize("hadamard", "compress", scheme="w8a8"),
    "not closed": with_quantize("max_calibrate"),
    "folded": with_quantize("max_calibrate", "export_quantize", ignore=["lm_head"]),
    "one block": with_quantize("hqq", "compress", targets=["model.layers.2.*"]),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_result_is_that_of_an_ordinary_run(tmp_path: Path, name: str, tied: bool) -> None:
    llama = save_tiny_llama(tmp_path / "llama", tied=tied, layers=3, shard_size=8000)

    result = modewright.optimize(
        llama, recipe(RECIPES[name]), output=tmp_path / "streamed", stream=True
    )

    convert_whole(llama, RECIPES[name], tmp_path / "whole")
    whole, streamed = read_manifest(tmp_path / "whole"), read_manifest(tmp_path / "streamed")
    assert digests(tmp_path / "streamed") == digests(tmp_path / "whole")
    assert streamed.state == whole.state
    assert streamed.aliases == whole.aliases
    assert result.ok
    assert result.size_after == modewright.inspect(tmp_path / "whole").bytes


def test_restored_model_runs_as_that_of_an_ordinary_run(llama: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = modewright.optimize(llama, recipe(PACKED), output=whole, evaluation=TOKENS).model

    modewright.optimize(llama, recipe(PACKED), output=out, stream=True)

    assert modewright.verify(out).modes == ("quantize", "hqq", "compress")
    assert {file.name for file in out.glob("*.json")} == {f.name for f in whole.glob("*.json")}
    assert (out / "config.json").read_text() == (whole / "config.json").read_text()
    restored = modewright.restore(build_from_config(out), out).eval()
    with torch.no_grad():
        assert torch.equal(restored(TOKENS).logits, expected.eval()(TOKENS).logits)


def test_half_precision_files_are_read_as_an_ordinary_run_reads_them(tmp_path: Path) -> None:
    llama = save_tiny_llama(tmp_path / "llama", dtype=torch.bfloat16, shard_size=8000)

    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "streamed", stream=True)

    convert_whole(llama, PACKED, tmp_path / "whole")
    assert digests(tmp_path / "streamed") == digests(tmp_path / "whole")


def test_folded_result_is_a_folder_that_transformers_loads(llama: Path, tmp_path: Path) -> None:
    import transformers

    modewright.optimize(llama, recipe(RECIPES["folded"]), output=tmp_path / "out", stream=True)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    restored = modewright.restore(build_from_config(tmp_path / "out"), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, restored(TOKENS).logits)


# --- going on ---------------------------------------------------------------------------------


class Interruption(BaseException):
    """The user's Ctrl-C."""


def interrupt_after(blocks: int) -> Callable[[str, int, int | None], None]:
    def on_progress(name: str, done: int, total: int | None) -> None:
        if name == "blocks" and done == blocks:
            raise Interruption

    return on_progress


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that were read and converted."""
    names: list[str] = []
    fill = Units.shell

    def noting(units: Units, unit: str) -> nn.Module:
        names.append(unit)
        return fill(units, unit)

    monkeypatch.setattr(Units, "shell", noting)
    return names


def interrupted(llama: Path, output: Path, work: dict[str, Any], after: int) -> None:
    with pytest.raises(Interruption):
        modewright.optimize(
            llama, work, output=output, stream=True, on_progress=interrupt_after(after)
        )


def test_interrupted_run_goes_on_after_the_last_finished_block(
    llama: Path, tmp_path: Path, converted: list[str]
) -> None:
    interrupted(llama, tmp_path / "out", recipe(PACKED), after=3)
    assert len(converted) == 3
    assert not (tmp_path / "out").exists()

    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)

    assert len(converted) == len(set(converted)) == 5
    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "again", stream=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")
    assert not (tmp_path / "out.partial").exists()


def test_another_recipe_begins_anew(llama: Path, tmp_path: Path, converted: list[str]) -> None:
    interrupted(llama, tmp_path / "out", recipe(PACKED), after=3)
    converted.clear()

    modewright.optimize(llama, recipe(RECIPES["max"]), output=tmp_path / "out", stream=True)

    assert len(converted) == 5


def test_changed_files_begin_anew(llama: Path, tmp_path: Path, converted: list[str]) -> None:
    interrupted(llama, tmp_path / "out", recipe(PACKED), after=3)
    converted.clear()
    shard = next(llama.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))

    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)

    assert len(converted) == 5


def test_a_finished_block_that_was_damaged_since_is_done_again(
    llama: Path, tmp_path: Path, converted: list[str]
) -> None:
    interrupted(llama, tmp_path / "out", recipe(PACKED), after=3)
    file = tmp_path / "out.partial" / "result" / "modewright-00002-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    converted.clear()

    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)

    assert converted == ["model.layers.1", "model.layers.3", "the rest"]
    modewright.verify(tmp_path / "out")


# --- memory -----------------------------------------------------------------------------------


def test_no_more_than_one_block_is_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[weakref.ref[torch.Tensor]] = []
    alive_before: list[int] = []
    fill = Units.fill

    def filling(units: Units, shell: nn.Module, shards: Shards) -> None:
        alive_before.append(sum(reference() is not None for reference in known))
        fill(units, shell, shards)
        known.extend(weakref.ref(tensor) for tensor in shell.state_dict(keep_vars=True).values())

    monkeypatch.setattr(Units, "fill", filling)

    result = modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)

    assert alive_before == [0] * 5
    assert all(tensor.is_meta for tensor in result.model.state_dict().values())


# --- what is refused --------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be read."""

    def refuse(shards: Shards, wanted: Any) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Shards, "read", refuse)


REFUSED: dict[str, tuple[list[Any], dict[str, Any], type[Exception], str]] = {
    "pattern": (with_quantize("compress", ignore=["*.down_porj"]), {}, MatchError, "down_proj"),
    "self": (
        with_quantize("gptq"),
        {"calibration": {"source": ["builtin", "self"]}},
        ConfigError,
        "gptq look at text that the model writes.*'builtin' or a file",
    ),
    "lsq": (with_quantize("max_calibrate", "lsq"), {}, ConfigError, "learns the scales of all"),
    "lsq, and what streams": (
        with_quantize("mse", "lsq", scheme="w4a16_asym"),
        {},
        ConfigError,
        "Leave it out, or take recipe 'int4' or 'int4-packed'",
    ),
    "a unit that cannot be packed": (
        with_quantize("compress", scheme="kv8", targets=["*.self_attn"]),
        {},
        ConfigError,
        r"(?s)pack nothing of model\.layers\.0.*only activations",
    ),
    "too little text": (
        with_quantize("gptq"),
        {"calibration": {"windows": 10**9, "length": 64}},
        DataError,
        "windows",
    ),
    "rotate": (["rotate", *with_quantize()], {}, ConfigError, "stream that all blocks"),
    "fallback": (
        with_quantize({"mode": "hqq", "fallback": ["max_calibrate"]}),
        {},
        ConfigError,
        "fallback",
    ),
    "patterns": (
        with_quantize({"mode": "hadamard", "config": {"ignore": ["lm_head"]}}),
        {},
        ConfigError,
        "ignore of mode 'hadamard'",
    ),
    "checks": (with_quantize(), {"checks": {"max_loss_increase": 1.0}}, ConfigError, "measures"),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_streamed_is_refused_before_a_weight_is_read(
    llama: Path, tmp_path: Path, name: str
) -> None:
    steps, more, error, message = REFUSED[name]

    with pytest.raises(error, match=message):
        modewright.optimize(llama, recipe(steps, **more), output=tmp_path / "out", stream=True)

    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("unread")
def test_plan_reads_no_weight(llama: Path) -> None:
    plan = dry_run(llama, recipe(PACKED), stream=True)

    assert plan.ok
    assert [step.mode for step in plan.steps] == ["quantize", "hqq", "compress"]


def test_recipe_may_say_that_it_is_streamed(llama: Path, tmp_path: Path) -> None:
    result = modewright.optimize(llama, recipe(PACKED, stream=True), output=tmp_path / "out")

    assert [step.name for step in result.steps] == ["load", "blocks", "save", "restore"]


@pytest.mark.parametrize(("free", "streamed"), [(10**9, False), (10**4, True)])
def test_streaming_is_chosen_where_the_weights_would_not_fit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, streamed: bool
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))

    work = recipe(PACKED, stream="auto", evaluation={"windows": 1, "length": 8})
    result = modewright.optimize(llama, work, output=tmp_path / "out")

    assert ("blocks" in {step.name for step in result.steps}) == streamed


def test_a_model_that_is_in_memory_is_not_streamed_of_itself() -> None:
    work = modewright.load_recipe(recipe(PACKED, stream="auto"))

    assert not is_streamed(work, nn.Linear(2, 2))


def test_output_is_needed(llama: Path) -> None:
    with pytest.raises(ConfigError, match="output"):
        modewright.optimize(llama, recipe(PACKED), stream=True)


def test_only_folders_of_files_are_streamed(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be streamed"):
        modewright.optimize(nn.Linear(2, 2), recipe(PACKED), output=tmp_path / "o", stream=True)
    modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)
    with pytest.raises(DataError, match="cannot be streamed"):
        modewright.optimize(tmp_path / "out", recipe(PACKED), output=tmp_path / "o", stream=True)


@pytest.mark.usefixtures("unread")
def test_truncated_shard_is_refused_before_a_weight_is_read(llama: Path, tmp_path: Path) -> None:
    shard = sorted(llama.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="Copy it anew"):
        modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)


@pytest.mark.usefixtures("unread")
def test_files_of_another_model_are_refused_before_a_weight_is_read(
    llama: Path, tmp_path: Path
) -> None:
    config = llama / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    )

    with pytest.raises(CheckpointError, match=r"layers\.4.*missing"):
        modewright.optimize(llama, recipe(PACKED), output=tmp_path / "out", stream=True)


def test_failing_mode_is_named_with_its_block(llama: Path, tmp_path: Path) -> None:
    shard = next(file for file in llama.glob("*.safetensors") if DAMAGED in load_file(file))
    tensors = load_file(shard)
    tensors[DAMAGED][0, 0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})

    with pytest.raises(ApplyModeError, match=r"model\.layers\.1: Mode 'max_calibrate'"):
        modewright.optimize(llama, recipe(RECIPES["max"]), output=tmp_path / "out", stream=True)
