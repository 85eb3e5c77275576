# SPDX-License-Identifier: Apache-2.0
"""Which weights become zero, and what the others make up for: tensor mathematics."""
