# SPDX-License-Identifier: Apache-2.0
"""Uniting the logs of a model's parts: as if the modes had been applied to the whole model.

The rule, for what a mode recorded of each part: a dict by name (of layers, quantizers, modules) is
the union of the parts' dicts; a list is the lists one after the other; anything else, and a name
that two parts hold, must be the same in all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from modewright.errors import ApplyModeError
from modewright.modes.state import ModeRecord, ModeState


def merge_states(parts: Sequence[ModeState]) -> ModeState:
    """Return the log of a model whose parts have these logs.

    Args:
        parts: The log of every part; parts to which no mode was applied have an empty one.

    Raises:
        ApplyModeError: The parts went through different modes, or what a mode recorded of them
            cannot be united.
    """
    logs = [part.records for part in parts if len(part)]
    if not logs:
        return ModeState()
    names = [record.name for record in logs[0]]
    for log in logs:
        if [record.name for record in log] != names:
            raise ApplyModeError(
                f"Parts of a model went through different modes: {', '.join(names)}; and "
                f"{', '.join(record.name for record in log)}. Their records cannot be united."
            )
    return ModeState(tuple(_merged(records) for records in zip(*logs, strict=True)))


def _merged(records: tuple[ModeRecord, ...]) -> ModeRecord:
    first = records[0]
    for other in records[1:]:
        if other.config != first.config:
            raise ApplyModeError(
                f"Mode {first.name!r} was applied to parts of a model with different configs: "
                f"{first.config} and {other.config}.",
                mode=first.name,
            )
    metadata: dict[str, Any] = {}
    for record in records:
        for key, value in record.metadata.items():
            where = f"{key!r} of mode {first.name!r}"
            metadata[key] = _joined(metadata[key], value, where) if key in metadata else value
    return replace(first, metadata=metadata)


def _joined(one: Any, other: Any, where: str) -> Any:
    """Return one field of two parts' metadata as one."""
    if isinstance(one, list) and isinstance(other, list):
        return [*one, *other]
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() & other.keys():
            _require_same(one[name], other[name], f"{name!r} in {where}")
        return {**one, **other}
    _require_same(one, other, where)
    return one


def _require_same(one: Any, other: Any, where: str) -> None:
    has_tensors = isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor)
    if has_tensors or type(one) is not type(other) or one != other:
        raise ApplyModeError(
            f"Two parts of a model recorded different values for {where}: {str(one)[:80]} and "
            f"{str(other)[:80]}. The mode cannot be applied part by part."
        )
