"""What the page sends, received with distrust: names, sizes, numbers, kinds and archives.

Whatever a name or an archive says, a file lands in one folder, is a plain file, and is counted before it is written.
"""

import os
import re
import secrets
import shutil
import stat
import struct
import threading
import unicodedata
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from anyio import to_thread

from crossmr.data.formats import fault_of, first_bytes, half, is_archive, is_volume
from crossmr.dicom.headers import begins_as_dicom
from crossmr.errors import CrossmrError

DEEPEST, LONGEST, LONGEST_PATH = 24, 180, 900
"""Folders of a path, bytes of a name and of a path."""
BLOCK = 2**20
"""Bytes that are written at once."""
SMALL = 64 * 2**20
"""Bytes that an archive may become whatever it was packed to."""
STUDY = "study"
"""The folder of files that were dropped without one; a study whose files' names say none is called by it."""
_BESIDE = (".json", ".mat", ".raw", ".raw.gz", ".zraw")
"""Endings of what belongs to a volume."""
_NO_NAMES = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
"""How what a system keeps for itself is called."""
_HEAD = 132
"""Bytes that tell what a file is."""


class Refused(CrossmrError):
    """What is not received, with the status of the answer."""

    def __init__(self, text: str, status: int = 400):
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How much one page may send."""

    total: int = 4 * 2**30
    """Bytes on the disk, archives unpacked."""
    files: int = 20_000
    """Files, those of archives included."""
    ratio: int = 200
    """How many times larger than itself an archive may become."""
    free: int = 2**30
    """Bytes of the disk that stay free."""


@dataclass
class Store:
    """The scans of one page, in a folder of their own."""

    folder: Path
    limits: Limits = field(default_factory=Limits)
    names: dict[str, int] = field(default_factory=dict)
    """Path of each file, in lower case, → its bytes."""
    remarks: dict[str, str] = field(default_factory=dict)
    """Path of a file → why it will not be read."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _taken: int = 0
    _closed: bool = False

    def close(self) -> None:
        """Receive nothing any more, and delete the folder of the page."""
        with self._lock:
            self._closed = True
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    @property
    def taken(self) -> int:
        """Bytes that are there or on their way."""
        return self._taken

    async def receive(self, name: str, chunks: AsyncIterator[bytes], announced: int = 0) -> None:
        """Write a file as it comes in; an archive is unpacked and deleted. Whole or not at all.

        Args:
            name: path as the page gives it, with the folders that were dropped.
            chunks: its bytes.
            announced: how many they are said to be, 0 where nothing is said.

        Raises:
            Refused: the name, the size, the number or the archive; nothing of it is left.
        """
        path = harmless(name)
        if path is None:
            async for _ in chunks:  # an answer before the end would look like a broken connection
                pass
            return
        if announced > self.limits.total - self._taken:
            raise self._too_large(path)
        temporary = self.folder.with_name(f"incoming-{secrets.token_hex(8)}")
        try:
            size = await self._stream(temporary, path, chunks)
            await to_thread.run_sync(self._keep, temporary, path, size)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
            if self._closed:  # while it came: what was written since goes, too
                self.close()

    async def _stream(self, temporary: Path, path: PurePosixPath, chunks: AsyncIterator[bytes]) -> int:
        """Write what comes in; returns how many bytes, which count as long as they come."""
        size = 0
        try:
            with _new_file(temporary) as file:
                async for block in _blocks(chunks):
                    self._take(len(block), path)
                    size += len(block)
                    await to_thread.run_sync(file.write, block)
        finally:
            self._take(-size, path)
        return size

    def _keep(self, temporary: Path, path: PurePosixPath, size: int) -> None:
        """Give a file that came in its place, or unpack it."""
        with temporary.open("rb") as file:
            start = file.read(_HEAD)
        if path.suffix.lower() == ".zip" and start[:2] == b"PK":
            self._unpack(temporary, path, size)
            return
        if len(path.parts) == 1:
            path = PurePosixPath(STUDY) / path
        with self._rollback() as written:
            self._put(path, start, size, written, lambda place: os.replace(temporary, place))

    def _put(
        self,
        path: PurePosixPath,
        start: bytes,
        size: int,
        written: list[PurePosixPath],
        write: Callable[[Path], object],
    ) -> None:
        """Write a file if it is of a kind that is read; of any other the empty file tells that it was given."""
        kept = is_read(path.name, start)
        self._reserve(path, size if kept else 0)
        written.append(path)
        place = self.folder / path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if kept:
                write(place)
            else:
                place.touch(mode=0o600)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise Refused(f"{path}: a file and a folder have this name. Rename one of them.", 409) from error
        if not kept:
            packed = is_archive(path.name)
            self.remarks[str(path)] = (
                "is an archive that is not opened; unpack it"
                if packed
                else "is neither a volume nor DICOM; it is not read"
            )
        elif is_volume(path.name) and (fault := fault_of(first_bytes(place), place)):
            self.remarks[str(path)] = fault

    @contextmanager
    def _rollback(self) -> Iterator[list[PurePosixPath]]:
        """Delete what was written within this if anything fails."""
        written: list[PurePosixPath] = []
        try:
            yield written
        except BaseException:
            for path in written:
                self._take(-self.names.pop(_key(path), 0), path)
                self.remarks.pop(str(path), None)
                with suppress(OSError):
                    (self.folder / path).unlink()
            raise

    def _reserve(self, path: PurePosixPath, size: int) -> None:
        """Count a file, before it is written."""
        with self._lock:
            if self._closed:
                raise Refused(f"{path}: the page started over.", 410)
            if _key(path) in self.names:
                raise Refused(f"{path} is here already. Rename one of them, or start over.", 409)
            if len(self.names) >= self.limits.files:
                raise Refused(f"{path}: more than {self.limits.files} files. Give fewer at once.", 413)
            self.names[_key(path)] = 0
        try:
            self._take(size, path)
        except Refused:
            del self.names[_key(path)]
            raise
        self.names[_key(path)] = size

    def _take(self, size: int, path: PurePosixPath) -> None:
        """Count bytes; refuse those that are too many, of the limit or of the disk."""
        with self._lock:
            if size > 0 and self._closed:
                raise Refused(f"{path}: the page started over.", 410)
            if size > 0 and self._taken + size > self.limits.total:
                raise self._too_large(path)
            if size > 0 and shutil.disk_usage(self.folder).free - size < self.limits.free:
                raise Refused(
                    f"{path}: the disk of the temporary folder is nearly full. Free space, or set TMPDIR.", 507
                )
            self._taken += size

    def _too_large(self, path: PurePosixPath) -> Refused:
        return Refused(
            f"{path}: with it, more than {self.limits.total / 2**30:.3g} GiB. Give less at once, or start with a "
            "larger --limit-gib.",
            413,
        )

    def _unpack(self, archive: Path, path: PurePosixPath, size: int) -> None:
        """Unpack an archive of plain files into a folder that is named after it, or that it names itself."""
        check_directory(archive, path.name, self.limits.files)
        try:
            with zipfile.ZipFile(archive) as packed, self._rollback() as written:
                entries = check_entries(packed, path.name, size, self.limits)
                tops = {place.parts[0] for place, _ in entries if len(place.parts) > 1}
                own = len(tops) == 1 and all(len(place.parts) > 1 for place, _ in entries)
                top = path.parent if own else path.with_suffix("")
                for place, info in entries:
                    with packed.open(info) as file:
                        start = file.read(_HEAD)
                        self._put(top / place, start, info.file_size, written, partial(_copy, file, start))
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
            raise Refused(f"{path.name}: is no zip that can be read ({error}). Pack it again.", 415) from error
        except OSError as error:
            reason = error.strerror or error
            raise Refused(f"{path.name}: could not be unpacked ({reason}). Unpack it, and give the folder.") from error


def harmless(name: str) -> PurePosixPath | None:
    """A path of the page's as one that stays below a folder on any system; None of what a system keeps for itself.

    Raises:
        Refused: it is absolute, leads upwards, or is too long.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in parts or not parts:
        raise Refused(f"{name[:80]!r} is not a path below a folder. Give files and folders as they are.")
    if any(_NO_NAMES.match(part) for part in parts):
        return None
    cleaned = [re.sub(r'[<>:"|?*\x00-\x1f\x7f]', "_", unicodedata.normalize("NFC", part)) for part in parts]
    cleaned = [part.encode(errors="replace").decode().rstrip(". ") or "_" for part in cleaned]
    length = max(len(part.encode()) for part in cleaned)
    if len(parts) > DEEPEST or length > LONGEST or len("/".join(cleaned).encode()) > LONGEST_PATH:
        raise Refused(f"{name[:80]!r}… is too long or too deep a path. Shorten it.")
    return PurePosixPath(*cleaned)


def is_read(name: str, start: bytes) -> bool:
    """Whether a file is of a kind that crossmr reads, by its name and its first bytes."""
    if is_volume(name) or half(name) or name.lower().endswith(_BESIDE):
        return True
    return begins_as_dicom(start)


def check_directory(archive: Path, name: str, most: int) -> None:
    """Refuse an archive whose list of files is too long, before it is read into memory.

    Raises:
        Refused: it is, or there is none.
    """
    size = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size - 65_557 - 20))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + 22:
            raise Refused(f"{name}: is no zip, or was cut off. Pack it again.", 415)
        count, length = struct.unpack("<xxxxxxxxxxHL", tail[at : at + 16])
        if (count == 0xFFFF or length == 0xFFFFFFFF) and at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
            file.seek(struct.unpack("<Q", tail[at - 12 : at - 4])[0])
            record = file.read(56)
            if len(record) < 56 or record[:4] != b"PK\x06\x06":
                raise Refused(f"{name}: is no zip, or was cut off. Pack it again.", 415)
            count, length = struct.unpack("<QQ", record[32:48])
    if count > most or length > most * 512:
        raise Refused(f"{name}: lists more than {most} files. Give fewer at once.", 413)


def check_entries(
    packed: zipfile.ZipFile, name: str, size: int, limits: Limits
) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """The plain files of an archive; one entry that is anything else, and none of it is unpacked.

    Raises:
        Refused: a path that leads elsewhere, a link, a device, an encrypted file, too much of anything.
    """
    entries, total, stored = [], 0, 0
    for info in packed.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refused(f"{name}: {info.filename[:80]!r} is a link or a device, not a file. Pack plain files.")
        place = None if info.orig_filename == "./" else harmless(info.orig_filename)
        if info.is_dir() or place is None:
            continue
        if info.flag_bits & 0x1:
            raise Refused(f"{name}: is encrypted. Unpack it, and give the folder.", 415)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused(f"{name}: is packed by a rare method. Pack it as zip usually does.", 415)
        total, stored = total + info.file_size, stored + info.compress_size
        entries.append((place, info))
    if total > max(SMALL, limits.ratio * size) or stored > size:
        raise Refused(f"{name}: would become {total / 2**20:.0f} MiB, out of {size / 2**20:.1f}: it is no study.", 413)
    return entries


def _copy(file: IO[bytes], start: bytes, place: Path) -> None:
    """Write an entry of an archive, no more than it announced: zipfile reads no further, and checks the sum."""
    with _new_file(place) as target:
        target.write(start)
        shutil.copyfileobj(file, target, BLOCK)


def _new_file(path: Path) -> IO[bytes]:
    """A file that only its owner reads, where there was none; a link is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o600), "wb")


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Chunks put together to blocks."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= BLOCK:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _key(path: PurePosixPath) -> str:
    return str(path).lower()
