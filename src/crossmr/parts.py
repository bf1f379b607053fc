"""Work that several processes share, on one machine or on many: which part is whose, and who has which item now.

Nothing but a folder that all of them see is needed. A claim is a file that only one process can create, on NFS as well;
its holder touches it again and again, so that others see whether it still lives, by the file server's clock.
"""

import contextlib
import glob
import json
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crossmr.errors import ConfigError, OutputError
from crossmr.files import digest, is_alive, write_json

T = TypeVar("T")

WORK = ".crossmr"
"""The folder of an output that holds what is left to do, while several processes share it."""
BEAT_SECONDS = 20.0
"""A holder touches its claims this often."""
POLL_SECONDS = 2.0
"""Who waits for what another process has looks this often."""
STALE_SECONDS = 300.0
"""A claim of another machine that was not touched for so long has no holder any more."""


@dataclass(frozen=True)
class Part:
    """One of several parts of a job: 3/100 is the third of a hundred."""

    number: int
    """From 1."""
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"--part is {self}; expected K/N, K from 1 to N, such as 3/100.")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read '3/100'.

        Raises:
            ConfigError: it is none.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
        if found is None:
            hint = f" The split is --split {text}." if text in ("train", "val", "test") else ""
            raise ConfigError(f"--part is '{text}'; expected K/N, such as 3/100.{hint}")
        return cls(int(found[1]), int(found[2]))

    def take(self, items: Sequence[T]) -> list[T]:
        """Every N-th of the items, from the K-th."""
        return list(items[self.number - 1 :: self.of])


@dataclass(frozen=True)
class Holder:
    """Who has claimed an item, as others see it."""

    item: str
    host: str
    process: int
    seconds: float
    """Since the claim was made."""
    alive: bool
    """Whether its process still lives, as far as can be told from here."""


class ClaimLost(Exception):
    """Another process has the item."""


@dataclass
class Claim:
    """An item that this process has and no other."""

    item: str
    path: Path
    attempt: int
    """How many processes died that had it before."""
    next: Path
    """What exists once another process has taken it over."""

    def check(self) -> None:
        """Refuse to write where another process took this one for dead.

        Raises:
            ClaimLost: it has the item now.
        """
        if os.path.lexists(self.next) or not os.path.lexists(self.path):
            raise ClaimLost(f"{self.item}: another process has taken it over, as this one was not heard of for long.")


def note_done(folder: Path, part: Part) -> bool:
    """Note in a folder that a part is done; whether all parts are.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(folder / f"{part.number}-of-{part.of}.json", {})
    done = {path.stem for path in folder.glob("*.json")}
    return all(f"{number}-of-{part.of}" in done for number in range(1, part.of + 1))


class Claims:
    """Claims in one folder. Each is ITEM.K: K is the number of processes that died with the item.

    A claim is taken over by creating the next number, which one process alone can do, so nothing is ever removed that
    another process may hold.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine: dict[str, Claim] = {}
        self._beating: threading.Event | None = None
        self._guard = threading.Lock()

    @property
    def mine(self) -> Collection[str]:
        """What this process has claimed here."""
        return self._mine.keys()

    def take(self, item: str) -> Claim | None:
        """Claim an item; None where a living process has it.

        Raises:
            OutputError: the folder cannot be written.
        """
        attempt = 0
        while True:
            path = self._path(item, attempt)
            if self._create(path):
                claim = Claim(item, path, attempt, self._path(item, attempt + 1))
                if os.path.lexists(claim.next):  # left by one who died
                    path.unlink()
                    attempt += 1
                    continue
                with self._guard:
                    self._mine[item] = claim
                self._beat()
                return claim
            holder = self._holder(path, self.now())
            if holder is None and not path.is_symlink():  # given back meanwhile
                continue
            if holder is not None and holder.alive:
                return None
            attempt += 1

    def wait_for(self, item: str) -> Claim:
        """Claim an item as soon as nobody else has it."""
        while (claim := self.take(item)) is None:
            time.sleep(POLL_SECONDS)
        return claim

    def give_back(self, claim: Claim) -> None:
        """Let others have the item; those who look will find what became of it, which is written before."""
        with self._guard:
            self._mine.pop(claim.item, None)
        lost = os.path.lexists(claim.next)  # then those before are cleared away by who has it now
        for path in [claim.path] if lost else [self._path(claim.item, k) for k in range(claim.attempt + 1)]:
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Give everything back, and touch nothing any more."""
        for claim in list(self._mine.values()):
            self.give_back(claim)
        if self._beating is not None:
            self._beating.set()
            self._beating = None
        with contextlib.suppress(OSError):  # they stay unless they are empty
            self._folder.rmdir()
            if self._folder.parent.name == WORK:
                self._folder.parent.rmdir()

    def disown(self, items: Iterable[str], whose: Mapping[str, Any]) -> None:
        """Take a process, as `me` describes it, for dead at once that someone knows to be dead: its claims are stale.

        If it lives in spite of that, it touches them again, and writes nothing that was taken over meanwhile.
        """
        for item in items:
            for path in self._folder.glob(f"{glob.escape(item)}.*"):
                with contextlib.suppress(OSError, ValueError):
                    if whose.items() <= json.loads(path.read_bytes()).items():
                        os.utime(path, (0, 0))

    def holders(self) -> list[Holder]:
        """Who has which item, the living and the dead; of each item the last."""
        latest: dict[str, tuple[int, Path]] = {}
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                item, _, attempt = entry.name.rpartition(".")
                if item and attempt.isdigit() and not item.startswith("."):
                    latest[item] = max(latest.get(item, (-1, Path())), (int(attempt), Path(entry.path)))
        now = self.now() if latest else 0.0
        found = (self._holder(path, now) for _, (_, path) in sorted(latest.items()))
        return [holder for holder in found if holder is not None]

    def _path(self, item: str, attempt: int) -> Path:
        return self._folder / f"{item}.{attempt}"

    def _create(self, path: Path) -> bool:
        try:
            os.makedirs(self._folder, exist_ok=True)
            if os.path.lexists(path):
                return False
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.isdir(self._folder):
                return False
            raise _not_written(path, error) from error
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({**me(), "made": os.fstat(descriptor).st_mtime}, file)
        except OSError as error:  # such as a full disk
            with contextlib.suppress(OSError):
                path.unlink()
            raise _not_written(path, error) from error
        return True

    def _holder(self, path: Path, now: float) -> Holder | None:
        """Who has made a claim; None where it is gone."""
        text = b""
        try:
            state = path.stat()
            with contextlib.suppress(PermissionError):  # another user's whose umask lets nobody read it
                text = path.read_bytes()
        except OSError:
            return None
        try:
            said: dict[str, Any] = json.loads(text)
            process, host, where, born = said["process"], said["host"], said["where"], said["born"]
            made = said["made"]
        except (ValueError, KeyError, TypeError):  # its holder writes it now, died while it did, or hides it
            process, host, where, born, made = 0, "", "", "", state.st_mtime
        alive = now - state.st_mtime < STALE_SECONDS
        if process and where == _where():
            alive = _born(process) == born != ""
        return Holder(path.name.rpartition(".")[0], host, process, max(0.0, now - made), alive)

    def now(self) -> float:
        """The time by the clock that stamps the claims."""
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".now-") as probe:
                return os.fstat(probe.fileno()).st_mtime
        except OSError:
            return time.time()

    def _beat(self) -> None:
        if self._beating is None:
            self._beating = threading.Event()
            threading.Thread(target=self._touch, args=(self._beating,), daemon=True).start()

    def _touch(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            with self._guard:
                paths = [claim.path for claim in self._mine.values()]
            for path in paths:
                with contextlib.suppress(OSError):
                    os.utime(path)


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} could not be written: {error.strerror or error}.")


def me() -> dict[str, Any]:
    """This process, as its claims describe it to others."""
    return {"host": platform.node(), "where": _where(), "process": os.getpid(), "born": _born(os.getpid())}


def _where() -> str:
    """What tells the processes that can see each other: the machine, since it was started, and the container."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
    return digest("\n".join(parts))[:16]


def _born(process: int) -> str:
    """When a process of this machine was started, in its own units; '' where there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return "unknown" if not os.path.isdir("/proc/self") and is_alive(process) else ""
