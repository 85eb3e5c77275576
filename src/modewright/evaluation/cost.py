# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters, bytes, arithmetic, time. Measured, not estimated from configs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modewright.errors import ConfigError, DataError, did_you_mean

COST_NAMES = ("params", "active_params", "size_bytes", "flops", "latency")
"""What :func:`measure_cost` knows."""

_NEEDS_INPUT = ("flops", "latency")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN_COUNTS = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")


def measure_cost(
    model: nn.Module, dummy_input: Any = None, which: Iterable[str] = ("params",)
) -> dict[str, float]:
    """Return what a model costs.

    Args:
        model: The model; its train flags are put back.
        dummy_input: What one call of the model gets: a tensor, a tuple of positional inputs, or a
            dict of keyword inputs. Only ``flops`` and ``latency`` need it.
        which: Names out of :data:`COST_NAMES`: ``params`` (numbers in parameters, tied ones once),
            ``active_params`` (those that one token uses: of experts, as many as a router picks),
            ``size_bytes`` (parameters and persistent buffers as they are stored), ``flops`` (twice
            the multiply-adds of one call's matrix products, convolutions and attention),
            ``latency`` (seconds of one call here and now, the median of warm repeats).

    Raises:
        ConfigError: A name is unknown, or it is not known how many experts a token uses.
        DataError: An input is needed and missing.
    """
    measures: dict[str, Callable[[], float]] = {
        "params": lambda: float(sum(p.numel() for p in model.parameters())),
        "active_params": lambda: _active_params(model),
        "size_bytes": lambda: float(_size_bytes(model)),
        "flops": lambda: float(_flops(model, dummy_input)),
        "latency": lambda: measure_latencies([_caller(model, dummy_input)])[0],
    }
    found: dict[str, float] = {}
    for name in which:
        if name not in measures:
            raise ConfigError(
                f"There is no cost {name!r}.{did_you_mean(name, COST_NAMES)} "
                f"Known: {', '.join(COST_NAMES)}."
            )
        if name in _NEEDS_INPUT and dummy_input is None:
            raise DataError(
                f"The cost {name!r} is that of one call of the model: pass its input as "
                "dummy_input (a tensor, a tuple of positional inputs, or a dict of keyword ones)."
            )
        found[name] = measures[name]()
    return found


def measure_latencies(
    calls: Sequence[Callable[[], object]], *, rounds: int = 9, warm_up: int = 2
) -> list[float]:
    """Return the seconds that each call takes: medians over rounds in which they take turns.

    What slows the machine down for a while slows all of them, so that their ratios stay.

    Args:
        calls: What is timed; on a GPU, its work is waited for.
        rounds: How often each is timed.
        warm_up: How often each runs before.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(warm_up + rounds):
        for call, seconds in zip(calls, taken, strict=True):
            _synchronize()
            started = time.perf_counter()
            call()
            _synchronize()
            if turn >= warm_up:
                seconds.append(time.perf_counter() - started)
    return [median(seconds) for seconds in taken]


def call_model(model: nn.Module, dummy_input: Any) -> Any:
    """Call a model with a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(dummy_input, torch.Tensor):
        return model(dummy_input)
    if isinstance(dummy_input, Mapping):
        return model(**dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return model(*dummy_input)
    raise DataError(
        f"dummy_input is a {type(dummy_input).__name__}; a tensor, a tuple of positional inputs "
        "or a dict of keyword inputs was expected."
    )


def _caller(model: nn.Module, dummy_input: Any) -> Callable[[], Any]:
    """Return a call of the model in eval mode, without gradients."""

    def call() -> Any:
        flags = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                return call_model(model, dummy_input)
        finally:
            for module, flag in flags:
                module.training = flag

    return call


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count the fused attention of CPUs: scores ``[q, k]`` and their products with the values."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _grouped_flops(rows: Any, matrices: Any, *args: Any, **kwargs: Any) -> int:
    """Count a product of rows with the matrix of the expert that each was sent to."""
    groups = rows[0] if len(rows) == 3 and len(matrices) == 2 else 1
    return int(2 * math.prod(rows) * matrices[-1] // groups)


def _flops(model: nn.Module, dummy_input: Any) -> int:
    aten: Any = torch.ops.aten
    unknown_to_torch: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
    }
    if hasattr(aten, "_grouped_mm"):
        unknown_to_torch[aten._grouped_mm] = _grouped_flops
    counter = FlopCounterMode(display=False, custom_mapping=unknown_to_torch)
    with counter:
        _caller(model, dummy_input)()
    return int(counter.get_total_flops())


def _size_bytes(model: nn.Module) -> int:
    """Return the bytes of a state dict in which shared tensors are stored once."""
    tensors = {id(tensor): tensor.numel() * tensor.element_size() for tensor in model.parameters()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[id(buffer)] = buffer.numel() * buffer.element_size()
    return sum(tensors.values())


def _active_params(model: nn.Module) -> float:
    """Return the numbers in parameters, those of routed experts by the part that a token uses."""
    shares: dict[int, float] = {}
    for path, module in model.named_modules():
        experts = _experts(module)
        if experts:
            used = _chosen(model, path) / max(experts.values())
            for parameter in (p for e in _expert_parameters(module) for p in e.parameters()):
                shares[id(parameter)] = used
            for name in experts:
                parameter = module._parameters.get(name)
                if parameter is not None:
                    shares[id(parameter)] = used
    return float(sum(p.numel() * shares.get(id(p), 1.0) for p in model.parameters()))


def _experts(module: nn.Module) -> dict[str, int]:
    """Return how many experts a module holds, by parameter or child that holds them."""
    lists = {
        name: len(child)
        for name, child in module.named_children()
        if name == "experts" and isinstance(child, nn.ModuleList)
    }
    count = next((int(c) for c in (getattr(module, n, None) for n in _EXPERT_COUNTS) if c), None)
    fused = {
        name: count
        for name, parameter in module._parameters.items()
        if count is not None
        and count > 1
        and parameter is not None
        and parameter.ndim >= 2
        and parameter.shape[0] == count
        and _is_fused(module)
    }
    return {**lists, **fused}


def _is_fused(module: nn.Module) -> bool:
    """Whether the experts are 3-D parameters of this very module (a router has only 2-D ones)."""
    return any(p is not None and p.ndim == 3 for p in module._parameters.values())


def _expert_parameters(module: nn.Module) -> list[nn.Module]:
    child = module._modules.get("experts")
    return list(child) if isinstance(child, nn.ModuleList) else []


def _chosen(model: nn.Module, path: str) -> int:
    """Return how many experts a token uses: said by the module, what holds it, or a config."""
    parts = path.split(".") if path else []
    holders = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    siblings = [child for holder in holders[1:2] for child in holder.children()]
    for owner in (*holders, *siblings):
        for source in (owner, getattr(owner, "config", None)):
            for name in _CHOSEN_COUNTS:
                value = getattr(source, name, None)
                if isinstance(value, int) and value > 0:
                    return value
    raise ConfigError(
        f"active_params: {path or 'the model'} holds experts, but neither it, nor a module around "
        f"it, nor a config says how many of them a token uses ({', '.join(_CHOSEN_COUNTS)}). Set "
        "one of these attributes on the module."
    )
