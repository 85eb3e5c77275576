# SPDX-License-Identifier: Apache-2.0
"""Backends: ways to multiply by a packed weight, and the choice between them."""

from modewright.runtime.backends.base import FEW_ROWS, Backend, Case
from modewright.runtime.backends.choice import choose, linear, using
from modewright.runtime.backends.table import backend_named, backends

__all__ = ["FEW_ROWS", "Backend", "Case", "backend_named", "backends", "choose", "linear", "using"]
