# SPDX-License-Identifier: Apache-2.0
"""What each candidate costs each group: bits as they would be stored, seconds as measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modewright.calibration.forward import evaluating
from modewright.errors import ConfigError, DataError
from modewright.evaluation.cost import call_model, measure_cost, measure_latencies
from modewright.mixed_precision.solver import total
from modewright.mixed_precision.trials import twin
from modewright.modes.constraints import Constraints
from modewright.quantization.config import CompressConfig
from modewright.quantization.layers import fitted_scheme, insert_quantizers
from modewright.quantization.packing import compress
from modewright.quantization.schemes import NO_SCHEME, scheme
from modewright.quantization.size import layer_bits

COST_NAMES = ("effective_bits", "size_bytes", "latency")
Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Costs:
    """What a choice costs.

    Attributes:
        tables: By cost what each candidate of each group costs, ``[groups][candidates]``: bits for
            both ``effective_bits`` and ``size_bytes``, seconds for ``latency``.
        numbers: How many numbers the parameters hold that are chosen for.
        rest_bytes: Bytes of everything else.
    """

    tables: dict[str, list[list[float]]]
    numbers: int
    rest_bytes: float

    def of(self, chosen: Sequence[int]) -> dict[str, float]:
        """Return by cost what a choice of one candidate for each group costs."""
        found = {name: total(table, chosen) for name, table in self.tables.items()}
        return {name: self._shown(name, value) for name, value in found.items()}

    def smallest(self) -> dict[str, float]:
        """Return by cost the least that any choice costs."""
        return {
            name: self._shown(name, sum(min(row) for row in table))
            for name, table in self.tables.items()
        }

    def budgets(self, bounds: Constraints) -> dict[str, float]:
        """Return absolute bounds in the units of the tables."""
        found = {}
        for bound in bounds.bounds:
            value = bound.value
            if bound.name == "effective_bits":
                value = value * self.numbers
            elif bound.name == "size_bytes":
                value = (value - self.rest_bytes) * 8
            found[bound.name] = value * (1 + 1e-12)  # what was written as decimals is rounded
        return found

    def _shown(self, name: str, value: float) -> float:
        if name == "effective_bits":
            return value / self.numbers
        return value / 8 + self.rest_bytes if name == "size_bytes" else value


def stored_costs(model: nn.Module, groups: Groups, candidates: Sequence[str]) -> Costs:
    """Count the bits of every candidate, scales and zero points included; shared weights once.

    Args:
        model: The model; quantizers on it are no matter.
        groups: Paths of layers.
        candidates: Names of schemes.
    """
    seen: set[int] = set()
    bits: list[list[float]] = []
    numbers = replaced = 0
    for paths in groups:
        row = [0.0] * len(candidates)
        for path in paths:
            layer = model.get_submodule(path)
            own = {n: layer._parameters[n] for n in layer_bits(layer, None)}
            new = {n: p for n, p in own.items() if p is not None and id(p) not in seen}
            seen |= {id(parameter) for parameter in new.values()}
            numbers += sum(p.numel() for p in new.values())
            replaced += sum(p.numel() * p.element_size() for p in new.values())
            for index, name in enumerate(candidates):
                found = layer_bits(layer, _fitted(layer, name))
                row[index] += sum(found[n] for n in new)
        bits.append(row)
    rest = measure_cost(model, which=["size_bytes"])["size_bytes"] - replaced
    return Costs({"effective_bits": bits, "size_bytes": bits}, numbers, rest)


def full_costs(model: nn.Module, groups: Groups) -> dict[str, float]:
    """Return what the model costs to store with nothing quantized."""
    return stored_costs(model, groups, [NO_SCHEME]).of([0] * len(groups))


@dataclass(frozen=True)
class Latencies:
    """What layers take in one call of the model.

    Attributes:
        layers: By path the seconds under each candidate, packed.
        full: The seconds of all of them as they are.
    """

    layers: dict[str, list[float]]
    full: float

    def table(self, groups: Groups) -> list[list[float]]:
        """Return ``[groups][candidates]`` in seconds."""
        return [
            [sum(each) for each in zip(*(self.layers[path] for path in paths), strict=True)]
            for paths in groups
        ]


def measured_latencies(
    model: nn.Module, layers: Sequence[str], candidates: Sequence[str], dummy_input: Any
) -> Latencies:
    """Measure the seconds that layers take, packed, in one call of the model.

    Every kind of layer (class, shapes, input) is timed once under each candidate. A layer that
    cannot be packed takes the time that it takes as it is; one that is not called takes none.

    Args:
        model: The model, without quantizers.
        layers: Paths of layers.
        candidates: Names of schemes.
        dummy_input: What the model is called with: one token for the speed of decoding.

    Raises:
        DataError: There is no input.
    """
    if dummy_input is None:
        raise DataError(
            "A bound on latency needs an input to measure with: pass dummy_input, for the speed of "
            "decoding one token."
        )
    calls = _captured(model, layers, dummy_input)
    known: dict[Any, list[float]] = {}
    found: dict[str, list[float]] = {}
    full = 0.0
    for path in layers:
        if path not in calls:
            found[path] = [0.0] * len(candidates)
            continue
        layer = model.get_submodule(path)
        key = _kind(layer, calls[path])
        if key not in known:
            runs = [_run(layer, name, calls[path]) for name in (NO_SCHEME, *candidates)]
            with torch.no_grad():
                known[key] = measure_latencies(runs)
        plain, *found[path] = known[key]
        full += plain
    return Latencies(found, full)


def _fitted(layer: nn.Module, name: str) -> Any:
    wanted = scheme(name)
    return None if wanted is None else fitted_scheme(layer, wanted)


def _captured(
    model: nn.Module, paths: Sequence[str], dummy_input: Any
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return how each layer is called first when the model is called once."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found.setdefault(path, (args, kwargs)) and None

    handles = [
        model.get_submodule(p).register_forward_pre_hook(note(p), with_kwargs=True) for p in paths
    ]
    try:
        with torch.no_grad(), evaluating(model):
            call_model(model, dummy_input)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(layer: nn.Module, name: str, call: tuple[Any, Any]) -> Callable[[], Any]:
    """Return a call of the layer, packed as a candidate says."""
    holder = nn.Sequential(twin(layer).eval())
    fitted = _fitted(layer, name)
    if fitted is not None:
        insert_quantizers(holder[0], fitted)
        try:
            compress(holder, CompressConfig())
        except ConfigError:
            holder = nn.Sequential(twin(layer).eval())
    args, kwargs = call
    return lambda: holder[0](*args, **kwargs)


def _kind(layer: nn.Module, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Any:
    shapes = [(n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters()]
    inputs = [tuple(v.shape) for v in (*call[0], *call[1].values()) if torch.is_tensor(v)]
    return type(layer), tuple(shapes), tuple(inputs)
