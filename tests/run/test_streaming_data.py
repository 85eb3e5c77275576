# SPDX-License-Identifier: Apache-2.0
"""Recipes that look at data go block by block too, with the bits of an ordinary run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.calibration.augmentation import more_windows
from modewright.calibration.text import fingerprint
from modewright.errors import ConfigError, DataError
from modewright.integrations.transformers import build_from_config, load_model
from modewright.modes.storage import read_manifest
from modewright.run.data import load_data
from modewright.run.streaming.front import Front, StandIns
from modewright.run.streaming.units import REST, Units
from modewright.run.subject import open_subject
from support.language_models import save_tiny_llama, write_text

LAYERS = 3
BATCHES = [
    torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(n)) for n in (1, 2)
]
BOTH_ENDS = {"rules": [{"targets": ["Embedding", "lm_head"], "scheme": "w8a16"}]}
LEARNED = {"mode": "learned_rounding", "config": {"iterations": 3}}


def quantized(*later: Any, **config: Any) -> list[Any]:
    return [{"mode": "quantize", "config": {"scheme": "w4a16", **config}}, *later]


RECIPES: dict[str, list[Any]] = {
    "mse": quantized("mse", "compress", **BOTH_ENDS),
    "mse in bfloat16": quantized("mse", ignore=["lm_head"]),
    "smoothquant": quantized("smoothquant", "compress", scheme="w8a8"),
    "gptq": quantized("gptq", "compress", ignore=["lm_head"]),
    "three passes": quantized("mse", "gptq", LEARNED, "compress", ignore=["lm_head"]),
    "awq then mse": quantized("awq", "mse", "export_quantize", **BOTH_ENDS),
    "svdquant": quantized("svdquant", "compress"),
    "bias correction": quantized("mse", "bias_correction", ignore=["lm_head"]),
    "static activations": quantized("max_calibrate", "compress", scheme="w8a8_static"),
    "two runs of data": quantized("mse", "compress", scheme="w8a8_static"),
    "one block": quantized("mse", "gptq", "compress", targets=["model.layers.1.*"]),
    "keys and values": quantized("mse", rules=[{"targets": ["*.self_attn"], "scheme": "kv8"}]),
}
# A step that finds the embedding with the scales of the head cannot come before the head.
ALIKE = {name: steps for name, steps in RECIPES.items() if name != "awq then mse"}


def save_llama(folder: Path, *, tied: bool = False) -> Path:
    return save_tiny_llama(folder, tied=tied, layers=LAYERS, shard_size=8000)


def recipe(steps: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": "streamed", "steps": steps, **more}


def optimize(llama: Path, steps: list[Any], output: Path, **more: Any) -> Any:
    return modewright.optimize(
        llama, recipe(steps), output=output, stream=True, calibration=BATCHES, **more
    )


def convert_whole(llama: Path, steps: list[Any], folder: Path) -> nn.Module:
    """Load a model, apply the modes to all of it, and save it."""
    model = modewright.apply_mode(
        load_model(llama).model,
        modewright.load_recipe(recipe(steps)).modes(),
        mode_kwargs={"calibration": BATCHES},
    )
    modewright.save(model, folder)
    return model.eval()


def digests(folder: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in read_manifest(folder).tensors.items()}


def require_same(streamed: Path, whole: Path) -> None:
    assert digests(streamed) == digests(whole)
    assert read_manifest(streamed).state == read_manifest(whole).state


@pytest.mark.parametrize("name", RECIPES)
def test_result_is_that_of_an_ordinary_run(tmp_path: Path, name: str) -> None:
    llama = save_llama(tmp_path / "llama")

    result = optimize(llama, RECIPES[name], tmp_path / "streamed")

    convert_whole(llama, RECIPES[name], tmp_path / "whole")
    require_same(tmp_path / "streamed", tmp_path / "whole")
    assert result.calibration is not None
    assert [step.name for step in result.steps] == ["load", "data", "blocks", "save", "restore"]


@pytest.mark.parametrize("name", ALIKE)
def test_result_is_that_of_an_ordinary_run_also_with_a_shared_embedding(
    tmp_path: Path, name: str
) -> None:
    llama = save_llama(tmp_path / "llama", tied=True)

    optimize(llama, RECIPES[name], tmp_path / "streamed")

    convert_whole(llama, RECIPES[name], tmp_path / "whole")
    require_same(tmp_path / "streamed", tmp_path / "whole")


def test_text_is_cut_as_in_an_ordinary_run(tmp_path: Path) -> None:
    llama, text = save_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    data = {"source": str(text), "windows": 3, "length": 16}
    work = recipe(RECIPES["gptq"], calibration=data, evaluation=data)

    streamed = modewright.optimize(llama, work, output=tmp_path / "streamed", stream=True)

    whole = modewright.optimize(llama, work, output=tmp_path / "whole")
    require_same(tmp_path / "streamed", tmp_path / "whole")
    assert streamed.calibration == whole.calibration


def test_windows_are_repeated_with_other_tokens_where_nothing_can_be_written(
    tmp_path: Path,
) -> None:
    llama, text = save_llama(tmp_path / "llama"), write_text(tmp_path / "text.txt")
    data = {"source": str(text), "windows": 3, "length": 16}
    plain = recipe(RECIPES["gptq"], calibration=data, evaluation=data)
    more = recipe(RECIPES["gptq"], calibration={**data, "augmented": 2}, evaluation=data)

    streamed = modewright.optimize(llama, more, output=tmp_path / "streamed", stream=True)

    subject = open_subject(llama, registry=modewright.default_registry)
    loaded = load_data(modewright.load_recipe(plain), subject, uses_calibration=True)
    assert loaded.calibration is not None
    windows = list(loaded.calibration.batches())
    special = subject.tokenizer.all_special_ids
    made = more_windows(subject.model, windows, count=2, special=special, write=False)
    assert streamed.calibration == fingerprint(torch.cat([*windows, *made]))


def test_blocks_of_other_architectures_are_called_as_their_models_call_them(tmp_path: Path) -> None:
    """GPT-2 hands on more than the hidden state; of Gemma 2 every other block sees a window."""
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
    more = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    configs = [
        transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=64, n_positions=32),
        transformers.Gemma2Config(**size, **more),
    ]
    for config in configs:
        folder = tmp_path / config.model_type
        save_llama(folder)  # for its tokenizer
        for file in folder.glob("model*"):
            file.unlink()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)

        optimize(folder, RECIPES["gptq"], folder / "streamed")

        convert_whole(folder, RECIPES["gptq"], folder / "whole")
        require_same(folder / "streamed", folder / "whole")


# --- going on ---------------------------------------------------------------------------------


class Interruption(BaseException):
    """The user's Ctrl-C."""


def interrupt_after(units: int) -> Callable[[str, int, int | None], None]:
    def on_progress(name: str, done: int, total: int | None) -> None:
        if name == "blocks" and done == units:
            raise Interruption

    return on_progress


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that were read, without the rest, which is read for what leads to the blocks."""
    names: list[str] = []
    shell = Units.shell

    def noting(units: Units, unit: str) -> nn.Module:
        if unit != REST:
            names.append(unit)
        return shell(units, unit)

    monkeypatch.setattr(Units, "shell", noting)
    return names


@pytest.mark.parametrize("after", [1, LAYERS, LAYERS + 1])
def test_interrupted_run_goes_on_with_the_same_bits(
    tmp_path: Path, converted: list[str], after: int
) -> None:
    llama, out = save_llama(tmp_path / "llama"), tmp_path / "out"
    steps = RECIPES["three passes"]
    with pytest.raises(Interruption):
        optimize(llama, steps, out, on_progress=interrupt_after(after))
    assert len(converted) == min(after, LAYERS)

    optimize(llama, steps, out)

    assert converted == [f"model.layers.{number}" for number in range(LAYERS)]
    convert_whole(llama, steps, tmp_path / "whole")
    require_same(out, tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_hidden_states_that_were_damaged_since_are_made_again(
    tmp_path: Path, converted: list[str]
) -> None:
    llama, out = save_llama(tmp_path / "llama"), tmp_path / "out"
    with pytest.raises(Interruption):
        optimize(llama, RECIPES["gptq"], out, on_progress=interrupt_after(2))
    (file,) = (tmp_path / "out.partial" / "parts").glob("after-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    converted.clear()

    optimize(llama, RECIPES["gptq"], out)

    assert len(converted) == LAYERS
    convert_whole(llama, RECIPES["gptq"], tmp_path / "whole")
    require_same(out, tmp_path / "whole")


def test_other_data_begins_anew(tmp_path: Path, converted: list[str]) -> None:
    llama, out = save_llama(tmp_path / "llama"), tmp_path / "out"
    with pytest.raises(Interruption):
        optimize(llama, RECIPES["gptq"], out, on_progress=interrupt_after(2))
    converted.clear()

    modewright.optimize(
        llama, recipe(RECIPES["gptq"]), output=out, stream=True, calibration=BATCHES[:1]
    )

    assert len(converted) == LAYERS


# --- what is refused --------------------------------------------------------------------------


def test_function_as_data_is_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")

    with pytest.raises(DataError, match="Pass batches"):
        modewright.optimize(
            llama,
            recipe(RECIPES["gptq"]),
            output=tmp_path / "out",
            stream=True,
            calibration=lambda model: model(BATCHES[0]),
        )


def test_evaluation_data_is_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")

    with pytest.raises(ConfigError, match="measures no quality"):
        optimize(llama, RECIPES["gptq"], tmp_path / "out", evaluation=BATCHES[0])


def test_scales_that_would_come_too_late_are_refused(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")
    rules = [{"targets": ["Embedding"], "scheme": "w8a16"}]

    with pytest.raises(ConfigError, match="would come too late"):
        optimize(llama, quantized("mse", scheme="w8a8_static", rules=rules), tmp_path / "out")


class Skipping(nn.Module):
    """A network whose second block does not get what the first one puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](x) + self.blocks[0](x)


def test_blocks_that_are_not_a_chain_are_refused() -> None:
    model = Skipping()
    stands = StandIns(Units(model).shell(REST), model, ["blocks.0", "blocks.1"])

    with pytest.raises(DataError, match="get what the one before it puts out"):
        Front(stands, [torch.ones(2, 4)])


def test_front_holds_no_more_than_what_runs_before_the_blocks(tmp_path: Path) -> None:
    llama = load_model(save_llama(tmp_path / "llama")).model
    units = Units(llama)
    stands = StandIns(units.shell(REST), llama, units.blocks)

    front = Front(stands, BATCHES)

    assert set(front.module.state_dict()) == {"model.embed_tokens.weight"}
    calls = front.calls()
    assert [len(calls[name]) for name in units.blocks] == [len(BATCHES)] * LAYERS
    hidden = calls[units.blocks[0]][0].hidden
    assert hidden is not None
    assert torch.equal(hidden, llama.get_submodule("model.embed_tokens")(BATCHES[0]))


def test_restored_model_runs(tmp_path: Path) -> None:
    llama, out = save_llama(tmp_path / "llama", tied=True), tmp_path / "out"
    expected = convert_whole(llama, RECIPES["mse"], tmp_path / "whole")

    optimize(llama, RECIPES["mse"], out)

    restored = modewright.restore(build_from_config(out), out).eval()
    with torch.no_grad():
        assert torch.equal(restored(BATCHES[0]).logits, expected(BATCHES[0]).logits)
