"""Which series is taken: written by a dry run for a person to see, corrected, read back, done again where needed."""

import csv
import io
import json
from dataclasses import replace

import dicoms
import numpy as np
import pytest
from conftest import rows_of, save_untrained, tree, write_study

from crossmr.cli import main
from crossmr.completion import choice
from crossmr.completion.choice import as_chosen, by_description
from crossmr.completion.cohort import CohortSettings, complete_cohort, plan_cohort
from crossmr.completion.inputs import PlannedCase, find_inputs
from crossmr.data.volume import read_volume
from crossmr.dicom.series_table import BY_PERSON, COLUMNS, read_series_table
from crossmr.display import Display
from crossmr.errors import ConfigError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.parts import Part

SETTINGS = InferenceSettings(ddim_steps=2, device="cpu", precision="float32")
SERIES = [("t1n", "AX T1"), ("t2w", "AX T2"), ("t2w", "AX T2 again"), ("t2f", "AX FLAIR")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model(save_untrained(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _extra():
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")


def write(folder, patients="AB", each=SERIES):
    for patient in patients:
        for number, (modality, text) in enumerate(each, 1):
            place, tags = folder / patient / str(number), {"number": number, "patient": patient, "description": text}
            voxels = dicoms.head("t2f" if modality == "?" else modality)
            dicoms.write_series(place, voxels, dicoms.OBLIQUE, modality, **tags)
    return folder


def correct(path, case, **changes):
    """Name the contrasts of series of a case: _3="FLAIR"."""
    rows = rows_of(path)
    for row in rows:
        if row["case"] == case and f"_{row['number']}" in changes:
            row["contrast"] = changes[f"_{row['number']}"]
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *(row.values() for row in rows)])
    path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")


def planned(tmp_path, model, path, **options):
    given = CohortSettings(series_table=path, **options)
    return plan_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, given, display=Display())


def completed(tmp_path, model, path, out="out", **options):
    given = CohortSettings(series_table=path, **options)
    return complete_cohort(tmp_path / "in", tmp_path / out, model, SETTINGS, given, display=Display())


def manifest_of(out, case):
    return json.loads((out / case / "manifest.json").read_text())


def taken_of(out, case):
    return {m: entry["series"] for m, entry in manifest_of(out, case)["series"]["taken"].items()}


def test_a_table_that_nobody_changed_gives_the_same_output(model, tmp_path, capsys):
    write(tmp_path / "in")
    path = tmp_path / "choice.csv"
    cases = planned(tmp_path, model, path)
    assert not (tmp_path / "out").exists()
    assert {(row["case"], row["number"]): row["contrast"] for row in rows_of(path)} == {
        (case.case, str(n)): m for case in cases for n, m in enumerate(("t1n", "", "t2w", "t2f"), 1)
    }
    assert f"{path}: 8 series of 2 studies, 0 in doubt." in (said := capsys.readouterr().out)
    assert "NOT FOR SHARING" in said
    before = path.read_bytes()
    summary = completed(tmp_path, model, path)
    assert "choice.csv: a person has chosen 0 series, in 0 of 2 studies" in capsys.readouterr().out
    plain = complete_cohort(tmp_path / "in", tmp_path / "plain", model, SETTINGS)
    assert summary.completed == plain.completed == {case.case: ["t1c"] for case in cases}
    for case in summary.completed:
        one, other = (manifest_of(tmp_path / out, case) for out in ("out", "plain"))
        for name in ("created", "seconds", "stamps"):
            del one[name], other[name]
        assert one == other
        image = f"{case}/{case}-t1c_synthetic.nii.gz"
        a, b = (read_volume(tmp_path / out / image).data for out in ("out", "plain"))
        assert np.array_equal(a, b)
    again = planned(tmp_path, model, path)
    assert [case.outcome for case in again] == ["finished before"] * 2
    assert path.read_bytes() == before
    assert completed(tmp_path, model, path).skipped == [case.case for case in cases]
    assert complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS).skipped == [case.case for case in cases]


def test_one_of_two_studies_with_equal_descriptions_is_corrected_and_done_again(model, tmp_path, capsys):
    write(tmp_path / "in")
    path, out = tmp_path / "choice.csv", tmp_path / "out"
    one, other = (case.case for case in planned(tmp_path, model, path))
    completed(tmp_path, model, path)
    made = tree(out / other)
    correct(path, one, _2="T2", _3="")
    capsys.readouterr()
    cases = {case.case: case for case in planned(tmp_path, model, path)}
    assert cases[one].again == "the table of the series says otherwise now (t2w)"
    assert cases[one].acquired["t2w"] == "series 2 (chosen by a person)"
    assert cases[one].excluded == {"series 3": "not used, chosen by a person"}
    assert cases[other].outcome == "finished before"
    assert "choice.csv: a person has chosen 2 series, in 1 of 2 studies" in capsys.readouterr().out
    summary = completed(tmp_path, model, path)
    assert summary.completed == {one: ["t1c"]}
    assert summary.skipped == [other]
    assert f"{one}: finished before, and done again: the table of the series says" in capsys.readouterr().out
    assert taken_of(out, one) == {"t1n": 1, "t2w": 2, "t2f": 4}
    assert manifest_of(out, one)["series"]["taken"]["t2w"]["why"] == BY_PERSON
    assert manifest_of(out, one)["series"]["left_out"] == {"series 3": "not used, chosen by a person"}
    assert tree(out / other) == made
    assert completed(tmp_path, model, path).skipped == [one, other]


def test_an_unused_series_is_synthesised_and_one_that_is_used_again_is_not(model, tmp_path):
    write(tmp_path / "in", "A")
    path, out = tmp_path / "choice.csv", tmp_path / "out"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    completed(tmp_path, model, path)
    correct(path, case, _4="unused")
    assert planned(tmp_path, model, path)[0].synthesise == ["t1c", "t2f"]
    assert completed(tmp_path, model, path).completed == {case: ["t1c", "t2f"]}
    assert (out / case / f"{case}-t2f_synthetic_dicom").is_dir()
    correct(path, case, _4="FLAIR")
    assert planned(tmp_path, model, path)[0].again.endswith("(t2f)")
    assert completed(tmp_path, model, path).completed == {case: ["t1c"]}
    assert not (out / case / f"{case}-t2f_synthetic_dicom").exists()


def test_what_could_take_the_place_of_a_series_that_is_not_used_is_not_replaced(model, tmp_path):
    """A person empties the one of two T2 that was taken: the other is no longer taken, nor is T2 synthesised."""
    write(tmp_path / "in", "A")
    path = tmp_path / "choice.csv"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    correct(path, case, _3="")
    (doubted,) = planned(tmp_path, model, path)
    assert ([*doubted.acquired], doubted.synthesise, doubted.unread) == (["t1n", "t2f"], [], ["t2w"])
    assert doubted.not_synthesised["t2w"].startswith(
        "series 2 may be it and was left out: no t2w, as a person chose; name it in the table, or mark it unused. To"
    )
    correct(path, case, _2="unused", _3="unused")
    assert planned(tmp_path, model, path)[0].unread == []
    correct(path, case, _2="T2")
    assert "series 2 (chosen by a person)" in planned(tmp_path, model, path)[0].acquired["t2w"]


def test_a_table_that_nobody_changed_says_nothing_of_what_is_new(model, tmp_path, capsys):
    """Neither another --map nor a series that arrives is a person's choice, and nothing is done again for it."""
    write(tmp_path / "in", "A")
    path, out = tmp_path / "choice.csv", tmp_path / "out"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    (mapped,) = planned(tmp_path, model, path, mapping={"t1c": "AX T2"})
    assert "series 1" in mapped.acquired["t1n"]
    assert mapped.acquired["t1c"] == "series 2 (named so by --map)"
    completed(tmp_path, model, path)
    dicoms.write_series(tmp_path / "in" / "A" / "8", dicoms.head("t2w"), dicoms.OBLIQUE, "t2w", number=8, patient="A")
    plain = complete_cohort(tmp_path / "in", out, model, SETTINGS).failed
    capsys.readouterr()
    assert "other scans of this name" in plain[case]
    assert completed(tmp_path, model, path).failed == plain
    said = capsys.readouterr().out
    assert "a person has chosen 0 series" in said
    assert "done again" not in said
    correct(path, case, _4="unused")  # and now a person says something
    assert planned(tmp_path, model, path)[0].again.startswith("the table of the series says otherwise now")
    assert completed(tmp_path, model, path).completed == {case: ["t1c", "t2f"]}
    dicoms.write_series(tmp_path / "in" / "A" / "9", dicoms.head("t2w"), dicoms.OBLIQUE, "t2w", number=9, patient="A")
    assert "other scans of this name" in completed(tmp_path, model, path).failed[case]


@pytest.mark.parametrize("chosen", [{"_2": "T2", "_3": ""}, {"_2": "unused", "_3": "unused"}, {"_4": "unused"}])
def test_what_a_person_chose_is_not_undone_without_the_table(chosen, model, tmp_path):
    write(tmp_path / "in", "A")
    path, out = tmp_path / "choice.csv", tmp_path / "out"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    correct(path, case, **chosen)
    completed(tmp_path, model, path)
    made, modality = tree(out / case), "t2f" if "_4" in chosen else "t2w"
    why = f"{case}: a person chose its series ({modality}) when it was made, and no table says so now; it stays. Give "
    assert planned(tmp_path, model, None)[0].failed.startswith(why)
    assert completed(tmp_path, model, None).failed[case].startswith(why)
    assert tree(out / case) == made
    assert completed(tmp_path, model, path).skipped == [case]
    assert completed(tmp_path, model, None, overwrite=True).failed == {}


def test_a_finished_study_stays_where_it_is_another_ones(model, tmp_path):
    write(tmp_path / "in", "A")
    path = tmp_path / "choice.csv"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    correct(path, case, _2="T2", _3="")
    completed(tmp_path, model, path)
    manifest = tmp_path / "out" / case / "manifest.json"
    told = json.loads(manifest.read_text())
    for entry in told["series"]["taken"].values():
        entry["of"] = "another"
    manifest.write_text(json.dumps(told))
    correct(path, case, _2="", _3="T2")
    for table in (path, None):
        assert "other scans of this name" in planned(tmp_path, model, table)[0].failed
        assert "other scans of this name" in completed(tmp_path, model, table).failed[case]


def test_a_conversion_that_was_not_completed_does_not_hide_the_change(model, tmp_path, monkeypatch):
    write(tmp_path / "in", "A")
    path = tmp_path / "choice.csv"
    ((case, _),) = {case.case: case for case in planned(tmp_path, model, path)}.items()
    completed(tmp_path, model, path)
    correct(path, case, _2="T2", _3="")
    with monkeypatch.context() as patched:
        patched.setattr("crossmr.completion.case.complete_study", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in completed(tmp_path, model, path).failed[case]
    assert completed(tmp_path, model, path).completed == {case: ["t1c"]}


def test_a_series_that_a_person_names_and_that_is_no_volume_is_not_replaced(model, tmp_path):
    write(tmp_path / "in", "A", [*SERIES[:2], ("t1n", "AX T1 SUB")])
    for image in sorted((tmp_path / "in" / "A" / "3").iterdir())[5:7]:
        image.unlink()
    path = tmp_path / "choice.csv"
    (case,) = planned(tmp_path, model, path)
    assert case.synthesise == ["t1c", "t2f"]
    correct(path, case.case, _3="FLAIR")
    (case,) = planned(tmp_path, model, path)
    assert case.synthesise == ["t1c"]
    assert "series 3 may be it and was left out: its slices are" in case.not_synthesised["t2f"]


def test_doubtful_studies_come_first_with_the_reasons(model, tmp_path, capsys):
    write(tmp_path / "in", "A")
    two = [("t1n", "T1"), ("t2w", "T2"), ("t1n", "T1 later"), ("?", "FLAIR")]
    write(tmp_path / "in", "Z", two)
    path = tmp_path / "choice.csv"
    cases = [case.case for case in planned(tmp_path, model, path)]
    rows = rows_of(path)
    doubtful = rows[0]["case"]
    assert [row["case"] for row in rows] == [doubtful] * 4 + [next(c for c in cases if c != doubtful)] * 4
    doubts = [row["doubt"] for row in rows]
    assert doubts[0].startswith("series 1, series 3 are T1, and no tag says which was acquired with contrast agent")
    assert doubts[2].startswith("may be T1ce, which is missing, and is a second T1 beside series 1")
    assert doubts[3] == "no tag tells it, its description alone does"
    assert doubts[4:] == ["", "", "series 2 could be t2w, too", ""]
    assert "--map" not in path.read_text(encoding="utf-8-sig")
    assert "8 series of 2 studies, 1 in doubt." in capsys.readouterr().out
    correct(path, doubtful, _3="unused")  # settles whether it is T1ce
    by_case = {case.case: case for case in planned(tmp_path, model, path)}
    assert by_case[doubtful].synthesise == ["t1c"]


def test_new_studies_are_added_to_a_table_and_said(model, tmp_path, capsys):
    write(tmp_path / "in", "A")
    path = tmp_path / "choice.csv"
    (case,) = planned(tmp_path, model, path)
    correct(path, case.case, _4="")
    write(tmp_path / "in", "B")
    capsys.readouterr()
    cases = planned(tmp_path, model, path)
    said = capsys.readouterr().out
    assert "choice.csv has no line of 1 study, which goes as recognised" in said
    assert f"{path}: 4 series added, 0 studies in doubt." in said
    assert {case.case: len(case.synthesise) for case in cases} == {
        one.case: 2 if one.case == case.case else 1 for one in cases
    }
    assert len(rows_of(path)) == 8
    assert rows_of(path)[3]["contrast"] == ""


def test_parts_of_a_cohort_share_a_table(model, tmp_path, capsys):
    write(tmp_path / "in", "AB")
    path = tmp_path / "choice.csv"
    one, other = (case.case for case in planned(tmp_path, model, path))
    correct(path, one, _2="T2", _3="")
    capsys.readouterr()
    for number in (1, 2):
        completed(tmp_path, model, path, part=Part(number, 2))
    assert "no study has" not in capsys.readouterr().out
    assert [taken_of(tmp_path / "out", case)["t2w"] for case in (one, other)] == [2, 3]
    correct(path, other, _2="T2", _3="")
    for number in (1, 2):  # which is another run
        completed(tmp_path, model, path, part=Part(number, 2))
    assert [taken_of(tmp_path / "out", case)["t2w"] for case in (one, other)] == [2, 2]


def test_parts_that_begin_a_table_at_once_both_have_their_studies_in_it(model, tmp_path, monkeypatch, capsys):
    """Each finds no table before it searches; the other has written it when it comes to write."""
    write(tmp_path / "in", "AB")
    path, write_now = tmp_path / "both.csv", choice.write_series_table

    def late(*given):
        monkeypatch.setattr(choice, "write_series_table", write_now)
        planned(tmp_path, model, path, part=Part(2, 2))
        return write_now(*given)

    monkeypatch.setattr(choice, "write_series_table", late)
    planned(tmp_path, model, path, part=Part(1, 2))
    assert len({row["case"] for row in rows_of(path)}) == 2
    assert len(rows_of(path)) == 8
    said = capsys.readouterr().out
    assert f"{path}: 4 series of 1 study, 0 in doubt." in said
    assert f"{path}: 4 series added, 0 studies in doubt." in said


def test_a_model_of_other_contrasts_has_these_in_its_table(tmp_path):
    own = read_model(save_untrained(tmp_path / "model", sources=("t1n", "swi"), targets=("t2w",)))
    write(tmp_path / "in", "A", [SERIES[0], ("?", "SWI")])
    path = tmp_path / "choice.csv"
    (case,) = planned(tmp_path, own, path)
    correct(path, case.case, _2="swi")
    assert planned(tmp_path, own, path)[0].synthesise == ["t2w"]


def test_a_table_is_for_dicom(model, tmp_path):
    write_study(tmp_path / "in", "P1", ("t1n", "t2w"))
    path = tmp_path / "choice.csv"
    with pytest.raises(ConfigError, match="is for DICOM, and these are files of NIfTI; use --map for them"):
        planned(tmp_path, model, path)
    assert not path.exists()
    path.write_text("study,series,contrast\n")
    with pytest.raises(ConfigError, match="is for DICOM"):
        completed(tmp_path, model, path)


def test_inputs_keep_what_a_person_chose_of_one_study(tmp_path):
    write(tmp_path / "in")
    path = tmp_path / "t.csv"
    inputs = find_inputs([tmp_path / "in"])
    path.write_text(f"study,series,contrast\n{next(iter(inputs.series.values()))[0].study},nothing,t1n\n")
    chosen = as_chosen(inputs, read_series_table(path), Display(quiet=True))
    one, other = inputs.cases
    assert chosen.listed == chosen.only(one).listed == {one}
    assert chosen.only(other).listed == frozenset()
    assert replace(chosen, listed=frozenset()).chosen_since({"series": {"taken": {}}}, one) == []


def test_descriptions_are_counted_by_contrast():
    first = PlannedCase("A", described={"t1n": ["AX T1"], "": ["LOC", "LOC", "DWI"], "t2f": [""]})
    cases = [first, replace(first, case="B", described={"t1n": ["AX T1"], "": ["LOC"]}), PlannedCase("C")]
    assert by_description(cases) == [
        "t1n ← 'AX T1' in 2 studies",
        "t2f ← no description in 1 study; none in 1 study",
        "not used: 'LOC' in 2 studies, 'DWI' in 1",
    ]
    many = [PlannedCase(str(k), described={"t1n": [f"T1 {k:02d}"]}) for k in range(12)]
    (line,) = by_description(many)
    assert line.startswith("t1n ← 'T1 00' in 1 study, 'T1 01' in 1")
    assert line.endswith(f"'T1 07' in 1, and {12 - choice.DESCRIPTIONS} other descriptions")
    assert by_description([PlannedCase("C")]) == []


# The command line


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    return int(stopped.value.code or 0)


def test_the_command_line_writes_a_table_and_takes_it_back(tmp_path, capsys):
    write(tmp_path / "in", "A")
    save_untrained(tmp_path / "model")
    path, given = tmp_path / "choice.csv", ("complete", tmp_path / "in", "-o", tmp_path / "out")
    given += ("--model", tmp_path / "model", "--ddim-steps", "2", "--device", "cpu", "--precision", "float32")
    assert run(*given, "--series-table", path) == 1
    assert "choice.csv cannot be read: No such file or directory. --dry-run writes it" in capsys.readouterr().err
    assert run(*given, "--series-table", path, "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    assert "AX T2" not in captured.out  # which may be kept, and shared
    assert "t2w ← 'AX T2 again' in 1 study\nt2f ← 'AX FLAIR' in 1 study\nnot used: 'AX T2' in 1 study" in captured.err
    assert f"nothing but {path} was written" in captured.err
    (case,) = {row["case"] for row in rows_of(path)}
    correct(path, case, _2="t5")
    assert run(*given, "--series-table", path) == 1
    assert "choice.csv, line 3, column contrast: 't5' is not a modality" in capsys.readouterr().err
    correct(path, case, _2="T2")
    assert run(*given, "--series-table", path, "--dry-run") == 1
    assert "line 4, column contrast: t2w of this study is on line 3 already" in capsys.readouterr().err
    correct(path, case, _3="")
    assert run(*given, "--series-table", path) == 0
    assert f"{case}: series 2 is t2w (chosen by a person)" in capsys.readouterr().out
    assert run("convert", tmp_path / "in", "-o", tmp_path / "converted", "--series-table", path) == 0
    assert f"{case}: series 2 is t2w (chosen by a person)" in capsys.readouterr().out


def test_a_file_that_is_no_such_table_is_left_alone(tmp_path, capsys):
    write(tmp_path / "in", "A")
    save_untrained(tmp_path / "model")
    path = tmp_path / "patients.csv"
    path.write_text("case,patient\nA,B\n")
    given = ("complete", tmp_path / "in", "-o", tmp_path / "out", "--model", tmp_path / "model", "--dry-run")
    assert run(*given, "--series-table", path) == 1
    assert "line 1: its columns are case, patient; expected study, series, contrast" in capsys.readouterr().err
    assert path.read_text() == "case,patient\nA,B\n"
