"""Parts of an evaluation: kept until all are there, then the same as one process would have written."""

import json
import shutil

import pytest
from conftest import save_untrained, tree, write_study

from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.measurements import Measurements, Outcome, read_parts, write_part
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


def test_a_damaged_part_is_named(tmp_path):
    outcomes = [Outcome("A", Measurements(patients={"A": "A"})), Outcome("C", failed="why")]
    write_part(tmp_path, Part(1, 2), "key", outcomes)
    write_part(tmp_path, Part(2, 2), "key", [Outcome("B", failed="b")])
    assert [one.name for one in read_parts(tmp_path, 2, "key")] == ["A", "B", "C"]
    assert read_parts(tmp_path, 2, "other") == read_parts(tmp_path, 3, "key") == []
    (tmp_path / WORK / "2-of-2.json").write_text("{")
    with pytest.raises(OutputError, match=r"2-of-2\.json is damaged .* Delete it, and run this part again"):
        read_parts(tmp_path, 2, "key")
