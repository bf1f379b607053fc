"""Parts of an evaluation: kept until all are there, then the same as one process would have written."""

import json
import shutil

import pytest
from conftest import save_untrained, tree, write_study

from crossmr.display import LOG, SILENT
from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.measurements import Measurements, Outcome, read_parts, unlike_parts, write_part
from crossmr.networks.inference import InferenceSettings
from crossmr.parts import WORK, Part

ALL = ("t1n", "t1c", "t2w", "t2f")
INFERENCE = InferenceSettings(ddim_steps=2, precision="float32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Five studies with the truth in, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("whole")
    for number in range(5):
        write_study(folder, f"P{number}", ALL, seed=number)
    path = next((folder / "P3").glob("*t2w*"))
    path.write_bytes(b"no image")
    return folder


def part(text, **changes):
    return EvaluationSettings(inference=INFERENCE, part=text and Part.parse(text), **changes)


def test_parts_measure_what_one_process_measures(model, whole, tmp_path):
    alone = evaluate(model, whole, tmp_path / "alone", part(None))
    for text in ("2/3", "3/3"):
        body = evaluate(model, whole, tmp_path / "out", part(text))
        assert body["finished"] is False
        assert not (tmp_path / "out" / "metrics.json").exists()
    body = evaluate(model, whole, tmp_path / "out", part("1/3"))
    assert body["finished"] is True
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert [*body["failed"]] == [*alone["failed"]] == ["P3"]


def test_parts_of_other_studies_or_settings_are_not_mixed(model, whole, tmp_path):
    cohort = tmp_path / "cohort"
    shutil.copytree(whole, cohort)
    out = tmp_path / "out"
    evaluate(model, cohort, out, part("1/2"))
    write_study(cohort, "P9", ALL, seed=9)
    assert evaluate(model, cohort, out, part("2/2"))["finished"] is False
    assert evaluate(model, cohort, out, part("1/2"))["finished"] is True
    assert json.loads((out / "metrics.json").read_text())["cases"] == ["P0", "P1", "P2", "P4", "P9"]


def test_parts_of_other_models_or_scans_are_not_mixed(model, whole, tmp_path):
    """Two studies, one a part: what another model measured, or the same one of other files, is not joined with it."""
    cohort = tmp_path / "cohort"
    for case in ("P0", "P1"):
        shutil.copytree(whole / case, cohort / case)
    for name in ("first", "second"):
        save_untrained(tmp_path / name, seed=len(name))
    other = shutil.copytree(tmp_path / "first", tmp_path / "other")

    def finished(folder, text, data=cohort, out="out"):
        return evaluate(folder, data, tmp_path / out, part(text, against=other))["finished"]

    assert [finished(model, "1/2"), finished(tmp_path / "first", "2/2")] == [False, False]
    shutil.copytree(tmp_path / "second", other, dirs_exist_ok=True)
    assert [finished(model, "2/2"), finished(model, "1/2")] == [False, True]
    shutil.copytree(cohort, tmp_path / "later")
    (scan,) = (tmp_path / "later" / "P1").glob("*t2w*")
    scan.write_bytes(scan.read_bytes() + bytes(1))
    moved = [finished(model, "1/2", out="o"), finished(model, "2/2", data=tmp_path / "later", out="o")]
    assert moved == [False, False]
    assert finished(model, "1/2", data=shutil.copytree(cohort, tmp_path / "again"), out="p") is False
    assert finished(model, "2/2", out="p") is True  # the same files elsewhere


def test_a_part_that_measured_nothing_waits_for_the_others(model, whole, tmp_path):
    cohort = tmp_path / "cohort"
    write_study(cohort, "A", ("t1n", "t1c"))  # lacks a source
    shutil.copytree(whole / "P0", cohort / "P0")
    body = evaluate(model, cohort, tmp_path / "out", part("1/3"))
    assert (body["finished"], body["summary"], [*body["failed"]]) == (False, [], ["A"])
    body = evaluate(model, cohort, tmp_path / "out", part("3/3"))  # there is no third study
    assert (body["finished"], body["cases"], body["failed"]) == (False, [], {})
    body = evaluate(model, cohort, tmp_path / "out", part("2/3"))
    assert (body["finished"], body["cases"], [*body["failed"]]) == (True, ["P0"], ["A"])


def patients_of(path, *patients):
    path.write_text("\n".join(["case,patient", *(f"P{k},{who}" for k, who in enumerate(patients))]))
    return path


def test_parts_of_other_patients_are_not_mixed_whatever_their_table_is_called(model, whole, tmp_path):
    cohort = tmp_path / "cohort"
    for case in ("P0", "P1"):
        shutil.copytree(whole / case, cohort / case)
    table = patients_of(tmp_path / "patients.csv", "A", "A")
    evaluate(model, cohort, tmp_path / "out", part("1/2", patients=table))
    patients_of(table, "A", "B")
    said = []
    display = type("Lines", (type(SILENT),), {"say": lambda self, text: said.append(text)})(quiet=True)
    body = evaluate(model, cohort, tmp_path / "out", part("2/2", patients=table), display=display)
    assert body["finished"] is False
    assert said[-1].endswith("is of other patients (--patients): it is not joined with 2/2.")
    assert said[-1].startswith("Part 1/2 in ")
    moved = patients_of(tmp_path / "elsewhere.csv", "A", "B")
    body = evaluate(model, cohort, tmp_path / "out", part("1/2", patients=moved))
    assert body["finished"] is True
    assert body["patients"] == {"P0": "A", "P1": "B"}


def test_what_is_another_in_a_part_is_named(tmp_path):
    write_part(tmp_path, Part(1, 3), {"studies": "a", "--seed": "0", "models": "m"}, [])
    write_part(tmp_path, Part(2, 3), {"studies": "b", "--seed": "1", "models": "m"}, [])
    assert unlike_parts(tmp_path, 3, {"studies": "b", "--seed": "0", "models": "m"}) == {
        "1/3": ["studies"],
        "2/3": ["--seed"],
    }
    path = tmp_path / WORK / "1-of-3.json"
    path.write_text(json.dumps({"key": "a hash", "outcomes": []}))  # as earlier versions did
    assert unlike_parts(tmp_path, 3, {}) == {"1/3": ["version of crossmr"], "2/3": ["--seed", "models", "studies"]}


def test_an_earlier_evaluation_stays_until_all_parts_are_there(model, whole, tmp_path):
    out = tmp_path / "out"
    evaluate(save_untrained(tmp_path / "earlier", seed=4), whole, out, part(None))
    before = tree(out)
    evaluate(model, whole, out, part("1/2"))
    now = tree(out)
    assert {path: now[path] for path in before if path != LOG} == {p: h for p, h in before.items() if p != LOG}
    evaluate(model, whole, out, part("2/2"))
    evaluate(model, whole, tmp_path / "alone", part(None))
    now, alone = tree(out), tree(tmp_path / "alone")
    assert {p: h for p, h in now.items() if p != LOG} == {p: h for p, h in alone.items() if p != LOG}


def test_a_damaged_part_is_named(tmp_path):
    outcomes = [Outcome("A", Measurements(patients={"A": "A"})), Outcome("C", failed="why")]
    write_part(tmp_path, Part(1, 2), {"studies": "a"}, outcomes)
    write_part(tmp_path, Part(2, 2), {"studies": "a"}, [Outcome("B", failed="b")])
    assert [one.name for one in read_parts(tmp_path, 2, {"studies": "a"})] == ["A", "B", "C"]
    assert read_parts(tmp_path, 2, {"studies": "b"}) == read_parts(tmp_path, 3, {"studies": "a"}) == []
    (tmp_path / WORK / "2-of-2.json").write_text("{")
    with pytest.raises(OutputError, match=r"2-of-2\.json is damaged .* Delete it, and run this part again"):
        read_parts(tmp_path, 2, {"studies": "a"})
