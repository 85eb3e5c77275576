# SPDX-License-Identifier: Apache-2.0
"""Whether a model is streamed: as the recipe says, or by what memory there is."""

from __future__ import annotations

from pathlib import Path

import psutil

from modewright.integrations.shards import Shards
from modewright.modes.storage import MANIFEST_NAME
from modewright.recipes.schema import Recipe

SHARE = 0.5  # of the free memory that weights may take; algorithms and data need the rest
_BYTES = 4  # weights are read as float32


def is_streamed(recipe: Recipe, model: object) -> bool:
    """Return whether a run goes block by block.

    Args:
        recipe: Says ``stream: true``, ``false`` or ``auto``.
        model: With ``auto``, a folder of safetensors files that was not optimized before can be
            streamed; anything else is not.

    Raises:
        DataError: The folder holds no model that can be loaded without running foreign code.
        CheckpointError: A file is damaged or missing.
    """
    if recipe.stream != "auto":
        return recipe.stream
    if not isinstance(model, (str, Path)) or not Path(model).is_dir():
        return False
    if (Path(model) / MANIFEST_NAME).is_file():
        return False
    needed = Shards(Path(model)).values * _BYTES
    return needed > SHARE * psutil.virtual_memory().available
