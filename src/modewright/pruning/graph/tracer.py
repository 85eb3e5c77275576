# SPDX-License-Identifier: Apache-2.0
"""``Tracer``: runs a network once and follows the identity of every index through it.

Every ATen operation of the run passes by here, whatever Python code it came from; this is what an
exported graph would hold, but code that cannot be exported (branches on data, loops over experts)
is traced as well. Each operation has a rule that says what its outputs' dimensions are; one without
a rule freezes what goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modewright.pruning.graph.atoms import FIXED, Atoms, Ids, fixed, is_live


@dataclass(frozen=True)
class Value:
    """What is known of a tensor in the run.

    Attributes:
        dims: The atoms of each dimension.
        weight: Whether it is made of parameters alone.
        points: The atoms that its values are indices of (what a router chose), if they are.
    """

    dims: tuple[Ids, ...]
    weight: bool = False
    points: Ids | None = None


@dataclass(frozen=True)
class Op:
    """One operation of the run: its name, arguments by name, and output tensors."""

    name: str
    arguments: dict[str, Any]
    outputs: list[torch.Tensor]
    scope: str

    def __getitem__(self, name: str) -> Any:
        """Return an argument."""
        return self.arguments[name]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that go in."""
        leaves = tree_leaves(list(self.arguments.values()))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def __str__(self) -> str:
        return f"{self.name} in {self.scope or 'the model'}"


Rule = Callable[["Tracer", Op], "Sequence[Value] | None"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows atoms through everything that runs inside it.

    Args:
        model: The network; its parameters and buffers get atoms.
        rules: By name of an operation (``aten.view``) its rule.
        pointwise: The rule of all operations that torch tags as pointwise.
        choices: By number of a reshape, which of the dimensions that it makes holds the units; the
            first candidate where it is not given.

    Attributes:
        atoms: All atoms.
        owned: By path of a parameter or buffer (tied ones once) its atoms, axis by axis.
        reached: Paths of those that the run used.
        splits: By number of a reshape the atoms that it had a choice about and how many
            candidates there were.
        numbers: What modules keep that equals a live dimension: (module, attribute) and atoms.
        lists: By path of a module list, atoms of the dimension that a loop over it goes through.
        minimum: By atom array (its first atom) how many must stay.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: dict[str, Rule],
        pointwise: Rule,
        choices: dict[int, int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self._rules, self._pointwise = model, rules, pointwise
        self.choices = choices or {}
        self.atoms = Atoms()
        self.owned: dict[str, tuple[Ids, ...]] = {}
        self.reached: set[str] = set()
        self.splits: dict[int, tuple[Ids, int]] = {}
        self.numbers: dict[tuple[str, str], list[Ids]] = {}
        self.lists: dict[str, Ids] = {}
        self.minimum: dict[int, int] = {}
        self.split_count = 0
        self._values: dict[int, tuple[torch.Tensor, Value]] = {}
        self._scopes: list[nn.Module] = []
        self._paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
        self._names: dict[int, str] = {}
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            dims = tuple(self.atoms.fresh(size) for size in tensor.shape)
            self.owned[path], self._names[id(tensor)] = dims, path
            self._values[id(tensor)] = (tensor, Value(dims, weight=True))

    @property
    def module(self) -> nn.Module:
        """The module whose ``forward`` is running."""
        return self._scopes[-1] if self._scopes else self.model

    @property
    def scope(self) -> str:
        """The path of :attr:`module`."""
        return self._paths.get(id(self.module), "")

    def value(self, tensor: torch.Tensor) -> Value:
        """Return what is known of a tensor; of one from outside, that nothing can be cut."""
        found = self._values.get(id(tensor))
        return found[1] if found else Value(tuple(fixed(size) for size in tensor.shape))

    def freeze(self, tensor: torch.Tensor, reason: str) -> None:
        """Freeze all dimensions of a tensor."""
        for dim in self.value(tensor).dims:
            self.atoms.freeze(dim, reason)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Trace, and know which module is running."""

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in self._paths:
                self._scopes.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self._paths:
                self._scopes.pop()

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and follow its dimensions."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        op = Op(str(func.overloadpacket), _bound(func, args, kwargs), outputs, self.scope)
        for tensor in op.tensors:
            if id(tensor) in self._names:
                self.reached.add(self._names[id(tensor)])
        values = self._ruled(func, op)
        for tensor, value in zip(outputs, values, strict=True):
            self._values[id(tensor)] = (tensor, value)  # held, so that ids stay theirs
        self._note_numbers(op)
        return result

    def _ruled(self, func: Any, op: Op) -> Sequence[Value]:
        rule = self._rules.get(op.name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._pointwise
        live = any(is_live(dim) for t in op.tensors for dim in self.value(t).dims)
        pointing = any(self.value(t).points is not None for t in op.tensors)
        if rule is None or not (live or pointing or op.name in _FACTORIES):
            values = None
        else:
            values = rule(self, op)
        if values is None or not _fit(op.outputs, values):
            for tensor in op.tensors:
                self.freeze(tensor, f"{op} has no rule for this form of it")
            values = [Value(tuple(fixed(size) for size in t.shape)) for t in op.outputs]
        return values

    def _note_numbers(self, op: Op) -> None:
        """Note the attributes of the running module that equal a dimension which may be cut."""
        module = self.module
        if type(module).__module__.startswith("torch.nn."):
            return
        numbers = {
            name: value for name, value in vars(module).items() if type(value) is int and value > 1
        }
        if not numbers:
            return
        for tensor in [*op.tensors, *op.outputs]:
            for dim in self.value(tensor).dims:
                if len(dim) < 2 or not is_live(dim):
                    continue
                for name, value in numbers.items():
                    if value == len(dim):
                        found = self.numbers.setdefault((self.scope, name), [])
                        if not any(dim is known for known in found):
                            found.append(dim)


_FACTORIES = frozenset(
    f"aten.{name}"
    for name in (
        *("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
    )
)


def _fit(outputs: Sequence[torch.Tensor], values: Sequence[Value]) -> bool:
    """Whether a rule gave every output its shape; one that did not knows too little."""
    return len(outputs) == len(values) and all(
        tuple(tensor.shape) == tuple(len(dim) for dim in value.dims)
        for tensor, value in zip(outputs, values, strict=True)
    )


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by their names, defaults filled in."""
    bound: dict[str, Any] = {}
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            bound[argument.name] = args[place]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def size_of(dims: Sequence[Ids]) -> int:
    """Return how many elements a tensor of these dimensions has."""
    count = 1
    for dim in dims:
        count *= len(dim)
    return count


__all__ = ["FIXED", "Op", "Rule", "Tracer", "Value", "fixed", "is_live", "size_of"]
