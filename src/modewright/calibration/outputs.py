# SPDX-License-Identifier: Apache-2.0
"""By which tensor the outputs of two networks are compared."""

from __future__ import annotations

from typing import Any

import torch

from modewright.errors import DataError


def main_output(output: Any, who: str) -> tuple[torch.Tensor, bool]:
    """Return the tensor that outputs are compared by, and whether it holds logits.

    Args:
        output: What a model returned.
        who: What compares them, for the message.

    Raises:
        DataError: It holds no tensor that is known.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits, True
    first = getattr(output, "last_hidden_state", output)
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if not isinstance(first, torch.Tensor):
        raise DataError(
            f"{who} compares outputs; a {type(output).__name__} holds no tensor that it knows "
            "(`logits`, `last_hidden_state`, or the first of a tuple)."
        )
    return first, False
