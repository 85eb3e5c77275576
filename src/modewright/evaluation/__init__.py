# SPDX-License-Identifier: Apache-2.0
"""Measurements of a model: how well it predicts text, and how far two sets of tensors differ."""
