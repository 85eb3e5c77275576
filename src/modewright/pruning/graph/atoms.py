# SPDX-License-Identifier: Apache-2.0
"""``Atoms``: the identity of every index of every dimension, and which of them are one.

Each index of each dimension of each parameter is born as an atom, a number of its own. Operations
tie atoms together: adding two tensors ties the channels that meet. Atoms that are tied in the end
can only be removed together. An atom that must stay for any reason is frozen, and with it all that
are tied to it; the reason is kept. ``FIXED`` stands for an index that nobody can remove.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
FIXED = 0


@dataclass(frozen=True)
class Components:
    """What is one in the end.

    Attributes:
        labels: By atom the number of its component.
        frozen: By component that must stay the reason.
        marked: By mark the components that have it.
        consumed: By atom whether it is an index of a weight that takes its dimension in.
    """

    labels: Ids
    frozen: dict[int, str]
    marked: dict[str, frozenset[int]]
    consumed: NDArray[np.bool_]

    def is_frozen(self, ids: Ids) -> bool:
        """Whether any of these atoms must stay."""
        return any(label in self.frozen for label in np.unique(self.labels[ids]).tolist())


@dataclass
class Atoms:
    """A growing set of atoms, and what is known of them."""

    count: int = 1
    _ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)
    _frozen: list[tuple[Ids, str]] = field(default_factory=list)
    _marks: dict[str, list[Ids]] = field(default_factory=dict)
    _consumed: list[Ids] = field(default_factory=list)

    def fresh(self, size: int) -> Ids:
        """Return new atoms; a dimension of size 1 has none, because it cannot be cut."""
        if size <= 1:
            return fixed(size)
        start = self.count
        self.count += size
        return np.arange(start, start + size, dtype=np.int64)

    def tie(self, first: Ids, second: Ids, reason: str) -> None:
        """Make atoms one, index by index; those that meet a fixed index are frozen."""
        key = (id(first), id(second))
        if first is second or key in self._seen:
            return
        self._seen.add(key)
        self._ties.append((first, second))  # keeps both alive, so that ids stay theirs
        fixed_first, fixed_second = first == FIXED, second == FIXED
        if np.any(fixed_first != fixed_second):
            self.freeze(first[fixed_second & ~fixed_first], reason)
            self.freeze(second[fixed_first & ~fixed_second], reason)

    def freeze(self, ids: Ids, reason: str) -> None:
        """Say that atoms must stay."""
        live = ids[ids != FIXED]
        if len(live):
            self._frozen.append((live, reason))

    def mark(self, mark: str, ids: Ids) -> None:
        """Note a fact about atoms."""
        live = ids[ids != FIXED]
        if len(live):
            self._marks.setdefault(mark, []).append(live)

    def consume(self, ids: Ids) -> None:
        """Note that atoms are indices of a weight which takes their dimension in."""
        self._consumed.append(ids)

    def solve(self) -> Components:
        """Return the components, why some are frozen, and which marks they have."""
        labels = _connected(self.count, self._ties)
        frozen: dict[int, str] = {}
        for ids, reason in self._frozen:
            for label in np.unique(labels[ids]).tolist():
                frozen.setdefault(label, reason)
        marked = {
            mark: frozenset(np.unique(labels[np.concatenate(ids)]).tolist())
            for mark, ids in self._marks.items()
        }
        consumed = np.zeros(self.count, dtype=np.bool_)
        for ids in self._consumed:
            consumed[ids] = True
        return Components(labels, frozen, marked, consumed)


def fixed(size: int) -> Ids:
    """Return a dimension of which nothing can be removed."""
    return np.zeros(size, dtype=np.int64)


def is_live(ids: Ids) -> bool:
    """Whether a dimension has any atom."""
    return bool(np.any(ids != FIXED))


def _connected(count: int, ties: list[tuple[Ids, Ids]]) -> Ids:
    """Return for every atom the least atom that it is connected with."""
    labels = np.arange(count, dtype=np.int64)
    if not ties:
        return labels
    pairs = np.concatenate([np.stack(pair) for pair in ties], axis=1)
    pairs = pairs[:, (pairs[0] != FIXED) & (pairs[1] != FIXED)]
    pairs = np.unique(np.sort(pairs, axis=0), axis=1)
    left: Any = pairs[0]
    right: Any = pairs[1]
    while True:
        low = np.minimum(labels[left], labels[right])
        high = np.maximum(labels[left], labels[right])
        if np.array_equal(low, high):
            return labels
        np.minimum.at(labels, high, low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
