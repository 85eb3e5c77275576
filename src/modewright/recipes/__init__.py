# SPDX-License-Identifier: Apache-2.0
"""Recipes: a workflow as a file. ``schema`` (what it holds), ``loader``, ``library/*.yaml``."""
