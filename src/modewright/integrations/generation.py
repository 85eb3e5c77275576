# SPDX-License-Identifier: Apache-2.0
"""Running a language model of Transformers one token after another, without its ``generate``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from modewright.integrations.model_folder import transformers_package

_CACHE_NAMES = ("cache", "past_key_values")  # newer releases of transformers, older ones


class Decoding:
    """A text that a model continues greedily, with a cache of keys and values.

    Args:
        model: A causal language model of Transformers, in evaluation mode.
        prompt: Token ids, int64 ``[batch, length]``.
        cache: A cache of Transformers; a new dynamic one if left out.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor, cache: Any = None) -> None:
        hf = transformers_package()
        self._model = model
        self._cache_name = cache_argument(model)
        self.cache = hf.DynamicCache() if cache is None else cache
        self.tokens = self._next(prompt)

    def step(self) -> torch.Tensor:
        """Return the next token of every text, int64 ``[batch, 1]``."""
        self.tokens = self._next(self.tokens)
        return self.tokens

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        more: dict[str, Any] = {self._cache_name: self.cache, "use_cache": True}
        with torch.no_grad():
            logits: torch.Tensor = self._model(tokens, logits_to_keep=1, **more).logits
        return logits[:, -1:].argmax(-1)


def cache_argument(model: nn.Module) -> str:
    """Return under which name a model takes its cache."""
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return next((name for name in _CACHE_NAMES if name in names), _CACHE_NAMES[-1])


def prefill(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after the last token of a prompt, ``[batch, 1, vocabulary]``."""
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=True, logits_to_keep=1).logits  # type: ignore[operator,unused-ignore]
    return logits
