# SPDX-License-Identifier: Apache-2.0
"""In which precision a pass runs the network while it learns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def automatic_precision(
    device: torch.device, precision: Precision
) -> AbstractContextManager[object]:
    """Return a context in which matrix products run in bfloat16, where that is faster.

    Args:
        device: Where the network is.
        precision: ``"auto"`` takes bfloat16 where the device has instructions for it.
    """
    if precision == "float32" or (precision == "auto" and not _has_bfloat16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def usable_precision(
    run: Callable[[], object], device: torch.device, precision: Precision
) -> Precision:
    """Return the precision to run in: float32 if ``"auto"`` would fail.

    Some operations refuse the mixture of types that bfloat16 products bring.

    Args:
        run: Runs the network once.
        device: Where the network is.
        precision: What was asked for.
    """
    if precision != "auto" or not _has_bfloat16(device):
        return precision
    try:
        with torch.no_grad(), automatic_precision(device, "bfloat16"):
            run()
    except RuntimeError:
        return "float32"
    return "bfloat16"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
