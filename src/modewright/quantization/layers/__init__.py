# SPDX-License-Identifier: Apache-2.0
"""Which layers can be quantized, and how their class is changed in place.

``base`` (what a quantized layer is), ``registry`` (which layers become one), and a file for each
family of layers.
"""

from modewright.quantization.layers.base import QuantizedLayer
from modewright.quantization.layers.parents import call_parts, read_parts
from modewright.quantization.layers.registry import (
    QUANTIZED_CLASSES,
    fitted_scheme,
    insert_quantizers,
    layer_kind,
    register_layer,
    remove_quantizers,
    supported_names,
)

__all__ = [
    "QUANTIZED_CLASSES",
    "QuantizedLayer",
    "call_parts",
    "fitted_scheme",
    "insert_quantizers",
    "layer_kind",
    "read_parts",
    "register_layer",
    "remove_quantizers",
    "supported_names",
]
