# SPDX-License-Identifier: Apache-2.0
"""What tests of the kernel library share: whether it is there, and for which instruction sets."""

from __future__ import annotations

import pytest

from modewright.runtime.native.library import ISAS, library

LIBRARY = library()
HERE: tuple[str, ...] = () if isinstance(LIBRARY, str) else LIBRARY.isas
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no kernel library: {LIBRARY}")
each_isa = pytest.mark.parametrize(
    "isa",
    [pytest.param(i, marks=pytest.mark.skipif(i not in HERE, reason="not here")) for i in ISAS],
)
