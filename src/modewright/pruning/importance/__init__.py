# SPDX-License-Identifier: Apache-2.0
"""How much each unit of a group matters."""
