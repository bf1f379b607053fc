"""Which files are volumes, by their names, which belong together, and what a file is that is none.

NIfTI, FreeSurfer (`.mgz`, `.mgh`), pairs (`.hdr`, `.img`), MetaImage (`.mha`, `.mhd`) and NRRD (`.nrrd`, `.nhdr`).
"""

import errno
import hashlib
import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path

from crossmr.errors import VolumeError

_ENDING = re.compile(r"\.(nii(\.gz)?|mgz|mgh(\.gz)?|hdr(\.gz)?|mha|mhd|nrrd|nhdr)$", re.I)
_NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
_HALF = re.compile(r"\.(hdr|img)(\.gz)?$", re.I)
_OWN_HEADER = {".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".gz": (".nhdr",), ".img": (".hdr", ".hdr.gz")}
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*(.+?)[ \t]*\r?$", re.I | re.M)
_LONGEST_HEADER = 65536
_INSTEAD = {
    rb"version https://git-lfs": "is a pointer of Git LFS, not the volume. Fetch that with: git lfs pull",
    rb"(\S*/)?\.git/annex/objects/|/annex/objects/": "is a pointer of git-annex, not the volume. Fetch that with: "
    "datalad get, or git annex get",
    rb"\s*<(!doctype|html|\?xml|head|error)": "is a web page, not a volume: the download failed. Download it again, "
    "logged in if need be",
    rb"PK\x03\x04|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!": "is packed, and not by gzip. Unpack it",
    rb"SIMPLE  =|MINC|CDF|\x89HDF": "is of another format than its name says. Convert it to .nii.gz",
}


def is_volume(name: str) -> bool:
    """Whether a file's name ends as a volume's does that can be read; of pairs the header's counts."""
    return _ENDING.search(name) is not None


def is_archive(name: str) -> bool:
    """Whether a file's name ends as that of an archive does, or of what is packed by another program than gzip."""
    return re.search(r"\.(zip|tar|tgz|tar\.\w+|7z|rar|bz2|xz|zst)$", name, re.I) is not None


def is_nifti(name: str) -> bool:
    """Whether a file's name ends as NIfTI's do."""
    return _NIFTI.search(name) is not None


def ending_of(name: str) -> str:
    """The ending of a volume's format, in lower case; '' of any other name."""
    found = _ENDING.search(name)
    return found[0].lower() if found else ""


def stem_of(name: str) -> str:
    """A volume's name without the ending of its format."""
    return _ENDING.sub("", name)


def without_images_of_pairs(names: Collection[str]) -> list[str]:
    """The names of a folder's files, but for each `.img` whose `.hdr` is there."""
    headers = {_HALF.sub("", name) for name in names if half(name) == "hdr"}
    return [name for name in names if half(name) != "img" or _HALF.sub("", name) not in headers]


def half(name: str) -> str:
    """'hdr' or 'img' where a name ends as those of a pair do; else ''."""
    found = _HALF.search(name)
    return found[1].lower() if found else ""


def header_of(path: Path) -> Path:
    """The file that a volume goes by: the header of a file that holds voxels alone; any other file itself."""
    for ending, others in _OWN_HEADER.items():
        if path.name.lower().endswith((ending, f"{ending}.gz")) and not is_volume(path.name):
            bare = re.sub(r"(\.img|\.raw|\.zraw)?(\.gz)?$", "", path.name, flags=re.I)
            for other in (way for end in others for way in (end, end.upper())):
                if os.path.isfile(path.with_name(bare + other)):
                    return path.with_name(bare + other)
    return path


def parts(path: Path) -> list[Path]:
    """The files that a volume consists of: itself, and the one or those that hold its voxels, if others do.

    Raises:
        VolumeError: its voxels lie in a file that is not there.
    """
    if half(path.name) == "hdr":
        bare = _HALF.sub("", path.name)
        ways = [bare + way for end in (".img", ".img.gz") for way in (end, end.upper())]
        there = [path.with_name(name) for name in ways if os.path.lexists(path.with_name(name))]
        if not there:
            raise VolumeError(
                f"{path.name}: {bare}.img, which holds its voxels, is not beside it. Copy both, or convert them to "
                "one .nii.gz file."
            )
        return [path, there[0]]
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return [path]
    start = first_bytes(path)
    found = _DATA_FILE.search(start)
    said = found[1].decode(errors="replace") if found else "LOCAL"
    if said.upper() == "LOCAL" or "%" in said:
        return [path]
    named = start[found.end() :].decode(errors="replace").split("\n") if found and said.startswith("LIST") else [said]
    files = [path.parent / line.strip() for line in named if line.strip()]
    if missing := next((file for file in files if not os.path.lexists(file)), None):
        raise VolumeError(
            f"{path.name}: {missing.name}, which holds its voxels, is not there. Copy both, or convert them to one "
            ".nii.gz file."
        )
    return [path, *files]


def first_bytes(path: Path) -> bytes:
    """The start of a file, unpacked where it is packed by gzip; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(_LONGEST_HEADER)
        return zlib.decompressobj(wbits=31).decompress(start, _LONGEST_HEADER) if start[:2] == b"\x1f\x8b" else start
    except (OSError, zlib.error):
        return b""


def content_sha256(path: Path) -> str:
    """SHA-256, in hex, of the bytes of a volume's file, or of its files.

    Raises:
        VolumeError: one is missing or unreadable.
    """
    found = hashlib.sha256()
    for part in parts(path):
        try:
            with open(part, "rb") as file:
                while block := file.read(2**20):
                    found.update(block)
        except OSError as error:
            raise unreadable(part, error) from error
    return found.hexdigest()


def unreadable(path: Path, error: OSError) -> VolumeError:
    """What to say of a file that the system does not read."""
    if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
        return VolumeError(
            f"{path}: is a link to a file that is not there. Fetch that (datalad get, git annex get, dvc pull), or "
            "delete the link."
        )
    reason = " ".join((error.strerror or str(error)).split())
    return VolumeError(f"{path}: cannot be read ({reason}). Check the path and permissions.")


def fault_of(start: bytes, path: Path) -> str:
    """What a file is that is no volume, by its first bytes, and what to do; '' where these do not tell."""
    if not start and os.path.exists(path) and not os.path.getsize(path):
        return "is empty (0 bytes). Copy or download it again"
    return next((fault for kind, fault in _INSTEAD.items() if re.match(kind, start, re.I)), "")


def stamp(path: Path) -> list[int]:
    """Bytes of a volume's file, or of its files, and nanoseconds since 1970 when it was last written to.

    Raises:
        VolumeError: one is missing or unreadable.
    """
    size, written = 0, 0
    for part in parts(path):
        try:
            state = part.stat()
        except OSError as error:
            raise unreadable(part, error) from error
        size, written = size + state.st_size, max(written, state.st_mtime_ns)
    return [size, written]
