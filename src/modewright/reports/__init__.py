# SPDX-License-Identifier: Apache-2.0
"""Renders results for people and programs; computes nothing."""
