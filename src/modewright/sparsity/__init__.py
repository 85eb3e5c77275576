# SPDX-License-Identifier: Apache-2.0
"""Sparsity: weights that are held at zero by masks.

``config`` and ``pattern`` say what a user may ask for, ``planning`` finds the layers,
``algorithms/`` is the mathematics, ``passes/`` runs it over a model, ``modes`` declares the modes.
"""
