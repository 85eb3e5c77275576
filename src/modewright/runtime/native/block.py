# SPDX-License-Identifier: Apache-2.0
"""A whole block of a language model for the next token of a text, in one or two library calls.

While a text is generated, each of a block's kernels takes some tens of microseconds, and calling it
from Python takes about as long. Only the cache of keys and values stays outside.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from modewright.errors import KernelError
from modewright.runtime.native.between import AttentionStruct
from modewright.runtime.native.library import ACTIVATIONS, BEST, DTYPES, ISAS, NativeWeight

WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Update = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class BlockStruct(ctypes.Structure):
    """``mw::Block`` of ``source/block.h``."""

    _fields_ = (
        ("weights", ctypes.c_void_p * len(WEIGHTS)),
        ("biases", ctypes.c_void_p * len(WEIGHTS)),
        ("act_scales", ctypes.c_float * len(WEIGHTS)),
        ("acts", ctypes.c_int * len(WEIGHTS)),
        ("norms", ctypes.c_void_p * 2),
        ("eps", ctypes.c_float * 2),
        *((n, ctypes.c_int64) for n in ("width", "heads", "kv_heads", "features", "inner")),
        ("scaling", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


class NativeBlock:
    """Attention with rotary embeddings and a gated activation, each behind an RMS norm.

    Args:
        weights: Those of :data:`WEIGHTS`, in that order.
        biases: Of each, contiguous, or ``None``.
        inputs: How inputs of each are quantized: ``None``, ``"int8_token"`` or ``"int8_tensor"``,
            and the scale of the latter.
        norms: The weights of both norms, contiguous, float32 or bfloat16; of the same dtype are
            biases, and what goes in and out.
        eps: Of both norms.
        features: Of a head.
        scaling: What scores are multiplied with.
        isa: The instruction set, for tests; the best one by default.
    """

    def __init__(
        self,
        weights: Sequence[NativeWeight],
        biases: Sequence[torch.Tensor | None],
        inputs: Sequence[tuple[str | None, torch.Tensor | None]],
        norms: tuple[torch.Tensor, torch.Tensor],
        eps: tuple[float, float],
        features: int,
        scaling: float,
        isa: str | None = None,
    ) -> None:
        loaded = weights[0].kernels.loaded
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._begin, self._end = loaded.mw_block_begin, loaded.mw_block_end
        self._next = loaded.mw_block_next
        self._begin.argtypes = [pointer, pointer, size, pointer, pointer, size]
        self._next.argtypes = [*self._begin.argtypes, pointer, pointer, size, size, pointer, number]
        self._begin.argtypes += [pointer, pointer, pointer, number]
        self._end.argtypes = [*[pointer] * 4, number]
        self._place = BEST if isa is None else ISAS.index(isa)
        self._kept = (weights, biases, norms)
        pointed = [*norms, *biases, *(w.packed for w in weights), *(w.scale for w in weights)]
        self._pointed = [tensor for tensor in pointed if tensor is not None]
        self._places: list[int] = []
        self._scaling, self.features, self.width = scaling, features, weights[0].columns
        self.heads, self.kv_heads = (weight.rows // features for weight in weights[:2])
        self._struct = BlockStruct(eps=eps, width=self.width, inner=weights[4].rows)
        self._struct.scaling = scaling
        self.dtype = norms[0].dtype
        self._struct.dtype = DTYPES[self.dtype]
        self._struct.features, self._struct.heads = features, self.heads
        self._struct.kv_heads = self.kv_heads
        self._struct.weights[:] = [weight.address for weight in weights]
        self._struct.acts[:] = [ACTIVATIONS[act] for act, _ in inputs]
        scales = [1.0 if scale is None else float(scale) for _, scale in inputs]
        self._struct.act_scales[:] = scales
        self._address = ctypes.addressof(self._struct)
        self._locate()

    def _locate(self) -> None:
        """Take the addresses anew that were changed: sharing a model's memory moves tensors."""
        places = list(map(torch.Tensor.data_ptr, self._pointed))
        if places != self._places:
            self._places = places
            weights, biases, norms = self._kept
            for weight in weights:
                weight.locate()
            self._struct.biases[:] = [None if bias is None else bias.data_ptr() for bias in biases]
            self._struct.norms[:] = [norm.data_ptr() for norm in norms]

    def append_token(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        """Return what :meth:`next_token` does, and write the token's key and value.

        Args:
            x: ``[texts, 1, width]``, contiguous, of the block's dtype.
            cos: ``[texts or 1, 1, features]``, likewise: by how much queries and keys are turned.
            sin: As ``cos``.
            keys: ``[texts, key heads, room, features]``, likewise, of which those of the tokens
                before are read, and that of the token is written.
            values: As ``keys``.
            tokens: How many there are with this one: ``room`` at most.

        Returns:
            ``[texts, 1, width]``.

        Raises:
            KernelError: Memory ran out.
        """
        self._locate()
        result = torch.empty_like(x)
        texts = len(x)
        failed = self._next(
            *(self._address, x.data_ptr(), texts, cos.data_ptr(), sin.data_ptr()),
            self.features if len(cos) > 1 else 0,
            *(keys.data_ptr(), values.data_ptr(), tokens, keys.shape[2], result.data_ptr()),
            self._place << 7 | torch.get_num_threads() << 9,
        )
        if failed:
            raise _failure(failed)
        return result

    def next_token(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, update: _Update
    ) -> torch.Tensor:
        """Return what the block makes of one token of each text.

        Args:
            x: ``[texts, 1, width]``, contiguous, of the block's dtype.
            cos: ``[texts or 1, 1, features]``, likewise: by how much queries and keys are turned.
            sin: As ``cos``.
            update: Takes the token's key and value, ``[texts, key heads, 1, features]``; returns
                those of all tokens, features side by side.

        Returns:
            ``[texts, 1, width]``.

        Raises:
            KernelError: Memory ran out, or the keys and values are not those of the texts.
        """
        texts, options = len(x), self._place << 7 | torch.get_num_threads() << 9
        heads, kv_heads, features = self.heads, self.kv_heads, self.features
        self._locate()
        query = torch.empty(texts, heads, features)
        key = x.new_empty(texts, kv_heads, 1, features)
        value = x.new_empty(texts, kv_heads, 1, features)
        failed = self._begin(
            *(self._address, x.data_ptr(), texts, cos.data_ptr(), sin.data_ptr()),
            features if len(cos) > 1 else 0,
            *(query.data_ptr(), key.data_ptr(), value.data_ptr(), options),
        )
        if failed:
            raise _failure(failed)
        keys, values = (self._plain(tensor) for tensor in update(key, value))
        shape = keys.shape
        if shape != values.shape or shape[:2] != (texts, kv_heads) or shape[3:] != (features,):
            raise KernelError(
                f"expected keys and values [{texts}, {kv_heads}, tokens, {features}] of the cache; "
                f"received {list(keys.shape)} and {list(values.shape)}."
            )
        attention = AttentionStruct(
            *(query.data_ptr(), keys.data_ptr(), values.data_ptr(), None, None),
            *(texts, heads, kv_heads, keys.shape[2], features),
            *(heads * features, features, features),
            *keys.stride()[:3],
            *values.stride()[:3],
            *(self._scaling, self._struct.dtype),
        )
        result = torch.empty_like(x)
        failed = self._end(
            *(self._address, x.data_ptr(), ctypes.addressof(attention), result.data_ptr(), options)
        )
        if failed:
            raise _failure(failed)
        return result

    def _plain(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a cache holds in the block's dtype, features side by side."""
        if tensor.dtype is self.dtype and tensor.stride(-1) == 1:
            return tensor
        return tensor.to(self.dtype).contiguous()


def _failure(code: int) -> KernelError:
    why = "groups of a weight do not fit" if code == 1 else "memory ran out"
    return KernelError(f"the kernels cannot run a block: {why}. Set MODEWRIGHT_NATIVE=0.")
