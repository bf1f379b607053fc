"""Which series a folder of DICOM holds: found through links, told from NIfTI, left out with the reason."""

import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import OBLIQUE, head, write

from crossmr.data.volume import read_volume
from crossmr.dicom.convert import convert
from crossmr.dicom.series import find_series, holds_dicom
from crossmr.display import Display


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ImagePositionPatient": None}, "do not say where they lie"),
        ({"SamplesPerPixel": 3}, "in colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "Export it as MONOCHROME2"),
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


def edited(paths, edit):
    """Change images in place: `edit` gets each and its index."""
    for k, path in enumerate(paths):
        image = pydicom.dcmread(path)
        edit(image, k)
        image.save_as(path)


def one_of(values, keyword):
    return lambda image, k: setattr(image, keyword, values[k % len(values)])


def rounded(image, _):
    image.ImagePositionPatient = [round(float(v)) for v in image.ImagePositionPatient]


def own_series(image, k):
    image.SeriesInstanceUID = dicoms.uid("slice", k)


def own_series_and_number(image, k):
    own_series(image, k)
    image.SeriesNumber = 100 + k


SPREAD = {
    "echo times that differ by rounding": one_of((12.0003, 11.9997), "EchoTime"),
    "echo times within a hundredth": one_of((12.0, 12.1), "EchoTime"),
    "alternating Image Type": one_of(
        (["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"]), "ImageType"
    ),
    "a UID for each slice": own_series,
    "a UID and a number for each slice": own_series_and_number,
    "positions in whole millimetres": rounded,
}


@pytest.mark.parametrize("habit", SPREAD)
def test_one_series_whose_tags_differ_between_its_slices(habit, tmp_path):
    edited(dicoms.write_series(tmp_path / "1", head("t1n"), OBLIQUE, number=1), SPREAD[habit])
    dicoms.write_series(tmp_path / "2", head("t2w"), OBLIQUE, "t2w", number=2)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert not scans.refused
    assert not scans.left_out
    assert {m: len(s.images) for m, s in scans.series.items()} == {"t1n": 24, "t2w": 24}
    t1, t2 = (read_volume(tmp_path / "out" / scans.case / f"{scans.case}-{m}.nii.gz") for m in ("t1n", "t2w"))
    wanted = read_volume(nib.Nifti1Image(head("t1n").astype(np.float32), OBLIQUE))
    np.testing.assert_array_equal(t1.data, wanted.data)
    np.testing.assert_allclose(t1.affine, t2.affine, atol=0.6 if habit.startswith("positions") else 1e-3)


def test_a_missing_slice_is_seen_among_rounded_positions(tmp_path):
    paths = dicoms.write_series(tmp_path, head(), OBLIQUE)
    edited(paths, rounded)
    paths[11].unlink()
    (series,) = find_series(tmp_path)
    assert "some are missing" in series.why


def test_a_study_that_was_sent_twice_is_one(tmp_path):
    for copy in ("a", "b"):
        edited(
            dicoms.write_series(tmp_path / copy, head(), OBLIQUE),
            lambda image, k, copy=copy: setattr(image, "SOPInstanceUID", dicoms.uid(copy, k)),
        )
    (series,) = find_series(tmp_path)
    assert (series.modality, len(series.images)) == ("t1n", 24)


@pytest.mark.parametrize(
    "removed", [("StudyInstanceUID",), ("StudyInstanceUID", "StudyDate"), ("StudyInstanceUID", "PatientID")]
)
def test_series_without_a_study_are_one_case(removed, tmp_path):
    write(tmp_path, ("t1n", "t2w", "t2f"))
    edited(tmp_path.rglob("*.dcm"), lambda image, _: [delattr(image, keyword) for keyword in removed])
    assert [sorted(s.series) for s in convert(tmp_path, tmp_path / "out")] == [["t1n", "t2f", "t2w"]]


@pytest.mark.parametrize("missing", [None, "StudyInstanceUID"])
@pytest.mark.parametrize("keyword", ["PatientID", "PatientName"])
def test_two_patients_are_never_one_case(missing, keyword, tmp_path):
    write(tmp_path, ("t1n", "t2w"))

    def of_another(image, _):
        image.PatientName, image.PatientID = ("Roe^John", "") if keyword == "PatientName" else ("", "MRN-7")

    def unnamed(image, _):
        image.PatientID = ""

    if keyword == "PatientName":
        edited(tmp_path.rglob("*.dcm"), unnamed)
    edited((tmp_path / "3").iterdir(), of_another)
    if missing is None or keyword == "PatientID":
        if missing:
            edited(tmp_path.rglob("*.dcm"), lambda image, _: delattr(image, missing))
        assert sorted(list(s.series) for s in convert(tmp_path, tmp_path / "out")) == [["t1n"], ["t2w"]]


def of_series_3(image, keyword, value):
    if image.SeriesNumber == 3:
        setattr(image, keyword, value)


@pytest.mark.parametrize("value", ["", "00MRN-0042", "mrn-0042 "])
def test_an_id_that_one_series_lacks_or_pads_is_the_same_patient(value, tmp_path):
    write(tmp_path, ("t1n", "t2w", "t2f"))
    edited(tmp_path.rglob("*.dcm"), lambda image, _: of_series_3(image, "PatientID", value))
    (scans,) = convert(tmp_path, tmp_path / "out", keep_names=True)
    assert list(scans.series) == ["t1n", "t2w", "t2f"]
    assert scans.case == "sub-MRN0042_ses-20240131"


@pytest.mark.parametrize("value", ["MRN-004-2", "MRN-00421"])
def test_another_id_is_another_patient(value, tmp_path):
    write(tmp_path, ("t1n", "t2w"))
    edited(tmp_path.rglob("*.dcm"), lambda image, _: of_series_3(image, "PatientID", value))
    assert sorted(list(s.series) for s in convert(tmp_path, tmp_path / "out")) == [["t1n"], ["t2w"]]


def test_slices_that_are_shifted_against_each_other_are_no_volume(tmp_path):
    paths = dicoms.write_series(tmp_path, head(), np.diag([6.0, 5.0, 7.0, 1.0]))

    def shift(image, k):
        image.ImagePositionPatient = [image.ImagePositionPatient[0] + 0.8 * k, *image.ImagePositionPatient[1:]]

    edited(paths, shift)
    (series,) = find_series(tmp_path)
    assert series.modality is None
    assert "shifted against each other by up to 9.2 mm" in series.why


def test_a_file_without_a_preamble_that_begins_with_the_length_of_its_group(tmp_path):
    write(tmp_path, ("t1n",), habit="without preamble")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x08\x00\x00\x00\x04\x00\x00\x00\x86\x00\x00\x00" + path.read_bytes())
    assert holds_dicom(tmp_path)
    assert [series.modality for series in find_series(tmp_path)] == ["t1n"]


def test_an_enhanced_image_says_of_what_kind_it_is(tmp_path):
    write(tmp_path, ("t1n", "t2w"), habit="enhanced", ContrastBolusAgent="Dotarem")

    def change(image, _):
        shared = image.SharedFunctionalGroupsSequence[0]
        if image.SeriesNumber == 2:
            used = pydicom.Dataset()
            used.ContrastBolusAgentAdministered = "NO"
            shared.ContrastBolusUsageSequence = [used]
        else:
            shared.MRModifierSequence[0].EchoPlanarPulseSequence = "YES"

    edited(tmp_path.rglob("*.dcm"), change)
    assert [(s.modality, s.why.split("; ")[-1]) for s in find_series(tmp_path)] == [
        ("t1n", "no contrast agent by its tag"),
        (None, "echo-planar: diffusion, perfusion or function"),
    ]


def test_map_takes_no_fat_where_it_names_water_too(tmp_path):
    for k, kind in enumerate(("W", "F")):
        dicoms.write_series(tmp_path / kind, head(), OBLIQUE, number=2, ImageType=["DERIVED", "PRIMARY", "DIXON", kind])
        edited((tmp_path / kind).iterdir(), lambda image, _, k=k: setattr(image, "SeriesInstanceUID", f"1.2.{k + 1}"))
    fat, water = sorted(find_series(tmp_path, {"t1n": "series 2"}), key=lambda series: series.modality or "")
    assert (water.modality, fat.modality) == ("t1n", None)
    assert fat.why == "the fat of a Dixon acquisition, and --map names another one alike"
    (alone,) = find_series(tmp_path / "F", {"t1n": "series 2"})
    assert alone.modality == "t1n"


@pytest.mark.parametrize("numbered", [True, False])
def test_one_series_uid_for_all_images(numbered, tmp_path):
    for number, (modality, description) in enumerate((("t1n", "AX T1"), ("t1c", "AX T1 GD"), ("t2w", "AX T2")), 2):
        dicoms.write_series(
            tmp_path / str(number), head(modality), OBLIQUE, modality, number=number, description=description
        )

    def as_one(image, _):
        image.SeriesInstanceUID = "1.2.3.4"
        if not numbered:
            del image.SeriesNumber

    edited(tmp_path.rglob("*.dcm"), as_one)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert sorted(scans.series) == ["t1c", "t1n", "t2w"]
    assert not scans.left_out


def test_the_echoes_of_a_gradient_echo_are_no_t1(tmp_path):
    for echo, time in enumerate((3, 6, 9, 15)):
        tags = {"ScanningSequence": "GR", "SequenceVariant": "SP", "RepetitionTime": 700, "EchoTime": time}
        habit = dicoms.Habit(name=f"e{echo}-{{0}}")
        paths = dicoms.write_series(tmp_path, head(), OBLIQUE, "?", habit=habit, **tags)
        edited(paths, lambda image, k, echo=echo: setattr(image, "SOPInstanceUID", dicoms.uid(echo, k)))
    assert {series.modality for series in find_series(tmp_path)} == {None}


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"BodyPartExamined": "CSPINE"}, "another part of the body"),
        ({"description": "SAG T1 L-SPINE", "BodyPartExamined": "BRAIN"}, "another part of the body"),
        ({"description": "BRAIN T1", "BodyPartExamined": "SPINE"}, ""),
        ({"NumberOfTemporalPositions": 20}, "several times"),
        ({"ContrastBolusAgent": "Dotarem", "ContrastBolusStartTime": "103000"}, "no contrast agent by its tag"),
        ({"ContrastBolusAgent": "Dotarem", "ContrastBolusStartTime": "235800"}, "contrast agent named"),  # midnight
    ],
)
def test_tags_that_are_weighed(tags, why, tmp_path):
    dicoms.write_series(tmp_path, head(), OBLIQUE, **tags)
    (series,) = find_series(tmp_path)
    assert why in series.why
    assert (series.modality is None) == bool(why and "agent" not in why)


def test_images_that_share_numbers_with_those_of_other_series_are_all_read(tmp_path):
    write(tmp_path, ("t1n", "t2f"))
    edited(tmp_path.rglob("*.dcm"), lambda image, _: setattr(image, "SOPInstanceUID", f"1.2.3.{image.InstanceNumber}"))
    assert sorted((s.modality, len(s.images)) for s in find_series(tmp_path)) == [("t1n", 24), ("t2f", 24)]


def test_images_that_share_numbers_with_those_of_other_patients_are_all_read(tmp_path):
    for patient in ("PA", "PB"):
        write(tmp_path / patient, ("t1n",), patient=patient)
    edited(tmp_path.rglob("*.dcm"), lambda image, _: setattr(image, "SOPInstanceUID", f"1.2.3.{image.InstanceNumber}"))
    assert sorted((s.patient, len(s.images)) for s in find_series(tmp_path)) == [("PA", 24), ("PB", 24)]
