"""Files on disk: written whole or not at all, one writer per folder, JSON, SHA-256."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crossmr.errors import CrossmrError, ModelError, NamingError, OutputError

LOCK = ".lock"
PARTIAL = ".crossmr.partial"
"""Ending of the hidden names of files and folders that are not yet complete."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, if need be, and let no other process write to it; also delete what a killed one left unfinished.

    The system releases the lock of a process that dies. A file system without locks is written to without one.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be made.
    """
    new = not folder.exists()
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{folder} is being written to by another crossmr. Wait for it, or name another folder."
        ) from error
    except NotImplementedError:  # a file system without locks
        yield
        return
    except OSError as error:
        raise _not_written(folder, error) from error
    try:
        for unfinished in list(folder.rglob(f".*{PARTIAL}")):
            remove(unfinished)
        yield
    finally:
        with contextlib.suppress(OSError):  # before the release: who opened it later would lock a deleted file
            (folder / LOCK).unlink()
        lock.release()
        if new:
            with contextlib.suppress(OSError):  # it stays unless it is empty
                folder.rmdir()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a mixture.

    Raises:
        OutputError: the folder is missing, read-only or full; nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder from `root` down, with the sorted names of its folders and files; hidden ones are skipped.

    Links are followed, and no folder comes twice. Folders deleted from the list are not entered, as with `os.walk`.

    Raises:
        NamingError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise NamingError(f"{error.filename}: cannot be listed ({error.strerror}). Check its permissions.") from error

    visited = set()
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(place)) in visited:  # a link to a parent would never end
            folders.clear()
            continue
        visited.add(real)
        yield place, folders, sorted(name for name in files if not name.startswith("."))


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


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} could not be written: {error.strerror or error}. "
        "Check free space and permissions, or name another folder."
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
