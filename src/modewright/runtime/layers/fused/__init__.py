# SPDX-License-Identifier: Apache-2.0
"""What lies between packed layers, and whole blocks, in a call of the kernel library each.

In a packed model the linear layers take a third of the time that they took, and what was little
beside them no longer is: an RMS norm is seven of torch's operators, a gated activation three, and
causal attention computes what it then masks. Layers that compute just these change their class, and
compute the same, to the rounding of float32, by :mod:`modewright.runtime.native.between`. While a
text is generated, what Python does between the kernels is half of the time; so blocks of Llama's
form are one call then, by :mod:`modewright.runtime.native.block`.

Where the kernel does not serve (no library, another device or dtype, gradients, tracing) a fused
layer runs its own forward.
"""

from modewright.runtime.layers.fused.fusing import fuse, fuse_as_recorded, unfuse

__all__ = ["fuse", "fuse_as_recorded", "unfuse"]
