# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are fused: those that compute just what there is a kernel for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import nn

from modewright.errors import CheckpointError
from modewright.runtime.backends.choice import using
from modewright.runtime.layers.base import PackedLayer
from modewright.runtime.layers.fused import attention, block, pointwise
from modewright.runtime.layers.fused.base import FusedLayer, own_class

_PROBE_ROWS = 3
_TOLERANCE = 1e-5  # part of the norm of what is expected
_TOLERANCE_QUANTIZED = 5e-3  # the same where inputs are rounded, now and then to another number
_TOLERANCE_HALF = 2e-2  # the same of layers in half precision
_Computes = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Kind:
    """A kind of fused layer.

    Attributes:
        cls: What layers become.
        fits: Whether a layer looks like one.
        formula: What it then should compute of a few rows; no matter what if left out.
        run: How it is run on them.
    """

    cls: type[FusedLayer]
    fits: Callable[[nn.Module], bool]
    formula: _Computes | None = None
    run: _Computes = nn.Module.__call__


_KINDS = {
    "block": _Kind(block.FusedBlock, block.is_block, block.block_formula, block.run_block),
    "rms_norm": _Kind(pointwise.FusedNorm, pointwise.is_norm, pointwise.norm_formula),
    "silu_gate": _Kind(pointwise.FusedGate, pointwise.is_gate, pointwise.gate_formula),
    "attention": _Kind(attention.FusedAttention, attention.is_attention),
}


def fuse(model: nn.Module, beside: Iterable[str] | None = None) -> dict[str, str]:
    """Fuse the layers of a model that compute what there is a kernel for.

    Layers are run on random numbers first, and left alone if they compute anything else.

    Args:
        model: The model.
        beside: Paths of layers: only what is in one block with one of these is fused. Blocks are
            the entries of lists of modules. Everything if left out.

    Returns:
        What was fused, by path: ``block``, ``rms_norm``, ``silu_gate`` or ``attention``.
    """
    blocks = None if beside is None else {_block_of(path) for path in beside} - {None}
    found = {}
    for path, layer in model.named_modules():
        if blocks is not None and _block_of(path) not in blocks:
            continue
        kind = _kind_of(layer)
        if kind is not None:
            _change_class(layer, _KINDS[kind].cls)
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
        fits = layer is not None and kind in _KINDS and _KINDS[kind].fits(layer)
        if not fits or layer is None:
            there = "nothing" if layer is None else f"a {type(layer).__name__}"
            raise CheckpointError(
                f"The record fuses {path!r} as {kind!r}; the model has {there} there, which "
                "cannot be."
            )
        _change_class(layer, _KINDS[kind].cls)


def unfuse(model: nn.Module) -> None:
    """Give fused layers their own class back."""
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            layer.__dict__.pop(block.KEPT, None)
            layer.__class__ = own_class(type(layer))  # type: ignore[assignment]


def _block_of(path: str) -> str | None:
    """Return the path of the entry of a list that a layer belongs to, the outermost one."""
    parts = path.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def _kind_of(layer: nn.Module) -> str | None:
    if isinstance(layer, FusedLayer) or "forward" in layer.__dict__:
        return None
    return next((name for name, kind in _KINDS.items() if _is_of_kind(layer, kind)), None)


def _is_of_kind(layer: nn.Module, kind: _Kind) -> bool:
    """Whether a layer is of a kind, and computes what that should, on a few random numbers."""
    if not kind.fits(layer) or kind.formula is None:
        return kind.fits(layer)
    tensor = next((t for t in (*layer.parameters(), *layer.buffers())), None)
    if tensor is None or tensor.device.type != "cpu":
        return False
    packed = next((part for part in layer.modules() if isinstance(part, PackedLayer)), None)
    dtype = tensor.dtype if packed is None else packed.compute_dtype
    linear = next((m for m in layer.modules() if isinstance(m, nn.Linear)), None)
    width = len(cast(torch.Tensor, layer.weight)) if linear is None else linear.in_features
    x = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.no_grad(), using("portable"):  # others round inputs, not always alike
            found, expected = kind.run(layer, x), kind.formula(layer, x)
            if found.shape != expected.shape:
                return False
            allowed = _TOLERANCE_HALF if dtype.itemsize < 4 else _tolerance(layer)
            return bool((found - expected).norm() <= allowed * expected.norm())
    except (TypeError, RuntimeError):  # other arguments, several dtypes
        return False


def _tolerance(layer: nn.Module) -> float:
    packed = [part for part in layer.modules() if isinstance(part, PackedLayer)]
    rounds = any(part.record.activations for part in packed)
    return _TOLERANCE_QUANTIZED if rounds else _TOLERANCE


def _change_class(layer: nn.Module, kind: type[FusedLayer]) -> None:
    if issubclass(kind, attention.FusedAttention):
        attention.register(type(layer))
    layer.__class__ = _fused_class(type(layer), kind)  # type: ignore[arg-type]


@cache
def _fused_class(cls: type[nn.Module], kind: type[FusedLayer]) -> type[FusedLayer]:
    namespace = {"__module__": __name__, "__doc__": f"Fused {cls.__name__}."}
    return cast("type[FusedLayer]", type(f"Fused{cls.__name__}", (kind, cls), namespace))
