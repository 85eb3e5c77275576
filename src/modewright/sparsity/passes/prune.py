# SPDX-License-Identifier: Apache-2.0
"""Modes ``wanda``, ``sparsegpt`` and ``alps``: choose masks from data, block by block.

The layers of a block are solved in the order in which they run, so that each sees what the ones
before it became. At the end the kept weights may be trained together (``distil``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modewright.calibration import blockwise
from modewright.calibration.blockwise import OnBlock
from modewright.calibration.driver import Block
from modewright.calibration.forward import run_batch, run_calibration
from modewright.calibration.moments import second_moments
from modewright.calibration.outputs import repeatable_batches
from modewright.calibration.precision import Precision, usable_precision
from modewright.errors import DataError
from modewright.layers.masks import add_masks, masked_layers, remove_masks, set_masked
from modewright.layers.matrices import from_matrix, rows_of, to_matrix
from modewright.least_squares import corrected_target, output_error
from modewright.sparsity.algorithms.alps import alps
from modewright.sparsity.algorithms.masks import choose_mask
from modewright.sparsity.algorithms.scores import wanda_scores
from modewright.sparsity.algorithms.sparsegpt import sparsegpt
from modewright.sparsity.config import (
    AlpsConfig,
    CalibratedSparseConfig,
    SparsegptConfig,
    WandaConfig,
)
from modewright.sparsity.passes.distil import distil
from modewright.sparsity.passes.magnitude import allot, mask_by_magnitude
from modewright.sparsity.passes.original import Original
from modewright.sparsity.passes.records import Metadata, record
from modewright.sparsity.planning import LayerSparsity, SparsePlan, plan_layers

NOT_REACHED = "no calibration data reaches it inside a block"
Solver = Callable[[torch.Tensor, torch.Tensor, LayerSparsity], tuple[torch.Tensor, torch.Tensor]]


def wanda(model: nn.Module, config: WandaConfig, **keywords: Any) -> tuple[nn.Module, Metadata]:
    """Mask every layer by its weights times the length of their inputs; see :func:`prune`."""

    def solve(
        weight: torch.Tensor, hessian: torch.Tensor, layer: LayerSparsity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = wanda_scores(weight, hessian)
        mask = choose_mask(scores, layer.pattern, layer.sparsity, by_row=True)
        return weight * mask, mask

    return prune(model, config, solve, mode="wanda", **keywords)


def sparsegpt_pass(
    model: nn.Module, config: SparsegptConfig, **keywords: Any
) -> tuple[nn.Module, Metadata]:
    """Solve every layer by :func:`sparsegpt`; see :func:`prune`."""

    def solve(
        weight: torch.Tensor, hessian: torch.Tensor, layer: LayerSparsity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sparsegpt(weight, hessian, layer.pattern, layer.sparsity, damping=config.damping)

    return prune(model, config, solve, mode="sparsegpt", **keywords)


def alps_pass(model: nn.Module, config: AlpsConfig, **keywords: Any) -> tuple[nn.Module, Metadata]:
    """Solve every layer by :func:`alps`; see :func:`prune`."""

    def solve(
        weight: torch.Tensor, hessian: torch.Tensor, layer: LayerSparsity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return alps(
            weight,
            hessian,
            layer.pattern,
            layer.sparsity,
            damping=config.damping,
            iterations=config.iterations,
            refit_iterations=config.refit_iterations,
        )

    return prune(model, config, solve, mode="alps", **keywords)


def prune(
    model: nn.Module,
    config: CalibratedSparseConfig,
    solve: Solver,
    *,
    mode: str,
    calibration: object = None,
    on_batch: OnBlock | None = None,
    checkpoint: str | Path | None = None,
) -> tuple[nn.Module, Metadata]:
    """Walk the blocks, make every layer sparse, and train what is kept if the config says so.

    Raises:
        DataError: There is no calibration data, or none that can be gone through again.
        MatchError: A pattern matches nothing that can be sparse.
    """
    if calibration is None:
        raise DataError(
            f"mode {mode!r} needs data that the model is run on: pass "
            "mode_kwargs={'calibration': batches}."
        )
    batches = repeatable_batches(calibration, mode) if config.epochs else ()
    plan = plan_layers(model, config, mode=mode, needs_rows=True)
    if config.allocation == "error":
        allot(model, plan, config, input_power(model, plan, calibration))
    original = Original(model)
    for path, layer in plan.layers.items():
        add_masks(model.get_submodule(path), layer.names)
    task = _Task(model, config, plan, solve, original)
    precision = _precision(model, calibration, config.precision)
    blocks = blockwise.walk(
        model,
        calibration,
        task.solve_block,
        mode=mode,
        as_original=original,
        settings=[config],
        precision=precision,
        keep_original=task.corrects,
        on_batch=on_batch,
        checkpoint=checkpoint,
    )
    reached = _settle(model, plan, blocks)
    history: list[float] = []
    if config.epochs and masked_layers(model):
        history = distil(model, original, batches, config, precision, on_batch)
    return model, record(
        model,
        {path: str(layer.pattern) for path, layer in plan.layers.items()},
        {**plan.skipped, **{p: e["skipped"] for p, e in reached.items() if "skipped" in e}},
        unmatched=list(plan.unmatched),
        solved={path: entry for path, entry in reached.items() if "relative_error" in entry},
        loss=history,
    )


def _settle(model: nn.Module, plan: SparsePlan, blocks: dict[str, Metadata]) -> dict[str, Metadata]:
    """Leave layers dense that the walk did not reach; return what it says of others, by path."""
    found = {
        f"{block}.{name}".strip("."): entry
        for block, entries in blocks.items()
        for name, entry in entries.items()
    }
    for path in plan.layers:
        if path not in found:
            remove_masks(model.get_submodule(path))
            plan.skipped[path] = NOT_REACHED
    return {path: entry for path, entry in found.items() if path in plan.layers}


def _precision(model: nn.Module, calibration: object, precision: Precision) -> Precision:
    """Return in which precision to run the network: zeros lose far more than bfloat16 does."""
    if precision != "auto":
        return precision
    if not isinstance(calibration, Sequence) or not calibration:
        return "float32"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = usable_precision(lambda: run_batch(model, calibration[0]), device, precision)
    return "float32" if found == "auto" else found


class _Task:
    """Solves the blocks of one model.

    Attributes:
        corrects: Whether layers are fitted to the output of the original network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CalibratedSparseConfig,
        plan: SparsePlan,
        solve: Solver,
        original: Original,
    ) -> None:
        self._layers = {model.get_submodule(path): layer for path, layer in plan.layers.items()}
        self._config, self._solve, self._original = config, solve, original
        self.corrects = isinstance(config, SparsegptConfig) and config.correct_inputs

    def solve_block(self, block: Block) -> Metadata:
        """Make the layers of one block sparse."""
        if self.corrects:
            block.original_outputs()
        wanted = {n: m for n, m in block.module.named_modules() if m in self._layers}
        found: Metadata = {}
        for members in blockwise.by_input(block, wanted):
            first = next(iter(members.values()))
            hessian, cross, tokens = second_moments(
                self._rows(block, first),
                self._rows(block, first, original=True) if self.corrects else None,
                self._config.max_row_norm,
            )
            for name, module in members.items():
                found[name] = self._solve_layer(module, hessian, cross, tokens)
        return found

    def _rows(self, block: Block, module: nn.Module, *, original: bool = False) -> Any:
        for found in blockwise.inputs(block, module, original=original):
            yield None if found is None else rows_of(module, found)

    def _solve_layer(
        self, module: nn.Module, hessian: torch.Tensor, cross: torch.Tensor | None, tokens: int
    ) -> Metadata:
        layer, config = self._layers[module], self._config
        if tokens < max(config.min_tokens, 1):
            mask_by_magnitude(module, layer)
            least = max(config.min_tokens, 1)
            return {"skipped": f"it saw only {tokens} of {least} tokens: masked by magnitude"}
        (name,) = layer.names
        weight = to_matrix(module, name, self._original.weight(module, name).detach()).float()
        target = weight
        if cross is not None and isinstance(config, SparsegptConfig):
            target = corrected_target(weight, hessian, cross, damping=config.correction_damping)
        values, mask = self._solve(target, hessian, layer)
        shaped = from_matrix(module, name, mask)
        set_masked(module, name, from_matrix(module, name, values), shaped)
        power = output_error(target, torch.zeros_like(target), hessian).sum().clamp_min(1e-30)
        return {"relative_error": float(output_error(target, values, hessian).sum() / power)}


def input_power(model: nn.Module, plan: SparsePlan, calibration: object) -> dict[str, torch.Tensor]:
    """Run a model once; return the sum of squares of every input of the planned layers, ``[in]``.

    A layer that the data does not reach is left out.
    """
    power: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares = rows_of(module, args[0]).square().sum(0)
            power[path] = power.get(path, torch.zeros_like(squares)) + squares

        return hook

    with ExitStack() as hooks:
        for path in plan.layers:
            handle = model.get_submodule(path).register_forward_pre_hook(note(path))
            hooks.callback(handle.remove)
        run_calibration(model, calibration)
    return power
