# SPDX-License-Identifier: Apache-2.0
"""Tiny models, example modes and comparisons that several test modules use."""
