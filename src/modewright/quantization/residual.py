# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a transformer: which modules write to it, and which read from it.

Nothing is guessed from names. Norms are recognised by what they compute, readers by the norm whose
output they were given in one run; all other layers of the right width write. Whoever changes the
stream has to run the network afterwards, to see that this was right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from modewright.errors import DataError


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm of the stream, and the linear layers that read what it puts out.

    Attributes:
        path: The norm's path.
        module: The norm.
        gain: What it multiplies the normalized stream with, ``[width]`` float64.
        neutral: The value of its weight under which that is one.
        readers: By path.
    """

    path: str
    module: nn.Module
    gain: torch.Tensor
    neutral: float
    readers: dict[str, nn.Linear]


@dataclass(frozen=True)
class ResidualStream:
    """The stream of a network.

    Attributes:
        width: Features of the stream.
        norms: The norms that it is read through.
        embeddings: The embeddings that write to it, by path.
        writers: The linear layers that write to it, by path.
    """

    width: int
    norms: list[Norm]
    embeddings: dict[str, nn.Embedding]
    writers: dict[str, nn.Linear]


def find_stream(model: nn.Module, run: Callable[[], object]) -> ResidualStream:
    """Find the residual stream.

    Args:
        model: A network that begins with an embedding and reads its stream through RMS norms.
        run: Runs the network once.

    Raises:
        DataError: There is no embedding, or no RMS norm that linear layers read; the message says
            which, and what was found instead.
    """
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if not embeddings:
        raise DataError(f"{type(model).__name__} has no embedding, so no residual stream is known.")
    width = max(embeddings.values(), key=lambda m: m.num_embeddings).embedding_dim
    norms = [
        Norm(path, module, *found, {})
        for path, module in model.named_modules()
        if (found := _gain(module, width)) is not None
    ]
    _note_readers(model, norms, width, run)
    norms = [norm for norm in norms if norm.readers]
    if not norms:
        kinds = {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()}
        raise DataError(
            f"{type(model).__name__} has no RMS norm of {width} features that linear layers read "
            f"(norms there: {', '.join(sorted(kinds)) or 'none'}). A norm that subtracts a mean "
            "does not commute with a rotation; use mode 'hadamard' after 'quantize' there."
        )
    reading = {id(layer) for norm in norms for layer in norm.readers.values()}
    writers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == width
        and id(module) not in reading
    }
    embeddings = {n: m for n, m in embeddings.items() if m.embedding_dim == width}
    return ResidualStream(width, norms, embeddings, writers)


def _note_readers(
    model: nn.Module, norms: list[Norm], width: int, run: Callable[[], object]
) -> None:
    """Run once, and note for every norm which linear layers are given its output."""
    made: dict[int, tuple[Norm, torch.Tensor]] = {}  # outputs stay alive: no memory is used twice

    def makes(norm: Norm) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            made[output.untyped_storage().data_ptr()] = (norm, output)

        return hook

    def reads(path: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            source = made.get(args[0].untyped_storage().data_ptr()) if args else None
            if source is not None:
                source[0].readers[path] = module

        return hook

    handles = [norm.module.register_forward_hook(makes(norm)) for norm in norms]
    handles += [
        module.register_forward_pre_hook(reads(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == width
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _gain(module: nn.Module, width: int) -> tuple[torch.Tensor, float] | None:
    """Return the gain of an RMS norm and its weight's neutral value; ``None`` for other modules."""
    weight = module._parameters.get("weight")
    parameters = [p for p in module.parameters() if p is not None]
    if weight is None or weight.shape != (width,) or len(parameters) != 1:
        return None
    for neutral in (1.0, 0.0):
        plain = _gain_with(module, torch.full_like(weight, neutral))
        if plain is not None and torch.allclose(plain, torch.ones_like(plain), rtol=0, atol=0.05):
            return weight.detach().double() + (1.0 - neutral), neutral
    return None


def _gain_with(module: nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    """Return what a module does to normalized values under a weight, ``[width]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator).to(weight) + 1.0
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        with torch.no_grad():
            y = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes other inputs: no norm
        return None
    finally:
        module._parameters["weight"] = own
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return None
    root: torch.Tensor = x.double().square().mean(-1, keepdim=True).sqrt()
    gains = (y.double() * root / x.double()).flatten(0, -2)
    steady = bool((gains - gains[:1]).abs().max() < 0.05)
    return gains.mean(0) if steady else None
