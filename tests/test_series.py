"""Which series a folder of DICOM holds: found through links, told from NIfTI, left out with the reason."""

import dicoms
import pydicom
import pytest
from dicoms import OBLIQUE, head, write

from crossmr.dicom.convert import convert
from crossmr.dicom.series import find_series, holds_dicom
from crossmr.display import Display


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ImagePositionPatient": None}, "do not say where they lie"),
        ({"SamplesPerPixel": 3}, "in colour"),
        ({"SeriesDescription": "SYNTHETIC T1"}, "itself synthetic"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, "a phase image"),
    ],
)
def test_left_out_with_the_reason(change, why, tmp_path):
    paths = dicoms.write_series(tmp_path, head(), OBLIQUE)
    for path in paths:
        image = pydicom.dcmread(path)
        for keyword, value in change.items():
            delattr(image, keyword) if value is None else setattr(image, keyword, value)
        image.save_as(path)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert why in scans.left_out["series 1"]
    assert "no T1, T1ce" in scans.refused


def test_a_folder_of_both_is_read_as_nifti_and_says_so(tmp_path, capsys):
    write(tmp_path / "in", ("t1n",))
    (tmp_path / "in" / "lesion.nii.gz").write_bytes(b"")  # names no contrast
    assert holds_dicom(tmp_path / "in", display=Display())
    assert capsys.readouterr().out == ""
    (tmp_path / "in" / "P1_t1.nii.gz").write_bytes(b"")
    assert not holds_dicom(tmp_path / "in", display=Display())
    assert "holds NIfTI (P1) and DICOM" in capsys.readouterr().out
    assert not holds_dicom(tmp_path / "in", {"t2w": "*_dark.nii.gz"})  # P1_t1 is still T1


def test_links_are_followed_and_never_in_a_circle(tmp_path):
    write(tmp_path / "archive", ("t1n", "t2f"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "patient").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "back").symlink_to(tmp_path / "in")
    assert holds_dicom(tmp_path / "in")
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert list(scans.series) == ["t1n", "t2f"]


def test_find_series_needs_no_pixels(tmp_path):
    for path in dicoms.write_series(tmp_path, head(), OBLIQUE):
        path.write_bytes(path.read_bytes()[:-2000])
    assert [series.modality for series in find_series(tmp_path)] == ["t1n"]
