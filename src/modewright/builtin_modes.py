# SPDX-License-Identifier: Apache-2.0
"""The one table of the modes that come with modewright, and the registry that holds it.

A row names where the descriptor is; it is imported when the mode is asked for. Installed packages
add modes through the entry point group ``modewright.modes``, programs through ``register_mode``.
"""

from __future__ import annotations

from modewright.modes.registry import ModeRegistry, ModeRow

ENTRY_POINT_GROUP = "modewright.modes"

_QUANTIZATION = "modewright.quantization.modes"

BUILTIN_MODES: dict[str, ModeRow] = {
    "quantize": ModeRow(
        f"{_QUANTIZATION}:QuantizeMode",
        "Put quantizers on the layers that rules pick: low precision, simulated.",
    ),
    "max_calibrate": ModeRow(
        f"{_QUANTIZATION}:MaxCalibrateMode",
        "Set the scales of all quantizers from the largest magnitudes seen.",
    ),
    "export_quantize": ModeRow(
        f"{_QUANTIZATION}:ExportQuantizeMode",
        "Fold the quantized weights into plain layers and remove the quantizers.",
    ),
}

default_registry = ModeRegistry(BUILTIN_MODES, entry_point_group=ENTRY_POINT_GROUP)
register_mode = default_registry.register
