"""What a person sees while a long job runs: a live bar in a terminal, a plain line now and then elsewhere; and the log.

The log is a file beside an output. It keeps every line and every traceback, so it names paths.
"""

import contextlib
import copy
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

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

from crossmr.errors import CrossmrError

SECONDS_BETWEEN_LINES = 15.0
LOG_WIDTH = 132
"""Columns of what is printed where there is no terminal."""
LOG = "crossmr.log"
"""Name of the log in the folder of an output."""
_LOG_HEAD = "crossmr log. It names paths and files, and perhaps patients: not for sharing.\n"


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
    """Where messages and progress go; `Display(quiet=True)` shows nothing but failures.

    `debug` shows tracebacks, too; `stderr` leaves the standard output to others. Without `keep`, a log keeps unforeseen
    errors only.
    """

    def __init__(self, *, quiet: bool = False, debug: bool = False, stderr: bool = False, keep: bool = True):
        self.console = Console(quiet=quiet, highlight=False, emoji=False, soft_wrap=True, stderr=stderr)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        self._quiet, self._debug, self._keeps_lines = quiet, debug, keep
        self._log: Path | None = None

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)
        if self._keeps_lines:
            self._keep(text)

    def say_failure(self, text: str) -> None:
        """Print one line to the standard error, even if quiet."""
        line = " ".join(text.split())
        print(line, file=sys.stderr)
        self._keep(line)

    def log_to(self, path: Path) -> "Display":
        """This display with a log, to which lines are appended; a file of this name that is no log is not touched."""
        logging = copy.copy(self)
        logging._log = path if _is_free(path) else None
        return logging

    @contextmanager
    def logged(self, path: Path) -> Iterator["Display"]:
        """Show what a job says and keep it in a log, with the traceback of an error that ends the job."""
        logging = self.log_to(path)
        try:
            yield logging
        except Exception as error:
            if not isinstance(error, CrossmrError):
                logging._keep(f"crossmr {version('crossmr')}: {traceback.format_exc()}")
            elif path.exists():  # a job that was refused leaves nothing
                logging._keep(str(error))
            raise

    def unforeseen(self, error: Exception) -> str:
        """Keep an error's traceback in the log; returns one line that names the error and where the traceback is."""
        text = traceback.format_exc()
        self._keep(text)
        if self._debug:
            print(text, file=sys.stderr)
        where = f"the traceback is in {self._log.name}" if self._log else "--debug shows the traceback"
        return f"{type(error).__name__}: {error}; {where}"

    def _keep(self, text: str) -> None:
        """Append to the log, if there is one; a disk that is full stops no job here."""
        if self._log is None:
            return
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_LOG_HEAD if file.tell() == 0 else "")
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

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


def is_log(path: Path) -> bool:
    """Whether a file is a log of crossmr's."""
    head = _LOG_HEAD.encode()
    with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                return file.read(len(head)) == head
    return False


def _is_free(path: Path) -> bool:
    """Whether a log can be written here: to nothing, or to a log."""
    return is_log(path) or not (path.exists() or path.is_symlink())


SILENT = Display(quiet=True, keep=False)
