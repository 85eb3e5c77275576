# SPDX-License-Identifier: Apache-2.0
"""Refitting what is left of a pruned network to what the whole one computes, by least squares."""
