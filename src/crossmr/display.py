"""What a person sees while a long job runs: a live bar in a terminal, a plain line now and then in a log."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

SECONDS_BETWEEN_LINES = 15.0
LOG_WIDTH = 132
"""Columns of what is printed where there is no terminal."""


class Task:
    """One job; `advance` it, with a note such as the loss. Its `total`, None where nobody knows, may change."""

    def __init__(self, display: "Display", name: str, total: int | None, done: int, bar: Progress | None):
        self._display, self._name, self.total, self._done, self._bar = display, name, total, done, bar
        self._identity = bar.add_task(name, total=total, completed=done, note="", speed="") if bar else None
        self._note = ""
        self._start, self._first, self._last_line = time.monotonic(), done, time.monotonic()

    def advance(self, note: str = "") -> None:
        """Count one more step done; without a note, the last one stays."""
        self._done += 1
        self._note = note or self._note
        now = time.monotonic()
        pace = (now - self._start) / max(1, self._done - self._first)
        speed = f"{1 / pace:.2f}/s" if pace > 0 else ""
        if self._bar is not None and self._identity is not None:
            self._bar.update(self._identity, total=self.total, completed=self._done, note=self._note, speed=speed)
        elif now - self._last_line > SECONDS_BETWEEN_LINES or self._done == self.total:
            self._last_line = now
            left = f"{pace * (self.total - self._done):.0f} s left" if self.total else ""
            parts = (f"{self._name}: {self._done}/{self.total or '?'}", self._note, speed, left)
            self._display.say("  ".join(part for part in parts if part))


class Display:
    """Where messages and progress go; `Display(quiet=True)` shows nothing."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, emoji=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    @property
    def wide(self) -> bool:
        """Whether there is room for wide tables."""
        return self.console.width >= LOG_WIDTH

    def print_tables(self, tables: Iterable[Table]) -> None:
        """Print tables one below the other."""
        for table in tables:
            self.console.print(table)

    @contextmanager
    def task(self, name: str, total: int | None, done: int = 0) -> Iterator[Task]:
        """Show the progress of a job of `total` steps, if that is known, `done` of which were done before."""
        if self._quiet or not self.console.is_terminal:
            yield Task(self, name, total, done, None)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            yield Task(self, name, total, done, bar)


SILENT = Display(quiet=True)
