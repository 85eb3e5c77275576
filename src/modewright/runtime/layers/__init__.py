# SPDX-License-Identifier: Apache-2.0
"""Layers that hold packed weights.

``record`` (what a packed layer is, as JSON), ``base`` (how a plain layer becomes one), and a file
for each family of layers.
"""

from modewright.runtime.layers.base import PackedLayer, make_packed, make_plain
from modewright.runtime.layers.experts import PackedExperts
from modewright.runtime.layers.linear import (
    PackedConv,
    PackedEmbedding,
    PackedLinear,
    PackedTransposedLinear,
)
from modewright.runtime.layers.record import LayerRecord, PackedParameter
from modewright.runtime.layers.recurrent import PackedRecurrent

__all__ = [
    "LayerRecord",
    "PackedConv",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLayer",
    "PackedLinear",
    "PackedParameter",
    "PackedRecurrent",
    "PackedTransposedLinear",
    "make_packed",
    "make_plain",
]
