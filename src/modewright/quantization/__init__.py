# SPDX-License-Identifier: Apache-2.0
"""Quantization: low precision, simulated while it is tuned.

``config`` (what a user may set), ``schemes`` (named ones), ``quantizer`` (simulates one tensor),
``layers`` (which layers can be quantized, and how), ``algorithms`` (tensor mathematics), ``modes``
(the descriptors), ``convert`` (what they do).
"""
