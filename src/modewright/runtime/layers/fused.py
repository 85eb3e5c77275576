# SPDX-License-Identifier: Apache-2.0
"""What lies between packed layers, in one call of the kernel library each.

In a packed model the linear layers take a third of the time that they took, and what was little
beside them no longer is: an RMS norm is seven of torch's operators, a gated activation three, and
causal attention computes what it then masks. Layers that compute just these change their class, and
compute the same, to the rounding of float32, by :mod:`modewright.runtime.native.between`.

Where the kernel does not serve (no library, another device or dtype, gradients, tracing) a fused
layer runs its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from modewright.errors import CheckpointError
from modewright.layers.attention_table import (
    ConfigView,
    function_named,
    register_function,
    takes_function,
)
from modewright.runtime.backends.choice import allows
from modewright.runtime.native.between import Between, between

NAME = "modewright_fused"
_PROBE_ROWS = 3
_FEW_TOKENS = 16  # for fewer, torch's attention is as fast


class FusedLayer(nn.Module):
    """Base of fused layers; the class that a layer had is its last base."""


class FusedNorm(FusedLayer):
    """``x / sqrt(mean(x ** 2) + eps) * weight``."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: D102
        weight = cast(torch.Tensor, self._parameters["weight"])
        kernels = _kernels_for(hidden_states, weight)
        if kernels is None or hidden_states.shape[-1:] != weight.shape:
            return cast(torch.Tensor, own_class(type(self)).forward(self, hidden_states))
        return kernels.rms_norm(hidden_states, weight, cast(float, _eps_of(self)))


class FusedGate(FusedLayer):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        kernels = _kernels_for(x)
        children: dict[str, Any] = self._modules
        gate = children["gate_proj"]
        if kernels is None or gate._forward_hooks:  # a hook may have kept what it saw
            return cast(torch.Tensor, own_class(type(self)).forward(self, x))
        gated, up = gate(x), children["up_proj"](x)
        plain = gated.is_contiguous() and up.is_contiguous() and gated.shape == up.shape
        if not plain or _kernels_for(gated, up) is None:  # autocast, weights that are trained
            return cast(torch.Tensor, children["down_proj"](F.silu(gated) * up))
        return cast(torch.Tensor, children["down_proj"](kernels.silu_gate_(gated, up)))


class FusedAttention(FusedLayer):
    """Attention that takes its function from the table of Transformers, and finds ours there."""

    @property
    def config(self) -> object:
        """The layer's config, under which it calls this module's function."""
        config = self.__dict__["config"]
        return config if torch.compiler.is_compiling() else ConfigView(config, NAME)

    @config.setter
    def config(self, value: object) -> None:
        self.__dict__["config"] = value


_KINDS: dict[str, type[FusedLayer]] = {
    "rms_norm": FusedNorm,
    "silu_gate": FusedGate,
    "attention": FusedAttention,
}


def fuse(model: nn.Module, beside: Iterable[str] | None = None) -> dict[str, str]:
    """Fuse the layers of a model that compute what there is a kernel for.

    Norms and gated activations are run on random numbers first, and left alone if they compute
    anything else.

    Args:
        model: The model.
        beside: Paths of layers: only what is in one block with one of these is fused. Blocks are
            the entries of lists of modules. Everything if left out.

    Returns:
        What was fused, by path: ``rms_norm``, ``silu_gate`` or ``attention``.
    """
    blocks = None if beside is None else {_block_of(path) for path in beside} - {None}
    found = {}
    for path, layer in model.named_modules():
        if blocks is not None and _block_of(path) not in blocks:
            continue
        kind = _kind_of(layer)
        if kind is not None:
            _change_class(layer, _KINDS[kind])
            found[path] = kind
    return found


def fuse_as_recorded(model: nn.Module, recorded: Mapping[str, str]) -> None:
    """Fuse what :func:`fuse` did in another model of the same architecture.

    Raises:
        CheckpointError: The record does not fit the model.
    """
    layers = dict(model.named_modules())
    for path, kind in recorded.items():
        layer = layers.get(path)
        fits = layer is not None and kind in _KINDS and _FITS[kind](layer)
        if not fits or layer is None:
            there = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise CheckpointError(
                f"The record fuses {path!r} as {kind!r}; the model has {there} there, which "
                "cannot be."
            )
        _change_class(layer, _KINDS[kind])


def unfuse(model: nn.Module) -> None:
    """Give fused layers their own class back."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            layer.__class__ = own_class(type(layer))  # type: ignore[assignment]


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a fused layer had."""
    return cast("type[nn.Module]", cls.__bases__[-1])


def _block_of(path: str) -> str | None:
    """Return the path of the entry of a list that a layer belongs to, the outermost one."""
    parts = path.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def _kind_of(layer: nn.Module) -> str | None:
    if isinstance(layer, FusedLayer) or "forward" in layer.__dict__:
        return None
    for kind, fits in _FITS.items():
        if fits(layer):
            formula = _FORMULAS.get(kind)
            return kind if formula is None or _computes(layer, formula) else None
    return None


def _is_norm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return (
        type(layer).__name__.endswith("RMSNorm")
        and weight is not None
        and weight.dim() == 1
        and len(layer._parameters) == 1
        and not layer._modules
        and _eps_of(layer) is not None
    )


def _is_gate(layer: nn.Module) -> bool:
    children = layer._modules
    return (
        set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and not layer._parameters
        and type(children["act_fn"]).__name__ in ("SiLU", "SiLUActivation")
        and all(isinstance(children[n], nn.Linear) for n in ("gate_proj", "up_proj", "down_proj"))
    )


def _is_attention(layer: nn.Module) -> bool:
    return takes_function(layer) and "config" not in vars(type(layer))


_FITS: dict[str, Callable[[nn.Module], bool]] = {
    "rms_norm": _is_norm,
    "silu_gate": _is_gate,
    "attention": _is_attention,
}


def _eps_of(layer: nn.Module) -> float | None:
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    return eps if isinstance(eps, float) else None


def _norm_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + cast(float, _eps_of(layer))) * cast(torch.Tensor, layer.weight)


def _gate_formula(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    own: Any = layer
    return cast(torch.Tensor, own.down_proj(F.silu(own.gate_proj(x)) * own.up_proj(x)))


_FORMULAS = {"rms_norm": _norm_formula, "silu_gate": _gate_formula}


def _computes(layer: nn.Module, formula: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> bool:
    """Whether a layer computes what a formula says, on a few random numbers."""
    width = getattr(layer._modules.get("gate_proj", layer), "in_features", None)
    if width is None:
        width = len(cast(torch.Tensor, layer.weight))
    tensor = next((t for t in (*layer.parameters(), *layer.buffers())), None)
    if tensor is None or tensor.device.type != "cpu":
        return False
    x = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            return torch.allclose(layer(x), formula(layer, x), rtol=1e-4, atol=1e-6)
    except (TypeError, RuntimeError):  # other arguments, another dtype
        return False


def _change_class(layer: nn.Module, kind: type[FusedLayer]) -> None:
    if kind is FusedAttention:
        register_function(type(layer), NAME, _attend)
    layer.__class__ = _fused_class(type(layer), kind)  # type: ignore[arg-type]


@cache
def _fused_class(cls: type[nn.Module], kind: type[FusedLayer]) -> type[FusedLayer]:
    namespace = {"__module__": __name__, "__doc__": f"Fused {cls.__name__}."}
    return cast("type[FusedLayer]", type(f"Fused{cls.__name__}", (kind, cls), namespace))


def _kernels_for(*tensors: torch.Tensor) -> Between | None:
    """Return the kernels if they serve such tensors."""
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_cpu:
            return None
    if (
        type(tensors[0]) is not torch.Tensor
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or not allows("native")
    ):
        return None
    return between()


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attend as ``"sdpa"`` does, or as the function that the config names."""
    behind = module.__dict__["config"]._attn_implementation
    if behind == "sdpa" and attention_mask is None and not args:
        kernels = _kernels_for(query, key, value)
        if kernels is not None and _is_causal(module, query, key, kwargs):
            scaling = kwargs.get("scaling")
            if kernels.can_attend(query, key, value):
                factor = query.shape[-1] ** -0.5 if scaling is None else scaling
                return kernels.attend(query, key, value, factor), None
    function = function_named(own_class(type(module)), behind)
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def _is_causal(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, given: Mapping[str, Any]
) -> bool:
    """Whether just causal attention is asked for, of all tokens, and enough of them."""
    causal = given.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return bool(
        causal
        and query.shape[2] == key.shape[2] >= _FEW_TOKENS
        and not given.get("dropout")
        and given.get("position_bias") is None
        and given.get("softcap") is None
        and not given.get("output_attentions")
    )
