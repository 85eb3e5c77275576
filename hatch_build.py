# SPDX-License-Identifier: Apache-2.0
"""Puts the kernel library into the wheel if ``MODEWRIGHT_BUILD_KERNELS=1`` is set.

The wheel is then one for this platform. Without it, or where the library cannot be built, the wheel
is pure Python, and the library is built when it is first needed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    """Builds the library beside the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and add it to the files of the wheel."""
        if version == "editable" or os.environ.get("MODEWRIGHT_BUILD_KERNELS") != "1":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from modewright.errors import KernelError
        from modewright.runtime.native import build

        made = Path(tempfile.mkdtemp()) / build.library_name()
        try:
            build.build(made)
        except KernelError as error:
            self.app.display_warning(f"no kernel library in the wheel: {error}")
            return
        target = f"modewright/runtime/native/bundled/{made.name}"
        build_data["force_include"][str(made)] = target
        build_data.update(pure_python=False, infer_tag=True)
