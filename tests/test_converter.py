"""What dcm2niix makes of a series, and what is said where it cannot."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile

import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import OBLIQUE, head, truth, write

import crossmr.dicom.converter as module
from crossmr.data.naming import find_studies
from crossmr.data.volume import read_volume, same_grid
from crossmr.dicom.convert import convert
from crossmr.errors import ConfigError


def test_voxels_come_on_the_scale_that_each_slice_says(tmp_path):
    voxels = head()
    paths = dicoms.write_series(tmp_path / "in", voxels, OBLIQUE)
    for k, path in enumerate(paths):
        image, slope = pydicom.dcmread(path), 1 + 0.5 * (k % 3)
        image.PixelData = np.rint(image.pixel_array / slope).astype("<u2").tobytes()
        image.RescaleSlope, image.RescaleIntercept = slope, 0
        image.save_as(path)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    data = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz").data
    assert np.abs(data - truth("t1n").data).max() <= 2.0 / 2


@pytest.mark.parametrize("slope", [None, 0.7, 0.9991])
def test_what_was_not_acquired_is_0(slope, tmp_path):
    for path in dicoms.write_series(tmp_path / "in", head(), OBLIQUE):
        image = pydicom.dcmread(path)
        pixels = image.pixel_array.astype("<i2")
        pixels[:3] = -32768
        image.PixelData, image.PixelRepresentation = pixels.tobytes(), 1
        image.add_new("PixelPaddingValue", "SS", -32768)
        if slope is not None:
            image.RescaleSlope, image.RescaleIntercept = slope, 0
        image.save_as(path)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz").data.min() == 0


def mixed(image, *, numbers):
    """An enhanced image whose frames lie every second slice first; `numbers`, their index, as places or as stored."""
    count = int(image.NumberOfFrames)
    order = [*range(0, count, 2), *range(1, count, 2)]
    frames, pixels = image.PerFrameFunctionalGroupsSequence, image.pixel_array
    image.PerFrameFunctionalGroupsSequence = [frames[k] for k in order]
    image.PixelData = pixels[order].tobytes()
    for k, frame in enumerate(image.PerFrameFunctionalGroupsSequence):
        if numbers == "stored":
            frame.FrameContentSequence[0].DimensionIndexValues = [1, k + 1]
            frame.FrameContentSequence[0].InStackPositionNumber = k + 1


@pytest.mark.parametrize("affine", [OBLIQUE, dicoms.SAGITTAL])
@pytest.mark.parametrize("numbers", ["places", "stored"])
def test_frames_are_where_their_positions_say_or_refused(numbers, affine, tmp_path):
    (path,) = dicoms.write_series(tmp_path / "in", head(), affine, habit="enhanced")
    dicoms.edited([path], lambda image, _: mixed(image, numbers=numbers))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert ("numbers its frames in another order than they lie in" in scans.refused) == (numbers == "stored")
    if not scans.refused:
        data = read_volume(tmp_path / "out" / scans.case / f"{scans.case}-t1n.nii.gz").data
        np.testing.assert_array_equal(data, truth("t1n", affine).data)


def test_frames_that_cannot_be_decoded_are_not_compared(tmp_path, monkeypatch):
    write(tmp_path / "in", ("t1n",), habit="enhanced")

    def cannot(*_, **__):
        raise RuntimeError("no decoder")

    monkeypatch.setattr("pydicom.pixels.pixel_array", cannot)
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert not scans.refused


def test_damaged_pixels_refuse_the_study_and_leave_nothing(tmp_path):
    paths = dicoms.write_series(tmp_path / "in", head(), OBLIQUE, habit="JPEG-LS")
    write(tmp_path / "in" / "good", ("t2f",), patient="MRN-1")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-300])
    bad, good = sorted(convert(tmp_path / "in", tmp_path / "out"), key=lambda scans: not scans.refused)
    assert "series 1" in bad.refused
    assert not good.refused
    assert [study.case for study in find_studies(tmp_path / "out")] == [good.case]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_tmpdir_refuses_the_study_and_the_others_go_on(tmp_path, monkeypatch):
    for patient in ("MRN-1", "MRN-2"):
        write(tmp_path / "in" / patient, ("t1n", "t2f"), patient=patient)
    usual, asked = tempfile.TemporaryDirectory, []

    def first_is_full(*given, **named):
        asked.append(named)
        return full() if len(asked) == 1 else usual(*given, **named)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", first_is_full)
    bad, good = sorted(convert(tmp_path / "in", tmp_path / "out"), key=lambda scans: not scans.refused)
    assert f"series 2 is converted in {tempfile.gettempdir()}: no temporary file could be written" in bad.refused
    assert "No space left on device. Free space there, or set TMPDIR to a folder with more space." in bad.refused
    assert list(good.series) == ["t1n", "t2f"]
    assert [study.case for study in find_studies(tmp_path / "out")] == [good.case]


@pytest.mark.parametrize("leaves", ["nothing", "half a volume"])
@pytest.mark.parametrize("free", [0, 10**9])
def test_space_that_dcm2niix_lacked_is_named_and_nothing_else_is_taken_for_it(tmp_path, monkeypatch, leaves, free):
    write(tmp_path / "in", ("t1n",))

    def run(_, __, outside, ___):
        outside.mkdir(exist_ok=True)
        (outside / "volume.nii").write_bytes(nib.Nifti1Image(head("t1n").astype(np.float32), OBLIQUE).to_bytes()[:999])
        return ([] if leaves == "nothing" else [outside / "volume.nii"]), "Error: cannot write"

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, free))
    monkeypatch.setattr(module, "_unpack", lambda *given: shutil.copy(given[2], given[3]))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert ("set TMPDIR" in scans.refused) == (free == 0)
    assert ("became no volumes" in scans.refused or "truncated" in scans.refused) == (free > 0)


def test_a_converter_that_cannot_be_run_is_named(tmp_path, monkeypatch):
    write(tmp_path / "in", ("t1n",))
    (tmp_path / "dcm2niix").write_text("no program")
    monkeypatch.setattr(module, "find_converter", lambda: str(tmp_path / "dcm2niix"))
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert "dcm2niix could not be run: Permission denied. Install dcm2niix again" in scans.refused


def test_what_is_written_here_is_what_dcm2niix_reads(tmp_path):
    """The maker of these tests' series is itself checked: by the reader that everybody uses."""
    import dcm2niix

    write(tmp_path / "in", ("t1n",))
    subprocess.run(
        [dcm2niix.bin, "-x", "i", "-f", "v", "-o", tmp_path, tmp_path / "in"], check=True, capture_output=True
    )
    volume = read_volume(tmp_path / "v.nii")
    assert same_grid(volume, truth("t1n"))
    assert json.loads((tmp_path / "v.json").read_text())["EchoTime"] == 0.012


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    write(tmp_path / "in", ("t1n",))
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"pip install 'crossmr\[dicom\]'"):
        convert(tmp_path / "in", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'crossmr\[dicom\]'"):
        convert(tmp_path / "in", tmp_path / "out")


def test_the_converter_is_found_without_importing_its_package(tmp_path, monkeypatch):
    """Releases of dcm2niix without the program in them fetch it from the network when they are imported."""
    bare = tmp_path / "dcm2niix"
    bare.mkdir()
    (bare / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.delitem(sys.modules, "dcm2niix", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    write(tmp_path / "in", ("t1n",))
    with pytest.raises(ConfigError, match=r"pip install 'crossmr\[dicom\]'"):
        convert(tmp_path / "in", tmp_path / "out")
    for place in (bare, tmp_path / "nowhere"):
        place.mkdir(exist_ok=True)
        program = place / "dcm2niix"
        program.write_text(f"#!{sys.executable}\nprint('Error: asked {place.name}')")
        program.chmod(0o755)
        (scans,) = convert(tmp_path / "in", tmp_path / "out")
        assert f"Error: asked {place.name}" in scans.refused
        program.unlink()
