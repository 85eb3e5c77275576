# SPDX-License-Identifier: Apache-2.0
"""All backends, best first: the first that does not refuse a case serves it."""

from __future__ import annotations

from functools import cache

from modewright.errors import ConfigError, did_you_mean
from modewright.runtime.backends.base import Backend
from modewright.runtime.backends.buffered import Buffered
from modewright.runtime.backends.fp8_mm import Fp8Mm
from modewright.runtime.backends.int4pack import Int4Pack
from modewright.runtime.backends.int8pack import Int8Pack
from modewright.runtime.backends.int_mm import IntMm
from modewright.runtime.backends.native import Native
from modewright.runtime.backends.native_floats import NativeFloats
from modewright.runtime.backends.native_tiles import NativeTiles
from modewright.runtime.backends.onednn import OneDnnInt8
from modewright.runtime.backends.portable import Portable
from modewright.runtime.backends.triton import Triton


@cache
def backends() -> dict[str, Backend]:
    """Return all backends by name, in the order of preference."""
    made: tuple[Backend, ...] = (
        NativeTiles(),
        Native(),
        NativeFloats(),
        Int4Pack(),
        Int8Pack(),
        OneDnnInt8(),
        IntMm(),
        Fp8Mm(),
        Triton(),
        Buffered(),
        Portable(),
    )
    return {backend.name: backend for backend in made}


def backend_named(name: str) -> Backend:
    """Return a backend.

    Raises:
        ConfigError: There is none of that name.
    """
    found = backends()
    if name not in found:
        raise ConfigError(
            f"There is no backend {name!r}.{did_you_mean(name, found)} Known: {', '.join(found)}."
        )
    return found[name]
