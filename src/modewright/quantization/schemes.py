# SPDX-License-Identifier: Apache-2.0
"""The named schemes: ``w`` and the bits of the weights, ``a`` and the bits of the activations."""

from __future__ import annotations

from modewright.errors import ConfigError, did_you_mean
from modewright.quantization.representation import QuantizerConfig, SchemeConfig

_CHANNEL_INT8 = QuantizerConfig(num_bits=8, granularity="channel")
_GROUP_INT4 = QuantizerConfig(num_bits=4, granularity="group", group_size=64)
_TOKEN_INT8 = QuantizerConfig(num_bits=8, granularity="token", dynamic=True)
_TENSOR_INT8 = QuantizerConfig(num_bits=8, granularity="tensor")

SCHEMES: dict[str, SchemeConfig] = {
    # int8 weights per output channel, int8 activations per token, scaled as they come
    "w8a8": SchemeConfig(weights=_CHANNEL_INT8, input_activations=_TOKEN_INT8),
    # the same with one calibrated scale for each activation tensor: for engines that need it
    "w8a8_static": SchemeConfig(weights=_CHANNEL_INT8, input_activations=_TENSOR_INT8),
    # int8 weights per output channel; activations stay as they are
    "w8a16": SchemeConfig(weights=_CHANNEL_INT8),
    # int4 weights in groups of 64 along the inputs; activations stay as they are
    "w4a16": SchemeConfig(weights=_GROUP_INT4),
}
NO_SCHEME = "none"


def scheme(name: str) -> SchemeConfig | None:
    """Return a named scheme; ``None`` for ``"none"``.

    Raises:
        ConfigError: There is no such scheme.
    """
    if name == NO_SCHEME:
        return None
    if name not in SCHEMES:
        raise ConfigError(
            f"There is no scheme {name!r}.{did_you_mean(name, SCHEMES)} "
            f"Known: {', '.join(SCHEMES)}, none."
        )
    return SCHEMES[name]
