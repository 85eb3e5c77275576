# SPDX-License-Identifier: Apache-2.0
"""How well a language model predicts text, and how far its predictions are from another's.

Both measures are means over token positions and are given in nats (natural logarithms):

* the *loss* is the negative log probability of the token that really came next; its exponential
  is the perplexity;
* the *divergence* KL(reference || model) compares whole distributions. It is 0 exactly where both
  predict the same, and it sees changes that the loss averages away.

A model here is any module that maps token ids ``[1, length]`` to logits ``[1, length, vocab]``,
returned as a tensor, as the attribute ``logits``, or first in a tuple. How two models differ,
and why, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from modewright.errors import DataError

_CHUNK_BYTES = 64 * 2**20  # how much float32 log probabilities may take at a time
_MAX_REFERENCE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class LanguageQuality:
    """How well a model predicted a text.

    Attributes:
        loss: Mean negative log probability of the next token, in nats per token. It is ``inf`` or
            ``nan`` where the model's predictions are.
        tokens: Number of tokens that were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; ``inf`` where that exceeds the range of a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate_language(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> LanguageQuality:
    """Measure the mean next-token loss of a model over windows of tokens.

    Windows are predicted one at a time, each on its own: its first token is context only, so a
    window of ``length`` tokens counts ``length - 1`` predictions. The loss is computed from
    float32 log probabilities, whatever the model computes in, and summed in float64.

    Args:
        model: See the module's text. It is put into evaluation mode, and the training flag of
            every submodule is put back afterwards, also after an error.
        windows: Token ids, int64, shape ``[n, length]`` with ``length >= 2``; moved to the
            device of the model's parameters.
        on_window: Called after each window with how many are done and how many there are.

    Returns:
        The loss and the number of predicted tokens.

    Raises:
        DataError: The windows or the model's output do not have the expected form.
    """
    _check_windows(windows, at_least=2)
    total, count = 0.0, len(windows)
    with _evaluating(model):
        for index in range(count):
            window = windows[index : index + 1]
            logits = _logits(model, window)
            targets = window[0, 1:].to(logits.device)
            if int(targets.max()) >= logits.shape[-1]:
                raise DataError(
                    f"Window {index} has the token {int(targets.max())}, but the model predicts "
                    f"{logits.shape[-1]} tokens. Use the tokenizer that belongs to the model."
                )
            for rows, log_probs in _log_prob_chunks(logits[:-1]):
                picked = log_probs.gather(1, targets[rows, None])
                total -= float(picked.sum(dtype=torch.float64))
            if on_window is not None:
                on_window(index + 1, count)
    tokens = count * (windows.shape[1] - 1)
    return LanguageQuality(loss=total / tokens, tokens=tokens)


def reference_log_probs(
    model: nn.Module, windows: torch.Tensor, *, max_bytes: int = _MAX_REFERENCE_BYTES
) -> torch.Tensor:
    """Record a model's predictions for the first windows, to compare others with them.

    Args:
        model: As for `evaluate_language`.
        windows: Token ids, int64, shape ``[n, length]``.
        max_bytes: How much memory the result may take. As many windows are recorded as fit into
            it, and always at least one.

    Returns:
        Log probabilities in the main memory, float32, shape ``[k, length, vocab]`` with
        ``1 <= k <= n``. Position ``t`` predicts the token at ``t + 1``; the last one is kept too.

    Raises:
        DataError: The windows or the model's output do not have the expected form.
    """
    _check_windows(windows, at_least=1)
    recorded = torch.empty(0)
    with _evaluating(model):
        index, kept = 0, 1
        while index < kept:
            logits = _logits(model, windows[index : index + 1])
            if index == 0:
                kept = min(len(windows), max(1, max_bytes // (logits.numel() * 4)))
                recorded = torch.empty((kept, *logits.shape), dtype=torch.float32)
            for rows, log_probs in _log_prob_chunks(logits):
                recorded[index, rows] = log_probs.cpu()
            index += 1
    return recorded


def kl_divergence(reference: torch.Tensor, model: nn.Module, windows: torch.Tensor) -> float:
    """Return the mean of KL(reference || model) over all positions of the first windows, in nats.

    Args:
        reference: What `reference_log_probs` returned, float32, shape ``[k, length, vocab]``.
        model: The model to compare with it.
        windows: The same windows; those after the first ``k`` are not used.

    Returns:
        The mean divergence: 0 or more, ``inf`` where the model rules out what the reference
        allows, ``nan`` where predictions are not numbers.

    Raises:
        DataError: The shapes of the three do not fit together.
    """
    _check_windows(windows, at_least=1)
    if reference.ndim != 3 or not 1 <= len(reference) <= len(windows):
        raise DataError(
            f"reference: expected log probabilities [k, length, vocab] of the first k of "
            f"{len(windows)} windows, got the shape {list(reference.shape)}."
        )
    total = 0.0
    with _evaluating(model):
        for index, expected in enumerate(reference):
            logits = _logits(model, windows[index : index + 1])
            if logits.shape != expected.shape:
                raise DataError(
                    f"reference: holds {list(expected.shape)} log probabilities for window "
                    f"{index}, but the model predicts {list(logits.shape)}. Record the reference "
                    "with the same windows and the same vocabulary."
                )
            for rows, log_probs in _log_prob_chunks(logits):
                wanted = expected[rows].to(log_probs.device)
                terms = wanted.exp() * (wanted - log_probs)
                terms.masked_fill_(wanted == -math.inf, 0.0)  # 0 * log 0 counts as 0
                total += float(terms.sum(dtype=torch.float64))
    mean = total / (reference.shape[0] * reference.shape[1])
    return 0.0 if mean < 0 else mean  # rounding may leave a tiny negative number; nan stays nan


def _check_windows(windows: torch.Tensor, *, at_least: int) -> None:
    """Raise DataError unless ``windows`` is int64 ``[n >= 1, length >= at_least]``, no id < 0."""
    fits = windows.ndim == 2 and windows.dtype == torch.int64
    if not fits or windows.shape[0] < 1 or windows.shape[1] < at_least:
        raise DataError(
            f"windows: expected token ids, int64, shape [n >= 1, length >= {at_least}], got "
            f"{windows.dtype} of shape {list(windows.shape)}."
        )
    if int(windows.min()) < 0:
        raise DataError(f"windows: token ids are 0 or more, got {int(windows.min())}.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and all training flags back after it."""
    flags = [(module, module.training) for module in model.modules()]
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        # train() and not only the flags: modules may override it to do more than set a flag.
        model.train(was_training)
        for module, flag in flags:
            module.training = flag


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Run a model on one window ``[1, length]`` and return its logits ``[length, vocab]``."""
    located = next(chain(model.parameters(), model.buffers()), window)
    output = model(window.to(located.device))
    if not isinstance(output, torch.Tensor):
        first = output[0] if isinstance(output, (tuple, list)) and output else None
        output = getattr(output, "logits", first)
    expected = (1, window.shape[1])
    if not isinstance(output, torch.Tensor) or output.ndim != 3 or output.shape[:2] != expected:
        got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise DataError(
            f"{type(model).__name__}: expected logits of shape [1, {window.shape[1]}, vocab] (a "
            f"tensor, an output with .logits, or a tuple that starts with them), got {got}."
        )
    return output[0]


def _log_prob_chunks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield runs of rows with their float32 log probabilities ``[rows, vocab]``.

    A window of a model with a large vocabulary has gigabytes of logits; the float32 copy is made
    for some rows at a time.
    """
    step = max(1, _CHUNK_BYTES // (4 * max(1, logits.shape[-1])))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        yield rows, torch.log_softmax(logits[rows].float(), dim=-1)
