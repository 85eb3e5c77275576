# SPDX-License-Identifier: Apache-2.0
"""The life cycle of a search, and going on from its checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modewright.errors import CheckpointError, ConfigError, SearchError
from modewright.modes.apply import apply_mode
from modewright.modes.codec import dumps
from modewright.modes.registry import ModeRegistry
from modewright.modes.searcher import HEADER_KEY, BaseSearcher, _digest
from support.example_modes import WidthSearcher
from support.models import MLP

BOUND = {"width": 20}


class Recorder(BaseSearcher):
    """Notes what is called."""

    calls: list[str]

    @property
    def default_state_dict(self) -> dict[str, Any]:
        return {"calls": []}

    def sanitize_search_config(self, config: Any) -> dict[str, Any]:
        self.sanitized = True
        return super().sanitize_search_config(config)

    def before_search(self) -> None:
        self.calls.append("before")

    def run_search(self) -> None:
        self.calls.append("run")
        self.best = {"answer": 42}

    def after_search(self) -> None:
        self.calls.append("after")


@pytest.fixture
def space(registry: ModeRegistry) -> nn.Module:
    return apply_mode(MLP.make(), "widths", registry=registry)


def search(model: nn.Module, searcher: WidthSearcher | None = None, **config: Any) -> Any:
    return (searcher or WidthSearcher()).search(model, BOUND, MLP.inputs, config)


def test_life_cycle_has_a_fixed_order() -> None:
    searcher = Recorder()

    assert searcher.search(MLP.make(), {}) == {"answer": 42}
    assert searcher.calls == ["before", "run", "after"]
    assert searcher.sanitized
    assert searcher.state_dict() == {"best": {"answer": 42}, "calls": ["before", "run", "after"]}


def test_searcher_can_be_used_again_from_its_start() -> None:
    searcher = Recorder()
    searcher.search(MLP.make(), {})
    searcher.search(MLP.make(), {})

    assert searcher.calls == ["before", "run", "after"]


def test_unknown_option_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'chekpoint'.*'checkpoint'"):
        Recorder().search(MLP.make(), {}, config={"chekpoint": "x"})


def test_defaults_are_filled_in() -> None:
    searcher = Recorder()
    searcher.search(MLP.make(), {}, config={"verbose": False})

    assert searcher.config == {**searcher.default_search_config, "verbose": False}
    assert searcher.config["checkpoint"] is None


def test_searcher_finds_the_best_subnet_within_the_bound(space: nn.Module) -> None:
    searcher = WidthSearcher()
    best = search(space, searcher)

    assert sum(best["widths"].values()) <= 20
    assert searcher.tried == 9
    assert [block.width for block in space.blocks] == list(best["widths"].values())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt], ids=str)
def test_train_flags_are_put_back_also_after_an_error(error: type[BaseException] | None) -> None:
    class Trains(Recorder):
        def run_search(self) -> None:
            self.model.train()
            self.model.blocks[0].eval()
            if error is not None:
                raise error

    model = MLP.make()
    model.blocks[1].train()
    before = [m.training for m in model.modules()]
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected:
        Trains().search(model, {})
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    "name", ["model", "config", "constraints", "dummy_input", "bounds", "points"]
)
def test_state_may_not_shadow_what_the_search_is_given(name: str) -> None:
    class Shadows(Recorder):
        default_state_dict = {name: 1}  # noqa: RUF012

    with pytest.raises(SearchError, match=f"may not hold {name}"):
        Shadows().search(MLP.make(), {})


def test_state_of_other_than_json_and_tensors_is_refused() -> None:
    class Bad(Recorder):
        default_state_dict = {"calls": {1, 2}}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"default_state_dict\['calls'\]"):
        Bad().search(MLP.make(), {})


def test_default_state_is_copied_for_every_search() -> None:
    shared: list[str] = []

    class Shares(Recorder):
        default_state_dict = {"calls": shared}  # noqa: RUF012

    Shares().search(MLP.make(), {})
    assert shared == []


# --- bounds, scores, visited points -------------------------------------------------------------


def test_bounds_are_resolved_and_what_cannot_be_met_is_refused_first() -> None:
    class Bounded(Recorder):
        def before_search(self) -> None:
            self.bound({"params": 200.0, "flops": 50.0}, {"params": 60.0, "flops": 1.0})

    searcher = Bounded()
    searcher.search(MLP.make(), {"params": "40%", "flops": 20})
    assert {b.name: b.value for b in searcher.bounds.bounds} == {"params": 80, "flops": 20}
    with pytest.raises(SearchError, match="params = 60"):
        Bounded().search(MLP.make(), {"params": "20%"})
    with pytest.raises(ConfigError, match="'width'"):
        Bounded().search(MLP.make(), {"width": 3})


def test_score_is_the_callers_function_or_the_negative_mean_loss() -> None:
    scores: list[float] = []

    class Scores(Recorder):
        def run_search(self) -> None:
            scores.append(self.score())

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert not model.training
        return model(batch).square().mean()

    model = MLP.make().train()
    with torch.no_grad():
        expected = [float(model(batch).square().mean()) for batch in MLP.batches]
    Scores().search(model, {}, config={"score_func": lambda model: 3})
    Scores().search(model, {}, config={"loss_func": loss, "calibration": MLP.batches})
    assert scores == [3.0, pytest.approx(-sum(expected) / 2)]
    assert model.training
    with pytest.raises(ConfigError, match="score_func"):
        Scores().search(model, {}, config={"calibration": MLP.batches})


class Visitor(Recorder):
    """Visits five points."""

    def run_search(self) -> None:
        while len(self.points) < 5 and not self.exhausted:
            number = len(self.points)
            self.record({"params": float(number)}, -number, {"width": number}, total=5)
            self.save_search_checkpoint()


def test_visited_points_are_kept_and_shown() -> None:
    searcher = Visitor()
    shown: list[tuple[int, int | None]] = []
    searcher.search(MLP.make(), {}, config={"on_trial": lambda *a: shown.append(a)})

    assert shown == [(number, 5) for number in range(1, 6)]
    assert searcher.points[2] == {"costs": {"params": 2.0}, "score": -2.0, "subnet": {"width": 2}}


def test_a_search_stops_after_as_many_trials_or_seconds_as_it_may_take() -> None:
    searcher = Visitor()
    searcher.search(MLP.make(), {}, config={"max_trials": 2})
    assert len(searcher.points) == 2
    searcher.search(MLP.make(), {}, config={"max_seconds": 0})
    assert searcher.points == []


def test_visited_points_survive_in_the_checkpoint(tmp_path: Path) -> None:
    path, searcher = tmp_path / "search", Visitor()
    searcher.search(MLP.make(), {}, config={"max_trials": 3, "checkpoint": path})
    searcher.search(MLP.make(), {}, config={"checkpoint": path})

    assert [point["subnet"]["width"] for point in searcher.points] == [0, 1, 2, 3, 4]


def test_what_does_not_depend_on_constraints_serves_others(tmp_path: Path) -> None:
    class Scored(Recorder):
        serves_other_constraints = True
        default_state_dict = {"table": []}  # noqa: RUF012

        def before_search(self) -> None:
            self.found = list(self.table)

        def run_search(self) -> None:
            assert self.best == {}
            self.table = [3, 1]
            self.best = {"answer": self.constraints["params"]}
            self.save_search_checkpoint()

        def after_search(self) -> None:
            pass

    path, searcher = tmp_path / "search", Scored()
    searcher.search(MLP.make(), {"params": 1}, config={"checkpoint": path})
    assert searcher.found == []
    best = searcher.search(MLP.make(), {"params": 2}, config={"checkpoint": path})
    assert searcher.found == [3, 1]
    assert best == {"answer": 2}


# --- checkpoints ---------------------------------------------------------------------------------


def test_resumed_search_gives_the_answer_of_an_uninterrupted_one(
    space: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "search.safetensors"
    whole = WidthSearcher()
    expected = search(space, whole)

    with pytest.raises(KeyboardInterrupt):
        search(space, checkpoint=path, stop_after=4)
    resumed = WidthSearcher()
    tries: list[Any] = []
    resumed._try = lambda *args: (tries.append(args), WidthSearcher._try(resumed, *args))

    assert search(space, resumed, checkpoint=str(path)) == expected
    assert len(tries) == 5
    assert resumed.errors.equal(whole.errors)


def test_finished_search_is_not_repeated(space: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "search"
    expected = search(space, checkpoint=path)
    again = WidthSearcher()
    again._try = lambda *args: pytest.fail("searched again")

    assert search(space, again, checkpoint=path) == expected


def test_without_a_path_nothing_is_written(
    space: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    search(space)

    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoint(space: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "search.safetensors"
    search(space, checkpoint=path)
    return path


def edit(path: Path, change: Any) -> None:
    """Change the body of a search checkpoint, and make its digest right again."""
    with safe_open(str(path), "pt") as reader:
        body = json.loads(reader.metadata()[HEADER_KEY])
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    del body["sha256"]
    body = change(body, tensors) or body
    text = dumps({**body, "sha256": _digest(body)})
    save_file(tensors, path, metadata={HEADER_KEY: text})


FOREIGN: dict[str, Any] = {
    "no state": lambda body, tensors: {"fingerprint": body["fingerprint"]},
    "state no dict": lambda body, tensors: {**body, "state": 3},
    "state with another key": lambda body, tensors: body["state"].update(more=1),
    "state without a key": lambda body, tensors: body["state"].pop("tried") and None,
    "points no list": lambda body, tensors: body["state"].update(points=3),
    "tensor missing": lambda body, tensors: tensors.clear(),
    "other fingerprint": lambda body, tensors: {**body, "fingerprint": "0"},
    "future nesting": lambda body, tensors: body["state"].update(best=nest(90)),
}


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_checkpoint_with_other_contents_is_refused(
    change: Any, checkpoint: Path, space: nn.Module
) -> None:
    edit(checkpoint, change)

    with pytest.raises(CheckpointError):
        search(space, checkpoint=checkpoint)


def test_checkpoint_of_another_search_is_refused(
    checkpoint: Path, space: nn.Module, registry: ModeRegistry
) -> None:
    with pytest.raises(CheckpointError, match="belongs to another search"):
        WidthSearcher().search(space, {"width": 8}, MLP.inputs, {"checkpoint": checkpoint})
    space.head = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match="belongs to another search"):
        search(space, checkpoint=checkpoint)


def test_damaged_checkpoint_is_refused_and_kept(checkpoint: Path, space: nn.Module) -> None:
    whole = checkpoint.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"\x80\x04K*.", whole + b"x"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            search(space, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == damaged
    place = whole.index(b"tried")
    checkpoint.write_bytes(whole[:place] + b"T" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        search(space, checkpoint=checkpoint)


def test_folder_and_foreign_file_are_no_search_checkpoints(
    space: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError):
        search(space, checkpoint=tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not the checkpoint of a search"):
        search(space, checkpoint=tmp_path / "other.safetensors")


@pytest.mark.parametrize("bound", [float("inf"), object(), {1}], ids=["infinity", "object", "set"])
def test_bound_that_cannot_be_written_down_is_a_config_error(
    bound: Any, space: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="constraints"):
        WidthSearcher().search(
            space, {"width": 20, "other": bound}, MLP.inputs, {"checkpoint": tmp_path / "x"}
        )
