# SPDX-License-Identifier: Apache-2.0
"""Calibration algorithms as tensor mathematics: they know no model, no hook and no mode."""
