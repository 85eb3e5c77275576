# SPDX-License-Identifier: Apache-2.0
"""Pruning of width: units of dimension groups are cut, in three ways of choosing them."""
