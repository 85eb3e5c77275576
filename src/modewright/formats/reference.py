# SPDX-License-Identifier: Apache-2.0
"""The same arithmetic one number at a time, in the order one would explain it.

Slow on purpose: it is what the fast path is checked against. Values are Python floats rounded to
float32 after every operation, as the fast path's are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from modewright.formats.integer import IntegerFormat


def fake_quantize_group(values: Sequence[float], fmt: IntegerFormat) -> list[float]:
    """Return the values of one group after max-scaled quantization and dequantization."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if fmt.signed:
        scale = float32(max(-low, high) / fmt.qmax)
    else:
        steps = fmt.qmax - fmt.qmin
        scale = float32(float32(high / steps) - float32(low / steps))
    if scale < 2.0**-126:
        scale = 1.0
    zero_point = 0
    if not fmt.signed:
        zero_point = round(float32(fmt.qmin - float32(low / scale)))
        zero_point = min(max(zero_point, fmt.qmin), fmt.qmax)
    return [_fake_quantize_value(value, scale, zero_point, fmt) for value in values]


def _fake_quantize_value(value: float, scale: float, zero_point: int, fmt: IntegerFormat) -> float:
    if math.isnan(value):
        return value
    code = round(float32(value / scale)) + zero_point
    code = min(max(code, fmt.qmin), fmt.qmax)
    return float32((code - zero_point) * scale)


def float32(value: float) -> float:
    """Round a Python float to the nearest float32, which may be an infinity."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded
