# SPDX-License-Identifier: Apache-2.0
"""The searches for widths keep to their constraints, find what is known, and go on when killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modewright
from modewright.errors import ConfigError, DataError, MatchError, SearchError
from modewright.evaluation.cost import measure_cost
from support.prunable_networks import build
from support.prunable_transformers import build_transformer

MODES = ("fastnas", "gradnas", "autonas")
QUICK = {"autonas": {"steps": 6, "save_every": 2, "population": 4, "generations": 2}}


class Redundant(nn.Module):
    """Two inner layers; of the second, only the first eight units do anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 6)
        self.c, self.d = nn.Linear(6, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.c.weight[8:] *= 1e-3
            self.c.bias[8:] = 0
            self.d.weight[:, 8:] *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(F.relu(self.c(x + self.b(F.relu(self.a(x))))))


def batches(shape: tuple[int, ...] = (8, 3, 16, 16), count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch), torch.arange(len(batch)) % 4)


def search(model: nn.Module, mode: str, constraints: dict[str, Any], **more: Any) -> Any:
    config = {**QUICK.get(mode, {}), **more.pop("config", {})}
    mode_config = {"divisor": 2, **more.pop("mode_config", {})}
    return modewright.search(model, (mode, mode_config), constraints, config=config, **more)


@pytest.mark.parametrize("mode", MODES)
def test_several_constraints_hold_for_what_is_exported(mode: str) -> None:
    model, example = build("residual")
    full = measure_cost(model, example, ("flops", "params", "size_bytes"))
    constraints = {"flops": "60%", "params": 0.7 * full["params"], "size_bytes": "75%"}
    result = search(model, mode, constraints, dummy_input=example, calibration=batches())
    output = result.model(example)
    exported = modewright.apply_mode(result.model, "export_prune")
    costs = measure_cost(exported, example, ("flops", "params", "size_bytes"))
    assert costs == result.costs
    assert costs["flops"] <= 0.6 * full["flops"]
    assert costs["params"] <= 0.7 * full["params"]
    assert costs["size_bytes"] <= 0.75 * full["size_bytes"]
    assert torch.equal(exported(example), output)
    assert type(exported) is type(build("residual")[0])


@pytest.mark.parametrize("mode", MODES)
def test_little_room_is_left_below_the_bound(mode: str) -> None:
    model, example = build("residual")
    result = search(model, mode, {"flops": "60%"}, dummy_input=example, calibration=batches())
    assert result.costs["flops"] > 0.93 * result.bounds["flops"]


@pytest.mark.parametrize("mode", ["fastnas", "gradnas"])
def test_units_that_do_nothing_are_cut_first(mode: str) -> None:
    model = Redundant()
    whole = model(batches((8, 6), 1)[0])
    result = search(
        model,
        mode,
        {"params": "67%"},
        calibration=batches((8, 6)),
        loss_func=None if mode == "fastnas" else loss,
        mode_config={"divisor": 8},
    )
    assert result.best["widths"] == {"a": 32, "c": 8}
    assert result.best["kept"]["c"] == list(range(8))
    torch.testing.assert_close(result.model(batches((8, 6), 1)[0]), whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_search_that_was_killed_gives_the_same_answer(mode: str, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def run(path: Path | None, limit: int | None) -> Any:
        model, example = build("residual")
        calls = 0

        def counted(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if limit is not None and calls > limit:
                raise KilledError
            return loss(model, batch)

        result = search(
            model,
            mode,
            {"flops": "60%"},
            dummy_input=example,
            calibration=batches(),
            loss_func=counted,
            checkpoint=path,
        )
        return result, calls

    through, calls = run(None, None)
    path = tmp_path / "search.safetensors"
    for limit in (calls // 3, calls // 2):
        with pytest.raises(KilledError):
            run(path, limit)
    again, fewer = run(path, None)
    assert again.best == through.best
    assert fewer < calls
    for name, tensor in through.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_met_is_said_before_anything_is_tried(mode: str) -> None:
    model, example = build("residual")
    parameters = list(model.parameters())
    with pytest.raises(SearchError, match="closest that can be reached"):
        search(model, mode, {"flops": "1%"}, dummy_input=example, calibration=batches())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model) is type(build("residual")[0])


@pytest.mark.parametrize("mode", MODES)
def test_language_models_are_searched(mode: str) -> None:
    model, example = build_transformer("llama")
    result = search(
        model,
        mode,
        {"params": "70%"},
        calibration=[example],
        mode_config={"divisor": 8},
    )
    exported = modewright.apply_mode(result.model, "export_prune")
    assert exported(**example).logits.shape == (2, 7, 64)
    assert measure_cost(exported)["params"] <= result.bounds["params"]


def test_latencies_are_measured_once_and_kept() -> None:
    model, example = build("dense")
    result = search(model, "gradnas", {"latency": 10.0}, dummy_input=example, calibration=batches())
    assert result.best["widths"] == {"a": 8, "b": 12, "c": 16, "hidden": 32}
    assert 0 < result.costs["latency"] < 10


def test_active_parameters_of_experts_are_bounded() -> None:
    model, example = build_transformer("mixtral")
    result = search(
        model,
        "gradnas",
        {"active_params": "80%", "params": "90%"},
        calibration=[example],
        mode_config={"divisor": 8},
    )
    exported = modewright.apply_mode(result.model, "export_prune")
    assert (
        measure_cost(exported, None, ("active_params",))["active_params"]
        <= (result.bounds["active_params"])
    )


def test_a_user_trains_subnets_by_their_own_function() -> None:
    model, example = build("residual")
    seen: list[tuple[int, ...]] = []

    def train(model: nn.Module, sample: Any) -> None:
        for which in ("whole", "smallest", "random"):
            sample(which)
            activations: list[int] = []
            handle = model.stem.register_forward_hook(
                lambda module, args, output, found=activations: found.append(output.shape[1])
            )
            model(example)
            handle.remove()
            seen.append(tuple(activations))

    search(
        model,
        "autonas",
        {"flops": "60%"},
        dummy_input=example,
        calibration=batches(),
        config={"train_func": train},
    )
    assert seen[0] == (16,)
    assert seen[1] == (2,)


def test_training_lowers_the_loss_of_small_subnets() -> None:
    def smallest_loss(steps: int) -> float:
        model, example = build("residual")
        torch.manual_seed(0)
        result = search(
            model,
            "autonas",
            {"flops": "40%"},
            dummy_input=example,
            calibration=batches(),
            loss_func=loss,
            config={"steps": steps, "learning_rate": 0.05},
        )
        return -result.best["score"]

    assert smallest_loss(40) < 0.7 * smallest_loss(1)


def test_targets_that_match_no_group_are_an_error() -> None:
    model, example = build("residual")
    with pytest.raises(MatchError, match="stem"):
        search(
            model,
            "fastnas",
            {"flops": "60%"},
            dummy_input=example,
            calibration=batches(),
            mode_config={"targets": ["sten"]},
        )


def test_ignored_groups_stay_whole() -> None:
    model, example = build("residual")
    result = search(
        model,
        "gradnas",
        {"flops": "70%"},
        dummy_input=example,
        calibration=batches(),
        mode_config={"ignore": ["stem"]},
    )
    assert "stem" not in result.best["widths"]
    assert modewright.apply_mode(result.model, "export_prune").stem.out_channels == 16


def test_widths_stay_multiples_of_the_divisor() -> None:
    model, example = build("residual")
    result = search(
        model,
        "fastnas",
        {"flops": "60%"},
        dummy_input=example,
        calibration=batches(),
        mode_config={"divisor": 4},
    )
    assert all(width % 4 == 0 for width in result.best["widths"].values())


def test_a_search_without_data_says_what_is_missing() -> None:
    model, example = build("residual")
    with pytest.raises(DataError, match="calibration"):
        search(model, "gradnas", {"flops": "60%"}, dummy_input=example)
    with pytest.raises(ConfigError, match="score_func"):
        search(model, "fastnas", {"flops": "60%"}, dummy_input=example)
    with pytest.raises(DataError, match="dummy_input"):
        search(model, "fastnas", {"flops": "60%"}, score_func=lambda model: 0.0)
