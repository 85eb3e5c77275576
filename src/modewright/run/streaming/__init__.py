# SPDX-License-Identifier: Apache-2.0
"""A run that never holds the whole model: from safetensors shards to a checkpoint, block by block.

``run`` tells the story, ``units`` cuts a model without weights into pieces and fills one at a time,
``support`` says which recipes can be applied piece by piece, ``kept`` what is on disk after each.
"""
