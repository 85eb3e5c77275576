# SPDX-License-Identifier: Apache-2.0
"""Traits: what holds for a model after the modes that were applied to it.

A mode declares which traits it ``requires``, ``provides``, ``removes`` and ``forbids``. "Nothing is
pruned after packing" is then one declaration on the pruning modes; no list of names goes stale, and
the rule holds for modes of third parties too.
"""

from __future__ import annotations

from enum import Enum


class Trait(str, Enum):
    """The traits that modewright's own modes speak of.

    A third party may declare further ones as strings with a namespace, such as ``"acme:fused"``.
    """

    FAKE_QUANTIZED = "fake_quantized"
    """Quantizers simulate low precision in the forward pass."""
    CALIBRATED = "calibrated"
    """The quantizers' scales were set by a calibration mode."""
    PACKED = "packed"
    """Weights are stored in their low-bit form; they can no longer be edited as numbers."""
    SPARSE = "sparse"
    """Masks keep a part of the weights at zero."""
    PRUNED = "pruned"
    """Structure was removed: shapes differ from the original model's."""
    SEARCH_SPACE = "search_space"
    """The model is a space of subnets, one of which is to be chosen and exported."""
    HAS_TEACHER = "has_teacher"
    """A teacher model is attached for distillation."""


NEEDS_RESTORE: frozenset[str] = frozenset(
    {Trait.FAKE_QUANTIZED, Trait.PACKED, Trait.SEARCH_SPACE, Trait.HAS_TEACHER}
)
"""While one of these holds, the weights alone, read by another program, are not this model."""


def trait_problem(trait: object) -> str | None:
    """Return why ``trait`` is no valid trait, or ``None`` if it is one."""
    if isinstance(trait, Trait) or trait in {t.value for t in Trait}:
        return None
    if isinstance(trait, str) and ":" in trait:
        return None
    known = ", ".join(t.value for t in Trait)
    return f"{trait!r} is not a trait (known: {known}; own traits are written 'namespace:name')"


def trait_names(traits: frozenset[str]) -> list[str]:
    """Return the traits as sorted plain strings."""
    return sorted(str(t.value) if isinstance(t, Trait) else t for t in traits)
