# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, how it ends, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch import nn

import modewright
from modewright.cli import VERBS, main
from support.command_line import run
from support.language_models import save_tiny_llama, tiny_recipe, write_text


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(write_text(tmp_path / "text.txt"))))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = modewright.quantize(nn.Sequential(nn.Linear(4, 4)), "w8a16")
    return modewright.save(model, tmp_path / "model.safetensors")


def test_optimize_prints_one_table_and_writes_the_output(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "llama")

    code, out, err = run("optimize", model, "-r", recipe, "-o", tmp_path / "out", capsys=capsys)

    assert code == 0, err
    for words in ("perplexity", "KL divergence", "peak memory", "max_calibrate", "skipped"):
        assert words in out
    assert "identical, in a fresh process" in out
    assert "baseline ..." in err  # progress does not mix with the result
    assert modewright.verify(tmp_path / "out").modes == ("quantize", "max_calibrate")


def test_optimize_streams_from_files_to_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "llama")
    recipe = tmp_path / "streamed.yaml"
    steps = [{"mode": "quantize", "config": {"scheme": "w8a16"}}, "hqq", "compress"]
    recipe.write_text(yaml.safe_dump({"steps": steps}))
    command = ("optimize", model, "-r", recipe, "--stream")

    planned, plan, _ = run(*command, "--dry-run", capsys=capsys)
    code, out, err = run(*command, "-o", tmp_path / "out", capsys=capsys)

    assert planned == 0
    assert "3. compress" in plan
    assert code == 0, err
    assert "not measured" in out
    assert "SHA-256" in out
    assert modewright.verify(tmp_path / "out").modes == ("quantize", "hqq", "compress")


def test_optimize_as_json_prints_nothing_else(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "llama")

    code, out, _ = run("optimize", model, "-r", recipe, "--json", capsys=capsys)

    assert code == 0
    data = json.loads(out)
    assert data["restored_identical"] is True
    assert [s["name"] for s in data["steps"]][3:5] == ["quantize", "max_calibrate"]


def test_dry_run_prints_the_plan(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "llama")

    code, out, _ = run(
        "optimize", model, "-r", recipe, "-o", tmp_path / "out", "--dry-run", capsys=capsys
    )

    assert code == 0
    assert "1. quantize(" in out
    assert "14 layers" in out
    assert not (tmp_path / "out").exists()


def test_a_missed_check_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_llama(tmp_path / "llama")
    path = tmp_path / "strict.yaml"
    text = write_text(tmp_path / "text.txt")
    path.write_text(yaml.safe_dump(tiny_recipe(text, checks={"max_loss_increase": -1.0})))

    code, out, _ = run("optimize", model, "-r", path, capsys=capsys)

    assert code == 1
    assert "MISSED" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimize", "no/such/model"], "does not exist"),
        (["optimize", "demo:smollm3"], "Did you mean 'demo:smollm2'"),
        (["optimize", "x", "-r", "w8a7"], "Did you mean 'w8a8'"),
        (["optimize"], "MODEL is missing"),
        (["optmize"], "Did you mean 'optimize'"),
        (["modes", "quantise"], "Did you mean 'quantize'"),
        (["recipes", "w4a61"], "Did you mean 'w4a16'"),
        (["inspect", "nothing.safetensors"], "does not exist"),
        (["verify", "nothing"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph_and_exit_code_two(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*arguments, capsys=capsys)

    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(modewright.errors.UnknownModeError):
        main(["--debug", "modes", "quantise"])


def test_an_interrupt_is_said_and_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modewright.recipes.loader.load_recipe", interrupt)

    code, _, err = run("optimize", "x", capsys=capsys)

    assert code == 130
    assert "Interrupted" in err


def test_inspect_says_what_a_checkpoint_holds(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run("inspect", checkpoint, capsys=capsys)
    assert code == 0
    assert "1. quantize" in out
    assert "2. max_calibrate" in out
    assert "float32" in out

    code, out, _ = run("inspect", checkpoint, "--json", capsys=capsys)
    assert [m["name"] for m in json.loads(out)["modes"]] == ["quantize", "max_calibrate"]


def test_verify_finds_one_flipped_bit(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", checkpoint, capsys=capsys)[0] == 0
    data = json.loads(run("verify", checkpoint, "--json", capsys=capsys)[1])
    assert data["modes"] == ["quantize", "max_calibrate"]

    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    checkpoint.write_bytes(content)
    code, _, err = run("verify", checkpoint, capsys=capsys)
    assert code == 2
    assert "damaged" in err


def test_modes_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("modes", "--json", capsys=capsys)
    assert code == 0
    assert list(json.loads(out)) == list(modewright.default_registry)

    for name in modewright.default_registry:
        code, out, _ = run("modes", name, "--json", capsys=capsys)
        data = json.loads(out)
        fields = modewright.default_registry[name].config_class.model_fields
        assert [row["field"] for row in data["config"]] == list(fields)
        assert all(row["description"] for row in data["config"])
        for rows in data["types"].values():
            assert all(row["description"] for row in rows)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("recipes", capsys=capsys)
    assert code == 0
    assert "w4a16" in out

    code, out, _ = run("recipes", "w8a8", capsys=capsys)
    assert yaml.safe_load(out)["steps"][0]["mode"] == "quantize"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["modes"], ["modes", "quantize"], ["recipes"], ["optimize", "--help"]]
)
def test_lists_and_help_do_not_wait_for_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom modewright.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as ended:\n    code = ended.code\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_an_unexpected_error_is_a_paragraph_with_the_way_to_see_more() -> None:
    script = (
        "import click\nfrom modewright import cli\n"
        "def broken(): raise ZeroDivisionError('oh')\n"
        "cli.application.get_command = lambda ctx, name: click.Command(name, callback=broken)\n"
        "cli.main(['modes'])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "Unexpected ZeroDivisionError: oh" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_options_of_every_verb_are_these() -> None:
    """A new option is a field of the recipe first; this list grows only on purpose."""
    import importlib

    options = {}
    for verb in VERBS:
        command = importlib.import_module(f"modewright.cli.{verb}").command
        options[verb] = sorted(p.name for p in command.params)

    assert options == {
        "optimize": ["as_json", "device", "dry_run", "model", "output", "recipe", "stream"],
        "search": [
            "as_json",
            "calibration",
            "checkpoint",
            "config",
            "constraints",
            "device",
            "dry_run",
            "input_length",
            "length",
            "max_seconds",
            "max_trials",
            "mode",
            "model",
            "options",
            "output",
            "then",
            "windows",
        ],
        "backends": ["as_json", "device", "dtype", "measure", "threads"],
        "bench": [
            "against",
            "as_json",
            "device",
            "length",
            "model",
            "prompt",
            "recipe",
            "repeats",
            "threads",
        ],
        "inspect": ["as_json", "path"],
        "verify": ["as_json", "path"],
        "modes": ["as_json", "name"],
        "recipes": ["as_json", "name"],
    }


def test_python_m_modewright_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modewright", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip().endswith(modewright.__version__)
