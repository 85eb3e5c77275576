# SPDX-License-Identifier: Apache-2.0
"""Pruning of depth: whole blocks are dropped by their measured effect."""
