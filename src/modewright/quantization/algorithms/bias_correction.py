# SPDX-License-Identifier: Apache-2.0
r"""Bias correction: take the mean error of a layer's output into its bias.

Rounding weights shifts the mean of every output by ``(W - Wq) @ E[x]``, and a shift, unlike noise,
adds up over the layers. The bias can take it back exactly (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2).
"""

from __future__ import annotations

import torch


def bias_shift(
    mean_input: torch.Tensor, weight: torch.Tensor, quantized_weight: torch.Tensor
) -> torch.Tensor:
    """Return what has to be added to the bias, so that the mean output is that of the original.

    Args:
        mean_input: The mean of the layer's input, ``[in]``.
        weight: The original weight, ``[out, in]``, any float dtype.
        quantized_weight: What remains of it, same shape.

    Returns:
        ``[out]`` in the dtype of ``mean_input``, at least float32.
    """
    dtype = torch.promote_types(mean_input.dtype, torch.float32)
    change = weight.detach().to(dtype) - quantized_weight.detach().to(dtype)
    return change @ mean_input.detach().to(dtype)
