# SPDX-License-Identifier: Apache-2.0
"""``uncollected``: no search for garbage while only lasting objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off, and on again if it was.

    Restoring makes tens of thousands of objects that all stay. Their number sets off collections,
    each of which goes through every object of the process and frees next to nothing: of restoring
    a small language model they were up to half.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
