"""Which images are of one study, and of one series, where UIDs, numbers and tags say it badly."""

import shutil
from collections import defaultdict
from functools import partial

import dicoms
import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import OBLIQUE, edited, head, rounded, write

from crossmr.completion.inputs import find_inputs
from crossmr.completion.unread import unread_series
from crossmr.data.volume import read_volume
from crossmr.dicom.convert import convert
from crossmr.dicom.grouping import announced_of, groups_of, moments_of, studies_of
from crossmr.dicom.headers import read_header
from crossmr.dicom.selection import choose
from crossmr.dicom.series import find_series
from crossmr.display import SILENT


def test_the_files_of_two_series_are_two_groups_of_one_study(tmp_path):
    write(tmp_path, ("t1n", "t2w"))
    files = [(path, read_header(pydicom, path)) for path in sorted(tmp_path.rglob("*.dcm"))]
    ((study, of_study),) = studies_of(files).items()
    assert study == files[0][1].StudyInstanceUID
    groups = list(groups_of(of_study))
    assert [({path.parent.name for path, _ in group}, len(group), echoes) for group, echoes in groups] == [
        ({"2"}, 24, 1),
        ({"3"}, 24, 1),
    ]


def one_of(values, keyword):
    return lambda image, k: setattr(image, keyword, values[k % len(values)])


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


UNNAMED = {"PatientID": "ANON", "PatientName": "ANON", "StudyDate": "19000101", "PatientBirthDate": ""}


def of_two_people(folder, *, frames, **tags):
    """T1 and T2 of one, FLAIR of another, whose study no image names."""
    for number, (modality, person) in enumerate((("t1n", "A"), ("t2w", "A"), ("t2f", "B")), 2):
        dicoms.write_series(folder / person / str(number), head(modality), OBLIQUE, modality, number=number)

    def edit(image, _):
        del image.StudyInstanceUID
        image.FrameOfReferenceUID = "1.2.4" if image.SeriesNumber == 4 else "1.2.3"
        if not frames:
            del image.FrameOfReferenceUID
        for keyword, value in tags.items():
            setattr(image, keyword, value)

    edited(folder.rglob("*.dcm"), edit)


DATED = {"StudyDate": "20240131"}
PLACEHOLDERS = ("ANONYMISIERT", "HIDDEN", "ANONIMIZADO", "NOT AVAILABLE", "ANONYME", "Removed by CTP")


@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize(
    "changed",
    [{}, {"PatientID": "0000"}, {"PatientID": "MRN-7"}, *({"PatientID": p, **DATED} for p in PLACEHOLDERS)],
)
def test_two_people_under_one_made_up_name_are_two_cases(frames, changed, tmp_path):
    of_two_people(tmp_path, frames=frames, **UNNAMED | changed)
    scans = sorted(convert(tmp_path, tmp_path / "out"), key=lambda scans: -len(scans.series))
    assert [list(s.series) for s in scans] == [["t1n", "t2w"], ["t2f"]]
    assert all("its images name no study" in s.notes[0] for s in scans)


def test_a_patient_and_a_date_of_their_own_are_one_study_unless_a_series_comes_twice(tmp_path):
    of_two_people(tmp_path / "1", frames=False)
    of_two_people(tmp_path / "2", frames=True)
    assert [[*s.series] for s in convert(tmp_path / "1", tmp_path / "o")] == [["t1n", "t2w", "t2f"]]
    assert [[*s.series] for s in convert(tmp_path / "2", tmp_path / "o2")] == [["t1n", "t2w", "t2f"]]
    dicoms.write_series(tmp_path / "4" / "A" / "2", head("t1n"), OBLIQUE, "t1n", number=2)
    dicoms.write_series(tmp_path / "4" / "B" / "2", head("t1n"), OBLIQUE, "t1n", number=2)

    def of_session(image, _, number):
        del image.StudyInstanceUID
        image.FrameOfReferenceUID = f"1.2.{number}"
        image.SOPInstanceUID += f".{number}"

    for number, session in enumerate("AB"):
        edited((tmp_path / "4" / session).rglob("*.dcm"), partial(of_session, number=number))
    assert [[*s.series] for s in convert(tmp_path / "4", tmp_path / "o4")] == [["t1n"], ["t1n"]]
    for path in sorted((tmp_path / "2").rglob("*.dcm")):
        path.rename(tmp_path / path.name)
    for number in ("1", "4"):
        shutil.rmtree(tmp_path / number)
    (together,) = convert(tmp_path, tmp_path / "o3")
    assert ([*together.series], together.notes) == (["t1n", "t2w", "t2f"], [])


def test_people_of_other_names_under_one_made_up_id_are_two_cases(tmp_path):
    of_two_people(tmp_path, frames=False, PatientID="ANON", **DATED)
    for path in (tmp_path / "B").iterdir():
        path.rename(tmp_path / "A" / path.name)

    def name(image, _):
        image.PatientName = "Roe^B" if image.SeriesNumber == 4 else "Meier^A" + "^" * (image.SeriesNumber == 3)

    edited(tmp_path.rglob("*.dcm"), name)
    assert sorted([*s.series] for s in convert(tmp_path, tmp_path / "out")) == [["t1n", "t2w"], ["t2f"]]


def doubted(folder):
    """Study by its contrasts → what it may have, too."""
    studies = defaultdict(list)
    for series in find_series(folder):
        studies[series.study].append(series)
    return {" ".join(choose(s)[0]): {m for one in unread_series(s) for m in one.may_be} for s in studies.values()}


def test_a_frame_of_its_own_in_the_folder_of_a_nameless_patient_leaves_a_doubt(tmp_path):
    """A patient who was repositioned; two that have a series each of one number are two people."""
    write(tmp_path / "pat1", ("t1n", "t2w", "t2f"))

    def edit(image, _):
        del image.StudyInstanceUID
        image.PatientID = image.PatientName = ""
        image.FrameOfReferenceUID = "1.2.4" if image.SeriesNumber == 4 else "1.2.3"

    edited(tmp_path.rglob("*.dcm"), edit)
    assert doubted(tmp_path) == {"t1n t2w": {"t2f"}, "t2f": {"t1n", "t2w"}}
    scans = {" ".join(one.series): one for one in convert(tmp_path, tmp_path / "out")}
    assert scans["t1n t2w"].left_out["series 4"].startswith("in the same folder, but of another frame of reference")
    assert scans["t2f"].notes[1].startswith("series 2, series 3 may be of this study: in the same folder")
    (tmp_path / "pat1" / "4").rename(tmp_path / "4")
    assert doubted(tmp_path) == {"t1n t2w": set(), "t2f": set()}


@pytest.mark.parametrize("same", [True, False])
def test_one_study_of_two_ids_says_so_and_is_in_doubt_where_it_seems_one_patients(same, tmp_path):
    write(tmp_path, ("t1n", "t2w", "t2f"))

    def edit(image, _):
        if image.SeriesNumber == 4:
            image.PatientID = "MRN-0042 A"
            image.PatientName = "Doe^Jane^^" if same else "Roe^Jane"

    edited(tmp_path.rglob("*.dcm"), edit)
    assert doubted(tmp_path) == {"t1n t2w": {"t2f"} if same else set(), "t2f": {"t1n", "t2w"} if same else set()}
    for scans in convert(tmp_path, tmp_path / "out"):
        assert scans.notes[0].startswith("its study's UID has images of another patient ID, too")
        assert len(scans.left_out) == (0 if not same else 1 if "t1n" in scans.series else 2)


def test_people_whose_names_were_removed_are_no_kin_under_one_uid(tmp_path):
    """After de-identification one UID of a study may be everybody's."""
    write(tmp_path, ("t1n", "t2w", "t2f"))

    def edit(image, _):
        image.PatientID, image.PatientName, image.PatientBirthDate = f"SUB00{image.SeriesNumber == 4:d}", "ANON", ""

    edited(tmp_path.rglob("*.dcm"), edit)
    assert doubted(tmp_path) == {"t1n t2w": set(), "t2f": set()}


def test_what_lies_beside_one_of_two_ids_is_still_found(tmp_path):
    """Series of the other ID, which stand in for a doubt, do not make its files nobody's."""
    write(tmp_path / "A", ("t1n", "t2w"))
    write(tmp_path / "B", ("t1c",))
    edited((tmp_path / "B").rglob("*.dcm"), lambda image, _: setattr(image, "PatientID", "MRN-0042 A"))
    (tmp_path / "A" / "FLAIR.7z").write_bytes(b"x")
    inputs = find_inputs([tmp_path], None, display=SILENT)
    of_a = [case for case, all_series in inputs.series.items() if any(s.modality == "t2w" for s in all_series)]
    assert {case: [path.name for path in files] for case, files in inputs.beside.items() if files} == {
        case: ["FLAIR.7z"] for case in of_a
    }


def test_a_name_that_ends_in_empty_parts_is_the_same_patient(tmp_path):
    write(tmp_path, ("t1n", "t2w"))

    def edit(image, _):
        image.PatientID, image.PatientName = "", "Doe^Jane" + "^" * (image.SeriesNumber == 3)

    edited(tmp_path.rglob("*.dcm"), edit)
    assert [[*s.series] for s in convert(tmp_path, tmp_path / "out")] == [["t1n", "t2w"]]


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


def test_images_that_share_numbers_with_those_of_other_series_are_all_read(tmp_path):
    write(tmp_path, ("t1n", "t2f"))
    edited(tmp_path.rglob("*.dcm"), lambda image, _: setattr(image, "SOPInstanceUID", f"1.2.3.{image.InstanceNumber}"))
    assert sorted((s.modality, len(s.images)) for s in find_series(tmp_path)) == [("t1n", 24), ("t2f", 24)]


def test_images_that_share_numbers_with_those_of_other_patients_are_all_read(tmp_path):
    for patient in ("PA", "PB"):
        write(tmp_path / patient, ("t1n",), patient=patient)
    edited(tmp_path.rglob("*.dcm"), lambda image, _: setattr(image, "SOPInstanceUID", f"1.2.3.{image.InstanceNumber}"))
    assert sorted((s.patient, len(s.images)) for s in find_series(tmp_path)) == [("PA", 24), ("PB", 24)]


def tags(**values):
    found = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found


@pytest.mark.parametrize(
    "acquired",
    [
        [{"AcquisitionTime": "235800"}, {"AcquisitionTime": "001000.5"}],  # without dates
        [{"AcquisitionDate": "20000101", "AcquisitionTime": t} for t in ("234500", "001000")],  # the same for all
        [{"AcquisitionDate": f"2024013{d}", "AcquisitionTime": t} for d, t in ((0, "230000"), (1, "220000"))],
        [{"AcquisitionDateTime": t} for t in ("20240130230000.000000+0100", "20240131001500.000000+0100")],
        [{"SeriesDate": f"2024013{d}", "SeriesTime": t} for d, t in ((0, "230000"), (1, "001500"))],
        [{"AcquisitionTime": "080000"}, {"AcquisitionTime": "2030"}],  # two sessions of a day
    ],
)
def test_series_are_sorted_by_day_and_time(acquired):
    first, second = moments_of([tags(StudyDate="20240130", **one) for one in acquired])
    assert "" < first < second


def test_images_of_one_second_are_of_one_time():
    times = {"AcquisitionTime": "101500"}, {"AcquisitionTime": "101500.25"}, {"AcquisitionDateTime": "20240130101500.1"}
    assert len({*moments_of([tags(**one, AcquisitionDate="20240130") for one in times])}) == 1
    assert moments_of([tags(StudyDate="20240130")]) == [""]


def of_series(folder, count=23, **others):
    """The files of series whose tags are given by number, of which the first images are there."""
    groups = []
    for name, values in others.items():
        number = int(name[1:])
        paths = dicoms.write_series(folder / name, head(), OBLIQUE, number=number, **values)[:count]
        groups.append([(path, read_header(pydicom, path)) for path in paths])
    return groups


TOGETHER = {"ImagesInAcquisition": 46, "AcquisitionTime": "101500"}


@pytest.mark.parametrize(
    ("series", "found"),
    [
        ({"s1": {"ImagesInAcquisition": 32}, "s2": {"ImagesInAcquisition": 23}}, [(23, 32), (0, 0)]),
        ({"s1": {"ImagesInAcquisition": 46}}, [(0, 0)]),  # another echo, which was left behind
        ({"s1": TOGETHER, "s2": TOGETHER}, [(0, 0), (0, 0)]),
        ({"s1": {"ImagesInAcquisition": 32, "ImageType": ["DERIVED", "PRIMARY", "MPR"]}}, [(0, 0)]),
        ({"s1": {}}, [(0, 0)]),
    ],
)
def test_fewer_images_than_their_tags_announce(series, found, tmp_path):
    assert announced_of(of_series(tmp_path, **series)) == found


@pytest.mark.parametrize(
    ("creator", "group", "element", "vr"),
    [("GEMS_RELA_01", 0x0021, 0x4F, "SS"), ("Philips Imaging DD 001", 0x2001, 0x18, "SL")],
)
@pytest.mark.parametrize("habit", ["plain", "implicit, no suffix, shuffled"])
def test_fewer_slices_than_the_scanner_announces(creator, group, element, vr, habit, tmp_path):
    paths = dicoms.write_series(tmp_path, head(), OBLIQUE, habit=habit)

    def announce(image, _):
        image.private_block(group, creator, create=True).add_new(element, vr, 24)

    edited(paths, announce)
    assert announced_of([[(path, read_header(pydicom, path)) for path in paths]]) == [(0, 0)]
    assert announced_of([[(path, read_header(pydicom, path)) for path in paths[:20]]]) == [(20, 24)]


def test_a_series_that_breaks_off_is_to_be_looked_at(tmp_path):
    write(tmp_path, ("t1n", "t2w"), ImagesInAcquisition=24)
    for path in sorted((tmp_path / "2").iterdir())[17:]:
        path.unlink()
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert list(scans.series) == ["t1n", "t2w"]
    why = "its tags announce 24 images, of which 17 are there: a part of the head may be missing."
    assert scans.notes[0] == f"series 2: {why} Export the whole series."
