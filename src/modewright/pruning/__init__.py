# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: parts of a network are removed, and what is left is a smaller network."""
