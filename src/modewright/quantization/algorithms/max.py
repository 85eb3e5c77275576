# SPDX-License-Identifier: Apache-2.0
"""Max scales: nothing saturates.

The scale of a group is its largest magnitude over the largest code. It is the only choice that
clips nothing, needs one pass, and has a bound: no value moves by more than half a scale (a
whole one with a zero point, which is rounded too).
"""

from __future__ import annotations

from modewright.formats.scaling import max_scale

__all__ = ["max_scale"]
