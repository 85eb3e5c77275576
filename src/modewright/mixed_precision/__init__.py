# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: every group of layers gets the scheme that an integer program picks for it.

``modes`` describes mode ``auto_quantize``, ``searcher`` runs its search: it scores what each
candidate does to each group (``gradient``, ``divergence``), counts what each costs (``costs``),
and hands both to an exact solver (``solver``). ``space`` puts the chosen quantizers in.
"""
