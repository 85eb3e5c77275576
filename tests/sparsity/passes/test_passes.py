"""The sparsity modes on small networks: what they choose, skip, resume and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modewright
from modewright.errors import ApplyModeError, ConfigError, DataError, MatchError
from modewright.layers.masks import mask_of, masked_layers
from modewright.layers.matrices import to_matrix
from modewright.sparsity.algorithms.masks import follows
from modewright.sparsity.pattern import parse_pattern
from support.models import CNN, LM, MLP, MOE, Mlp

CALIBRATED = ("wanda", "sparsegpt", "alps")
FEW = {"min_tokens": 1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return Mlp(features=16, hidden=32, classes=4)


def batches(count: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 16, generator=draw)
    return [torch.randn(16, 16, generator=draw) @ mixing for _ in range(count)]


def sparse(mode: str, model: nn.Module | None = None, **config: Any) -> nn.Module:
    data = {} if mode == "sparse_magnitude" else {"calibration": batches()}
    return modewright.apply_mode(model or network(), (mode, config), mode_kwargs=data)


def metadata(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = modewright.mode_state(model)["modes"][-1]["metadata"]
    return found


def distance(model: nn.Module, x: torch.Tensor | None = None) -> float:
    x = torch.cat(batches()) if x is None else x
    with torch.no_grad():
        return float((model.eval()(x) - network().eval()(x)).square().mean())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured", "4x4"])
@pytest.mark.parametrize("mode", ["sparse_magnitude", *CALIBRATED])
def test_every_layer_follows_the_pattern(mode: str, pattern: str) -> None:
    model = sparse(mode, pattern=pattern)

    layers = masked_layers(model)
    assert len(layers) == 4 + (mode == "sparse_magnitude")  # data-driven modes go through blocks
    for layer in layers.values():
        mask = mask_of(layer)
        assert mask is not None
        assert follows(to_matrix(layer, "weight", mask), parse_pattern(pattern))
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert metadata(model)["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_what_looks_at_more_changes_the_output_less(pattern: str) -> None:
    magnitude = distance(sparse("sparse_magnitude", pattern=pattern, ignore=["head"]))
    second_order = distance(sparse("sparsegpt", pattern=pattern))
    together = distance(sparse("alps", pattern=pattern))
    trained = distance(sparse("alps", pattern=pattern, epochs=20, rate=3e-3))

    assert second_order < magnitude
    assert together < second_order
    assert trained < together


def test_correcting_inputs_makes_up_for_earlier_layers() -> None:
    plain = distance(sparse("sparsegpt"))

    assert distance(sparse("sparsegpt", correct_inputs=True, correction_damping=0.01)) < plain


def test_the_mask_stays_when_the_kept_weights_are_trained() -> None:
    before = sparse("sparsegpt")
    after = sparse("sparsegpt", epochs=3, rate=1e-2)

    for name, layer in masked_layers(after).items():
        assert torch.equal(mask_of(layer), mask_of(before.get_submodule(name)))  # type: ignore[arg-type]
        assert not torch.equal(layer.weight, before.get_submodule(name).weight)
        assert not dict(layer.named_parameters())["weight"][layer.weight == 0].any()
    assert len(metadata(after)["loss"]) == 4
    assert min(metadata(after)["loss"]) < metadata(after)["loss"][0]


def test_training_that_makes_it_worse_is_dropped() -> None:
    before, after = sparse("sparsegpt"), sparse("sparsegpt", epochs=1, rate=10.0)

    assert metadata(after)["loss"][1] > metadata(after)["loss"][0]
    assert distance(after) == pytest.approx(distance(before))


def test_a_budget_is_shared_out_by_error() -> None:
    uniform = metadata(sparse("wanda", pattern="unstructured"))
    shared = metadata(sparse("wanda", pattern="unstructured", allocation="error", span=0.2))

    parts = {round(layer["sparsity"], 2) for layer in shared["layers"].values()}
    assert len(parts) > 1
    assert shared["sparsity"] == pytest.approx(uniform["sparsity"], abs=0.03)
    assert all(0.28 <= part <= 0.72 for part in parts)


def test_rules_change_the_pattern_and_leave_layers_dense() -> None:
    rules = [
        {"targets": ["*.fc2"], "pattern": "1:4"},
        {"targets": ["blocks.0.fc1"], "sparsity": 0},
    ]
    found = metadata(sparse("wanda", rules=rules))["layers"]

    assert {name: layer["pattern"] for name, layer in found.items()} == {
        "blocks.0.fc2": "1:4",
        "blocks.1.fc1": "2:4",
        "blocks.1.fc2": "1:4",
    }
    assert found["blocks.0.fc2"]["sparsity"] == 0.75


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error(field: str) -> None:
    with pytest.raises(MatchError, match="no module matches"):
        sparse("sparse_magnitude", **{field: ["blocks.9.*"]})
    assert metadata(
        sparse("sparse_magnitude", **{"ignore": ["blocks.9.*"], "on_unmatched": "report"})
    )["unmatched"] == ["blocks.9.*"]


def test_a_target_that_cannot_be_sparse_is_an_error() -> None:
    with pytest.raises(MatchError, match="matches only LayerNorm"):
        sparse("sparse_magnitude", targets=["LayerNorm"])


def test_sparsity_beside_n_to_m_is_an_error() -> None:
    with pytest.raises(ConfigError, match="leave out sparsity"):
        sparse("sparse_magnitude", pattern="2:4", sparsity=0.7)
    with pytest.raises(ConfigError, match="expected a pattern"):
        sparse("sparse_magnitude", pattern="4:2")


def test_what_stays_dense_is_listed_with_the_reason() -> None:
    tied = metadata(modewright.apply_mode(LM.make(), "sparse_magnitude"))
    assert {item["module"]: item["reason"] for item in tied["skipped"]} == {
        "head": "its weight is shared with another layer"
    }
    convolutions = modewright.apply_mode(
        CNN.make(), ("sparsegpt", FEW), mode_kwargs={"calibration": CNN.batches}
    )
    reasons = {item["module"]: item["reason"] for item in metadata(convolutions)["skipped"]}
    assert "no multiple of 4" in reasons["one"]
    assert "sparse_magnitude" in reasons["up_two"]


def test_fused_experts_are_made_sparse_along_their_inputs() -> None:
    model = modewright.apply_mode(MOE.make(), ("sparse_magnitude", {"pattern": "1:2"}))

    found = metadata(model)["layers"]
    names = [n for n, layer in found.items() if len(layer["parameters"]) == 2]
    assert names
    for name in names:
        layer = model.get_submodule(name)
        for parameter in found[name]["parameters"]:
            value = to_matrix(layer, parameter, getattr(layer, parameter))
            assert follows(value != 0, parse_pattern("1:2"))


def test_a_layer_that_sees_few_tokens_is_masked_by_magnitude_and_listed() -> None:
    model = sparse("sparsegpt", min_tokens=1000)

    skipped = metadata(model)["skipped"]
    assert len([s for s in skipped if "masked by magnitude" in s["reason"]]) == 4
    expected = sparse("sparse_magnitude")
    layer = "blocks.0.fc1"
    assert torch.equal(model.get_submodule(layer).weight, expected.get_submodule(layer).weight)


def test_data_is_needed_and_for_epochs_more_than_once() -> None:
    with pytest.raises(ApplyModeError, match="needs data"):
        modewright.apply_mode(network(), "wanda")
    with pytest.raises(ApplyModeError, match="several times") as caught:
        modewright.apply_mode(
            network(),
            ("wanda", {"epochs": 1}),
            mode_kwargs={"calibration": lambda model: model(batches()[0])},
        )
    assert isinstance(caught.value.cause, DataError)


class Killed(Exception):
    pass


@pytest.mark.parametrize("mode", CALIBRATED)
def test_a_killed_conversion_goes_on_and_gives_the_same(mode: str, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == 1:
            raise Killed

    whole = sparse(mode)
    data = {"calibration": batches(), "checkpoint": tmp_path}
    with pytest.raises(ApplyModeError):
        modewright.apply_mode(network(), mode, mode_kwargs={**data, "on_batch": stop})
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = modewright.apply_mode(network(), mode, mode_kwargs=data)

    assert len(kept) == 1
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_conversion_that_fails_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(done: int, total: int | None) -> None:
        raise Killed

    with pytest.raises(ApplyModeError):
        modewright.apply_mode(
            model,
            ("alps", {"epochs": 1}),
            mode_kwargs={"calibration": batches(), "on_batch": fail},
        )
    assert not masked_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_says_what_becomes_sparse() -> None:
    plan = str(modewright.plan(MLP.make(), ["sparse_magnitude"]))

    assert "2:4, 50% zeros" in plan
