"""The table of all series: written, changed in a spreadsheet, read back, and what a person's word in it is worth."""

import csv
import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import sleep

import dicoms
import numpy as np
import pytest
from conftest import rows_of
from dicoms import OBLIQUE, SAGITTAL, edited, head

from crossmr.dicom import agents, series_table
from crossmr.dicom.agents import tell_apart
from crossmr.dicom.convert import convert, find_cases
from crossmr.dicom.selection import choose
from crossmr.dicom.series import find_series
from crossmr.dicom.series_table import (
    BY_PERSON,
    COLUMNS,
    NOT_USED,
    about,
    decide,
    keys_of,
    read_series_table,
    without_remedy,
    write_series_table,
)
from crossmr.display import Display
from crossmr.errors import ConfigError

HEAD = ("study", "series", "contrast")


def series(folder, *each, **all_of_them):
    """Series of one study, numbered from 1, of these modalities and tags."""
    for number, (modality, tags) in enumerate(each, 1):
        dicoms.write_series(folder / str(number), head(), OBLIQUE, modality, number=number, **{**all_of_them, **tags})
    return find_series(folder)


def usual(folder, **tags):
    """T1, two T2 of which the second is taken, a subtraction."""
    named = [("t1n", "AX T1"), ("t2w", "AX T2"), ("t2w", "AX T2 again"), ("t1n", "AX T1 SUB")]
    return series(folder, *((m, {"description": text}) for m, text in named), **tags)


def written(path, all_series, case="A", doubts=None):
    write_series_table(path, {case: all_series}, doubts or {})
    return path


def changed(path, changes, **added):
    """Change cells: number → column → text; a column that is not there is added."""
    rows = rows_of(path)
    for row in rows:
        row |= added | changes.get(int(row["number"] or 0), {})
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    return read_series_table(path)


def taken(all_series):
    return {modality: one.number for modality, one in choose(all_series)[0].items()}


def whys(all_series):
    return {one.number: one.why for one in all_series}


def test_a_line_says_what_a_series_is_judged_by(tmp_path):
    tags = {"ContrastBolusAgent": "Gadavist", "ContrastBolusVolume": 7.5, "AcquisitionTime": "101500.25"}
    dicoms.write_series(tmp_path / "in" / "1", head(), SAGITTAL, "t1c", description="=cmd|'T1'", **tags)
    dicoms.write_series(tmp_path / "in" / "2", head(), OBLIQUE, "t2f", number=2, description="+C  FLAIR")
    (one, two) = find_series(tmp_path / "in")
    path = written(tmp_path / "t.csv", [one, two], doubts={two: "some doubt"})
    assert path.read_bytes().startswith(b"\xef\xbb\xbfcase,")
    first, second = rows_of(path)
    assert tuple(first) == COLUMNS
    assert first | {"study": "", "series": "", "which": ""} == {
        **dict.fromkeys(COLUMNS, ""),
        "case": "A",
        "acquired": "2024-01-31 10:15:00",
        "number": "1",
        "description": "'=cmd|'T1'",  # no formula
        "contrast": "t1c",
        "recognised": "t1c",
        "why": "SE, TR 550 ms, TE 12 ms; contrast agent named",
        "plane": "sagittal",
        "slices": "24",
        "voxel_mm": "5 x 5 x 6",
        "image_type": "ORIGINAL\\PRIMARY\\M",
        "tr_ms": "550",
        "te_ms": "12",
        "agent": "Gadavist 7.5 ml",
    }
    assert (first["study"], first["series"], first["which"]) == keys_of([one])[0]
    told = [second[name] for name in ("description", "contrast", "doubt", "plane", "ti_ms", "agent")]
    assert told == ["'+C FLAIR", "t2f", "some doubt", "axial", "2500", ""]


def test_what_was_acquired_after_midnight_has_the_next_day(tmp_path):
    late = ("t1n", {"AcquisitionTime": "235010"}), ("t2w", {"AcquisitionTime": "001500"})
    same = series(tmp_path / "same", *late)
    days = ("t1n", {"AcquisitionDate": "20231231"}), ("t2w", {"AcquisitionDate": "20240101"})
    told = series(tmp_path / "told", *((m, tags | day) for (m, tags), (_, day) in zip(late, days, strict=True)))
    for name, all_series, first, second in (("a", same, "01-31", "02-01"), ("b", told, None, "01-01")):
        acquired = [row["acquired"] for row in rows_of(written(tmp_path / f"{name}.csv", all_series))]
        assert acquired == [f"2024-{first} 23:50:10" if first else "2023-12-31 23:50:10", f"2024-{second} 00:15:00"]
    undated = [replace(one, date="") for one in same]
    assert rows_of(written(tmp_path / "c.csv", undated))[1]["acquired"] == "next day 00:15:00"


@pytest.mark.parametrize("said", ["", "FALSE", "no", "0", "nein", "Non", "FALSCH"])
def test_an_empty_box_is_not_checked(said, tmp_path):
    (tmp_path / "t.csv").write_text(f"study,series,contrast,checked\n1,2,t1n,{said}\n1,3,t2w,TRUE\n")
    assert [row.checked for row in read_series_table(tmp_path / "t.csv").rows.values()] == [False, True]


def test_what_lies_between_the_axes_is_oblique_and_what_has_no_place_has_no_plane(tmp_path):
    turned = np.array([[0, 4.2, 4.2, -60], [-4.2, 3, -3, -80], [4.2, 3, -3, -70], [0, 0, 0, 1.0]])
    turned[:3, 1:3] = np.array([[0.7071, 0.7071], [0.5, -0.5], [0.5, -0.5]]) * 6
    turned[:3, 0] = [0, -4.2426, 4.2426]
    dicoms.write_series(tmp_path / "1", head(), turned)
    gone = ("ImageOrientationPatient", "ImagePositionPatient")
    dicoms.write_series(tmp_path / "2", head(), OBLIQUE, number=2, habit=dicoms.Habit(missing=gone))
    assert [row["plane"] for row in rows_of(written(tmp_path / "t.csv", find_series(tmp_path)))] == ["oblique", ""]


def test_a_table_that_nobody_changed_changes_nothing(tmp_path):
    all_series = usual(tmp_path / "in")
    table = read_series_table(written(tmp_path / "t.csv", all_series))
    assert decide(all_series, table) == all_series  # the very objects
    assert about(table, {"A": all_series}) == []


def test_nor_where_the_voxels_told_two_t1_apart(tmp_path, monkeypatch):
    found = series(tmp_path / "in", ("t1n", {}), ("t2w", {}), ("t1n", {}))
    monkeypatch.setattr(
        agents, "_compared", lambda alike, _: {alike[0]: {"t1n": alike[1]}, alike[1]: {"t1c": alike[0]}}
    )
    told = tell_apart(found, lambda _: None)
    path = written(tmp_path / "t.csv", told)
    assert taken(told) == {"t1n": 1, "t1c": 3, "t2w": 2}
    assert decide(told, read_series_table(path)) == told
    swapped = decide(told, changed(path, {1: {"contrast": "T1ce"}, 3: {"contrast": "T1"}}))
    assert taken(swapped) == {"t1n": 3, "t1c": 1, "t2w": 2}
    assert not any("was taken for T1ce" in note for note in choose(swapped)[2])


def test_a_persons_word_overrules_tags_descriptions_and_preferences(tmp_path):
    all_series = usual(tmp_path / "in")
    path = written(tmp_path / "t.csv", all_series)
    table = changed(path, {2: {"contrast": "T2"}, 3: {"contrast": ""}, 4: {"contrast": "t1 gd"}})
    decided = decide(all_series, table)
    assert taken(decided) == {"t1n": 1, "t1c": 4, "t2w": 2}
    assert whys(decided) == {1: all_series[0].why, 2: BY_PERSON, 3: NOT_USED, 4: BY_PERSON}


def test_nothing_takes_the_place_of_what_a_person_does_not_want(tmp_path):
    """The table has the other T2 as not used, too; a series that it does not list may."""
    all_series = usual(tmp_path / "in")
    path = written(tmp_path / "t.csv", all_series)
    decided = decide(all_series, changed(path, {3: {"contrast": "unused"}}))
    assert taken(decided) == {"t1n": 1}
    assert whys(decided) == whys(all_series) | {2: "no t2w, as a person chose", 3: NOT_USED}
    rows = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    path.write_text("".join(row for row in rows if ",2,AX T2," not in row), encoding="utf-8-sig")
    assert taken(decide(all_series, read_series_table(path))) == {"t1n": 1, "t2w": 2}


def test_a_series_without_a_line_takes_no_contrast_that_a_line_has(tmp_path):
    path = written(tmp_path / "t.csv", usual(tmp_path / "in"))
    dicoms.write_series(tmp_path / "in" / "8", head(), OBLIQUE, "t2w", number=8)
    dicoms.write_series(tmp_path / "in" / "9", head(), OBLIQUE, "t2f", number=9)
    more = find_series(tmp_path / "in")
    assert taken(more) == {"t1n": 1, "t2w": 8, "t2f": 9}
    assert decide(more, read_series_table(path)) == more
    decided = decide(more, changed(path, {3: {"checked": "x"}}))
    assert taken(decided) == {"t1n": 1, "t2w": 3, "t2f": 9}
    assert whys(decided)[8] == "not the t2w that a person chose"


def test_what_a_person_has_checked_is_that_persons_word(tmp_path):
    """Also where nothing changes: a doubt is settled by it."""
    agent = {"ContrastBolusAgent": "Gadavist"}
    all_series = series(tmp_path / "in", ("t1c", {}), ("t2w", agent))
    assert "every series names a contrast agent" in choose(all_series)[2][0]
    path = written(tmp_path / "t.csv", all_series)
    decided = decide(all_series, changed(path, {1: {"checked": "x"}}))
    assert whys(decided) == {1: BY_PERSON, 2: all_series[1].why}
    assert choose(decided)[2] == []
    unsure = series(tmp_path / "two", ("t1n", {}), ("t2w", {}), ("t1n", {}))
    path = written(tmp_path / "two.csv", unsure)
    decided = decide(unsure, changed(path, {1: {"checked": "x"}}))
    assert whys(decided)[3] == "not the t1n that a person chose"
    assert whys(decide(unsure, changed(path, {1: {"checked": ""}, 3: {"checked": "yes"}})))[3] == NOT_USED


def test_a_line_that_was_left_alone_overrules_nothing(tmp_path):
    """Not --map, nor a series that arrives later; spellings are no change either."""
    usual(tmp_path / "in")
    path = written(tmp_path / "t.csv", find_series(tmp_path / "in"))
    table = changed(path, {1: {"contrast": " T1 "}, 4: {"recognised": ""}})
    mapped = find_series(tmp_path / "in", {"t1c": "AX T1 SUB", "t2f": "AX T2 again"})
    assert taken(mapped) == {"t1n": 1, "t1c": 4, "t2w": 2, "t2f": 3}
    assert decide(mapped, table) == mapped
    dicoms.write_series(tmp_path / "in" / "8", head(), OBLIQUE, "t2w", number=8)
    more = find_series(tmp_path / "in")
    assert decide(more, table) == more
    assert write_series_table(path, {"A": more}, {}) == (1, True)
    both = read_series_table(path)  # two lines say t2w, of which nobody has chosen one
    assert decide(more, both) == more
    with pytest.raises(ConfigError, match="line 6, column contrast: t2w of this study is on line 4 already"):
        changed(path, {3: {"checked": "x"}})
    assert taken(decide(more, changed(path, {3: {"checked": "x"}, 8: {"contrast": ""}})))["t2w"] == 3


def test_what_a_person_chose_changes_no_line_that_was_left_alone(tmp_path):
    """Which of two T1 is taken depends on whether there is T1ce."""
    all_series = series(tmp_path / "in", ("t1n", {}), ("t2w", {}), ("t1n", {}), ("t1n", {"description": "T1 SUB"}))
    assert taken(all_series) == {"t1n": 1, "t2w": 2}
    path = written(tmp_path / "t.csv", all_series)
    decided = decide(all_series, changed(path, {4: {"contrast": "t1c"}}))
    assert taken(decided) == {"t1n": 1, "t2w": 2, "t1c": 4}
    assert whys(decided) == whys(all_series) | {3: "not the t1n that a person chose", 4: BY_PERSON}


def test_a_table_that_does_not_tell_what_was_recognised_is_a_persons_as_a_whole(tmp_path):
    all_series = usual(tmp_path / "in")
    path = written(tmp_path / "t.csv", all_series)
    path.write_text("\n".join(["study,series,contrast", *(f"{s.study},{s.uid}," for s in all_series[2:])]))
    decided = decide(all_series, read_series_table(path))
    assert taken(decided) == {"t1n": 1, "t2w": 2}
    assert whys(decided) == whys(all_series) | {3: NOT_USED}


def test_what_is_no_volume_of_one_contrast_stays_out(tmp_path):
    """With the reason that its images give, whatever its tags say, and nothing is taken in its place."""
    localizer = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    all_series = series(
        tmp_path,
        ("t1n", {}),
        ("t2w", {}),
        ("t2w", {"PhotometricInterpretation": "MONOCHROME1"}),
        ("t2f", localizer),
        ("t1n", {"description": "SYNTHETIC T1ce"}),
    )
    for path in sorted((tmp_path / "4").iterdir())[5:7]:
        path.unlink()
    all_series = find_series(tmp_path)
    path = written(tmp_path / "t.csv", all_series)
    given = {2: {"contrast": ""}, 3: {"contrast": "T2"}, 4: {"contrast": "FLAIR"}, 5: {"contrast": "T1ce"}}
    decided = decide(all_series, changed(path, given))
    assert taken(decided) == {"t1n": 1}
    assert [whys(decided)[number].partition(":")[0][:24] for number in (3, 4, 5)] == [
        "stored with white for th",
        "its slices are 7.00 mm a",
        "itself synthetic",
    ]
    assert whys(all_series)[4] == "a localiser"


def test_series_that_share_a_uid_are_told_apart(tmp_path):
    for echo, time in ((1, 12), (2, 95)):
        tags = dicoms.TIMING["t2w"] | {"EchoTime": time, "EchoNumbers": echo}
        habit = dicoms.Habit(name=f"e{echo}-{{0}}")
        paths = dicoms.write_series(tmp_path / "in", head(), OBLIQUE, "t2w", habit=habit, **tags)
        edited(paths, lambda image, k, echo=echo: setattr(image, "SOPInstanceUID", dicoms.uid(echo, k)))
    all_series = find_series(tmp_path / "in")
    path = written(tmp_path / "t.csv", all_series)
    rows = rows_of(path)
    assert len({row["series"] for row in rows}) == 1
    assert all(re.fullmatch("w[0-9a-f]{8}", row["which"]) for row in rows)
    assert [row["contrast"] for row in rows] == ["pdw", "t2w"]
    path.write_text(path.read_text(encoding="utf-8-sig").replace(",pdw,", ",none,"))  # and no BOM
    decided = decide(all_series, read_series_table(path))
    assert [one.modality for one in decided] == [None, "t2w"]
    assert len({*keys_of([*all_series, *all_series])}) == 4  # whatever comes twice


def test_a_correction_stays_when_another_series_of_its_uid_appears(tmp_path):
    paths = dicoms.write_series(tmp_path / "in" / "1", head(), OBLIQUE, "t2w", EchoTime=95)
    changed(written(tmp_path / "t.csv", find_series(tmp_path / "in")), {1: {"contrast": "FLAIR"}})
    (row,) = rows_of(tmp_path / "t.csv")
    own = tmp_path / "own.csv"
    own.write_text(f"study,series,contrast\n{row['study']},{row['series']},t2f\n")
    alone = find_series(tmp_path / "in")
    assert taken(decide(alone, read_series_table(own))) == {"t2f": 1}
    assert write_series_table(own, {"A": alone}, {}) == (0, True)
    assert not about(read_series_table(own), {"A": alone})
    more = dicoms.write_series(tmp_path / "in" / "2", head(), OBLIQUE, "t2w", EchoTime=12)
    edited(more, lambda image, k: setattr(image, "SOPInstanceUID", dicoms.uid(7, k)))
    edited([*paths, *more], lambda image, _: setattr(image, "SeriesInstanceUID", dicoms.uid(8)))
    text = (tmp_path / "t.csv").read_text(encoding="utf-8-sig").replace(row["series"], dicoms.uid(8))
    (tmp_path / "t.csv").write_text(text)
    table = read_series_table(tmp_path / "t.csv")
    both = find_series(tmp_path / "in")
    assert len({one.uid for one in both}) == 1
    assert [one.modality for one in decide(both, table)].count("t2f") == 1
    own.write_text(own.read_text().replace(row["series"], dicoms.uid(8)))
    with pytest.raises(ConfigError, match=r"own\.csv, line 2, column which: empty, and 2 series of the"):
        about(read_series_table(own), {"A": both})
    own.write_text(own.read_text().splitlines()[0] + "\n")
    assert write_series_table(own, {"A": both}, {}) == (2, True)  # with `which`, as they share a UID
    assert not about(read_series_table(own), {"A": both})
    untouched = f"study,series,contrast,recognised\n{row['study']},{dicoms.uid(8)},t2w,t2w\n"
    own.write_text(untouched)
    assert decide(both, read_series_table(own)) == both


def test_what_others_write_meanwhile_stays(tmp_path, monkeypatch):
    """Another part's lines, and what a person has changed in them."""
    cases = {name: usual(tmp_path / name, patient=name) for name in "AB"}
    path = tmp_path / "t.csv"
    cells = series_table._cells

    def meanwhile(*given):
        if not path.exists():
            monkeypatch.setattr(series_table, "_cells", cells)
            written(path, cases["A"])
            changed(path, {4: {"contrast": "FLAIR"}})
        return cells(*given)

    monkeypatch.setattr(series_table, "_cells", meanwhile)
    assert write_series_table(path, {"B": cases["B"]}, {}) == (4, True)
    assert [row["case"] for row in rows_of(path)] == [*"AAAABBBB"]
    assert rows_of(path)[3]["contrast"] == "FLAIR"
    assert sorted(place.name for place in tmp_path.iterdir()) == ["A", "B", "t.csv"]


def test_parts_that_write_a_table_at_once_write_it_one_after_the_other(tmp_path, monkeypatch):
    cases = {name: usual(tmp_path / name, patient=name) for name in "ABC"}
    path = tmp_path / "t.csv"
    monkeypatch.setattr("crossmr.parts.POLL_SECONDS", 0.01)
    write = series_table._write
    monkeypatch.setattr(series_table, "_write", lambda *given: (sleep(0.2), write(*given)))
    with ThreadPoolExecutor(3) as pool:
        counts = [*pool.map(lambda case: write_series_table(path, {case: cases[case]}, {})[0], cases)]
    assert counts == [4, 4, 4]
    assert sorted(row["case"] for row in rows_of(path)) == [*"AAAABBBBCCCC"]


@pytest.mark.parametrize(("encoding", "by"), [("cp1252", ";"), ("utf-8-sig", ";"), ("utf-16", "\t"), ("utf-8", ",")])
def test_spreadsheets_save_it_in_their_own_ways(encoding, by, tmp_path):
    """A German Excel has semicolons and its old code page; 'Unicode text' is of tabs; lines may lose empty ends."""
    all_series = usual(tmp_path / "in", SeriesDescription="Schädel")
    rows = rows_of(written(tmp_path / "t.csv", all_series))
    rows[3]["contrast"] = "T1 post"
    text = io.StringIO()
    csv.writer(text, delimiter=by).writerows([COLUMNS, *(list(row.values())[:-1] for row in rows), [""] * 5])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode(encoding))
    table = read_series_table(tmp_path / "t.csv")
    assert taken(decide(all_series, table)) == {"t1n": 1, "t1c": 4, "t2w": 3}
    new = dicoms.write_series(tmp_path / "in" / "9", head(), OBLIQUE, "t2f", number=9, description="Schädel neu")
    assert new
    assert write_series_table(tmp_path / "t.csv", {"A": find_series(tmp_path / "in")}, {}) == (1, True)
    again = read_series_table(tmp_path / "t.csv")  # as UTF-8, its separator kept
    assert (again.delimiter, len(again.rows)) == (by, 5)
    assert "Schädel neu" in again.lines[-1]
    assert "Schädel" in again.lines[0]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["study,contrast", "1,t1n"], "line 1: its columns are study, contrast; expected study, series, contrast"),
        ([""], "line 1: its columns are none"),
        (["study,series,contrast,series", "1,2,t1n,3"], r"\(series is not\)"),
        ([HEAD, "1,2,t1n", "1,3,t3w"], "line 3, column contrast: 't3w' is not a modality"),
        ([HEAD, "1,2,t1n", "", "1,3,T1"], "line 4, column contrast: t1n of this study is on line 2 already"),
        ([HEAD, "1,2,t1n", "1,2,t2w"], "line 3: its series is on line 2 already"),
        ([HEAD, ",2,t1n"], "line 2, column study: it is empty"),
        ([HEAD, "1,2,t1n,more"], "line 2: it has 4 columns; expected 3"),
        ([HEAD, '1,2,"' + "x" * 200_000 + '"'], "line 2: it is no CSV file"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(lines, wanted, tmp_path):
    text = "\n".join(line if isinstance(line, str) else ",".join(line) for line in lines)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        read_series_table(tmp_path / "t.csv")


def test_a_table_that_is_not_there_is_said_to_be_written_by_a_dry_run(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory\. --dry-run writes it"):
        read_series_table(tmp_path / "t.csv")


def test_contrasts_of_ones_own_and_studies_alike(tmp_path):
    (tmp_path / "t.csv").write_text("study,series,contrast\n1,2,t1n\n2,2,t1n\n1,3,swi\n1,4,-\n1,5,Not used\n")
    table = read_series_table(tmp_path / "t.csv", ["swi"])
    assert [row.contrast for row in table.rows.values()] == ["t1n", "t1n", "swi", "unused", "unused"]
    (tmp_path / "t.csv").write_text("study;contrast;series\n1;none;5\n2;T1;2\n1;swi;3\n1;t1n;2\n1;-;4\n")
    assert read_series_table(tmp_path / "t.csv", ["swi"]).digest == table.digest  # whatever the order


def test_a_table_and_the_studies_beside_it(tmp_path):
    cases = {name: usual(tmp_path / name, patient=name) for name in "ABC"}
    path = written(tmp_path / "t.csv", cases["A"])
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join([*lines[:-1], "A,,7,,t2f,,,,,,,,,,,,,gone,9.9,"]))
    table = read_series_table(path)
    assert about(table, cases) == [
        "warning: t.csv has no line of 2 studies, which go as recognised: B, C",
        "warning: t.csv lacks series, which go as recognised: A (series 4)",
        "warning: t.csv has 1 series that no study has, and which change nothing: line 5 (A series 7)",
    ]
    assert len(about(table, cases, whole=False)) == 2
    (alone,) = about(table, {f"{k}": cases["B"] for k in range(7)}, whole=False)
    assert alone.endswith("of 7 studies, which go as recognised: 0, 1, 2, 3, 4 and 2 more")


def test_what_a_table_lacks_is_added_and_nothing_else_is_touched(tmp_path):
    cases = {name: usual(tmp_path / name, patient=name) for name in "AB"}
    path = written(tmp_path / "t.csv", cases["A"])
    changed(path, {4: {"contrast": "FLAIR", "mine": "asked Dr. Roe"}}, mine="")
    before = path.read_text(encoding="utf-8-sig").splitlines()
    assert write_series_table(path, {"A": cases["A"]}, {}) == (0, True)
    assert write_series_table(path, cases, {}) == (4, True)
    after = path.read_text(encoding="utf-8-sig").splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + 4
    assert "asked Dr. Roe" in after[4]
    assert not about(read_series_table(path), cases)


def test_files_that_cannot_be_read_have_a_line_too(tmp_path):
    usual(tmp_path / "in")
    (tmp_path / "in" / "broken").mkdir()
    (tmp_path / "in" / "broken" / "1.dcm").write_bytes(bytes(128) + b"DICM" + b"\x08\x00")
    all_series = find_series(tmp_path / "in")
    path = written(tmp_path / "t.csv", all_series)
    rows = rows_of(path)
    assert (rows[0]["number"], rows[0]["description"]) == ("", "broken")
    assert "can be read as DICOM" in rows[0]["why"]
    assert [row["which"] for row in rows] == [which for _, _, which in keys_of(all_series)]
    table = changed(path, {0: {"contrast": "FLAIR"}})
    assert "t2f" not in taken(decide(all_series, table))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("series 5 is T1ce: brighter. Name it with --map if that is wrong.", "series 5 is T1ce: brighter"),
        ("a second T1; name it with --map t1c='D', or, where none is, with --map t1n='series 2'", "a second T1"),
        ("it covers 40 %. Export the whole series.", "it covers 40 %. Export the whole series."),
        ("name it with --map", ""),
    ],
)
def test_a_table_does_not_speak_of_map(text, left):
    assert without_remedy(text) == left


def test_series_of_one_number_have_reasons_of_their_own(tmp_path):
    for k in range(3):
        paths = dicoms.write_series(tmp_path / str(k), head(), OBLIQUE, "t2w", AcquisitionTime=f"10000{k}")
        edited(paths, lambda image, i, k=k: setattr(image, "SOPInstanceUID", dicoms.uid(k, i)))
        edited(paths, lambda image, _, k=k: setattr(image, "SeriesInstanceUID", dicoms.uid(k)))
    path = written(tmp_path / "t.csv", find_series(tmp_path))
    assert sorted(row["why"] for row in rows_of(path)) == [
        "SE, TR 4500 ms, TE 95 ms",
        "another t2w is preferred",
        "another t2w is preferred",
    ]


def test_convert_takes_the_series_of_a_table(tmp_path, capsys):
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    usual(tmp_path / "in")
    ((case, all_series),) = find_cases(tmp_path / "in").items()
    path = written(tmp_path / "t.csv", all_series, case)
    (scans,) = convert(tmp_path / "in", tmp_path / "out", series_table=path)
    assert {m: one.number for m, one in scans.series.items()} == {"t1n": 1, "t2w": 3}
    changed(path, {3: {"contrast": ""}, 4: {"contrast": "t2f"}})
    (scans,) = convert(tmp_path / "in", tmp_path / "out", series_table=path, display=Display())
    assert {m: one.number for m, one in scans.series.items()} == {"t1n": 1, "t2f": 4}
    assert {path.name for path in (tmp_path / "out" / case).glob("*.nii.gz")} == {
        f"{case}-t1n.nii.gz",
        f"{case}-t2f.nii.gz",
    }
    assert "warning" not in capsys.readouterr().out
