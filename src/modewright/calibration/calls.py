# SPDX-License-Identifier: Apache-2.0
"""``Call``: how a block was called, and what has to happen to it to be kept and repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """How a block was called once: positional and keyword arguments, the hidden state in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor | None:
        """The hidden state: the first floating-point tensor, positional arguments first."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
        return None

    def with_hidden(self, hidden: torch.Tensor) -> Call:
        """Return the same call with another hidden state; without one, the call itself."""
        own = self.hidden
        if own is None:
            return self
        return self._mapped(lambda value: hidden if value is own else value)

    def on(self, device: torch.device) -> Call:
        """Return the call with all tensors on a device."""
        return self._mapped(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v)

    def without_cache(self) -> Call:
        """Return a call that keeps nothing from one forward pass to the next."""
        call = self._mapped(lambda value: None if _is_cache(value) else value)
        switched = {"use_cache": False} if "use_cache" in call.kwargs else {}
        return Call(call.args, {**call.kwargs, **switched})

    def _mapped(self, change: Callable[[Any], Any]) -> Call:
        kwargs = {key: _each(value, change) for key, value in self.kwargs.items()}
        return Call(tuple(_each(value, change) for value in self.args), kwargs)


class CallKeeper:
    """Prepares calls to be kept: equal arguments (masks, positions) take memory once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def keep(self, call: Call, *, hidden: bool) -> Call:
        """Return the call without caches and gradients, with shared arguments.

        Args:
            call: A call, as it came.
            hidden: Whether to keep the hidden state; otherwise an empty tensor takes its place.
        """
        own = call.hidden

        def one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return copy if value is own else self._shared(value)

        with torch.inference_mode(False), torch.no_grad():
            # A copy, since networks write into hidden states.
            copy = torch.empty(0) if own is None or not hidden else own.clone()
            return call.without_cache()._mapped(one)

    def _shared(self, value: torch.Tensor) -> torch.Tensor:
        """Return an equal tensor that is kept already, or this one from now on."""
        sample = value.reshape(-1)[:: max(1, value.numel() // 8)][:8].tolist()
        key = (value.shape, value.stride(), value.dtype, value.device, *sample)
        alike = self._known.setdefault(key, [])
        for other in alike:
            if other.data_ptr() == value.data_ptr() or torch.equal(other, value):
                return other
        alike.append(value.clone() if value.is_inference() else value.detach())
        return alike[-1]


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the hidden state in what a module puts out."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            found: torch.Tensor = getattr(output, name)
            return found
    items = output.values() if isinstance(output, dict) else output
    if isinstance(output, (tuple, list, dict)):
        return next((tensor for i in items if (tensor := first_tensor(i)) is not None), None)
    return None


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to all that is in tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return type(value)(_each(item, change) for item in value)
    if type(value) is dict:
        return {key: _each(item, change) for key, item in value.items()}
    return change(value)


def _is_cache(value: Any) -> bool:
    """Whether a value is an object that collects keys and values."""
    return callable(getattr(value, "update", None)) and not isinstance(value, (dict, nn.Module))
