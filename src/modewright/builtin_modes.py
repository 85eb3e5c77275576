# SPDX-License-Identifier: Apache-2.0
"""The one table of the modes that come with modewright, and the registry that holds it.

A row names where the descriptor is; it is imported when the mode is asked for. Installed packages
add modes through the entry point group ``modewright.modes``, programs through ``register_mode``.
"""

from __future__ import annotations

from modewright.modes.registry import ModeRegistry, ModeRow

ENTRY_POINT_GROUP = "modewright.modes"

_PRUNING = "modewright.pruning.modes"
_QUANTIZATION = "modewright.quantization.modes"
_SPARSITY = "modewright.sparsity.modes"

BUILTIN_MODES: dict[str, ModeRow] = {
    "fastnas": ModeRow(
        f"{_PRUNING}:FastnasMode",
        "Let widths be cut; a search scores each by itself and combines the best.",
    ),
    "gradnas": ModeRow(
        f"{_PRUNING}:GradnasMode",
        "Let widths be cut; a search takes the units that the loss feels least.",
    ),
    "autonas": ModeRow(
        f"{_PRUNING}:AutonasMode",
        "Let widths be cut; subnets that share weights are trained, then bred by evolution.",
    ),
    "depth": ModeRow(
        "modewright.pruning.depth.mode:DepthMode",
        "Let whole blocks be dropped; a search picks those whose loss matters least.",
    ),
    "minitron": ModeRow(
        "modewright.pruning.minitron.mode:MinitronMode",
        "Let heads, inner widths and blocks be cut, alike in all blocks; a search balances them.",
    ),
    "refit": ModeRow(
        "modewright.pruning.refit.mode:RefitMode",
        "Solve what writes to the residual stream anew, so that pruning changes the stream least.",
    ),
    "export_prune": ModeRow(
        f"{_PRUNING}:ExportPruneMode",
        "Cut what was not chosen, for good; a plain smaller network is left.",
    ),
    "rotate": ModeRow(
        f"{_QUANTIZATION}:RotateMode",
        "Rotate the residual stream of a transformer, so that no channel stands out.",
    ),
    "sparse_magnitude": ModeRow(
        f"{_SPARSITY}:SparseMagnitudeMode",
        "Make the smallest weights zero, in a pattern; no data is needed.",
    ),
    "wanda": ModeRow(
        f"{_SPARSITY}:WandaMode",
        "Make the weights zero that matter least for the inputs that they see.",
    ),
    "sparsegpt": ModeRow(
        f"{_SPARSITY}:SparsegptMode",
        "Make weights zero one column after another; later ones make up for what is lost.",
    ),
    "alps": ModeRow(
        f"{_SPARSITY}:AlpsMode",
        "Choose which weights are zero and what the others are together (ADMM).",
    ),
    "export_sparse": ModeRow(
        f"{_SPARSITY}:ExportSparseMode",
        "Fold masks into plain layers, whose zeros are then ordinary numbers.",
    ),
    "quantize": ModeRow(
        f"{_QUANTIZATION}:QuantizeMode",
        "Put quantizers on the layers that rules pick: low precision, simulated.",
    ),
    "max_calibrate": ModeRow(
        f"{_QUANTIZATION}:MaxCalibrateMode",
        "Set the scales of all quantizers from the largest magnitudes seen.",
    ),
    "percentile": ModeRow(
        f"{_QUANTIZATION}:PercentileMode",
        "Set the scales of activations so that the outermost values saturate.",
    ),
    "entropy": ModeRow(
        f"{_QUANTIZATION}:EntropyMode",
        "Set the scales of activations that keep their distribution closest.",
    ),
    "mse": ModeRow(
        f"{_QUANTIZATION}:MseMode",
        "Search the scales with the least squared error, weighted by the inputs.",
    ),
    "hqq": ModeRow(
        f"{_QUANTIZATION}:HqqMode",
        "Search the scales of weights without data (half-quadratic quantization).",
    ),
    "smoothquant": ModeRow(
        f"{_QUANTIZATION}:SmoothquantMode",
        "Divide inputs with outliers, and let the weights take their range over.",
    ),
    "awq": ModeRow(
        f"{_QUANTIZATION}:AwqMode",
        "Enlarge the columns of weights that see large inputs, so that rounding costs less.",
    ),
    "hadamard": ModeRow(
        f"{_QUANTIZATION}:HadamardMode",
        "Rotate the inputs of layers in blocks when they run, so that outliers spread out.",
    ),
    "svdquant": ModeRow(
        f"{_QUANTIZATION}:SvdquantMode",
        "Put a branch of low rank in full precision beside every quantized weight.",
    ),
    "bias_correction": ModeRow(
        f"{_QUANTIZATION}:BiasCorrectionMode",
        "Take the mean error of every layer's output into its bias.",
    ),
    "gptq": ModeRow(
        f"{_QUANTIZATION}:GptqMode",
        "Round weights one column after another; later ones make up for the error.",
    ),
    "learned_rounding": ModeRow(
        f"{_QUANTIZATION}:LearnedRoundingMode",
        "Learn the rounding and clipping of weights, block by block.",
    ),
    "lsq": ModeRow(
        f"{_QUANTIZATION}:LsqMode",
        "Learn all scales together from the original model's predictions.",
    ),
    "auto_quantize": ModeRow(
        "modewright.mixed_precision.modes:AutoQuantizeMode",
        "Search a scheme for every group of layers, within budgets of bits, bytes or seconds.",
    ),
    "export_quantize": ModeRow(
        f"{_QUANTIZATION}:ExportQuantizeMode",
        "Fold the quantized weights into plain layers and remove the quantizers.",
    ),
    "compress": ModeRow(
        f"{_QUANTIZATION}:CompressMode",
        "Store quantized weights in as many bits as they have, and run them like that.",
    ),
    "decompress": ModeRow(
        f"{_QUANTIZATION}:DecompressMode",
        "Unpack the weights into plain layers that any program knows.",
    ),
}

default_registry = ModeRegistry(BUILTIN_MODES, entry_point_group=ENTRY_POINT_GROUP)
register_mode = default_registry.register
