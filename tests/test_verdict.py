"""The verdict on a study: what is refused, what is to be looked at, who hears of it, and how it is overruled."""

import json
import sys

import numpy as np
import pytest
from conftest import image, make_head, save_untrained, write_study

from crossmr.cli import main
from crossmr.completion.checks import Finding
from crossmr.completion.cohort import complete_cohort
from crossmr.completion.study import complete
from crossmr.completion.unread import Unread, reasons
from crossmr.completion.verdict import despite, is_refusal, judge, refusals, undertrained, unlearnt, verdict_on
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.networks.trained_on import count_seen
from crossmr.output.report import report_completion

ALL = ("t1n", "t1c", "t2w", "t2f")
SETTINGS = InferenceSettings(precision="float32")
SWAPPED, MOVED = Finding("swapped", "refuse", "T1 and T2 are swapped."), Finding("moved", "look", "T2 has moved.")
NOTE, LOST = Finding("grey values", "note", "Eight bits."), Finding("lost lesion", "look", "It is gone.", ("t2f",))
SEEN = count_seen([("A", ("t1n", "t1c", "t2f"), False), ("B", ALL, True)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of any subset that has seen no T2 of a head with skull."""
    changes = {"sources": ALL, "targets": ALL, "training": {"seen": SEEN}}
    return save_untrained(tmp_path_factory.mktemp("model"), guidance="none", **changes)


@pytest.fixture(scope="module")
def any_model(folder):
    return read_model(folder)


def heads(*modalities, air=True):
    return {m: image(make_head(m, air=air)) for m in modalities}


# One word from all findings


@pytest.mark.parametrize(
    ("findings", "refused", "synthetic", "gaps", "verdict", "kinds"),
    [
        ([], {}, ["t2f"], {}, "use", []),
        ([NOTE], {}, ["t2f"], {}, "use", []),
        ([NOTE, MOVED], {}, ["t2f"], {}, "look", ["moved"]),
        ([LOST], {}, ["t2f", "t1c"], {}, "look", ["lost lesion"]),
        ([LOST], {}, ["t1c"], {}, "use", []),
        ([MOVED, SWAPPED], {"t2f": "T1 and T2 are swapped."}, [], {}, "refuse", ["refused"]),
        ([SWAPPED], {}, ["t2f"], {}, "look", ["swapped"]),  # asked for by name
        ([SWAPPED], {}, [], {}, "look", ["swapped"]),  # nothing was wanted
        ([MOVED], {"t2w": "never learnt"}, ["t2f"], {}, "refuse", ["refused", "moved"]),
        ([], {}, [], {"t2w": "not trained for"}, "look", ["not synthesised"]),
        ([], {}, ["t2f"], {"t2w": "not trained for"}, "use", []),
    ],
)
def test_a_verdict_follows_from_the_findings(findings, refused, synthetic, gaps, verdict, kinds):
    judged = judge(findings, refused, synthetic, gaps)
    assert (judged["verdict"], [reason["kind"] for reason in judged["reasons"]]) == (verdict, kinds)
    assert judged["refused"] == sorted(refused)


def test_contrasts_refused_for_one_reason_share_it():
    refused = refusals([SWAPPED, MOVED], ["t1c", "t2f"])
    assert refused["t2f"] == "T1 and T2 are swapped. To synthesise FLAIR all the same, pass --targets t2f."
    (reason,) = judge([SWAPPED], refused, [], refused)["reasons"]
    assert reason == {
        "verdict": "refuse",
        "kind": "refused",
        "contrasts": ["t1c", "t2f"],
        "text": "T1 and T2 are swapped.",
    }
    assert refusals([MOVED, NOTE], ["t1c"]) == {}


def test_one_contrast_has_a_verdict_of_its_own():
    judged = judge([LOST], {}, ["t1c", "t2f"], {})
    assert [verdict_on(m, judged["reasons"]) for m in ("t1c", "t2f")] == ["use", "look"]


def test_whatever_targets_overrules_is_known_by_its_words():
    doubt = reasons([Unread("x.nii", frozenset({"t1c"}), "has no name")], ["t1c"])["t1c"]
    assert is_refusal(doubt, "t1c")
    assert is_refusal(despite("why.", "t2w"), "t2w")
    assert not is_refusal("the model was trained for t1c, t2f only", "t2w")


# What the model has never learnt


@pytest.mark.parametrize(
    ("sources", "targets", "stripped", "severities"),
    [
        (("t1n",), ("t2w", "t2f"), False, ["refuse"]),
        (("t1n",), ("t2w", "t2f"), True, []),
        (("t1n", "t2w"), ("t2f",), False, ["look"]),
    ],
)
def test_what_was_never_learnt_of_such_heads(sources, targets, stripped, severities):
    found = unlearnt(SEEN, sources, targets, stripped=stripped)
    assert [one.severity for one in found] == severities
    assert all("T2 of a head with skull" in one.words for one in found)
    assert unlearnt({}, sources, targets, stripped=stripped) == []
    assert unlearnt({"studies": 3, "without_skull": 0}, sources, targets, stripped=stripped) == []


def test_t2_of_a_head_with_skull_is_refused_unless_it_is_asked_for(any_model):
    made = complete(heads("t1n", "t2f"), any_model, SETTINGS)
    assert list(made.images) == ["t1c"]
    assert made.manifest["verdict"] == "refuse"
    assert made.manifest["refused"] == ["t2w"]
    assert made.manifest["synthetic"]["t1c"]["verdict"] == "use"
    assert made.manifest["not_filled"]["t2w"].startswith("the model has never learnt T2 of a head with skull.")
    asked = complete(heads("t1n", "t2f"), any_model, SETTINGS, targets="T2")
    assert list(asked.images) == ["t2w"]
    assert (asked.manifest["verdict"], asked.manifest["refused"]) == ("look", [])
    assert asked.manifest["synthetic"]["t2w"]["verdict"] == "look"
    brain = complete(heads("t1n", "t2f", air=False), any_model, SETTINGS)
    assert list(brain.images) == ["t1c", "t2w"]


# What the model has learnt too little of

VALIDATION = {
    "t1c": {"correlation": 0.41, "linear_regression": 0.65},
    "t2f": {"correlation": 0.7, "linear_regression": 0.65},
}


def test_a_model_that_is_no_better_than_a_linear_regression():
    (found,) = undertrained(VALIDATION, ("t1c", "t2f"))
    assert (found.kind, found.severity, found.contrasts) == ("undertrained", "look", ("t1c",))
    assert "regression of the same sources (T1ce: correlation 0.41 against 0.65): train longer." in found.words
    assert undertrained(VALIDATION, ("t2f",)) == undertrained(None, ("t1c",)) == []
    assert len(undertrained({"t1c": {"correlation": 0.65, "linear_regression": 0.65}}, ("t1c",))) == 1


def test_a_model_whose_contrast_no_validation_patient_had():
    (found,) = undertrained({"t2f": VALIDATION["t2f"]}, ("t1c", "t2f", "t2w"))
    assert (found.kind, found.severity, found.contrasts) == ("not validated", "look", ("t1c", "t2w"))
    assert found.words.startswith("No validation patient has shown how good this model's T1ce and T2 is")
    assert [one.kind for one in undertrained({}, ("t1c",))] == ["not validated"]


def test_what_such_a_model_makes_is_to_be_looked_at(tmp_path):
    changes = {"sources": ALL, "targets": ALL, "training": {"validation": VALIDATION}}
    model = read_model(save_untrained(tmp_path / "model", guidance="none", **changes))
    manifest = complete(heads("t1n", "t2w", air=False), model, SETTINGS).manifest
    assert {m: one["verdict"] for m, one in manifest["synthetic"].items()} == {"t1c": "look", "t2f": "use"}
    assert [reason["kind"] for reason in manifest["reasons"]] == ["undertrained"]
    assert complete(heads("t1n", "t1c", "t2w", air=False), model, SETTINGS).manifest["verdict"] == "use"


# What follows from it


def twice(*modalities):
    """A study in which one image has two names."""
    return {m: np.float32(n) * make_head("t1n", air=False) for n, m in enumerate(modalities, 1)}


def test_nothing_is_made_of_scans_that_contradict_one_another(any_model):
    given = {m: image(data) for m, data in twice("t1n", "t1c").items()}
    made = complete(given, any_model, SETTINGS)
    assert made.images == {}
    assert set(made.manifest["not_filled"]) == {"t2w", "t2f"}
    assert "T1 and T1ce are the same image" in made.manifest["not_filled"]["t2f"]
    (reason,) = (r for r in made.manifest["reasons"] if r["verdict"] == "refuse")
    assert reason["contrasts"] == ["t2w", "t2f"]
    asked = complete(given, any_model, SETTINGS, targets="t2f")
    assert list(asked.images) == ["t2f"]
    assert asked.manifest["verdict"] == "look"


def crossmr(monkeypatch, *said):
    monkeypatch.setattr(sys, "argv", ["crossmr", *map(str, said)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


def test_the_exit_code_the_terminal_and_the_page_say_it(folder, tmp_path, monkeypatch, capsys):
    write_study(tmp_path / "in", "same", replace=twice("t1n", "t1c"), modalities=())
    flat = np.minimum(make_head("t2f", air=False), 100)  # cut off at the top
    write_study(tmp_path / "in", "cut", ("t1n", "t1c"), air=False, replace={"t2f": flat})
    write_study(tmp_path / "in", "fine", ("t1n", "t1c", "t2f"), air=False)
    command = ("complete", tmp_path / "in", "-o", tmp_path / "out", "--model", folder)
    assert crossmr(monkeypatch, *command) == 1
    said = capsys.readouterr().out
    for verdict, case in (("refuse", "same"), ("look", "cut")):
        assert f"verdict {verdict}: {case}; status.csv has the reasons" in said
    assert "verdict use: 1 study" in said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verdicts"] == {
        "cut": "look",
        "fine": "use",
        "same": "refuse",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    table = page[page.index("<h2>Verdicts") : page.index("<h2>Cases")]
    assert table.index("#same") < table.index("#cut")
    assert "#fine" not in table
    assert "T1 and T1ce are the same image" in table
    assert "use 1</span>" in table
    assert crossmr(monkeypatch, *command) == 1  # finished before, and still refused
    assert crossmr(monkeypatch, "complete", tmp_path / "in" / "cut", "-o", tmp_path / "two", "--model", folder) == 0


def test_what_was_refused_is_tried_again_when_something_has_changed(any_model, tmp_path):
    write_study(tmp_path / "in", "same", replace=twice("t1n", "t2f"), modalities=())
    out = tmp_path / "out"
    assert complete_cohort(tmp_path / "in", out, any_model, SETTINGS).verdicts == {"same": "refuse"}
    assert complete_cohort(tmp_path / "in", out, any_model, SETTINGS).skipped == ["same"]
    asked = InferenceSettings(precision="float32", targets=("t2w",))
    assert complete_cohort(tmp_path / "in", out, any_model, asked).completed == {"same": ["t2w"]}
    (out / "same" / "manifest.json").unlink()
    complete_cohort(tmp_path / "in", out, any_model, SETTINGS)
    write_study(tmp_path / "in", "same", ("t1n", "t2f"), air=False)  # the right scans
    again = complete_cohort(tmp_path / "in", out, any_model, SETTINGS)
    assert again.verdicts == {"same": "use"}
    assert again.completed == {"same": ["t1c", "t2w"]}


def test_a_page_of_a_manifest_without_a_verdict(any_model, tmp_path):
    write_study(tmp_path / "in", "fine", ("t1n", "t1c", "t2f"), air=False)
    complete_cohort(tmp_path / "in", tmp_path / "out", any_model, SETTINGS)
    path = tmp_path / "out" / "fine" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["verdict"]
    path.write_text(json.dumps(manifest))
    assert "before there were verdicts" in report_completion(tmp_path / "out").read_text()
