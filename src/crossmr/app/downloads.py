"""What was made, as zips that are written while they are sent, each with a note that it is synthetic."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from crossmr.completion.private import NAME as PRIVATE
from crossmr.display import LOG

Kind = Literal["nifti", "dicom", "bids"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK = 2**20
NOTE = """SYNTHETIC MRI
=============

Every image in this archive was made by crossmr, a program that synthesises contrasts which were not acquired. None of
them is a scan. Research use only; not a medical device. manifest.json of each study has the verdict (use, look or
refuse), its reasons, and what was made from what.
"""
_PACKED = (".gz", ".webp", ".png")
"""Endings of what packing makes no smaller."""


def files_of(out: Path, kind: Kind) -> list[tuple[str, Path]]:
    """What a download holds: name in the archive, and file, sorted.

    Of NIfTI, all that `complete` wrote but DICOM, pages and what is not for sharing; of DICOM, the derived series with
    their manifests.
    """
    paths = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = []
    for path in paths:
        place = path.relative_to(out)
        series = any(part.endswith("_dicom") for part in place.parts[:-1])
        manifest = path.name == "manifest.json" and len(place.parts) == 2
        private = path.name in (PRIVATE, LOG) or place.parts[0] in ("scans", "view")
        wanted = {"nifti": not series, "dicom": series or manifest, "bids": True}[kind]
        if wanted and not private:
            found.append((place.as_posix(), path))
    return found


def stream_zip(folder: str, files: list[tuple[str, Path]]) -> Iterator[bytes]:
    """A zip of these files in a folder, with NOTE, block by block; at no time is more than a block in memory."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(f"{folder}/SYNTHETIC.txt", NOTE)
        for name, path in files:
            info = zipfile.ZipInfo.from_file(path, f"{folder}/{name}")
            info.compress_type = zipfile.ZIP_STORED if path.suffix in _PACKED else zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(info, "w") as target:
                while block := source.read(BLOCK):
                    target.write(block)
                    yield sink.taken()
    yield sink.taken()


class _Sink:
    """A file that holds what was written since it was last asked; it cannot go back."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        """Hold bytes."""
        self._held += data
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """There is nothing to close."""

    def taken(self) -> bytes:
        """What was written, which is not held any more."""
        held = bytes(self._held)
        self._held.clear()
        return held
