# SPDX-License-Identifier: Apache-2.0
"""The mode as a whole: search, record, restore, solve again, go on, pack."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import (
    ApplyModeError,
    ConfigError,
    DataError,
    IncompatibleModeError,
    SearchError,
)
from modewright.evaluation.cost import measure_cost
from modewright.mixed_precision import costs as costs_module
from modewright.mixed_precision import searcher as searcher_module
from modewright.quantization.representation import SchemeConfig
from modewright.quantization.size import layer_bits, packed_bytes
from support.models import FAMILIES, Family
from support.photograph import contents
from support.small_lm import SmallLm, small_lm

MODE = "auto_quantize"
SMALL = (MODE, {"candidates": ["w2a16", "w4a16", "w8a16"]})


def search(model: Any, bounds: dict[str, Any], mode: Any = SMALL, **more: Any) -> Any:
    return modewright.search(model, mode, bounds, **more)


def record(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = modewright.mode_state(model)["modes"][0]["metadata"]
    return found


def outputs(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(batch).logits for batch in batches]


def stored_bits(model: nn.Module) -> tuple[int, int]:
    """Bits of all layers that are chosen for, by what their quantizers store, and their numbers."""
    bits = numbers = 0
    for path in record(model)["targets"]:
        layer = model.get_submodule(path)
        recorded = record(model)["layers"].get(path)
        scheme = None if recorded is None else SchemeConfig.model_validate(recorded)
        bits += sum(layer_bits(layer, scheme).values())
        numbers += layer.weight.numel()
    return bits, numbers


@pytest.mark.parametrize("sensitivity", ["gradient", "kl"])
def test_search_puts_quantizers_in_within_the_budget(
    sensitivity: str, model: SmallLm, batches: list[torch.Tensor]
) -> None:
    before = outputs(model, batches)
    config = {"sensitivity": sensitivity}
    result = search(model, {"effective_bits": 5.0}, calibration=batches, config=config)
    bits, numbers = stored_bits(model)

    assert result.costs["effective_bits"] == bits / numbers <= 5.0
    assert record(model)["chosen"] == result.best["subnet"]
    assert set(record(model)["chosen"].values()) <= {"w2a16", "w4a16", "w8a16"}
    assert not torch.equal(outputs(model, batches)[0], before[0])
    assert record(model)["table"]["sensitivity"] == sensitivity


def test_choice_is_the_best_of_all_by_its_scores(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    result = search(model, {"effective_bits": 5.0}, calibration=batches)
    table = record(model)["table"]
    stored = costs_module.stored_costs(model, table["groups"], table["candidates"])
    fitting = [
        sum(row[c] for row, c in zip(table["scores"], choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(table["groups"]))
        if stored.of(choice)["effective_bits"] <= 5.0
    ]
    assert -result.best["score"] == pytest.approx(min(fitting), rel=1e-9)


def test_layers_with_one_input_get_one_scheme(model: SmallLm, batches: list[torch.Tensor]) -> None:
    chosen = search(model, {"effective_bits": 5.0}, calibration=batches).best["subnet"]

    for block in ("blocks.0", "blocks.1"):
        assert chosen[f"{block}.gate"] == chosen[f"{block}.up"]


def test_tied_weights_get_one_scheme_and_count_once(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    mode = (MODE, {"candidates": ["w4a16", "w8a16"], "targets": ["embed", "head"]})
    result = search(model, {"size_bytes": "90%"}, mode, calibration=batches)

    assert result.best["subnet"] in ({"embed": n, "head": n} for n in ("w4a16", "w8a16"))
    assert model.embed.weight is model.head.weight
    size = packed_bytes(model, record(model)["layers"])
    full = measure_cost(small_lm(), which=["size_bytes"])["size_bytes"]
    assert result.costs["size_bytes"] == size <= 0.9 * full


def test_prediction_falls_as_the_budget_grows(model: SmallLm, batches: list[torch.Tensor]) -> None:
    scores = []
    for budget in (3.5, 4.5, 6.0, 8.5):
        data = None if scores else batches
        scores.append(search(model, {"effective_bits": budget}, calibration=data).best["score"])
    assert scores == sorted(scores)


def test_another_budget_is_solved_without_data_or_scoring(
    model: SmallLm, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    search(model, {"effective_bits": 7.0}, calibration=batches)
    monkeypatch.setattr(searcher_module, "gradient_scores", lambda *a, **k: pytest.fail("scored"))
    again = search(model, {"effective_bits": 4.0})
    direct = small_lm()
    monkeypatch.undo()
    expected = search(direct, {"effective_bits": 4.0}, calibration=batches)

    assert again.best == expected.best
    assert record(model)["layers"] == record(direct)["layers"]
    assert torch.equal(outputs(model, batches)[0], outputs(direct, batches)[0])


def test_saved_model_is_restored_and_solved_for_another_budget(
    model: SmallLm, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    search(model, {"effective_bits": 7.0}, calibration=batches)
    path = modewright.save(model, tmp_path / "m.safetensors")
    restored = modewright.restore(small_lm(), path)

    assert torch.equal(outputs(restored, batches)[0], outputs(model, batches)[0])
    assert (
        search(restored, {"effective_bits": 4.0}).best
        == search(model, {"effective_bits": 4.0}).best
    )


def test_table_of_another_model_is_taken_from_its_checkpoint(
    model: SmallLm, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    search(model, {"effective_bits": 7.0}, calibration=batches)
    modewright.apply_mode(model, "mse", mode_kwargs={"calibration": batches})
    path = modewright.save(model, tmp_path / "m.safetensors")
    other = small_lm()
    result = search(other, {"effective_bits": 4.0}, config={"table": path})

    assert result.costs["effective_bits"] <= 4.0
    mode = (MODE, {"candidates": ["w3a16"]})
    with pytest.raises(ConfigError, match="lacks some of the candidates"):
        search(small_lm(), {"effective_bits": 4.0}, mode, config={"table": path})
    table = modewright.save(small_lm(), tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="holds no table"):
        search(small_lm(), {"effective_bits": 4.0}, config={"table": table})


def test_search_checkpoint_serves_other_budgets(
    batches: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores"
    search(small_lm(), {"effective_bits": 7.0}, calibration=batches, checkpoint=path)
    monkeypatch.setattr(searcher_module, "gradient_scores", lambda *a, **k: pytest.fail("scored"))
    result = search(small_lm(), {"effective_bits": 4.0}, checkpoint=path)

    assert result.costs["effective_bits"] <= 4.0
    assert result.constraints == {"effective_bits": 4.0}


def test_workflow_goes_on_from_the_mixed_model_and_restores(
    model: SmallLm, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    search(model, {"effective_bits": 4.5}, calibration=batches)
    data = {"calibration": batches}
    steps = ["mse", ("gptq", {"min_tokens": 1}), ("learned_rounding", {"iterations": 2}), "lsq"]
    modewright.apply_mode(model, steps, mode_kwargs=data)
    modewright.apply_mode(model, "compress")
    path = modewright.save(model, tmp_path / "m.safetensors")
    restored = modewright.restore(small_lm(), path)

    assert torch.equal(outputs(restored, batches)[0], outputs(model, batches)[0])
    size = modewright.inspect(model).bytes
    assert size < modewright.inspect(small_lm()).bytes


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym"])
def test_zeros_of_a_sparse_model_are_kept(
    model: SmallLm, batches: list[torch.Tensor], scheme: str
) -> None:
    modewright.apply_mode(model, ("sparse_magnitude", {"pattern": "2:4"}))
    zeros = {n: m.weight == 0 for n, m in model.named_modules() if hasattr(m, "weight_mask")}
    bounds = {"effective_bits": 6.0}
    search(model, bounds, (MODE, {"candidates": [scheme, "w8a16"]}), calibration=batches)
    modewright.apply_mode(model, ["mse", "export_quantize"])

    assert zeros
    for name, held in zeros.items():
        assert held.float().mean() == 0.5
        assert not model.get_submodule(name).weight[held].any()


def test_mixed_model_is_exported_as_plain_layers(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    search(model, {"effective_bits": 4.5}, calibration=batches)
    modewright.apply_mode(model, ["mse", "export_quantize"])

    assert type(model.blocks[0].gate) is nn.Linear


def test_rules_of_the_choice_make_the_same_model_with_quantize(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    best = search(model, {"effective_bits": 4.5}, calibration=batches).best
    plain = small_lm()
    modewright.apply_mode(plain, ("quantize", {"scheme": "none", "rules": best["rules"]}))

    assert torch.equal(outputs(plain, batches)[0], outputs(model, batches)[0])


# --- what may be left alone, several budgets -----------------------------------------------------


def test_none_leaves_layers_as_they_are(model: SmallLm, batches: list[torch.Tensor]) -> None:
    mode = (MODE, {"candidates": ["w2a16", "none"]})
    result = search(model, {"effective_bits": 20.0}, mode, calibration=batches)
    left = [path for path, name in result.best["subnet"].items() if name == "none"]

    assert left
    assert all(type(model.get_submodule(path)) is nn.Linear for path in left)
    assert result.costs["effective_bits"] <= 20.0


def test_several_budgets_hold_at_once(
    model: SmallLm, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 bits are the slowest here, so that a bound on time excludes what a bound on bits favours.
    seconds = [3.0, 1.0, 9.0, 1.0]
    monkeypatch.setattr(costs_module, "measure_latencies", lambda runs: seconds)
    bounds = {"effective_bits": 7.0, "latency": 2.0, "size_bytes": "70%"}
    with pytest.raises(SearchError, match="latency = 6"):
        search(small_lm(), bounds, calibration=batches)
    bounds["latency"] = 14.0
    result = search(model, bounds, calibration=batches)

    assert all(result.costs[name] <= bound for name, bound in result.bounds.items())
    assert list(result.best["subnet"].values()).count("w4a16") <= 1
    assert record(model)["table"]["latency"]["full"] == 18.0
    again = search(model, {"latency": "80%"})
    assert again.bounds["latency"] == pytest.approx(0.8 * 18)


def test_latency_is_measured_on_packed_layers(model: SmallLm, batches: list[torch.Tensor]) -> None:
    result = search(model, {"latency": 10.0}, calibration=batches, dummy_input=batches[0][:, :1])

    assert 0 < result.costs["latency"] < 10
    assert set(record(model)["table"]["latency"]["layers"]) == set(record(model)["targets"])


def test_points_of_other_budgets_are_on_the_pareto_front(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    result = search(model, {"effective_bits": 5.0}, calibration=batches)
    front = result.pareto()

    assert len(front) >= 5
    assert any(point.costs == result.costs for point in front)
    assert sum(front[0].subnet.values()) == 6


# --- refusals ------------------------------------------------------------------------------------


def test_unreachable_budget_is_said_before_anything_is_scored(
    model: SmallLm, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searcher_module, "observe", lambda *a: pytest.fail("looked at data"))
    before = contents(model)

    with pytest.raises(SearchError, match=r"effective_bits <= 2 .*effective_bits = 3\.25"):
        search(model, {"effective_bits": 2}, calibration=batches)
    assert contents(model) == before


def test_modes_after_an_unsearched_space_are_refused_with_what_to_do(model: SmallLm) -> None:
    modewright.apply_mode(model, MODE)

    with pytest.raises(ApplyModeError, match=r"not searched: call modewright\.search"):
        modewright.apply_mode(model, "mse")
    assert modewright.last_mode(model) == MODE


def test_without_data_or_table_the_search_says_what_it_needs(model: SmallLm) -> None:
    with pytest.raises(DataError, match="list of batches"):
        search(model, {"effective_bits": 4.5})
    with pytest.raises(DataError, match="dummy_input"):
        search(model, {"latency": 1.0})


@pytest.mark.parametrize(
    "config", [{"sensitivity": "guess"}, {"loss": "l1"}, {"probes": 0}, {"table": 3}], ids=str
)
def test_options_with_unknown_values_are_refused(
    config: dict[str, Any], model: SmallLm, batches: list[torch.Tensor]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        search(model, {"effective_bits": 4.5}, calibration=batches, config=config)


@pytest.mark.parametrize(
    ("candidates", "text"),
    [(["w4a16", "w4a16"], "different"), (["none"], "alone"), (["w9a16"], "no scheme"), ([], "1")],
    ids=str,
)
def test_candidates_that_make_no_choice_are_refused(
    candidates: list[str], text: str, model: SmallLm
) -> None:
    with pytest.raises(ConfigError, match=text):
        modewright.apply_mode(model, (MODE, {"candidates": candidates}))


def test_constraint_on_something_else_is_refused(model: SmallLm) -> None:
    with pytest.raises(ConfigError, match=r"'flops'.*effective_bits, size_bytes, latency"):
        search(model, {"flops": "50%"})


def test_quantized_models_are_refused(model: SmallLm) -> None:
    modewright.apply_mode(model, "quantize")

    with pytest.raises(IncompatibleModeError, match="fake_quantized"):
        search(model, {"effective_bits": 4.5})


# --- every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_searched_saved_and_restored(family: Family, tmp_path: Path) -> None:
    model = family.make()
    result = search(model, {"effective_bits": "60%"}, calibration=family.batches)
    path = modewright.save(model, tmp_path / "m.safetensors")
    restored = modewright.restore(family.make(), path)

    assert result.costs["effective_bits"] <= result.bounds["effective_bits"]
    assert len(set(result.best["subnet"].values())) >= 1
    expected = family.run(model)
    assert torch.equal(first(family.run(restored)), first(expected))


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_layers_that_no_data_reaches_are_judged_by_their_weights(
    model: SmallLm, batches: list[torch.Tensor]
) -> None:
    model.spare = nn.Linear(16, 16)
    search(model, {"effective_bits": 5.0}, calibration=batches)
    table = record(model)["table"]
    (index,) = (i for i, paths in enumerate(table["groups"]) if paths == ["spare"])

    assert table["unreached"] == ["spare"]
    assert table["scores"][index] == sorted(table["scores"][index], reverse=True)
    assert min(table["scores"][index]) > 0
