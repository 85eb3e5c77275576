# SPDX-License-Identifier: Apache-2.0
"""modewright's own matrix kernel: C++ in ``source``, built when first needed, and its loader."""
