# SPDX-License-Identifier: Apache-2.0
"""``python -m modewright``: the command line."""

from modewright.cli import main

main()
