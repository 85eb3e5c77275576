# SPDX-License-Identifier: Apache-2.0
"""The whole run, on a tiny language model and on plain modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import (
    ApplyModeError,
    CheckpointError,
    ConfigError,
    DataError,
    IncompatibleModeError,
    MatchError,
)
from modewright.run import progress, stages
from modewright.run.optimize import dry_run, optimize
from modewright.run.subject import open_subject
from support.language_models import tiny_recipe


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Teller(nn.Module):
    """A language model of one layer: token windows in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(32, 8)
            self.head = nn.Linear(8, 32)
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.embedding(tokens))


WINDOWS = torch.arange(64).reshape(4, 16) % 32


def test_a_module_that_modes_changed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = modewright.apply_mode(mlp(), ("quantize", {"scheme": "w8a16"}))
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ConfigError, match=r"changed by modes already \(quantize\)"):
        optimize(model, {"name": "r", "steps": ["mse"]}, output=tmp_path / "output")

    assert not (tmp_path / "output").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_from_files_is_optimized_and_proven_in_a_fresh_process(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    output = tmp_path / "output"

    result = optimize(
        llama, tiny_recipe(text), output=output, on_progress=lambda *now: seen.append(now)
    )

    assert result.restored_identical
    assert result.restored_in == "a fresh process"
    assert [s.name for s in result.steps] == [
        "load",
        "data",
        "baseline",
        "quantize",
        "max_calibrate",
        "save",
        "restore",
        "evaluation",
    ]
    assert all(s.seconds > 0 and s.peak_memory > 0 for s in result.steps)
    assert result.baseline is not None
    assert result.optimized is not None
    assert result.loss_increase == result.optimized.loss - result.baseline.loss
    assert result.kl_divergence is not None
    assert 0 < result.kl_divergence < 0.1
    assert result.calibration is not None
    assert ("max_calibrate", 4, 4) in seen
    assert ("baseline", 4, 4) in seen
    # what was written is a checkpoint of what was returned, and JSON tells the same as the result
    assert modewright.verify(output).modes == ("quantize", "max_calibrate")
    written = json.loads((output / "result.json").read_text())
    assert written["kl_divergence"] == result.kl_divergence
    assert written["optimized"]["perplexity"] == result.optimized.perplexity
    assert not output.with_name("output.partial").exists()


def test_a_folded_model_is_loaded_by_transformers_and_gives_the_same_logits(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    import transformers

    steps = [
        {"mode": "quantize", "config": {"scheme": "w4a16", "ignore": ["lm_head"]}},
        {"mode": "max_calibrate"},
        {"mode": "export_quantize"},
    ]
    result = optimize(llama, tiny_recipe(text, steps=steps), output=tmp_path / "output")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "output")

    with torch.no_grad():
        assert torch.equal(loaded(WINDOWS).logits, result.model(WINDOWS).logits)


def test_a_simulated_model_is_refused_by_transformers(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    import transformers

    optimize(llama, tiny_recipe(text), output=tmp_path / "output")

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "output")


def test_an_output_can_be_optimized_further(llama: Path, text: Path, tmp_path: Path) -> None:
    first = optimize(llama, tiny_recipe(text), output=tmp_path / "first")

    second = optimize(
        tmp_path / "first",
        tiny_recipe(text, steps=[{"mode": "export_quantize"}]),
        output=tmp_path / "second",
    )

    modes = [record["name"] for record in modewright.mode_state(second.model)["modes"]]
    assert modes == ["quantize", "max_calibrate", "export_quantize"]
    assert second.baseline == first.optimized


def test_a_module_is_optimized_with_data_of_the_callers() -> None:
    model = Teller()

    result = optimize(
        model,
        {
            "name": "own",
            "steps": [
                {"mode": "quantize", "config": {"scheme": "w8a8_static"}},
                {"mode": "max_calibrate"},
            ],
        },
        calibration=(WINDOWS[i : i + 1] for i in range(4)),
        evaluation=WINDOWS,
    )

    assert result.model is model
    assert result.restored_identical
    assert result.restored_in == "this process"
    assert result.loss_increase is not None
    assert abs(result.loss_increase) < 0.05
    assert result.calibration is not None


def test_a_module_without_data_is_optimized_and_its_weights_are_compared(tmp_path: Path) -> None:
    model = mlp()

    result = optimize(model, _weight_only())

    assert result.baseline is None
    assert result.kl_divergence is None
    assert result.restored_identical
    assert modewright.last_mode(model) == "max_calibrate"


def _weight_only(**changes: Any) -> dict[str, Any]:
    steps = [{"mode": "quantize", "config": {"scheme": "w8a16"}}, {"mode": "max_calibrate"}]
    return {"name": "weights", "steps": steps, **changes}


def test_a_static_scheme_without_data_says_what_to_pass() -> None:
    recipe = _weight_only()
    recipe["steps"][0]["config"]["scheme"] = "w8a8_static"

    with pytest.raises(ApplyModeError, match="calibration"):
        optimize(mlp(), recipe)


def test_a_dtype_other_than_float32_is_restored_too(tmp_path: Path) -> None:
    model = mlp().to(torch.bfloat16)

    result = optimize(model, _weight_only(), output=tmp_path / "output")

    assert result.restored_identical
    assert next(result.model.parameters()).dtype == torch.bfloat16


def test_the_original_is_untouched_by_a_recipe_that_cannot_work() -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(MatchError, match="nearest: 'Linear'"):
        optimize(
            model,
            {"name": "typo", "steps": [{"mode": "quantize", "config": {"targets": ["Linaer"]}}]},
        )

    assert not modewright.is_converted(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_an_impossible_order_is_refused_before_the_baseline_is_measured() -> None:
    model = Teller()

    with pytest.raises(IncompatibleModeError, match="max_calibrate"):
        optimize(model, {"name": "x", "steps": [{"mode": "max_calibrate"}]}, evaluation=WINDOWS)

    assert model.calls == 0


def test_a_fallback_is_taken_and_said(tmp_path: Path) -> None:
    recipe = _weight_only()
    recipe["steps"][0] = {
        "mode": "quantize",
        "config": {"scheme": "w4a16", "targets": ["nothing.like.it"]},
        "fallback": [{"mode": "quantize", "config": {"scheme": "w8a16"}}],
    }

    result = optimize(mlp(), recipe, output=tmp_path / "output")

    step = next(s for s in result.steps if s.name == "quantize")
    assert step.fallback_for == "quantize"
    assert step.fallback_reason is not None
    assert "nothing.like.it" in step.fallback_reason
    origin = modewright.inspect(tmp_path / "output").provenance[0]
    assert origin["fallback_for"] == "quantize"
    assert "nothing.like.it" in origin["fallback_reason"]


def test_checks_are_held_against_what_was_measured() -> None:
    recipe = _weight_only(checks={"max_loss_increase": -1.0, "max_kl_divergence": 10.0})

    result = optimize(Teller(), recipe, evaluation=WINDOWS)

    assert [(c.name, c.passed) for c in result.checks] == [
        ("loss increase", False),
        ("KL divergence", True),
    ]
    assert not result.ok
    assert not optimize(mlp(), _weight_only(checks={"max_loss_increase": 1.0})).ok  # not measured


def test_an_interrupted_run_leaves_no_output_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WORTH_KEEPING_SECONDS", 0.0)
    output = tmp_path / "output"
    recipe = {
        "name": "own",
        "steps": [
            {"mode": "quantize", "config": {"scheme": "w8a8_static"}},
            {"mode": "max_calibrate"},
        ],
    }

    def run(batches: list[torch.Tensor]) -> modewright.Result:
        return optimize(Teller(), recipe, calibration=batches, evaluation=WINDOWS, output=output)

    class Interrupting(list[torch.Tensor]):
        armed = True

        def __iter__(self) -> Any:
            import inspect

            called_from = {frame.function for frame in inspect.stack()}
            if "run_calibration" in called_from and self.armed:
                raise KeyboardInterrupt
            return super().__iter__()

    batches = Interrupting([WINDOWS[i : i + 1] for i in range(4)])
    with pytest.raises(KeyboardInterrupt):
        run(batches)
    assert not output.exists()
    assert output.with_name("output.partial").is_dir()

    batches.armed = False
    result = run(batches)

    resumed = {s.name: s.resumed for s in result.steps}
    assert resumed["quantize"] is True
    assert resumed["max_calibrate"] is False
    assert "baseline" not in resumed  # it was kept, and is not measured again
    assert result.baseline is not None
    fresh = optimize(Teller(), recipe, calibration=list(batches), evaluation=WINDOWS)
    assert result.optimized == fresh.optimized
    assert result.kl_divergence == fresh.kl_divergence
    assert not output.with_name("output.partial").exists()


def test_progress_of_another_recipe_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WORTH_KEEPING_SECONDS", 0.0)
    output = tmp_path / "output"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.Run, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimize(mlp(), _weight_only(), output=output)
    recipe = _weight_only()
    recipe["steps"][0]["config"]["scheme"] = "w4a16"

    result = optimize(mlp(), recipe, output=output)

    assert not any(step.resumed for step in result.steps)
    assert modewright.inspect(output).modes[0]["config"]["scheme"] == "w4a16"


def test_an_earlier_output_is_replaced_and_a_foreign_folder_is_not(tmp_path: Path) -> None:
    output = tmp_path / "output"
    optimize(mlp(), _weight_only(), output=output)
    optimize(mlp(), _weight_only(name="again"), output=output)
    assert json.loads((output / "result.json").read_text())["recipe"] == "again"

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="thesis"):
        optimize(mlp(), _weight_only(), output=foreign)
    assert (foreign / "chapter.txt").read_text() == "years of work"


def test_a_restoration_that_differs_is_an_error_and_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.restore

    def restore_wrongly(*arguments: Any, **keywords: Any) -> nn.Module:
        model = real(*arguments, **keywords)
        with torch.no_grad():
            next(model.parameters()).add_(1e-6)
        return model

    monkeypatch.setattr(stages, "restore", restore_wrongly)

    with pytest.raises(CheckpointError, match="other outputs"):
        optimize(mlp(), _weight_only(), output=tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_calibration_and_evaluation_share_no_window(llama: Path, text: Path) -> None:
    run = stages.Run(
        modewright.load_recipe(tiny_recipe(text)), modewright.default_registry, lambda *now: None
    )
    opened = open_subject(llama, registry=modewright.default_registry)

    data = run.load_data(opened, None, None)

    assert data.calibration is not None
    assert data.evaluation is not None
    batches = data.calibration.for_mode()
    assert isinstance(batches, Sequence)
    used = {tuple(batch.flatten().tolist()) for batch in batches}
    assert len(batches) == len(data.evaluation) == 4
    assert used.isdisjoint(tuple(window.tolist()) for window in data.evaluation)


def test_dry_run_changes_nothing_and_says_what_would_happen(llama: Path, text: Path) -> None:
    plan = dry_run(llama, tiny_recipe(text))

    assert plan.ok
    assert "14 layers: int8 weights per channel, int8 inputs per tensor" in str(plan)

    bad = dry_run(llama, tiny_recipe(text, steps=[{"mode": "export_quantize"}]))
    assert not bad.ok
    assert "none is open" in str(bad)


def test_text_needs_a_tokenizer(text: Path) -> None:
    opened = open_subject(mlp(), registry=modewright.default_registry)

    with pytest.raises(DataError, match="tokenizer"):
        opened.encode()


def test_a_skeleton_takes_no_memory_and_is_restored_like_the_model() -> None:
    model = Teller()
    opened = open_subject(model, registry=modewright.default_registry)

    assert opened.skeleton is not None
    assert all(p.is_meta for p in opened.skeleton.parameters())
    assert not any(p.is_meta for p in model.parameters())


def test_data_that_no_mode_looked_at_is_not_recorded() -> None:
    recipe = _weight_only()
    unused = optimize(Teller(), recipe, calibration=[WINDOWS[:1]], evaluation=WINDOWS)
    recipe["steps"][0]["config"]["scheme"] = "w8a8_static"
    used = optimize(Teller(), recipe, calibration=[WINDOWS[:1]], evaluation=WINDOWS)

    assert unused.calibration is None
    assert used.calibration is not None


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("  - mode: max_calibrat\n", "Did you mean 'max_calibrate'"),
        ("  - mode: quantize\n    config: {shceme: w8a8}\n", "Did you mean 'scheme'"),
        ("  - mode: quantize\n    fallback: [nothing]\n", "no mode 'nothing'"),
    ],
    ids=["mode", "config", "fallback"],
)
def test_a_mistake_in_a_step_names_file_and_line_before_the_model_is_loaded(
    tmp_path: Path, step: str, words: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsteps:\n" + step)

    with pytest.raises(ConfigError) as caught:
        optimize("no/such/model", path)

    assert f"{path}:{3 if 'max' in step else 4}: " in str(caught.value)
    assert words in str(caught.value)


def test_a_dry_run_takes_the_fallback_that_the_run_would_take(llama: Path, text: Path) -> None:
    steps = [
        {
            "mode": "quantize",
            "config": {"targets": ["nothing.like.it"]},
            "fallback": [
                {"mode": "quantize", "config": {"scheme": "w8a16", "ignore": ["lm_head"]}}
            ],
        },
        "max_calibrate",
    ]

    plan = dry_run(llama, tiny_recipe(text, steps=steps))

    assert plan.ok
    assert "fallback for quantize, which is not possible" in str(plan)
    assert [step.mode for step in plan.steps] == ["quantize", "max_calibrate"]


def test_modes_that_only_this_process_knows_are_restored_in_this_process(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    class Config(modewright.ModeConfig):
        """Nothing to set."""

    class Noop(modewright.ModeDescriptor[Config]):
        """Do nothing."""

        name = "noop"
        config_class = Config

        def convert(self, model: nn.Module, config: Config) -> tuple[nn.Module, dict[str, Any]]:
            return model, {}

        def restore(self, model: nn.Module, config: Config, metadata: dict[str, Any]) -> nn.Module:
            return model

    registry = modewright.default_registry.copy()
    registry.register(Noop)

    result = optimize(
        llama, tiny_recipe(text, steps=["noop"]), output=tmp_path / "out", registry=registry
    )

    assert result.restored_identical
    assert result.restored_in == "this process"


def test_a_kept_step_that_is_damaged_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WORTH_KEEPING_SECONDS", 0.0)
    output = tmp_path / "output"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.Run, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimize(mlp(), _weight_only(), output=output)
    for weights in (tmp_path / "output.partial" / "modes").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])

    result = optimize(mlp(), _weight_only(), output=output)

    assert result.restored_identical
    assert not any(step.resumed for step in result.steps)


def test_the_packed_size_is_that_of_the_last_quantization(tmp_path: Path) -> None:
    def packed(*schemes: str) -> int | None:
        steps: list[object] = []
        for scheme in schemes:
            steps += [{"mode": "quantize", "config": {"scheme": scheme}}, "export_quantize"]
        return optimize(mlp(), {"name": "own", "steps": steps}).packed_size

    assert packed("w8a16", "w4a16") == packed("w4a16") != packed("w8a16")
