# SPDX-License-Identifier: Apache-2.0
"""Tensor mathematics of pruning: torch and formats, nothing else of the package."""
