"""Files on disk: written whole or not at all, one writer per folder, nothing of others replaced, JSON, SHA-256."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from crossmr.errors import CrossmrError, CrossmrWarning, ModelError, NamingError, OutputError, StudyError

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, shared: bool = False) -> None:
        if not shared:  # there is no shared one: those who share go without
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int, *, shared: bool = False) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


LOCK = ".crossmr.lock"
"""Name of the empty file that a running crossmr locks in its output folder."""
PARTIAL = ".crossmr.partial"
"""Ending of the hidden names of files and folders that are not yet complete."""
REPORT = "report.html"
"""Name of the page that shows what was done."""
ABANDONED_SECONDS = 24 * 3600
"""An unfinished file that was not written to for so long has no writer any more; a write takes seconds."""
SHARING_SECONDS = 1.0
"""So long one who shares a folder waits for its lock: who leaves holds it alone for a moment, to see whether to delete
it."""
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK}
"""What a system says of a lock that another process holds."""
_WITHOUT_LOCKS = {
    getattr(errno, name)
    for name in ("ENOLCK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP")
    if hasattr(errno, name)  # Windows lacks some
}
"""What file systems without locks say: NFS without its daemon, network shares, user-space and parallel ones."""
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_UNFINISHED = re.compile(rf"\..*\.([0-9a-f]{{8}})-(\d+)\.[^.]*{re.escape(PARTIAL)}", re.DOTALL)
"""Name of an unfinished file: what it becomes, a hash of its writer's host, and the number of its writer's process."""


@dataclass
class _Session:
    """The output folders that this call of crossmr has locked."""

    folders: list[Path] = field(default_factory=list)
    entered: set[Path] = field(default_factory=set)
    """Folders that were written to, and are therefore known to be nobody else's."""


_session: ContextVar[_Session | None] = ContextVar("session", default=None)


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Make a folder, if need be, and let no other crossmr write to it, or, if shared, none that does not share it.

    A folder is refused, too, if another crossmr has locked a folder above it, or one directly in it. Of those that lie
    deeper each one is refused when `write_atomically` comes to it, so nothing is searched. The system releases the
    lock of a process that dies. A file system without locks is written to without one, after a CrossmrWarning.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be made, or LOCK in it is not crossmr's, or
            is another user's who lets nobody open it.
    """
    new = not os.path.exists(folder)
    place, lock = folder.resolve(), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign(lock, _is_lock)
        descriptor = _acquire(lock, shared=shared)
    except BlockingIOError as error:
        raise _in_use(folder) from error
    except OSError as error:
        if isinstance(error, PermissionError) and os.path.lexists(lock):
            raise OutputError(
                f"{lock} cannot be opened: it is another user's. Delete it if no crossmr writes there, or name another "
                "folder."
            ) from error
        raise _not_written(folder, error) from error
    outer = _session.get()
    if descriptor is None and outer is None and not shared:
        warnings.warn(
            f"{folder} is on a file system without locks: let no other crossmr write to it meanwhile.",
            CrossmrWarning,
            stacklevel=3,
        )
    session = outer or _Session()
    token = _session.set(session)
    session.folders.append(place)
    try:
        for other in place.parents if shared else (*place.parents, *_folders_in(place)):
            if _held_by_another(other):
                raise _in_use(other)
        yield
    finally:
        session.folders.remove(place)
        _session.reset(token)
        with contextlib.suppress(OSError):
            if shared and descriptor is not None:
                _lock(descriptor)  # which fails if others share it still: theirs must stay the one that all find
            lock.unlink()
        if descriptor is not None:
            os.close(descriptor)  # which releases it
        if new:
            with contextlib.suppress(OSError):  # it stays unless it is empty
                folder.rmdir()


def _acquire(path: Path, *, create: bool = True, shared: bool = False) -> int | None:
    """Lock a file; returns its descriptor, or None on a file system without locks.

    Raises:
        BlockingIOError: another process, or another call, holds it. OSError: it cannot be opened.
    """
    start = time.monotonic()
    for attempt in itertools.count(1):
        descriptor = _open(path, create=create)
        try:
            _lock(descriptor, shared=shared)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD and shared and time.monotonic() - start < SHARING_SECONDS:
                time.sleep(0.01)
                continue
            if error.errno in _HELD:
                raise BlockingIOError(error.errno, "locked", str(path)) from error
            if error.errno in _WITHOUT_LOCKS:
                return None
            if error.errno == errno.EBADF:  # NFS locks nothing that is only read
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from error
            raise
        if os.fstat(descriptor).st_nlink or attempt == 9:  # some file systems count no links
            return descriptor
        os.close(descriptor)  # who held it before has deleted it meanwhile
    return None


def _open(path: Path, *, create: bool) -> int:
    """Open a lock; another user's only to read, which is enough to lock it."""
    without_links = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_RDWR | without_links | (os.O_CREAT if create else 0), 0o666)
    except PermissionError:
        if not os.path.lexists(path):
            raise
        return os.open(path, os.O_RDONLY | without_links)


def _in_use(folder: Path) -> OutputError:
    return OutputError(f"{folder} is being written to by another crossmr. Wait for it, or name another folder.")


def _is_lock(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if os.path.isdir(entry.path)]  # a link in a circle is none


def _held_by_another(folder: Path) -> bool:
    """Whether another call of crossmr has locked this very folder."""
    session, path = _session.get(), folder / LOCK
    try:
        if (session is not None and folder in session.folders) or path.is_symlink() or not _is_lock(path):
            return False
        if (descriptor := _acquire(path, create=False)) is not None:
            os.close(descriptor)
        return False
    except BlockingIOError:
        return True
    except OSError:  # not to be opened: nobody can tell
        return False


def _enter(folder: Path) -> None:
    """Before the first file of a call in this folder: refuse one that another crossmr has locked, and clear up.

    What a killed writer left unfinished in this very folder is deleted.
    """
    session, place = _session.get(), folder.resolve()
    if session is not None and place in session.entered:
        return
    if session is not None:
        for other in (place, *place.parents):
            if other in session.folders:
                break
            if _held_by_another(other):
                raise _in_use(other)
        session.entered.add(place)
    for unfinished in folder.glob(f".*{PARTIAL}"):
        if _is_abandoned(unfinished):
            remove(unfinished)


def _is_abandoned(path: Path) -> bool:
    """Whether a file or folder is crossmr's, unfinished, and its writer is gone."""
    match = _UNFINISHED.fullmatch(path.name)
    if match is None:
        return False
    host, process = match[1], int(match[2])
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS or (host == _HOST and not is_alive(process))
    return False


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs, as far as the system says."""
    if os.name != "posix":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def unfinished_path(path: Path) -> Path:
    """A new hidden path beside `path` for what will become it."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")


def refuse_foreign(path: Path, recognise: Callable[[Path], bool]) -> None:
    """Refuse to replace or delete what crossmr did not write. A link is never crossmr's.

    Raises:
        OutputError: there is something at `path` that is not recognised, or no folder where its folder would be.
    """
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        known = there.is_dir() if there != path else not path.is_symlink() and recognise(path)
    except (OSError, CrossmrError):
        known = False
    if not known and os.path.lexists(there):  # a lock may just have been deleted by who held it
        raise OutputError(f"{there} is not crossmr's, so it is not replaced. Name another folder, or move it away.")


def is_record(path: Path, kind: str) -> bool:
    """Whether a file is one of crossmr's JSON files, of the kind that its entry 'format' names."""
    try:
        return path.is_file() and read_json(path, OutputError).get("format") == kind
    except OutputError:
        return False


def is_page(path: Path) -> bool:
    """Whether a file is a page that crossmr wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'<meta name="generator" content="crossmr ' in file.read(8192)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a mixture.

    The content is bytes, or a function that writes them to the open file. Who may read it, umask and folder decide.

    Raises:
        OutputError: the folder is missing, read-only or full, or another crossmr's; nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _enter(path.parent)
        with (unfinished := unfinished_path(path)).open("xb") as file:
            temporary = unfinished
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


class _Listed(NamedTuple):
    """What is in a folder, without what is hidden; sorted."""

    folders: list[str]
    files: list[str]
    links: frozenset[str]
    """Those of the folders that are links."""


_listed: ContextVar[dict[str, _Listed] | None] = ContextVar("listed", default=None)


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Within this, `walk` asks the file system for each folder once, however often it comes there."""
    token = _listed.set({})
    try:
        yield
    finally:
        _listed.reset(token)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder from `root` down, with the sorted names of its folders and files; hidden ones are skipped.

    Links are followed, and no folder comes twice. Folders deleted from the list are not entered, as with `os.walk`.

    Raises:
        NamingError: a folder cannot be listed.
    """
    visited: set[str] = set()
    left = [(os.fspath(root), os.path.realpath(root))]
    while left:
        place, real = left.pop()
        if real in visited:  # a link to a parent would never end
            continue
        visited.add(real)
        found = _list(place)
        folders = [*found.folders]
        yield place, folders, [*found.files]
        for name in reversed(folders):
            path = os.path.join(place, name)
            left.append((path, os.path.realpath(path) if name in found.links else os.path.join(real, name)))


def _list(place: str) -> _Listed:
    """What is in a folder; as it was before, within `listed_once`."""
    known = _listed.get()
    if known is not None and place in known:
        return known[place]
    folders, files, links = list[str](), list[str](), set[str]()
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if is_folder(entry) else files).append(entry.name)
                    links |= {entry.name} if entry.is_symlink() else set()
    except OSError as error:
        raise NamingError(f"{place}: cannot be listed ({error.strerror}). Check its permissions.") from error
    found = _Listed(sorted(folders), sorted(files), frozenset(links))
    if known is not None:
        known[place] = found
    return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


@contextlib.contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A folder in TMPDIR, deleted afterwards; `what` it is for stands at the head of errors.

    Raises:
        StudyError: in place of whatever the system says when it is full, read-only or not there.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="crossmr-") as temporary:
            yield Path(temporary)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        with contextlib.suppress(OSError):  # no usable folder at all
            what = f"{what} in {tempfile.gettempdir()}"
        raise StudyError(
            f"{what}: no temporary file could be written: {error.strerror or error}. "
            "Free space there, or set TMPDIR to a folder with more space."
        ) from error


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents; does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log that `append_line` wrote; a line that was cut off, its writer killed, is left out."""
    whole = []
    for line in path.read_bytes().splitlines():  # what a disk has damaged need not be UTF-8
        with contextlib.suppress(ValueError):
            whole.append(json.loads(line))
    return whole


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} could not be written: {error.strerror or error}. "
        "Check free space and permissions, or name another folder."
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON atomically; NaN is refused, since JSON has none."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode(errors="surrogatepass"))  # a file name need not be valid Unicode


def read_json(path: Path, error: type[CrossmrError] = ModelError) -> dict[str, Any]:
    """Read a JSON object, raising `error` with one clear line when it is missing or damaged."""
    try:
        data = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}.") from reason
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is damaged: it is not valid JSON ({reason}). Copy or make it again.") from reason
    if not isinstance(data, dict):
        raise error(f"{path} is damaged: it holds no JSON object. Copy or make it again.")
    return data


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def digest(content: bytes | str | Mapping[str, Any]) -> str:
    """SHA-256, in hex, of bytes, of text, or of a JSON object in its canonical form."""
    if isinstance(content, Mapping):
        content = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")  # as above
    return hashlib.sha256(content).hexdigest()
