# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar with time left in a terminal, a line for each part elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressDisplay:
    """Shows the parts of a run as they come; call it like ``on_progress``.

    Args:
        console: Where to show them; a console that is no terminal gets one line for each part.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> ProgressDisplay:
        """Start showing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, leaving what is shown."""
        if kind is None:
            self._finish()
        self._progress.stop()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Show how far a part is."""
        if name != self._name:
            self._finish()
            self._name = name
            self._task = self._progress.add_task(name, total=total)
            if not self._console.is_terminal:
                self._console.print(f"{name} ...", highlight=False)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._task]
            total = task.total or 1
            self._progress.update(self._task, completed=total, total=total)
