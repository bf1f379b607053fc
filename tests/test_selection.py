"""Which of several series of one contrast is taken, and what is said of the others."""

import dicoms
import numpy as np
import pytest
from dicoms import OBLIQUE, SAGITTAL, head, write

from crossmr.dicom.convert import convert
from crossmr.dicom.selection import choose, taken
from crossmr.dicom.series import find_series

SMALL = np.diag([2.0, 2.0, 3.0, 1.0])  # a slab of the head, in small voxels


def test_each_contrast_has_one_series_and_each_other_series_a_reason(tmp_path):
    write(tmp_path, ("t2f", "t1n"))
    dicoms.write_series(tmp_path / "more", head("t2f"), OBLIQUE, "t2f", number=9)
    found = find_series(tmp_path)
    chosen, left_out, notes = choose(found)
    assert taken(found) == list(chosen) == ["t1n", "t2f"]
    assert len(left_out) == 1
    assert next(iter(left_out.values())).startswith("another t2f, ")
    assert notes == []


def test_the_finer_the_original_and_the_later_series_is_taken(tmp_path):
    coarse = OBLIQUE @ np.diag([1, 1, 1.5, 1])
    dicoms.write_series(tmp_path / "1", head(), coarse, number=1)
    dicoms.write_series(tmp_path / "2", head(), OBLIQUE, number=2)
    dicoms.write_series(tmp_path / "3", head(), OBLIQUE, number=3, ContrastBolusAgent="NONE")
    dicoms.write_series(tmp_path / "4", head(), OBLIQUE, number=4, ImageType=["DERIVED", "SECONDARY", "MPR"])
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.series["t1n"].number == 3
    assert scans.left_out == {
        "series 1": "another t1n, coarser than series 3",
        "series 2": "another t1n, earlier than series 3",
        "series 4": "another t1n, derived, unlike series 3",
    }
    assert "no tag says which" in scans.notes[0]


@pytest.mark.parametrize(("time", "unsure"), [("100200", False), ("101500", True)])
def test_what_a_scanner_makes_of_one_t1_leaves_no_doubt(time, unsure, tmp_path):
    write(tmp_path, ("t1n", "t2w"))
    kinds = ["DERIVED", "PRIMARY", "MPR", "ND"]
    dicoms.write_series(tmp_path / "9", head(), OBLIQUE, number=9, ImageType=kinds, AcquisitionTime=time)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.series["t1n"].number == 2
    assert any("no tag says which" in note for note in scans.notes) == unsure


def test_of_t1_alone_no_time_says_that_they_are_one(tmp_path):
    for number in (2, 5):
        dicoms.write_series(tmp_path / str(number), head(), OBLIQUE, number=number, AcquisitionTime="000000")
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert any("no tag says which" in note for note in scans.notes)


def test_a_series_that_covers_half_of_what_the_others_do_is_said(tmp_path):
    write(tmp_path, ("t1n", "t2w"))
    for path in sorted((tmp_path / "2").iterdir())[12:]:
        path.unlink()
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.notes == [
        "series 2 (t1n) covers 60% of what series 3 does: a part of it may be missing. Export the whole series."
    ]


@pytest.mark.parametrize(
    ("affine", "tags", "why"),
    [
        (SMALL, {}, "covers less than"),
        (OBLIQUE @ np.diag([0.6, 0.6, 0.9, 1]), {"description": "T1 SELLA"}, "of a part of the head, unlike"),
        (SAGITTAL, {}, "in another plane than"),
        (OBLIQUE, {"ImageType": ["DERIVED", "SECONDARY"]}, "derived, unlike"),
    ],
)
def test_the_series_of_the_whole_head_like_the_others_of_its_study(affine, tags, why, tmp_path):
    write(tmp_path, ("t1n", "t2w", "t2f"))
    dicoms.write_series(tmp_path / "9", head(), affine, number=9, **tags)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.series["t1n"].number == 2
    assert scans.left_out == {"series 9": f"another t1n, {why} series 2"}


@pytest.mark.parametrize(("description", "noted"), [("AX T1", True), ("AX T1 GD", False)])
def test_an_agent_on_every_series_that_nothing_resolves_is_said(description, noted, tmp_path):
    for number, (modality, text) in enumerate((("t1n", description), ("t2w", "AX T2")), 2):
        tags = {"description": text, "ContrastBolusAgent": "Gadavist"}
        dicoms.write_series(tmp_path / str(number), head(modality), OBLIQUE, modality, number=number, **tags)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert list(scans.series) == ["t1c", "t2w"]
    assert any("every series names a contrast agent" in note for note in scans.notes) == noted


@pytest.mark.parametrize(
    ("description", "agent", "said"),
    [
        ("T1 BASAL", "Gadavist", "taken for T1ce: its tag names a contrast agent, which its description denies"),
        ("T1 CONTRAST", "NONE", "taken for T1: its tag denies a contrast agent, which its description names"),
        ("T1 nativ", "Gadavist", ""),
        ("T1 BASAL GANGLIA", "Gadavist", ""),
    ],
)
def test_words_against_the_tag_are_said(description, agent, said, tmp_path):
    write(tmp_path, ("t2w",))
    tags = {"description": description, "ContrastBolusAgent": agent}
    dicoms.write_series(tmp_path / "9", head(), OBLIQUE, number=9, **tags)
    notes = choose(find_series(tmp_path))[2]
    assert [said in note for note in notes] == ([True] if said else [])


@pytest.mark.parametrize(
    ("description", "kinds", "noted"),
    [
        ("Amplitude", ["DERIVED", "PRIMARY", "M"], True),
        ("Amplitude", ["ORIGINAL", "PRIMARY", "M"], False),
        ("Reformat", ["DERIVED", "SECONDARY", "MPR"], False),
        ("", ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"], False),
        ("AX T1 FSE", ["DERIVED", "SECONDARY"], False),
    ],
)
def test_a_derived_series_that_does_not_name_its_contrast_is_said(description, kinds, noted, tmp_path):
    write(tmp_path, ("t2w",))
    dicoms.write_series(tmp_path / "9", head(), OBLIQUE, number=9, description=description, ImageType=kinds)
    chosen, _, notes = choose(find_series(tmp_path))
    assert chosen["t1n"].number == 9
    assert any("(image type DERIVED, M, PRIMARY)" in note for note in notes) == noted
    assert len(notes) == noted


@pytest.mark.parametrize("modality", ["t2w", "t2f"])
@pytest.mark.parametrize(
    ("tags", "taken_first"),
    [
        (({}, {"ContrastBolusAgent": "Gadavist"}), True),
        (({}, {"description": "AX POST GD"}), True),
        (({"ContrastBolusAgent": "Gadavist"}, {}), False),
        (({"ContrastBolusAgent": "Gadavist"}, {"ContrastBolusAgent": "Gadavist"}), False),
        (({"ContrastBolusAgent": "Gadavist"}, {"ContrastBolusAgent": "Gadavist", "description": "POST GD"}), True),
    ],
)
def test_of_two_t2_or_flair_the_one_without_contrast_agent_is_taken(modality, tags, taken_first, tmp_path):
    write(tmp_path, ("t1n",))
    for number, one in zip((5, 6), tags, strict=True):
        dicoms.write_series(tmp_path / str(number), head(modality), OBLIQUE, modality, number=number, **one)
    chosen, left_out, notes = choose(find_series(tmp_path))
    assert chosen[modality].number == (5 if taken_first else 6)
    why = left_out[f"series {6 if taken_first else 5}"]
    assert ("after the contrast agent, unlike" in why) == (tags[0] != tags[1])
    assert notes == []


def test_a_flair_after_the_agent_that_is_finer_than_the_one_before_is_said(tmp_path):
    write(tmp_path, ("t1n", "t2f"))
    tags = {"description": "FLAIR POST GD", "AcquisitionTime": "103000"}
    coarse = OBLIQUE @ np.diag([0.7, 0.7, 0.7, 1])
    voxels = np.kron(head("t2f"), np.ones((2, 2, 2), int))
    dicoms.write_series(tmp_path / "9", voxels, coarse, "t2f", number=9, **tags)
    chosen, left_out, notes = choose(find_series(tmp_path))
    assert chosen["t2f"].number == 9
    assert left_out["series 3"] == "another t2f, coarser than series 9"
    assert any("another FLAIR that names none was left out" in note for note in notes)


@pytest.mark.parametrize(("agent", "noted"), [(None, True), ("Gadavist", False)])
def test_two_t1ce_by_description_alone_and_no_t1_are_said(agent, noted, tmp_path):
    """One may deny the agent in words that nobody knows."""
    for number, hour in ((1, "101500"), (2, "103000")):
        tags = {"ContrastBolusAgent": agent} if agent else {}
        text = "T1 CONTRAST"
        dicoms.write_series(
            tmp_path / str(number), head(), OBLIQUE, number=number, description=text, AcquisitionTime=hour, **tags
        )
    dicoms.write_series(tmp_path / "3", head("t2f"), OBLIQUE, "t2f", number=3, AcquisitionTime="102000")
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert list(scans.series) == ["t1c", "t2f"]
    assert any("series 1 and series 2 by description alone; there is no T1" in n for n in scans.notes) == noted


def test_of_two_t1_without_a_word_of_the_agent_the_earlier_is_the_plain_one(tmp_path):
    for number, hour in ((1, "101500"), (2, "103000")):
        dicoms.write_series(tmp_path / str(number), head(), OBLIQUE, number=number, AcquisitionTime=hour)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.series["t1n"].number == 1
    assert scans.left_out == {"series 2": "another t1n, later than series 1"}
    assert "no tag says which" in scans.notes[0]


def test_thin_slices_are_finer_than_thick_ones_of_small_pixels(tmp_path):
    fine = np.diag([1.0, 1, 1, 1])
    dicoms.write_series(tmp_path / "1", head(), fine @ np.diag([0.4, 0.4, 5, 1]), number=1)
    dicoms.write_series(tmp_path / "2", head(), fine, number=2)
    (scans,) = convert(tmp_path, tmp_path / "out")
    assert scans.series["t1n"].number == 2
