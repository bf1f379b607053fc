"""What a folder is: of DICOM or of NIfTI, converted, derived, one part of several."""

import shutil

import pytest
from dicoms import write

from crossmr.dicom.convert import convert
from crossmr.dicom.folders import begins_with_dicom, first_dicom, folders_of_part, holds_dicom, is_derived
from crossmr.display import Display
from crossmr.errors import ConfigError
from crossmr.parts import Part


def test_a_folder_of_both_is_read_as_nifti_and_says_so(tmp_path, capsys):
    write(tmp_path / "in", ("t1n",))
    (tmp_path / "in" / "lesion.nii.gz").write_bytes(b"")  # names no contrast
    assert holds_dicom(tmp_path / "in", display=Display())
    assert capsys.readouterr().out == ""
    (tmp_path / "in" / "P1_t1.nii.gz").write_bytes(b"")
    assert not holds_dicom(tmp_path / "in", display=Display())
    assert "holds NIfTI (P1) and DICOM" in capsys.readouterr().out
    assert not holds_dicom(tmp_path / "in", {"t2w": "*_dark.nii.gz"})  # P1_t1 is still T1


def test_other_formats_hide_no_dicom(tmp_path):
    write(tmp_path, ("t1n",))
    (tmp_path / "fs" / "mri").mkdir(parents=True)
    (tmp_path / "fs" / "mri" / "T1.mgz").write_bytes(b"")
    assert holds_dicom(tmp_path)
    (tmp_path / "P1_T1.nii.gz").write_bytes(b"")
    assert not holds_dicom(tmp_path)


def test_links_are_followed_and_never_in_a_circle(tmp_path):
    write(tmp_path / "archive", ("t1n", "t2f"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "patient").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "back").symlink_to(tmp_path / "in")
    assert holds_dicom(tmp_path / "in")
    (scans,) = convert(tmp_path / "in", tmp_path / "out")
    assert list(scans.series) == ["t1n", "t2f"]


def test_dicom_beside_the_folders_of_parts_is_refused(tmp_path):
    write(tmp_path / "in" / "a", ("t1n",))
    (tmp_path / "in" / "b").mkdir()
    shutil.copy(next((tmp_path / "in" / "a").rglob("*.dcm")), tmp_path / "in" / "loose")
    with pytest.raises(ConfigError, match=r"lies beside the folders that --part shares out"):
        convert(tmp_path / "in", tmp_path / "out", part=Part(1, 2))
    assert not (tmp_path / "out").exists()


def test_a_part_has_folders_of_its_own_below_the_only_one(tmp_path):
    for name in "abcd":
        (tmp_path / "in" / "export" / name).mkdir(parents=True)
    (tmp_path / "in" / "export" / "DICOMDIR").write_bytes(b"")
    parts = [[path.name for path in folders_of_part(tmp_path / "in", Part(k, 2))] for k in (1, 2)]
    assert sorted(parts[0] + parts[1]) == [*"abcd"]
    assert all(parts)
    export = tmp_path / "in" / "export"
    without = [path.name for k in (1, 2) for path in folders_of_part(export, Part(k, 2), export / "b")]
    assert sorted(without) == [*"acd"]


def test_the_first_file_of_dicom_is_found_below_and_not_in_what_is_left_out(tmp_path):
    write(tmp_path / "in" / "deep", ("t1n",))
    (tmp_path / "in" / "a.txt").write_text("text")
    first = first_dicom(tmp_path / "in")
    assert first is not None
    assert first.is_relative_to(tmp_path / "in" / "deep")
    assert begins_with_dicom(tmp_path / "in")
    assert first_dicom(tmp_path / "in", tmp_path / "in" / "deep") is None
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"")  # comes first
    assert not begins_with_dicom(tmp_path / "in")
    assert not is_derived(first.parent)  # a scanner's
    assert not is_derived(tmp_path / "nowhere")
