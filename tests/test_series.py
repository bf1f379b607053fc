"""Which series a folder of DICOM holds: found through links, told from NIfTI, left out with the reason."""

import dicoms
import numpy as np
import pydicom
import pytest
from conftest import Listener
from dicoms import OBLIQUE, edited, head, rounded, write

from crossmr.dicom.convert import convert, find_cases
from crossmr.dicom.series import find_series
from crossmr.errors import NamingError


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


def test_find_series_needs_no_pixels(tmp_path):
    for path in dicoms.write_series(tmp_path, head(), OBLIQUE):
        path.write_bytes(path.read_bytes()[:-2000])
    assert [series.modality for series in find_series(tmp_path)] == ["t1n"]


def test_a_missing_slice_is_seen_among_rounded_positions(tmp_path):
    paths = dicoms.write_series(tmp_path, head(), OBLIQUE)
    edited(paths, rounded)
    paths[11].unlink()
    (series,) = find_series(tmp_path)
    assert "some are missing" in series.why


def test_slices_that_are_shifted_against_each_other_are_no_volume(tmp_path):
    paths = dicoms.write_series(tmp_path, head(), np.diag([6.0, 5.0, 7.0, 1.0]))

    def shift(image, k):
        image.ImagePositionPatient = [image.ImagePositionPatient[0] + 0.8 * k, *image.ImagePositionPatient[1:]]

    edited(paths, shift)
    (series,) = find_series(tmp_path)
    assert series.modality is None
    assert "shifted against each other by up to 9.2 mm" in series.why


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


def test_what_another_program_calls_synthetic_is_not_read_unless_it_is_named(tmp_path):
    dicoms.write_series(tmp_path, head(), OBLIQUE, description="MAGiC_Synthetic T1")
    (series,) = find_series(tmp_path)
    assert (series.modality, series.reason) == (None, "")
    assert series.why.startswith("called synthetic, by whatever program.")
    assert [series.modality for series in find_series(tmp_path, {"t1n": "*synthetic*"})] == ["t1n"]


CAPTURED = "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"SOPClassUID": CAPTURED}, "of SOP class Secondary Capture Image Storage, which is not read. Export it as MR"),
        ({"Modality": "OT"}, "of modality OT, which is not read. Export it as MR images"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "of SOP class Positron Emission"),
    ],
)
@pytest.mark.parametrize("unidentified", [False, True])
def test_images_of_another_kind_are_left_out_with_the_reason(tags, why, unidentified, tmp_path):
    dicoms.write_series(tmp_path / "2", head(), OBLIQUE, number=2)
    dicoms.write_series(tmp_path / "3", head("t1c"), OBLIQUE, "t1c", number=3, description="AX T1 GD", **tags)
    if unidentified:
        edited((tmp_path / "3").iterdir(), lambda image, _: delattr(image, "StudyInstanceUID"))
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert list(scans.series) == ["t1n"]
    assert scans.left_out["series 3"].startswith(why)


def test_a_study_of_another_kind_alone_is_named_where_it_may_be_a_scan(tmp_path):
    dicoms.write_series(tmp_path / "2", head(), OBLIQUE, number=2)
    for patient, kind in (("MRN-1", "OT"), ("MRN-2", "CT")):
        dicoms.write_series(tmp_path / patient, head(), OBLIQUE, patient=patient, description="AX T1", Modality=kind)
    assert sorted((s.patient, s.modality) for s in find_series(tmp_path)) == [("MRN-0042", "t1n"), ("MRN-1", None)]
    with pytest.raises(NamingError, match="no MR image"):
        convert(tmp_path / "MRN-2", tmp_path / "out")


def test_a_study_of_captures_alone_is_said_where_its_patient_has_another_one(tmp_path):
    listener, tags = Listener(), {"patient": "A", "description": "AX FLAIR"}
    dicoms.write_series(tmp_path / "1", head(), OBLIQUE, number=1, patient="A")
    dicoms.write_series(tmp_path / "2", head("t2f"), OBLIQUE, number=2, SOPClassUID=CAPTURED, date="20240601", **tags)
    ((series,),) = find_cases(tmp_path, display=listener).values()
    assert series.modality == "t1n"
    (said,) = listener.said
    assert said.startswith(f"{tmp_path / '2'}: a study of its own without MR images, left out: 24 images of SOP class")


def test_reports_and_a_few_captures_are_no_scans(tmp_path):
    dicoms.write_series(tmp_path / "2", head(), OBLIQUE, number=2)
    few = dicoms.write_series(tmp_path / "3", head("t1c"), OBLIQUE, number=3, description="T1 GD", SOPClassUID=CAPTURED)
    for path in few[3:]:
        path.unlink()
    tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}
    report = dicoms.write_series(tmp_path / "4", head(), OBLIQUE, number=4, description="AX T1 GD", **tags)
    edited(report, lambda image, _: [delattr(image, keyword) for keyword in ("Rows", "Columns", "PixelData")])
    _, captures = find_series(tmp_path)
    assert (captures.number, captures.reason) == (3, "decided")


def test_an_image_without_a_modality_is_read_by_its_class(tmp_path):
    dicoms.write_series(tmp_path, head(), OBLIQUE, Modality="")
    assert [series.modality for series in find_series(tmp_path)] == ["t1n"]


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


@pytest.mark.parametrize("dated", [False, True])
def test_a_study_over_midnight_keeps_its_order(dated, tmp_path):
    """An agent that was typed in for the whole examination: the T1 before it is the earlier one."""
    order = ("t2w", "234500"), ("t1n", "235000"), ("t2f", "235800"), ("t1c", "001000")
    for number, (modality, time) in enumerate(order, 2):
        tags = {"AcquisitionTime": time, "ContrastBolusAgent": "Gadavist"}
        if dated:
            tags |= {"AcquisitionDate": "20240131" if time > "12" else "20240201"}
        dicoms.write_series(tmp_path / str(number), head(modality), OBLIQUE, modality, number=number, **tags)
    assert [series.modality for series in find_series(tmp_path)] == ["t2w", "t1n", "t2f", "t1c"]


def test_enhanced_images_of_one_time_are_of_one_acquisition(tmp_path):
    write(tmp_path, ("t1n", "t1n", "t2w"), habit="enhanced")

    def timed(image, _):
        del image.AcquisitionTime
        image.AcquisitionDateTime = f"2024013110{15 if image.SeriesNumber < 4 else 30}00.00"

    edited(tmp_path.rglob("*.dcm"), timed)
    times = [series.time for series in find_series(tmp_path)]
    assert times[0] == times[1] < times[2]
    assert times[0]


def test_the_spine_beside_a_brain_leaves_no_doubt_of_the_brain(tmp_path):
    write(tmp_path / "in", ("t1n", "t2f"))
    for path in dicoms.write_series(tmp_path / "in" / "spine", head("t2w"), OBLIQUE, "t2w", number=9):
        image = pydicom.dcmread(path)
        image.SeriesDescription = "SAG T2 SCOUT C-SPINE"
        image.save_as(path)
    (spine,) = [series for series in find_series(tmp_path / "in") if series.number == 9]
    assert (spine.modality, spine.reason) == (None, "decided")
    assert "another part of the body" in spine.why


def test_a_protocol_that_names_crossmr_is_a_scan(tmp_path):
    for path in dicoms.write_series(tmp_path, head(), OBLIQUE):
        image = pydicom.dcmread(path)
        image.SeriesDescription = "CROSSMR T1 MPRAGE"
        image.save_as(path)
    (series,) = find_series(tmp_path)
    assert series.modality == "t1n"
