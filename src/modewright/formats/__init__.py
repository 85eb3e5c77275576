# SPDX-License-Identifier: Apache-2.0
"""What a number is: the catalogue of formats, and the arithmetic of scales and codes."""
