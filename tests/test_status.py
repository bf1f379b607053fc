"""status.csv: one line for each case, right after every run, and never another's file."""

import csv
import json
import shutil

import pytest
from conftest import write_images

from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.status import COLUMNS, NAME, is_status, line_of, write_lines, write_status
from crossmr.errors import OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_completion
from crossmr.output.viewer import view_case
from crossmr.parts import Part

SETTINGS = InferenceSettings(ddim_steps=1, precision="float32")


def table(out):
    """Case → its line."""
    with (out / NAME).open(newline="") as file:
        return {line["case"]: line for line in csv.DictReader(file)}


def test_every_case_has_a_line(completed):
    out, summary = completed
    lines = table(out)
    assert [*lines] == ["Ann", "Bob", "Cem", "Dan", "Eve"]
    assert {case: line["verdict"] for case, line in lines.items()} == summary.verdicts
    assert lines["Ann"]["filled"] == "T1ce from T1 + T2; FLAIR from T1 + T2"
    assert lines["Ann"]["contrasts"] == "T1ce use; FLAIR use"
    assert (lines["Cem"]["filled"], lines["Cem"]["contrasts"]) == ("", "")
    assert "the model needs t1n, t2w, and t2w is missing" in lines["Cem"]["reasons"]
    assert (lines["Dan"]["verdict"], lines["Dan"]["filled"]) == ("refuse", "")
    assert "t2w is 24×28×22" in lines["Dan"]["reasons"]
    assert float(lines["Ann"]["seconds"]) == json.loads((out / "Ann" / "manifest.json").read_text())["seconds"]


def test_the_same_command_and_another_cohort_keep_it_right(small, model, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    complete_cohort(small, out, model, SETTINGS)
    before = (out / NAME).read_bytes()
    complete_cohort(small, out, model, SETTINGS)
    assert (out / NAME).read_bytes() == before
    write_images(other, "Zoe", ("t1n", "t2w"), seed=9)
    complete_cohort(other, out, model, SETTINGS)
    assert [*table(out)] == ["Ann", "Zoe"]
    shutil.rmtree(out / "Ann")
    complete_cohort(other, out, model, SETTINGS)
    assert [*table(out)] == ["Zoe"]


def test_a_run_that_was_stopped_has_a_line_for_each_finished_case(small, model, tmp_path, monkeypatch):
    write_images(small, "Zoe", ("t1n", "t2w"), seed=9)
    made = []

    def stop(*given):
        if made:
            raise KeyboardInterrupt
        made.append(usual(*given))
        return made[-1]

    from crossmr.completion import case

    usual = case.complete_study
    monkeypatch.setattr(case, "complete_study", stop)
    with pytest.raises(KeyboardInterrupt):
        complete_cohort(small, tmp_path / "out", model, SETTINGS)
    assert [*table(tmp_path / "out")] == ["Ann"]


def test_a_manifest_from_before_there_were_verdicts_is_to_be_looked_at(small, model, tmp_path):
    complete_cohort(small, tmp_path / "out", model, SETTINGS)
    path = tmp_path / "out" / "Ann" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("verdict", "reasons", "refused"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    summary = complete_cohort(small, tmp_path / "out", model, SETTINGS)
    assert summary.verdicts == {"Ann": "look"}
    assert "before there were verdicts" in table(tmp_path / "out")["Ann"]["reasons"]


@pytest.mark.parametrize("profile", ["labelled", "bids"])
def test_another_s_table_of_that_name_is_not_replaced(small, model, tmp_path, profile):
    records = tmp_path / "out" / ("crossmr" if profile == "bids" else "")
    records.mkdir(parents=True)
    (records / NAME).write_text("case,status\n1,done\n")
    with pytest.raises(OutputError, match=r"status\.csv is not crossmr's, so it is not replaced"):
        complete_cohort(small, tmp_path / "out", model, SETTINGS, CohortSettings(profile=profile))
    assert (records / NAME).read_text() == "case,status\n1,done\n"
    assert not (tmp_path / "out" / "Ann").exists()


def test_the_verdict_on_each_contrast_stands_beside_the_worst_of_the_case(tmp_path):
    """What was refused of a case says nothing against what was synthesised of it."""
    synthetic = {"t1n": {"from": ["t2f"], "verdict": "use"}, "t2f": {"from": ["t2f"], "verdict": "look"}}
    manifest = {"case": "Ann", "verdict": "refuse", "reasons": [], "synthetic": synthetic, "refused": ["t2w"]}
    write_lines(tmp_path, {"Ann": line_of({**manifest, "seconds": 1.0})}, {"Bob": "it is damaged"})
    lines = table(tmp_path)
    assert (lines["Ann"]["verdict"], lines["Ann"]["contrasts"]) == ("refuse", "T1 use; FLAIR look; T2 refuse")
    assert (lines["Bob"]["verdict"], lines["Bob"]["contrasts"], lines["Bob"]["reasons"]) == (
        "refuse",
        "",
        "it is damaged",
    )


def test_a_table_of_an_earlier_version_is_known(tmp_path):
    for head, known in (("case,verdict,reasons,filled,seconds", True), ("case,verdict,reasons,filled", False)):
        (tmp_path / NAME).write_text(f"{head}\r\nP1,use,,,\r\n", newline="")
        assert is_status(tmp_path / NAME) is known


def test_words_of_any_kind_are_one_cell(tmp_path):
    reason = 'its name, "T1, or\nT2", says nothing;\udcff'
    write_status(tmp_path, {"P,1": reason})
    assert is_status(tmp_path / NAME)
    assert table(tmp_path)["P,1"]["reasons"] == reason.replace("\udcff", "?")
    assert tuple(table(tmp_path)["P,1"]) == COLUMNS


def test_another_output_in_this_one_is_no_case_of_it(small, cohort, model, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out / "site", model, SETTINGS)
    for options in (CohortSettings(), CohortSettings(share=True), CohortSettings(part=Part(1, 1))):
        assert not complete_cohort(cohort / "Bob", out, model, SETTINGS, options).failed
        assert [*table(out)] == ["Bob"]
        assert "Bob" in report_completion(out).read_text()
    with pytest.raises(OutputError, match="is not crossmr's"):
        view_case(out, "site")
