# SPDX-License-Identifier: Apache-2.0
"""Packed weights, the layers that hold them, and the backends that run them.

Knows no modes and no quantizers: mode ``compress`` fills these layers from quantized ones.
"""
