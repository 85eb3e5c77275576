# SPDX-License-Identifier: Apache-2.0
"""The part that a layer plays in its model, as far as it decides whether to change its weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "router_gate", "wg")


def is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer picks the experts of a mixture: by its class, or its name beside experts.

    Args:
        name: The layer's path.
        modules: All modules of the model, by path.
    """
    if is_router_class(modules[name]):
        return True
    parent, _, last = name.rpartition(".")
    beside = modules[parent]._modules if last in ROUTER_NAMES else {}
    return any("experts" in key for key in beside)


def is_router_class(module: nn.Module) -> bool:
    """Whether a layer picks the experts of a mixture, by its class."""
    weight = module._parameters.get("weight")
    if "Router" not in type(module).__name__ or weight is None or is_lazy(weight):
        return False
    return weight.ndim == 2


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate fetches the parameters when the layer runs."""
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def shared_parameters(modules: Mapping[str, nn.Module]) -> list[list[tuple[str, str]]]:
    """Return for every parameter that is held more than once its holders: module and key."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((name, key))
    return [places for places in holders.values() if len(places) > 1]
