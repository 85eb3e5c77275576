# SPDX-License-Identifier: Apache-2.0
"""``BaseSearcher``: the life cycle of a search, and a checkpoint from which a killed one goes on.

A searcher is written by giving ``default_state_dict`` (what the search knows, as JSON values and
tensors) and ``run_search``. Every key of the state becomes an attribute; ``run_search`` reads and
writes these attributes, calls :meth:`BaseSearcher.save_search_checkpoint` whenever losing the work
would hurt, and skips on entry what the attributes say is done.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modewright._version import __version__
from modewright.calibration.forward import evaluating
from modewright.errors import CheckpointError, ConfigError, SearchError, did_you_mean
from modewright.modes.codec import canonical, copy_data, dumps, join_tensors, loads, split_tensors
from modewright.modes.constraints import CONSTRAINT_NAMES, Constraints
from modewright.modes.model_like import all_modules
from modewright.modes.storage import READ_ERRORS, replace_file

HEADER_KEY = "modewright.search"
CALLER_OPTIONS = ("checkpoint", "verbose", "calibration", "score_func", "loss_func", "on_trial")
"""Options of every search that its caller brings; the others may stand in a recipe."""
_GIVEN = ("model", "constraints", "config", "dummy_input", "bounds", "points")


class BaseSearcher(ABC):
    """Base of all searchers.

    Attributes:
        serves_other_constraints: Whether what the state holds (scores, say) does not depend on the
            constraints: then a checkpoint serves a search under others, which finds ``best`` anew.
        model: The model that is searched.
        constraints: Upper bounds, absolute ``{"params": 2e6}`` or relative ``{"flops": "60%"}``.
        bounds: The constraints as absolute bounds, once :meth:`bound` was called.
        dummy_input: An input to trace or measure the model with, if the search needs one.
        config: The search config, defaults filled in.
        points: What was visited, in order: what :meth:`record` was given.
        best: What the search found; :meth:`search` returns it.
    """

    serves_other_constraints: ClassVar[bool] = False

    model: nn.Module
    constraints: dict[str, float | str]
    bounds: Constraints | None
    dummy_input: Any
    config: dict[str, Any]
    points: list[dict[str, Any]]
    best: dict[str, Any]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """All config keys and their defaults; subclasses add to these.

        ``checkpoint``: a path to save progress to and go on from. ``verbose``: show progress.
        ``calibration``: batches, or a function that runs the model. ``score_func``:
        ``(model) -> float``, higher is better. ``loss_func``: ``(model, batch) -> tensor``, a mean.
        ``max_seconds`` and ``max_trials``: when to stop trying. ``on_trial``: called with the
        number of trials so far and how many there will be, if that is known.
        None of their values is ever saved.
        """
        return {
            "checkpoint": None,
            "verbose": True,
            "calibration": None,
            "score_func": None,
            "loss_func": None,
            "max_seconds": None,
            "max_trials": None,
            "on_trial": None,
        }

    @property
    @abstractmethod
    def default_state_dict(self) -> dict[str, Any]:
        """What the search knows at its start: JSON values and tensors, each an attribute later."""

    @abstractmethod
    def run_search(self) -> None:
        """Search; leave the outcome in :attr:`best`."""

    def sanitize_search_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return ``config`` with all defaults filled in.

        Raises:
            ConfigError: It has a key that this searcher does not know.
        """
        defaults = self.default_search_config
        for key in config or {}:
            if key not in defaults:
                raise ConfigError(
                    f"{type(self).__name__} has no search option {key!r}."
                    f"{did_you_mean(str(key), defaults)} Known: {', '.join(defaults)}."
                )
        return {**defaults, **(config or {})}

    def before_search(self) -> None:  # noqa: B027
        """Prepare the search; called after the checkpoint was read."""

    def after_search(self) -> None:  # noqa: B027
        """Finish the search, for example by setting the model to the best subnet."""

    @final
    def search(
        self,
        model: nn.Module,
        constraints: Mapping[str, float | str],
        dummy_input: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Search ``model`` under ``constraints`` and return what was found.

        Args:
            model: The model; every module's train flag is put back at the end.
            constraints: Upper bounds, absolute or relative.
            dummy_input: An input of the model, where the searcher needs one.
            config: Options over :attr:`default_search_config`.

        Returns:
            :attr:`best`.

        Raises:
            ConfigError: An option is unknown, or the state is not JSON values and tensors.
            CheckpointError: The checkpoint is damaged, or of another search.
            SearchError: The constraints cannot be met.
        """
        self.config = self.sanitize_search_config(config)
        self.model, self.dummy_input = model, dummy_input
        self.constraints = dict(constraints)
        self.bounds, self.points = None, []
        self._reset()
        self._started = time.monotonic()
        path = self._checkpoint_path
        if path is not None and path.exists():
            self._load(path)
        training = [(module, module.training) for module in all_modules(model)]
        try:
            self.before_search()
            self.run_search()
            self.after_search()
        finally:
            for module, flag in training:
                module.training = flag
        return self.best

    def bound(
        self,
        full_costs: Mapping[str, float],
        smallest: Mapping[str, float] | None = None,
        *,
        names: Iterable[str] = CONSTRAINT_NAMES,
    ) -> Constraints:
        """Read the constraints, resolve relative ones, and refuse what cannot be met.

        Args:
            full_costs: What the whole model costs.
            smallest: For each cost the least value in the search space.
            names: The costs that this search can bound.

        Returns:
            Absolute bounds, kept as :attr:`bounds`.

        Raises:
            ConfigError: A constraint is unknown or no number.
            SearchError: Nothing in the search space meets one; the message names the closest.
        """
        self.bounds = Constraints.parse(self.constraints, names).resolve(full_costs)
        if smallest is not None:
            self.bounds.require_reachable(smallest, "the smallest of the search space")
        return self.bounds

    def score(self) -> float:
        """Return how good the model is as it is now set; higher is better.

        That is ``score_func(model)``, or the negative mean of ``loss_func(model, batch)`` over the
        calibration batches.

        Raises:
            ConfigError: There is neither.
        """
        if self.config["score_func"] is not None:
            return float(self.config["score_func"](self.model))
        loss_func, batches = self.config["loss_func"], self.config["calibration"]
        if loss_func is None or batches is None or callable(batches):
            raise ConfigError(
                f"{type(self).__name__} scores what it tries: pass score_func=(model) -> float, "
                "higher is better; or loss_func=(model, batch) -> tensor with calibration batches."
            )
        with torch.no_grad(), evaluating(self.model):
            losses = [float(loss_func(self.model, batch)) for batch in batches]
        return -sum(losses) / len(losses)

    def record(
        self,
        costs: Mapping[str, float],
        score: float,
        subnet: Any = None,
        *,
        total: int | None = None,
    ) -> None:
        """Note a point of the search space that was visited, and show progress.

        Args:
            costs: What it costs.
            score: How good it is; higher is better.
            subnet: What was chosen there: JSON values.
            total: How many points there will be, if that is known.
        """
        self.points.append({"costs": dict(costs), "score": float(score), "subnet": subnet})
        self.show_progress(len(self.points), total)

    def show_progress(self, done: int, total: int | None = None) -> None:
        """Call ``on_trial``."""
        if self.config["on_trial"] is not None:
            self.config["on_trial"](done, total)

    @property
    def exhausted(self) -> bool:
        """Whether ``max_trials`` points were visited, or ``max_seconds`` have passed."""
        trials, seconds = self.config["max_trials"], self.config["max_seconds"]
        tried_enough = trials is not None and len(self.points) >= trials
        return tried_enough or (seconds is not None and time.monotonic() - self._started >= seconds)

    def state_dict(self) -> dict[str, Any]:
        """Return what the search knows now, a copy."""
        names = ("best", *self.default_state_dict, *(["points"] if self.points else []))
        state = {name: getattr(self, name) for name in names}
        result: dict[str, Any] = copy_data(
            canonical(state, f"The state of {type(self).__name__}", error=ConfigError)
        )
        return result

    def save_search_checkpoint(self) -> None:
        """Write what the search knows to ``config["checkpoint"]``; without a path, do nothing."""
        path = self._checkpoint_path
        if path is None:
            return
        data, tensors = split_tensors(self.state_dict(), "state")
        body = {"fingerprint": self._fingerprint(), "version": __version__, "state": data}
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {HEADER_KEY: dumps({**body, "sha256": _digest(body)})}
        replace_file(path, lambda temporary: save_file(stored, temporary, metadata=metadata))

    @property
    def _checkpoint_path(self) -> Path | None:
        path = self.config["checkpoint"]
        return None if path is None else Path(path)

    def _reset(self) -> None:
        for name, value in {"best": {}, **self.default_state_dict}.items():
            if name in _GIVEN:
                raise SearchError(
                    f"default_state_dict of {type(self).__name__} may not hold {name}."
                )
            where = f"default_state_dict[{name!r}] of {type(self).__name__}"
            setattr(self, name, copy_data(canonical(value, where, error=ConfigError)))

    def _fingerprint(self) -> str:
        """Return what must be the same for a search to go on: searcher, constraints, parameters."""
        shapes = [[n, str(p.dtype), list(p.shape)] for n, p in self.model.named_parameters()]
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        constraints = canonical(self.constraints, "constraints", error=ConfigError)
        if self.serves_other_constraints:
            constraints = None
        return _digest({"searcher": name, "constraints": constraints, "parameters": shapes})

    def _load(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as reader:
                text = (reader.metadata() or {}).get(HEADER_KEY)
                tensors = {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118
        except READ_ERRORS as error:
            raise CheckpointError(
                f"The search checkpoint {path} cannot be read: {error}"
            ) from error
        if text is None:
            raise CheckpointError(f"{path} is not the checkpoint of a search.")
        body = loads(text, f"The search checkpoint {path}", error=CheckpointError)
        digest = body.pop("sha256", None) if isinstance(body, dict) else None
        if digest is None or digest != _digest(body):
            raise CheckpointError(
                f"The search checkpoint {path} is damaged. Delete it to start anew."
            )
        if body.get("fingerprint") != self._fingerprint():
            raise CheckpointError(
                f"The search checkpoint {path} belongs to another search: the searcher, the "
                "constraints or the model differ. Name another file, or delete this one."
            )
        state = join_tensors(body.get("state"), tensors, str(path), error=CheckpointError)
        expected = {"best", *self.default_state_dict}
        found = set(state) - {"points"} if isinstance(state, dict) else set()
        if found != expected or not isinstance(state.get("points", []), list):
            raise CheckpointError(
                f"The search checkpoint {path} holds {sorted(found)}; {sorted(expected)} was "
                "expected. It is of another version: delete it to start anew."
            )
        for name, value in state.items():
            setattr(self, name, value)
        if self.serves_other_constraints:
            self.best = {}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(dumps(body).encode()).hexdigest()
