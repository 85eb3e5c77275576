# SPDX-License-Identifier: Apache-2.0
"""The whole run: load, baseline, modes, save, restore, measure again.

``optimize`` tells the story, ``subject`` is what is optimized, ``progress`` lets a killed run go
on, ``metering`` measures seconds and memory, ``fresh_restore`` proves the checkpoint in another
process, ``result`` is what comes out.
"""
