# SPDX-License-Identifier: Apache-2.0
"""``AutonasSearcher``: train subnets that share weights, then breed the best of them.

After training (see ``supernet``) a subnet needs no fine-tuning to be scored. Evolution keeps the
best of a population, crosses and mutates them, and lets every child grow as far as the constraints
allow (Cai et al. 2020: once for all). The trained weights stay in the network.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch

from modewright.errors import DataError
from modewright.pruning.space import choose
from modewright.pruning.width.choices import smallest, whole
from modewright.pruning.width.searcher import WidthSearcher, refilled
from modewright.pruning.width.supernet import Distillation, SupernetTraining


class AutonasSearcher(WidthSearcher):
    """Choose widths by evolution among subnets that were trained together.

    Attributes:
        steps_done: How many steps of training are behind.
        weights: Parameters and buffers after these steps.
        velocity: The momentum of the training.
        generation: How many generations are behind.
        population: Their last one, as widths.
    """

    steps_done: int
    weights: dict[str, torch.Tensor]
    velocity: dict[str, torch.Tensor]
    generation: int
    population: list[dict[str, int]]

    @property
    def default_search_config(self) -> dict[str, Any]:
        """See the base class.

        ``train_func``: ``(model, sample) -> None`` trains by itself; ``sample()`` sets the model to
        a random subnet, ``sample("whole")`` and ``sample("smallest")`` to these. Without it:
        ``steps`` of stochastic gradient descent with ``learning_rate`` and ``momentum`` on the
        calibration batches, ``subnets`` random ones in each, with ``loss_func`` or by distillation
        from what the network was; progress is saved every ``save_every`` steps. ``population``,
        ``generations``, ``mutation``: of the evolution.
        ``seed``: of everything that is drawn.
        """
        training = {"train_func": None, "steps": 200, "learning_rate": 0.01, "momentum": 0.9}
        evolution = {"population": 16, "generations": 6, "mutation": 0.2}
        return {
            **super().default_search_config,
            **training,
            "subnets": 2,
            "save_every": 25,
            **evolution,
            "seed": 0,
        }

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """See the base class."""
        training = {"steps_done": 0, "weights": {}, "velocity": {}}
        return {**super().default_state_dict, **training, "generation": 0, "population": []}

    def run_search(self) -> None:
        """Train, then breed."""
        self._train()
        choose(self.model, self.groups, {})
        generations = int(self.config["generations"])
        if not self.population:
            self.population = self._first_generation()
        while self.generation < generations and not self.exhausted:
            self.population = self._next_generation()
            self.generation += 1
            self.save_search_checkpoint()
        self.set_best(max(self.population, key=self.score_of))

    def _train(self) -> None:
        if self.config["train_func"] is not None:
            if not self.weights:
                self.config["train_func"](self.model, self._sampler(self._draw(0)))
                self._keep_weights(None, int(self.config["steps"]))
            self._set_weights()
            return
        batches = list(self.config["calibration"] or ())
        if not batches:
            raise DataError(
                "autonas trains subnets: pass calibration=batches, or a train_func=(model, sample)."
            )
        loss_func = self.config["loss_func"] or Distillation(self.model, batches)
        self._set_weights()
        steps = int(self.config["steps"])
        training = SupernetTraining(
            self.model,
            batches,
            loss_func,
            learning_rate=self.config["learning_rate"],
            momentum=self.config["momentum"],
            steps=steps,
        )
        training.set_velocity(self.velocity)
        for number in range(self.steps_done, steps):
            sample = self._sampler(self._draw(number))
            random_ones = [sample] * int(self.config["subnets"])
            ends = [partial(sample, "whole"), partial(sample, "smallest")]
            training.step(number, [*ends, *random_ones])
            self.show_progress(number + 1, steps)
            if (number + 1) % self.config["save_every"] == 0 or number + 1 == steps:
                self._keep_weights(training, number + 1)

    def _draw(self, number: int) -> random.Random:
        """Return what draws in one step or generation, the same one at every call."""
        return random.Random(int(self.config["seed"]) * 1_000_003 + number)  # noqa: S311

    def _sampler(self, draw: random.Random) -> Any:
        def sample(which: str = "random") -> None:
            widths = {
                "whole": lambda: whole(self.found),
                "smallest": lambda: smallest(self.found),
                "random": lambda: {c.name: draw.choice(c.widths) for c in self.found},
            }[which]()
            choose(self.model, self.groups, self.kept(widths))

        return sample

    def _keep_weights(self, training: SupernetTraining | None, steps: int) -> None:
        self.steps_done = steps
        self.weights = {name: t.detach() for name, t in self.model.state_dict().items()}
        self.velocity = {} if training is None else training.velocity()
        self.save_search_checkpoint()

    def _set_weights(self) -> None:
        """Give the network the weights of a training that goes on."""
        if self.weights:
            self.model.load_state_dict(self.weights)

    def _first_generation(self) -> list[dict[str, int]]:
        draw = self._draw(-1)
        start = [whole(self.found)]
        start += [
            {c.name: draw.choice(c.widths) for c in self.found}
            for _ in range(int(self.config["population"]) - 1)
        ]
        return [self._tried(self._repaired(widths, draw)) for widths in start]

    def _next_generation(self) -> list[dict[str, int]]:
        draw = self._draw(-2 - self.generation)
        size = int(self.config["population"])
        parents = sorted(self.population, key=self.score_of, reverse=True)[: max(2, size // 4)]
        children: list[dict[str, int]] = []
        while len(children) < size - len(parents):
            one, other = draw.choice(parents), draw.choice(parents)
            child = {}
            for choice in self.found:
                child[choice.name] = draw.choice((one, other))[choice.name]
                if draw.random() < self.config["mutation"]:
                    child[choice.name] = draw.choice(choice.widths)
            children.append(self._tried(self._repaired(child, draw)))
        return [*parents, *children]

    def _repaired(self, widths: dict[str, int], draw: random.Random) -> dict[str, int]:
        """Return a subnet near by that fits, and has no room left."""
        now = dict(widths)
        while not self.fits(now):
            choice = draw.choice(self.found)
            now[choice.name] = choice.narrower(now[choice.name])
        return refilled(self, now, {name: draw.random() for name in now})

    def _tried(self, widths: dict[str, int]) -> dict[str, int]:
        score = self.score_of(widths)
        total = int(self.config["population"]) * (1 + int(self.config["generations"]))
        self.record(self.costs(widths), score, dict(widths), total=total)
        return widths
