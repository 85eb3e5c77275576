# SPDX-License-Identifier: Apache-2.0
"""The named schemes: ``w`` and the bits of the weights, ``a`` and the bits of the activations."""

from __future__ import annotations

import re

from modewright.errors import ConfigError, did_you_mean
from modewright.quantization.representation import FormatName, QuantizerConfig, SchemeConfig


def _channel(num_bits: int) -> QuantizerConfig:
    return QuantizerConfig(num_bits=num_bits, granularity="channel")


def _group(num_bits: int, *, symmetric: bool = True) -> QuantizerConfig:
    return QuantizerConfig(
        num_bits=num_bits, symmetric=symmetric, granularity="group", group_size=64
    )


def _mx(fmt: FormatName, *, dynamic: bool = False) -> QuantizerConfig:
    """Groups of 32 that share a power of two: OCP microscaling formats v1.0.

    The specification leaves open how the power is chosen. By the rule in its section 6.3 a fourth
    of all groups saturate; here it is the better of that power and the next.
    """
    return QuantizerConfig(
        format=fmt,
        granularity="group",
        group_size=32,
        scale_format="e8m0",
        scale_rule="least_error",
        dynamic=dynamic,
    )


def _nvfp4(*, dynamic: bool = False) -> QuantizerConfig:
    """Groups of 16 that share an fp8 scale, times one float32 for the tensor."""
    return QuantizerConfig(
        format="fp4_e2m1",
        granularity="group",
        group_size=16,
        scale_format="e4m3",
        scale_rule="least_error",
        dynamic=dynamic,
    )


_TOKEN_INT8 = QuantizerConfig(num_bits=8, granularity="token", dynamic=True)
_TENSOR_INT8 = QuantizerConfig(num_bits=8, granularity="tensor")
_FP8_CHANNEL = QuantizerConfig(format="fp8_e4m3", granularity="channel")
_FP8_TENSOR = QuantizerConfig(format="fp8_e4m3", granularity="tensor")
_FP8_TOKEN = QuantizerConfig(format="fp8_e4m3", granularity="token", dynamic=True)
_FP8_TILE = QuantizerConfig(format="fp8_e4m3", granularity="block", block_size=(128, 128))
_FP8_GROUP = QuantizerConfig(format="fp8_e4m3", granularity="group", group_size=128, dynamic=True)


def _both(weights: QuantizerConfig, inputs: QuantizerConfig) -> SchemeConfig:
    return SchemeConfig(weights=weights, input_activations=inputs)


SCHEMES: dict[str, SchemeConfig] = {
    # int8 weights per output channel, int8 activations per token, scaled as they come
    "w8a8": _both(_channel(8), _TOKEN_INT8),
    # the same with one calibrated scale for each activation tensor: for engines that need it
    "w8a8_static": _both(_channel(8), _TENSOR_INT8),
    # weights alone; activations stay as they are
    "w8a16": SchemeConfig(weights=_channel(8)),
    "w4a16": SchemeConfig(weights=_group(4)),
    "w4a16_asym": SchemeConfig(weights=_group(4, symmetric=False)),
    "w4a16_channel": SchemeConfig(weights=_channel(4)),
    "w3a16": SchemeConfig(weights=_group(3)),
    "w3a16_asym": SchemeConfig(weights=_group(3, symmetric=False)),
    # two bits are always with a zero point: of the four codes around zero one would be lost
    "w2a16": SchemeConfig(weights=_group(2, symmetric=False)),
    "nf4": SchemeConfig(weights=QuantizerConfig(format="nf4", granularity="group", group_size=64)),
    # int4 weights in groups of 64, int8 activations per token
    "w4a8": _both(_group(4), _TOKEN_INT8),
    # fp8: weights per channel and activations per token; or one scale each; or tiles of 128
    "fp8": _both(_FP8_CHANNEL, _FP8_TOKEN),
    "fp8_static": _both(_FP8_TENSOR, _FP8_TENSOR),
    "fp8_w8a16": SchemeConfig(weights=_FP8_CHANNEL),
    "fp8_block": _both(_FP8_TILE, _FP8_GROUP),
    # groups of 16 with an fp8 scale
    "nvfp4": _both(_nvfp4(), _nvfp4(dynamic=True)),
    "nvfp4_w4a16": SchemeConfig(weights=_nvfp4()),
    # groups of 32 with a power of two as scale
    "mxfp4": _both(_mx("fp4_e2m1"), _mx("fp4_e2m1", dynamic=True)),
    "mxfp4_w4a16": SchemeConfig(weights=_mx("fp4_e2m1")),
    "mxfp6": _both(_mx("fp6_e2m3"), _mx("fp6_e2m3", dynamic=True)),
    "mxfp8": _both(_mx("fp8_e4m3"), _mx("fp8_e4m3", dynamic=True)),
    "mxint8": _both(_mx("int"), _mx("int", dynamic=True)),
    # keys and values of attention
    "kv8": SchemeConfig(kv_cache=_TOKEN_INT8),
    "kv_fp8": SchemeConfig(kv_cache=_FP8_TENSOR),
}
NO_SCHEME = "none"


_WRITTEN_OUT = re.compile(r"w([2-8])a(8|16)(?:_g([1-9]\d*)|_(channel))?(_asym)?")


def scheme(name: str) -> SchemeConfig | None:
    """Return a scheme by its name; ``None`` for ``"none"``.

    Besides those of the table a name may say the integers of a scheme: ``w5a16_g32_asym`` has 5-bit
    weights with zero points in groups of 32 (``channel`` instead of ``g32``: one scale for an
    output channel; neither: groups of 64, channels for 8 bits) and activations as they are, ``a8``
    int8 activations per token.

    Raises:
        ConfigError: There is no such scheme.
    """
    if name == NO_SCHEME:
        return None
    if name in SCHEMES:
        return SCHEMES[name]
    written = _WRITTEN_OUT.fullmatch(name)
    if written is None:
        raise ConfigError(
            f"There is no scheme {name!r}.{did_you_mean(name, SCHEMES)} "
            f"Known: {', '.join(SCHEMES)}, none, and integers such as w5a16_g32_asym."
        )
    return _integers(*written.groups())


def _integers(
    bits: str, inputs: str, group: str | None, channel: str | None, asym: str | None
) -> SchemeConfig:
    whole_channel = channel or (bits == "8" and group is None)
    weights = QuantizerConfig(
        num_bits=int(bits),
        symmetric=asym is None,
        granularity="channel" if whole_channel else "group",
        group_size=None if whole_channel else int(group or 64),
    )
    return SchemeConfig(weights=weights, input_activations=_TOKEN_INT8 if inputs == "8" else None)
