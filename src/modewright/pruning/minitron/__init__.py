# SPDX-License-Identifier: Apache-2.0
"""Pruning of language models in width and depth together, with one width for all blocks."""
