"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Meter", "console", "meter"]

console = Console(file=sys.stdout, highlight=False, soft_wrap=True)


class Meter:
    """Counts steps of one piece of work."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._next_line = 0.25
        self._bar: Progress | None = None
        if console.is_terminal:
            note = TextColumn("{task.fields[note]}")
            columns = (TextColumn("  {task.description:<27}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, note, console=console)
            self._bar.start()
            self._task = self._bar.add_task(description, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps; the note is shown beside the bar."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif self._done >= self._next_line * self._total:
            console.print(f"  {self._description} {self._done}/{self._total} {note}".rstrip())
            self._next_line = (int(4 * self._done / self._total) + 1) / 4

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def meter(description: str, total: int) -> Iterator[Meter]:
    """Show progress inside the ``with`` block."""
    one = Meter(description, total)
    try:
        yield one
    finally:
        one.close()
