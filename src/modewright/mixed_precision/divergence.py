# SPDX-License-Identifier: Apache-2.0
"""Sensitivity as it is: the divergence of the predictions with one group in low precision.

The blocks before the group's compute what they always do, so they are not run again: what the block
before put out is played back, and the network is replayed from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.calibration.blocks import find_blocks
from modewright.calibration.forward import evaluating, run_batch
from modewright.evaluation.outputs import main_output
from modewright.mixed_precision.gradient import OnStep, Scores
from modewright.mixed_precision.observing import called_parts
from modewright.mixed_precision.trials import Trial, standing_in


def divergence_scores(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    trials: Mapping[str, Mapping[str, Trial]],
    batches: Sequence[object],
    *,
    loss: str = "auto",
    on_step: OnStep | None = None,
) -> Scores:
    """Return for every group, by candidate, the divergence in nats for each position.

    Args:
        model: The original model.
        groups: Paths of layers.
        trials: By layer and candidate what the layer would become.
        batches: Calibration batches; the predictions for all of them are kept in memory.
        loss: As for ``gradient_scores``.
        on_step: Called after each group with how many are done, and how many there are.
    """
    scores: Scores = [{} for _ in groups]
    with torch.no_grad(), evaluating(model), called_parts():
        replay = _Replay(model)
        original = [main_output(run_batch(model, batch), "auto_quantize") for batch in batches]
        kl = loss == "kl" or (loss == "auto" and all(are_logits for _, are_logits in original))
        order = sorted(range(len(groups)), key=lambda g: replay.place(groups[g]))
        for done, number in enumerate(order, start=1):
            paths = groups[number]
            with replay.starting_at(replay.place(paths), batches) as run:
                for name in trials[paths[0]]:
                    layers = {model.get_submodule(p): trials[p][name] for p in paths}
                    with standing_in(layers):
                        each = [
                            _distance(wanted, main_output(run(i), "auto_quantize")[0], kl)
                            for i, (wanted, _) in enumerate(original)
                        ]
                    scores[number][name] = sum(each) / len(each)
            if on_step is not None:
                on_step(done, len(groups))
    return scores


def _distance(wanted: torch.Tensor, got: torch.Tensor, kl: bool) -> float:
    wanted, got = wanted.float(), got.float()
    if kl:
        rows = wanted.shape[:-1].numel()
        log_p, log_q = F.log_softmax(wanted, -1), F.log_softmax(got, -1)
        return float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)) / rows
    tiny = torch.finfo(torch.float32).tiny
    return float(F.mse_loss(got, wanted) / wanted.var().clamp_min(tiny))


class _Replay:
    """Runs the network from a block on.

    Args:
        model: The network. Without repeated blocks it is run from the beginning.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = list(find_blocks(model))
        self._outputs: list[Any] = []  # of the block before the place, one for each batch
        self._at = -1

    def place(self, paths: Sequence[str]) -> int:
        """Return the index of the first block that holds one of the layers; 0 if none does."""
        inside = [
            index
            for path in paths
            for index, block in enumerate(self._blocks)
            if path == block or path.startswith(f"{block}.")
        ]
        return min(inside) if len(inside) == len(paths) else 0

    @contextmanager
    def starting_at(self, place: int, batches: Sequence[object]) -> Iterator[Callable[[int], Any]]:
        """Lend a function that runs the network on a batch, from a block on."""
        before = [self._model.get_submodule(path) for path in self._blocks[:place]]
        if place and self._at != place:
            self._outputs = [self._recorded(before[-1], batch) for batch in batches]
            self._at = place
        held: list[Any] = [None]

        def played(*args: Any, **kwargs: Any) -> Any:
            return held[0]

        def run(number: int) -> Any:
            held[0] = self._outputs[number] if place else None
            return run_batch(self._model, batches[number])

        try:
            for block in before:
                block.__dict__["forward"] = played
            yield run
        finally:
            for block in before:
                block.__dict__.pop("forward", None)

    def _recorded(self, block: nn.Module, batch: object) -> Any:
        """Return what a block puts out in the original network."""
        found: list[Any] = []
        handle = block.register_forward_hook(lambda m, args, output: found.append(output))
        try:
            run_batch(self._model, batch)
        finally:
            handle.remove()
        return found[-1]
