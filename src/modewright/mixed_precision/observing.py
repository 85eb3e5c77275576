# SPDX-License-Identifier: Apache-2.0
"""One look at the network: which layers share an input, and how large each input is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import run_calibration
from modewright.mixed_precision.trials import twin
from modewright.quantization.layers import QuantizedLayer, insert_quantizers
from modewright.quantization.passes.records import row_weights
from modewright.quantization.precision import automatic_precision, usable_precision
from modewright.quantization.representation import SchemeConfig


@dataclass
class Observed:
    """What was seen of the layers that are chosen for.

    Attributes:
        importance: By layer the mean square of each of its inputs, ``[in]``, over their mean;
            layers that multiply no rows have none.
        shared: Layers that were given the same input by the same module, as sets of paths.
        reached: The layers that data reached.
    """

    importance: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: list[set[str]] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)


def observe(model: nn.Module, layers: Sequence[str], calibration: object) -> Observed:
    """Run the data once.

    Args:
        model: The model, without quantizers.
        layers: Paths of the layers to look at.
        calibration: Batches, or a function that runs the model.
    """
    observed = Observed()
    inputs: dict[tuple[int, str], set[str]] = {}
    kept: list[Any] = []  # alive, so that no two of them have one address

    def watch(path: str, accessor: QuantizedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
            if given is None:
                return
            if path not in observed.reached:
                observed.reached.add(path)
                kept.append(given)
                inputs.setdefault((id(given), path.rpartition(".")[0]), set()).add(path)
            rows = accessor.input_rows(given) if given.is_floating_point() else None
            if rows is not None and len(rows):
                squares = (rows * row_weights(rows, 1.0)).square().sum(0)
                known = observed.importance.get(path)
                observed.importance[path] = squares if known is None else known + squares

        return hook

    with called_parts(), ExitStack() as hooks:
        for path in layers:
            layer = model.get_submodule(path)
            look = watch(path, insert_quantizers(twin(layer), SchemeConfig()))
            hooks.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with automatic_precision(device, running_precision(model, calibration)):
            run_calibration(model, calibration, on_batch=lambda done, total: kept.clear())
    observed.shared = [paths for paths in inputs.values() if len(paths) > 1]
    observed.importance = {n: s / s.mean() for n, s in observed.importance.items() if s.any()}
    return observed


@contextmanager
def called_parts() -> Iterator[None]:
    """Have torch's transformer layers call their parts instead of one kernel that reads weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def running_precision(model: nn.Module, calibration: object) -> Any:
    """Return bfloat16 where the network runs faster in it and can, otherwise float32."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not isinstance(calibration, Sequence) or not calibration:
        return "float32"
    return usable_precision(lambda: run_calibration(model, calibration[:1]), device, "auto")


def group_layers(
    model: nn.Module, layers: Sequence[str], shared: Iterable[set[str]]
) -> list[list[str]]:
    """Return the layers by group: those that must get the same scheme.

    Layers that are given the same input must (fused kernels run them together), and layers that
    hold the same parameter.
    """
    group = {path: {path} for path in layers}
    holders: dict[int, set[str]] = {}
    for path in layers:
        for parameter in model.get_submodule(path)._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(path)
    for together in (*shared, *holders.values()):
        merged = set().union(*(group[path] for path in together))
        for path in merged:
            group[path] = merged
    order = {path: number for number, path in enumerate(layers)}
    distinct = {id(members): members for members in group.values()}.values()
    return sorted((sorted(m, key=order.__getitem__) for m in distinct), key=lambda m: order[m[0]])
