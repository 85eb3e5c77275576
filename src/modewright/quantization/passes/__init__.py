# SPDX-License-Identifier: Apache-2.0
"""One file for each mode that calibrates: what it reads from the network, and where it puts it."""
