# SPDX-License-Identifier: Apache-2.0
"""Calibration text that a language model writes itself.

What a model writes looks like what it was trained on, whatever that was, so no text has to be found
that does. As in LLM-QAT (Liu et al., 2023) the first token of a window is drawn from the whole
vocabulary, the next few are the most probable ones, and the others are sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from modewright.calibration.calls import first_tensor
from modewright.calibration.forward import OnBatch, evaluating
from modewright.errors import ConfigError, DataError

_TOGETHER = 32  # windows that are written at a time
_CACHE_ARGUMENTS = ("cache", "past_key_values")  # newest name first
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def generate_windows(
    model: nn.Module,
    *,
    count: int,
    length: int,
    seed: int,
    first_tokens: Sequence[int] | torch.Tensor | None = None,
    greedy: int = 4,
    temperature: float = 1.0,
    on_batch: OnBatch | None = None,
) -> torch.Tensor:
    """Let a language model write windows of tokens.

    The same arguments give the same windows; the global random generators are not used.

    Args:
        model: Maps token ids int64 ``[windows, length]`` to logits, float ``[windows, length,
            vocabulary]``, or to something that holds them as ``logits``. Keys and values are
            cached if its ``forward`` takes ``use_cache`` and ``cache`` (``past_key_values`` before
            transformers 5.24).
        count: How many windows.
        length: Tokens in a window.
        seed: Of all random choices.
        first_tokens: Ids that the first token of a window is drawn from, ``[n]``; if left out, the
            vocabulary without the special tokens that the model's config names.
        greedy: How many of the tokens after the first are the most probable ones.
        temperature: What logits are divided by before tokens are sampled.
        on_batch: Called after every token of some windows with how many tokens are written, and
            how many there will be.

    Returns:
        Token ids, int64, shape ``[count, length]``, in the memory of the CPU.

    Raises:
        ConfigError: A number is out of its range.
        DataError: The model is no language model with a known vocabulary, takes no windows of this
            length, or its logits are not finite.
    """
    _check(model, count, length, greedy, temperature)
    generator = torch.Generator().manual_seed(seed)
    allowed = ordinary_tokens(model) if first_tokens is None else torch.as_tensor(first_tokens)
    if not allowed.numel():
        raise DataError("first_tokens is empty: there is nothing to begin a window with.")
    begin = allowed[torch.randint(len(allowed), (count,), generator=generator)].long()
    written = 0

    def note(tokens: int) -> None:
        nonlocal written
        written += tokens
        if on_batch is not None:
            on_batch(written, count * length)

    with torch.no_grad(), evaluating(model):
        parts = [
            _continued(model, ids, length, greedy, temperature, generator, note)
            for ids in torch.split(begin.unsqueeze(1), _TOGETHER)
        ]
    return torch.cat(parts)


def _check(model: nn.Module, count: int, length: int, greedy: int, temperature: float) -> None:
    ranges = (("count", count, 1), ("length", length, 1), ("greedy", greedy, 0))
    for name, value, least in ranges:
        if value < least:
            raise ConfigError(f"{name}: expected {least} or more, got {value}.")
    if not temperature > 0:
        raise ConfigError(f"temperature: expected more than 0, got {temperature}.")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or length
    if length > longest:
        raise DataError(
            f"The model takes {longest} tokens at most, but windows of {length} were asked for."
        )


def writes_text(model: nn.Module, window: torch.Tensor) -> bool:
    """Whether a network predicts the next token: logits at a place do not see later ones.

    So it is told from a network that fills gaps, whose logits depend on all places.

    Args:
        model: The network.
        window: Token ids that it takes, int64 ``[1, n]`` with ``n >= 2``.
    """
    window = window.cpu()
    first = _first_logits(model, window[:, :2])
    known = ordinary_tokens(model)
    if first is None or first.shape[-1] < len(known):
        return False
    later = known[known != window[0, 1]][:1]
    other = _first_logits(model, torch.cat([window[:, :1], later[None]], 1))
    near = 1e-3 * float(first.abs().max())
    return other is not None and torch.allclose(first, other, rtol=0, atol=near)


def _first_logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits at the first of two places, float32; ``None`` if there are none."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), evaluating(model):
        output = model(tokens.to(device))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        return None
    return logits[0, 0].float() if logits.ndim == 3 and logits.shape[1] == 2 else None


def _continued(
    model: nn.Module,
    ids: torch.Tensor,
    length: int,
    greedy: int,
    temperature: float,
    generator: torch.Generator,
    note: Callable[[int], None],
) -> torch.Tensor:
    """Let the model continue first tokens ``[n, 1]``; return ``[n, length]``."""
    note(len(ids))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    argument = _cache_argument(model)
    options: dict[str, Any] = {} if argument is None else {"use_cache": True}
    if "logits_to_keep" in _parameters(model):
        options["logits_to_keep"] = 1
    fed = ids
    for position in range(1, length):
        output = model(fed.to(device), **options)
        logits = first_tensor(output)
        if logits is None or logits.ndim != 3 or not logits.is_floating_point():
            raise DataError(
                f"{type(model).__name__} cannot write text: expected logits [windows, length, "
                "vocabulary] for token ids [windows, length]."
            )
        last = logits[:, -1].float().cpu() / temperature
        if not torch.isfinite(last.amax(-1)).all():
            raise DataError("The model's logits are not finite, so it cannot write text.")
        if position <= greedy:
            drawn = last.argmax(-1, keepdim=True)
        else:
            drawn = torch.multinomial(last.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
        note(len(drawn))
        cache = None if argument is None else getattr(output, argument, None)
        if argument is not None and cache is not None:
            options[argument] = cache
        fed = ids if cache is None else drawn
    return ids


def ordinary_tokens(model: nn.Module) -> torch.Tensor:
    """Return all ids of a model's vocabulary but those of special tokens, int64 ``[n]``.

    Raises:
        DataError: The size of the vocabulary is unknown.
    """
    config: Any = getattr(model, "config", None)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    size = getattr(config, "vocab_size", None) or getattr(embedding, "num_embeddings", None)
    if size is None:
        raise DataError(
            f"The vocabulary of {type(model).__name__} is unknown: it has neither a config with "
            "vocab_size nor an embedding. Name the first tokens."
        )
    special: set[int | None] = set()
    for name in _SPECIAL:
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    return torch.tensor([token for token in range(size) if token not in special])


def _cache_argument(model: nn.Module) -> str | None:
    """Return the name of the argument (and output) that holds keys and values, if there is one."""
    known = _parameters(model)
    named = next((name for name in _CACHE_ARGUMENTS if name in known), None)
    return named if "use_cache" in known else None


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
