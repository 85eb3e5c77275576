# SPDX-License-Identifier: Apache-2.0
"""What lies between linear layers, by the kernel library: norms, gates, attention, rounding.

Each is one pass over memory where torch's operators take several, on the CPU. Norms and gates take
float32 and bfloat16, and compute in float32; attention of whole texts takes float32.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from modewright.errors import KernelError
from modewright.runtime.native.library import BEST, DTYPES, ISAS, ROUNDINGS, Library, library

_FEATURES = 16  # a head has a multiple of so many


class AttentionStruct(ctypes.Structure):
    """``mw::Attention`` of ``source/kernel.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "arranged")),
        *(
            (name, ctypes.c_int64)
            for name in ("batches", "heads", "kv_heads", "tokens", "features")
        ),
        *(
            (f"{tensor}_{axis}", ctypes.c_int64)
            for tensor in ("query", "key", "value")
            for axis in ("batch", "head", "token")
        ),
        ("scaling", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


def between() -> Between | None:
    """Return the functions, or ``None`` where there is no library."""
    found = library()
    return None if isinstance(found, str) else _functions(found)


@cache
def _functions(kernels: Library) -> Between:
    return Between(kernels)


class Between:
    """The functions of the library.

    Args:
        kernels: The library.
        isa: The instruction set, for tests; the best one by default.

    Attributes:
        attends: Whether that has a kernel for attention.
    """

    def __init__(self, kernels: Library, isa: str | None = None) -> None:
        loaded = kernels.loaded
        self._place = BEST if isa is None else ISAS.index(isa)
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._norm = loaded.mw_rms_norm
        self._norm.argtypes = [pointer, pointer, pointer, size, size, ctypes.c_float, number]
        self._gate = loaded.mw_silu_gate
        self._gate.argtypes = [pointer, pointer, size, number]
        self._norm.restype = self._gate.restype = None
        self._round = loaded.mw_round
        self._round.argtypes = [pointer, pointer, size, size, ctypes.c_float, number]
        self._attend = loaded.mw_attend
        self._attend.argtypes = [pointer, number, number]
        self.attends = bool(loaded.mw_attends(self._place))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``x / sqrt(mean(x ** 2) + eps) * weight``.

        Args:
            x: ``[..., n]``, float32 or bfloat16.
            weight: ``[n]``, likewise.
            eps: What is added to the mean.
        """
        x = x.contiguous()
        result = torch.empty_like(x)
        width = len(weight)
        self._norm(
            x.data_ptr(),
            weight.data_ptr(),
            result.data_ptr(),
            x.numel() // width,
            width,
            eps,
            DTYPES[x.dtype] | DTYPES[weight.dtype] << 2 | self._how(),
        )
        return result

    def silu_gate_(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` in the memory of ``gate``.

        Args:
            gate: Any shape, contiguous, float32 or bfloat16.
            up: As ``gate``.
        """
        options = DTYPES[gate.dtype] | self._how()
        self._gate(gate.data_ptr(), up.data_ptr(), gate.numel(), options)
        return gate

    def round(self, x: torch.Tensor, act: str, scale: float) -> torch.Tensor | None:
        """Return what a format leaves of rows, ``None`` if a number is infinite or none.

        Args:
            x: ``[..., n]``, float32 or bfloat16.
            act: How they are quantized: one of ``ROUNDINGS``.
            scale: What numbers of the format are multiplied with; 0: for each row its largest
                magnitude divided by the format's (448, 127).
        """
        x = x.contiguous()
        result, width = torch.empty_like(x), x.shape[-1]
        failed = self._round(
            *(x.data_ptr(), result.data_ptr(), x.numel() // max(width, 1), width),
            *(scale, DTYPES[x.dtype] | ROUNDINGS[act] << 2 | self._how()),
        )
        return None if failed else result

    def _how(self) -> int:
        """Return the instruction set and the number of threads, as the library is told them."""
        return self._place << 7 | torch.get_num_threads() << 9

    def can_attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether :meth:`attend` takes such tensors: ``[batch, heads, tokens, features]``."""
        return (
            self.attends
            and query.dtype == key.dtype == value.dtype == torch.float32
            and query.shape[-1] == key.shape[-1] == value.shape[-1]
            and query.shape[-1] % _FEATURES == 0
            and query.shape[0] == key.shape[0] == value.shape[0]
            and query.shape[2] == key.shape[2] == value.shape[2]
            and key.shape[1] == value.shape[1]
            and query.shape[1] % key.shape[1] == 0
            and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Return causal attention, each token to itself and those before it.

        Args:
            query: ``[batch, heads, tokens, features]``.
            key: The same, with as many heads or a part of them, each for several of the queries'.
            value: As ``key``.
            scaling: What scores are multiplied with.

        Returns:
            ``[batch, tokens, heads, features]``.

        Raises:
            KernelError: Memory ran out.
        """
        batches, heads, tokens, features = query.shape
        result = query.new_empty(batches, tokens, heads, features)
        struct = AttentionStruct(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr(), result.data_ptr(), None),
            *(batches, heads, key.shape[1], tokens, features),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            scaling,
        )
        if self._attend(ctypes.addressof(struct), self._place, torch.get_num_threads()):
            raise KernelError(f"memory ran out for the keys of {tokens} tokens.")
        return result
