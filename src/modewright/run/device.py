# SPDX-License-Identifier: Apache-2.0
"""Where a run's model is: the CPU, a GPU."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from modewright.errors import ConfigError


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is; packed ones may have no parameters."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def named_device(name: str | None) -> torch.device | None:
    """Return the device of a name such as ``cuda`` or ``cuda:1``; ``None`` for none.

    Raises:
        ConfigError: There is no such device here.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used: {reason}. Expected one that this torch has, such as "
            "cpu or cuda."
        ) from error
    if device.type == "meta":
        raise ConfigError("device 'meta' holds no numbers: a model cannot be optimized there.")
    return device


def require_cpu(device: torch.device | None) -> None:
    """Refuse another device for a run that goes block by block.

    Raises:
        ConfigError: It is another one.
    """
    if device is not None and device.type != "cpu":
        raise ConfigError(
            f"device {str(device)!r}: going block by block is done on the CPU. Pass stream=False "
            "(--no-stream) if the model fits into memory."
        )
