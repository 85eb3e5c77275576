# SPDX-License-Identifier: Apache-2.0
"""Data for calibration and evaluation: where text comes from, and how it becomes token windows."""
