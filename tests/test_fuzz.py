"""Damaged files of every kind: refused in one line or read, never a traceback, never a hang.

`python tests/test_fuzz.py 3000` tries so many of each kind, from another seed each time, and counts the outcomes.
"""

import faulthandler
import gzip
import importlib.util
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import make_head

from crossmr.data.nifti import read_header
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.errors import CrossmrError

SECONDS = 5.0
"""That one damaged file may take."""
EXTREME = (
    *(struct.pack("<h", number) for number in (0, 1, -1, 2, 7, 16, 64, 128, 512, 2304, 32767, -32768)),
    *(struct.pack("<i", number) for number in (0, 1, -1, 348, 540, 2**31 - 1, -(2**31))),
    *(struct.pack("<f", number) for number in (0, -0.0, 1, -1, np.nan, np.inf, -np.inf, 1e-45, 3e38, -3e38, 352)),
    *(struct.pack("<d", number) for number in (np.nan, np.inf, 1e308, 5e-324)),
    struct.pack("<q", 2**63 - 1),
    b"\x00" * 16,
    b"\xff" * 16,
    b"\x1f\x8b\x08",
)
"""Numbers at which fields overflow, divide by zero or announce what is not there."""


def damage(content: bytes, rng: random.Random, head: int) -> bytes:
    """Some bytes changed, lost, doubled or inserted; mostly among the first `head`."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(min(head, len(data)) if rng.random() < 0.9 else len(data)) if data else 0
        kind = rng.random()
        if kind < 0.45:
            value = rng.choice(EXTREME)
            data[at : at + len(value)] = value
        elif kind < 0.7:
            data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b"x"
        elif kind < 0.8:
            data[at : at + 4] = rng.randbytes(4)
        elif kind < 0.87:
            del data[at : at + rng.choice((1, 2, 4, 100))]
        elif kind < 0.94:
            data[at:at] = rng.choice((rng.randbytes(3), bytes(data[at : at + 64])))
        else:
            del data[rng.randrange(len(data)) if data else 0 :]
    return bytes(data)


def niftis(rng: random.Random) -> Iterator[bytes]:
    """Damaged NIfTI-1 and -2 of both byte orders and several types, plain and gzipped, damaged before or after it."""
    voxels = make_head(shape=(16, 18, 14))
    whole = []
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for order, dtype in (("<", "i2"), (">", "f4"), ("<", "u1"), ("<", "f8")):
            header = kind.header_class(endianness=order)
            header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
            image = kind(voxels.astype(dtype), np.diag([6.0, 6, 7, 1]), header)
            image.set_qform(image.affine, 1)
            whole.append(image.to_bytes())
    while True:
        content = rng.choice(whole)
        kind = rng.random()
        if kind < 0.5:
            yield damage(content, rng, 352)
        elif kind < 0.8:
            yield gzip.compress(damage(content, rng, 352), 1, mtime=0)
        else:
            yield damage(gzip.compress(content, 1, mtime=0), rng, rng.choice((24, 4000)))


def read_nifti(path: Path) -> None:
    """What every verb does with a volume first."""
    read_header(path)
    read_volume(path)
    load_study({"t1n": path}, "P1")


def tried(contents: Iterator[bytes], count: int, path: Path, read: Callable[[Path], Any]) -> Counter[str]:
    """Read so many damaged files; returns how many were read, and refused by which error. Anything else fails."""
    outcomes: Counter[str] = Counter()
    for number in range(count):
        content = next(contents)
        path.write_bytes(content)
        start = time.perf_counter()
        faulthandler.dump_traceback_later(60, exit=True)  # a hang within C
        try:
            read(path)
            outcomes["read"] += 1
        except CrossmrError as error:
            outcomes[type(error).__name__ if "\n" not in str(error) else "more than one line"] += 1
        except Exception as error:
            path.with_name(f"fault{number}").write_bytes(content)
            raise AssertionError(f"the {number}th, kept as fault{number}: {error!r}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert time.perf_counter() - start < SECONDS, f"the {number}th took too long"
    assert not outcomes["more than one line"]
    return outcomes


def test_damaged_nifti_is_read_or_refused(tmp_path):
    outcomes = tried(niftis(random.Random(26)), 300, tmp_path / "scan.nii.gz", read_nifti)
    assert outcomes["read"] > 30
    assert outcomes["VolumeError"] > 100


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "SamplesPerPixel"])
@pytest.mark.filterwarnings("ignore")
def test_lists_where_one_value_belongs_are_damage(tmp_path, keyword):
    """Drawn below once."""
    pydicom = pytest.importorskip("pydicom")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "image.dcm"
    path.write_bytes(slices(tmp_path / "whole")[0])
    image = pydicom.dcmread(path)
    setattr(image, keyword, [getattr(image, keyword)] * 2)
    image.save_as(path)
    if keyword == "SamplesPerPixel":
        read_dicom(path)
    else:
        with pytest.raises(CrossmrError, match="no MR image"):
            read_dicom(path)


def slices(folder: Path) -> list[bytes]:
    """The files of two small series, one of them a multi-frame image."""
    import dicoms

    voxels = np.rint(make_head(shape=(8, 8, 5))).astype(int)
    single = dicoms.write_series(folder / "1", voxels, np.diag([6.0, 6, 7, 1]))
    enhanced = dicoms.write_series(folder / "2", voxels, np.diag([6.0, 6, 7, 1]), habit="enhanced, implicit")
    return [path.read_bytes() for path in (single[0], *enhanced)]


def damaged_slices(rng: random.Random, whole: list[bytes]) -> Iterator[bytes]:
    """Damaged DICOM; pixels are not read from it here."""
    while True:
        yield damage(rng.choice(whole), rng, 2500)


def read_dicom(path: Path) -> None:
    """What every verb does with a folder of DICOM before it is converted."""
    from crossmr.dicom.convert import find_cases
    from crossmr.dicom.folders import holds_dicom
    from crossmr.dicom.selection import choose

    holds_dicom(path.parent)
    for all_series in find_cases(path.parent).values():
        choose(all_series)


@pytest.mark.filterwarnings("ignore")  # pydicom's, of values that no standard allows
def test_damaged_dicom_is_read_or_refused(tmp_path):
    pytest.importorskip("pydicom")
    whole = slices(tmp_path / "whole")
    (tmp_path / "in").mkdir()
    outcomes = tried(damaged_slices(random.Random(26), whole), 200, tmp_path / "in" / "image.dcm", read_dicom)
    assert outcomes["read"] > 50


if __name__ == "__main__":
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
        print("seed", seed)
        print("NIfTI", dict(tried(niftis(random.Random(seed)), count, place / "scan.nii.gz", read_nifti)))
        if importlib.util.find_spec("pydicom"):
            (place / "in").mkdir()
            contents = damaged_slices(random.Random(seed), slices(place / "whole"))
            print("DICOM", dict(tried(contents, count, place / "in" / "image.dcm", read_dicom)))
