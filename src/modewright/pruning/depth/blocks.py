# SPDX-License-Identifier: Apache-2.0
"""Blocks that can be skipped, and their removal.

While the search space is open, a block that can be dropped has a class derived from its own, which
was changed in place: paths, keys of the state dict and ``isinstance`` stay. Skipped, it gives back
the hidden state that it was given. Removal takes blocks out of the container that holds them; those
behind them move up, and so do the attributes in which they keep their own place (``layer_idx``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import nn

from modewright.calibration.blocks import find_blocks
from modewright.calibration.calls import Call
from modewright.errors import DataError, MatchError
from modewright.matching import require_matches

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_PLACE_WORDS = ("layer", "block", "idx", "index", "id", "num")


class SkippableBlock(nn.Module):
    """Base of the classes of blocks that can be skipped.

    Attributes:
        skipped: Whether the block gives back its hidden state unchanged.
        parts: The length of the tuple that the block puts out; 0 if it puts out no tuple.
    """

    skipped: bool
    parts: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or give back the hidden state."""
        if not self.skipped:
            return super().forward(*args, **kwargs)
        hidden = Call(args, kwargs).hidden
        if hidden is None:
            raise DataError(
                f"A skipped {own_class(type(self)).__name__} was called without a floating-point "
                "tensor, so there is no hidden state to give back."
            )
        return (hidden, *[None] * (self.parts - 1)) if self.parts else hidden


def removable_blocks(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the blocks that could be taken out of a network, and why others could not.

    Returns:
        Blocks by path, and for every other block the reason.
    """
    blocks: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for path in find_blocks(model):
        parent = model.get_submodule(path.rpartition(".")[0])
        block = model.get_submodule(path)
        uses = sum(m is block for holder in model.modules() for m in holder._modules.values())
        if not isinstance(parent, _CONTAINERS):
            refused[path] = f"it is an attribute of a {type(parent).__name__}, not in a list"
        elif len(parent) == 1:
            refused[path] = "it is alone in its list"
        elif uses > 1:
            refused[path] = "the network holds it in several places"
        else:
            blocks[path] = block
    return blocks, refused


def choose_blocks(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str]
) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Return the blocks that patterns let be dropped, and what is left alone.

    Returns:
        What :func:`make_skippable` takes, and ``{"module": path, "reason": why}`` for every other
        block.

    Raises:
        MatchError: A pattern matches no block, or no block can be dropped.
    """
    blocks, refused = removable_blocks(model)
    every: dict[str, nn.Module] = {path: model.get_submodule(path) for path in find_blocks(model)}
    if not blocks:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in refused.items())
        raise MatchError(
            f"{type(model).__name__} has no block that could be dropped: a block is one of several "
            f"modules with parameters in an nn.ModuleList or nn.Sequential.{reasons}"
        )
    wanted = require_matches(every, targets, "`targets` of mode 'depth'").names
    kept = require_matches(every, ignore, "`ignore` of mode 'depth'").names
    for path in blocks:
        if path in kept or path not in wanted:
            refused[path] = "`ignore` names it" if path in kept else "`targets` do not name it"
    chosen = {path: 0 for path in blocks if path not in refused}
    if not chosen:
        raise MatchError("`targets` and `ignore` of mode 'depth' leave no block to drop.")
    return chosen, [{"module": path, "reason": reason} for path, reason in refused.items()]


def make_skippable(model: nn.Module, parts: Mapping[str, int]) -> None:
    """Let blocks be skipped; none is yet.

    Args:
        model: The model.
        parts: By path of the block the length of the tuple that it puts out, 0 for a tensor.
    """
    for path, count in parts.items():
        module = model.get_submodule(path)
        module.__class__ = _skippable_class(type(module))  # type: ignore[arg-type]
        block = cast(SkippableBlock, module)
        block.skipped, block.parts = False, count


def make_plain(model: nn.Module) -> None:
    """Give all blocks their own class back."""
    for block in skippable_blocks(model).values():
        del block.skipped, block.parts
        block.__class__ = own_class(type(block))  # type: ignore[assignment]


def skippable_blocks(model: nn.Module) -> dict[str, SkippableBlock]:
    """Return the blocks of an open search space, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, SkippableBlock)}


def skipped_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the blocks that are skipped now."""
    return [path for path, block in skippable_blocks(model).items() if block.skipped]


def skip_blocks(model: nn.Module, paths: Collection[str]) -> None:
    """Skip these blocks and run all others."""
    for path, block in skippable_blocks(model).items():
        block.skipped = path in paths


@contextmanager
def noting_parts(model: nn.Module) -> Iterator[None]:
    """Note meanwhile what blocks put out, so that they can put out the like when skipped."""

    def note(block: nn.Module, args: Any, output: Any) -> None:
        cast(SkippableBlock, block).parts = len(output) if isinstance(output, tuple) else 0

    handles = [b.register_forward_hook(note) for b in skippable_blocks(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def removed(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Take blocks out of a network meanwhile, so that what is left can be measured."""
    holders = [m for m in model.modules() if isinstance(m, _CONTAINERS)]
    held = [dict(holder._modules) for holder in holders]
    try:
        _take_out(model, paths)
        yield
    finally:
        for holder, modules in zip(holders, held, strict=True):
            holder._modules.clear()
            holder._modules.update(modules)


def remove_blocks(model: nn.Module, paths: Collection[str]) -> None:
    """Take blocks out of a network; those behind them get their places, and know it.

    Raises:
        KeyError: There is no such block.
    """
    for holder, names in _by_holder(model, paths).items():
        before = list(model.get_submodule(holder).children())
        places = _place_attributes(before)
        _take_out(model, [f"{holder}.{name}" if holder else name for name in names])
        for index, block in enumerate(model.get_submodule(holder).children()):
            for path, attribute in places:
                setattr(block.get_submodule(path), attribute, index)


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a block had before it could be skipped."""
    return cast("type[nn.Module]", cls.__bases__[-1])


@cache
def _skippable_class(cls: type[nn.Module]) -> type[SkippableBlock]:
    namespace = {"__module__": __name__, "__doc__": f"A {cls.__name__} that can be skipped."}
    name = f"Skippable{cls.__name__}"
    return cast("type[SkippableBlock]", type(name, (SkippableBlock, cls), namespace))


def _by_holder(model: nn.Module, paths: Collection[str]) -> dict[str, list[str]]:
    """Return the names of blocks by the path of the container that holds them."""
    found: dict[str, list[str]] = {}
    for path in paths:
        holder, _, name = path.rpartition(".")
        if name not in model.get_submodule(holder)._modules:
            raise MatchError(f"There is no block {path!r} in this {type(model).__name__}.")
        found.setdefault(holder, []).append(name)
    return found


def _take_out(model: nn.Module, paths: Collection[str]) -> None:
    """Take modules out of their containers and number the others from 0 again."""
    for holder, names in _by_holder(model, paths).items():
        modules = model.get_submodule(holder)._modules
        numbered = all(key.isdigit() for key in modules)
        kept = [(key, module) for key, module in modules.items() if key not in names]
        modules.clear()
        modules.update(
            (str(place) if numbered else key, module) for place, (key, module) in enumerate(kept)
        )


def _place_attributes(blocks: list[nn.Module]) -> list[tuple[str, str]]:
    """Return where blocks of one container keep their place in it: path in the block, attribute.

    What is the place of *every* block and is called like one is taken for it.
    """
    if len(blocks) < 2:
        return []
    return [
        (path, attribute)
        for path, module in blocks[0].named_modules()
        for attribute, value in vars(module).items()
        if value == 0
        and any(word in attribute for word in _PLACE_WORDS)
        and all(_is_place(block, path, attribute, i) for i, block in enumerate(blocks))
    ]


def _is_place(block: nn.Module, path: str, attribute: str, place: int) -> bool:
    found: Any = dict(block.named_modules()).get(path)
    value = getattr(found, attribute, None)
    return type(value) is int and value == place
