"""Damaged files of other formats: read or refused in one line, and before there is memory for what they announce."""

import nibabel as nib
import numpy as np
import pytest
from test_formats import AFFINES, numbered, refused, write

from crossmr.data.foreign import read_foreign_header
from crossmr.data.volume import read_volume
from crossmr.errors import VolumeError


@pytest.mark.parametrize("ending", ["mgh", "mha", "mhd", "nrrd", "nhdr", "hdr", "analyze"])
def test_damaged_headers_are_read_or_refused_in_one_line(ending, tmp_path):
    path = tmp_path / f"a.{ending}".replace("analyze", "hdr")
    if ending == "analyze":
        nib.save(nib.Spm99AnalyzeImage(numbered(), np.diag([-2.0, 2, 2, 1])), tmp_path / "a.img")
    else:
        write(path, numbered(), AFFINES["oblique"])
    whole, rng, said = path.read_bytes(), np.random.default_rng(len(ending)), []
    for _ in range(12):
        damaged = bytearray(whole)
        place = int(rng.integers(min(len(whole), 350)))
        damaged[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", bytes(4), b"nan ", b"-1 -", b"1e99", b"9999"])
        path.write_bytes(damaged[: int(rng.integers(200, len(whole)))] if rng.random() < 0.2 else damaged)
        read_foreign_header(path)
        try:
            read_volume(path)
        except VolumeError as error:
            said.append(str(error))
    assert not [message for message in said if "\n" in message]


@pytest.mark.parametrize("ending", ["nrrd", "hdr"])
def test_what_its_files_cannot_hold_is_refused_before_there_is_memory_for_it(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    if ending == "hdr":
        nib.save(nib.Spm99AnalyzeImage(numbered(), np.diag([-2.0, 2, 2, 1])), tmp_path / "a.img")
        start = bytearray(path.read_bytes())
        start[42:48] = np.array([9000, 9000, 9000], "<i2").tobytes()
        path.write_bytes(start)
    else:
        whole = write(path, numbered(), np.eye(4)).read_bytes()
        path.write_bytes(whole.replace(b"sizes: 4 5 6", b"sizes: 9000 9000 9000"))
    refused(path, "is truncated", "announces 1458000000000")
