# SPDX-License-Identifier: Apache-2.0
"""What the sparsity modes read of a model, and write to it."""
