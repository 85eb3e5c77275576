# SPDX-License-Identifier: Apache-2.0
"""Bridges to other libraries; each of them is optional and imported only when it is used."""
