"""Many processes, one cohort, one OUT: every study is done, none twice, and the results are those of one process."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import dicoms
import pytest
from conftest import Listener, save_untrained, write_images

from crossmr.completion import case as cases
from crossmr.completion import turns, work
from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.layout import Layout
from crossmr.completion.work import find_run, read_progress
from crossmr.errors import OutputError, StudyError
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_completion
from crossmr.parts import Part

SETTINGS = InferenceSettings(ddim_steps=1, precision="float32", device="cpu")
NAMES = ("Ann", "Bob", "Cem", "Dan", "Eve")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    for module in (work, turns):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def part(number, of, **options):
    return CohortSettings(part=Part(number, of), **options)


def volumes(out):
    return {path.name: path.read_bytes() for path in out.rglob("*.nii.gz")}


def manifests(out):
    """What the manifests say, but for when and how fast."""
    found = {}
    for path in out.rglob("manifest.json"):
        said = json.loads(path.read_text())
        found[str(path.relative_to(out))] = {k: v for k, v in said.items() if k not in ("created", "seconds")}
    return found


def test_parts_make_what_one_process_makes_and_the_last_one_sums_up(cohort, completed, model, tmp_path):
    out, settings = tmp_path / "out", InferenceSettings(ddim_steps=3, precision="float32")
    first = complete_cohort(cohort, out, model, settings, part(2, 2))
    assert [*first.verdicts] == ["Bob", "Dan"]
    assert json.loads((out / "manifest.json").read_text())["finished"] is False
    assert not (out / "status.csv").exists()
    progress = read_progress(out)
    assert (progress.studies, progress.done, progress.left, [*progress.failed]) == (5, 1, 3, ["Dan"])
    assert "t2w is 24×28×22" in progress.failed["Dan"]
    second = complete_cohort(cohort, out, model, settings, part(1, 2))
    assert [*second.verdicts] == ["Ann", "Cem", "Eve"]
    assert volumes(out) == volumes(completed[0])
    assert manifests(out) == manifests(completed[0])
    assert {path.name for path in out.iterdir()} == {path.name for path in completed[0].iterdir()}
    with (out / "status.csv").open() as file:
        assert [line["case"] for line in csv.DictReader(file)] == [*NAMES]
    assert read_progress(out).lines()[0].startswith("5 studies: 4 done, 0 running, 1 failed, 0 left")


COMPLETE = (
    "import sys; from pathlib import Path\n"
    "from crossmr.completion import case, turns, work\n"
    "from crossmr.completion.cohort import CohortSettings, complete_cohort\n"
    "from crossmr.networks.inference import InferenceSettings\n"
    "from crossmr.parts import Part\n"
    "turns.POLL_SECONDS = work.POLL_SECONDS = 0.02\n"
    "cohort, out, model, log, stop = sys.argv[1:]\n"
    "usual = case.complete_study\n"
    "def noted(study, *given):\n"
    "    with open(log, 'a') as file: file.write(study.case + '\\n')\n"
    "    if study.case == stop:\n"
    "        import time; print('at it', flush=True); time.sleep(60)\n"
    "    return usual(study, *given)\n"
    "case.complete_study = noted\n"
    "settings = InferenceSettings(ddim_steps=1, precision='float32', device='cpu')\n"
    "complete_cohort(cohort, out, model, settings, CohortSettings(part=Part(1, 1)))\n"
)


def start(cohort, out, model, log, stop=""):
    command = [sys.executable, "-c", COMPLETE, cohort, out, model, log, stop]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_processes_share_a_cohort_and_one_is_killed(model_folder, model, tmp_path):
    cohort, out, log = tmp_path / "cohort", tmp_path / "out", tmp_path / "log"
    for number in range(8):
        write_images(cohort, f"P{number}", ("t1n", "t2w"), seed=number)
    doomed = start(cohort, out, model_folder, log, stop="P0")
    assert doomed.stdout.readline() == "at it\n"  # P0 is its, and P1 it has read ahead
    others = [start(cohort, out, model_folder, log) for _ in range(3)]
    time.sleep(0.5)
    doomed.kill()
    doomed.communicate()
    for process in others:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sorted(log.read_text().split()) == [
        "P0",
        *(f"P{k}" for k in range(8)),
    ]  # P0 was begun twice
    assert json.loads((out / "manifest.json").read_text())["finished"] is True
    assert not (out / ".crossmr").exists()
    complete_cohort(cohort, tmp_path / "alone", model, SETTINGS)
    assert volumes(out) == volumes(tmp_path / "alone")


def test_a_case_that_its_processes_die_with_fails_until_it_is_tried_again(model, small, tmp_path):
    out = tmp_path / "out"
    layout = Layout(out)
    complete_cohort(small, out, model, SETTINGS, part(2, 2))  # of one study: nothing, but the run has begun
    for attempt in range(work.ATTEMPTS):
        dead = {"host": "node3", "where": "elsewhere", "process": 1, "born": "1"}
        claim = layout.records / ".crossmr" / "claims" / f"Ann.{attempt}"
        claim.parent.mkdir(exist_ok=True)
        claim.write_text(json.dumps(dead))
        os.utime(claim, (0, 0))
    summary = complete_cohort(small, out, model, SETTINGS, part(1, 1))
    assert "3 processes died with it, perhaps of too little memory" in summary.failed["Ann"]
    assert json.loads((out / "manifest.json").read_text())["failed"] == summary.failed


def test_what_failed_is_tried_again_only_if_asked_while_the_run_lasts(model, cohort, tmp_path, monkeypatch):
    out, tried = tmp_path / "out", []
    usual = cases.complete_study

    def fail(study, *given):
        tried.append(study.case)
        if len(tried) == 1:
            raise StudyError(f"{cohort / 'Ann' / 'Ann-t1n.nii.gz'}: nobody knows")
        return usual(study, *given)

    monkeypatch.setattr(cases, "complete_study", fail)
    assert [*complete_cohort(cohort, out, model, SETTINGS, part(1, 3)).failed] == ["Ann", "Dan"]
    assert read_progress(out).failed["Ann"] == "Ann-t1n.nii.gz: nobody knows"  # without its folder
    again = complete_cohort(cohort, out, model, SETTINGS, part(1, 3))
    assert (tried, again.failed["Ann"]) == (["Ann"], "Ann-t1n.nii.gz: nobody knows")
    once_more = complete_cohort(cohort, out, model, SETTINGS, part(1, 3, retry_failed=True))
    assert (tried, [*once_more.failed]) == (["Ann", "Ann"], ["Dan"])
    assert [*read_progress(out).failed] == ["Dan"]


def test_a_new_run_lists_the_studies_anew(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS, part(1, 1))
    write_images(small, "Bob", ("t1n", "t2w"), seed=9)
    assert [*complete_cohort(small, out, model, SETTINGS, part(1, 1)).completed] == ["Bob"]
    complete_cohort(small, out, model, SETTINGS, part(1, 2))
    write_images(small, "Cem", ("t1n", "t2w"), seed=8)
    assert complete_cohort(small, out, model, SETTINGS, part(2, 2)).skipped == ["Bob"]  # the list is the run's


def test_overwriting_does_each_case_once_in_a_run(model, cohort, tmp_path):
    out = tmp_path / "out"
    complete_cohort(cohort, out, model, SETTINGS)
    before = {case: (out / case / "manifest.json").stat().st_mtime_ns for case in ("Ann", "Bob")}
    first = complete_cohort(cohort, out, model, SETTINGS, part(1, 2, overwrite=True))
    assert [*first.completed] == ["Ann"]
    same = complete_cohort(cohort, out, model, SETTINGS, part(1, 2, overwrite=True))
    assert (same.completed, same.skipped) == ({}, ["Ann", "Cem", "Eve"])
    assert [*complete_cohort(cohort, out, model, SETTINGS, part(2, 2, overwrite=True)).completed] == ["Bob"]
    assert all((out / case / "manifest.json").stat().st_mtime_ns > then for case, then in before.items())


def test_nobody_joins_with_another_cohort_or_other_options(model_folder, model, small, cohort, tmp_path):
    out = tmp_path / "out"
    busy = start(small, out, model_folder, tmp_path / "log", stop="Ann")
    assert busy.stdout.readline() == "at it\n"
    other, again = replace(SETTINGS, targets="t2f"), {"profile": "labelled", "overwrite": True}
    for given, settings, options in ((cohort, SETTINGS, {}), (small, SETTINGS, again), (small, other, {})):
        with pytest.raises(OutputError, match=r"by other processes of crossmr \(process .* or other options"):
            complete_cohort(given, out, model, settings, part(1, 2, **options))
    with pytest.raises(OutputError, match="being written to by another crossmr"):
        complete_cohort(small, out, model, SETTINGS)
    (running,) = read_progress(out).running
    assert (running.item, running.process) == ("Ann", busy.pid)
    busy.send_signal(signal.SIGKILL)
    busy.communicate()
    assert "Ann: its process" in "\n".join(read_progress(out).lines())
    assert complete_cohort(cohort, out, model, SETTINGS, part(1, 1)).completed.keys() == {"Ann", "Bob"}


def test_parts_with_another_model_or_other_settings_make_no_run_together(model, cohort, tmp_path):
    """The manifest of a run states one model and one set of settings; the device may be another on each machine."""
    other = save_untrained(tmp_path / "model", seed=1)
    for number, (using, settings) in enumerate(
        ((model, SETTINGS), (other, SETTINGS), (model, replace(SETTINGS, seed=1)))
    ):
        out = tmp_path / str(number)
        complete_cohort(cohort, out, model, replace(SETTINGS, device="auto"), part(1, 2))
        complete_cohort(cohort, out, using, settings, part(2, 2))
        assert json.loads((out / "manifest.json").read_text())["finished"] is (number == 0)


def test_the_manifest_of_a_run_states_its_own_settings_not_those_of_what_it_skipped(model, tmp_path):
    for seed, name in enumerate(("Zoe", "Ann")):
        write_images(tmp_path / "cohort", name, ("t1n", "t2w"), seed=seed)
        complete_cohort(tmp_path / "cohort", tmp_path / "out", model, replace(SETTINGS, seed=seed), part(1, 1))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["skipped"], manifest["settings"]["seed"]) == (["Zoe"], 1)


def test_an_output_of_one_process_says_how_far_it_is(model, cohort, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    usual = cases.complete_study
    monkeypatch.setattr(cases, "complete_study", lambda *given: (seen.append(read_progress(out)), usual(*given))[1])
    complete_cohort(cohort, out, model, SETTINGS)
    assert [(progress.studies, progress.done) for progress in seen] == [(5, 0), (5, 1), (5, 2), (5, 3)]
    assert seen[0].running[0].item == "Ann"
    assert find_run(out) is None
    assert (read_progress(out).finished, read_progress(out).done) == (True, 4)
    with pytest.raises(OutputError, match="is not an output of 'crossmr complete'"):
        read_progress(tmp_path)


@pytest.mark.parametrize("profile", ["challenge", "bids", "labelled"])
def test_every_profile_is_shared(profile, model, cohort, tmp_path):
    for number in (1, 2, 3):
        complete_cohort(cohort, tmp_path / "out", model, SETTINGS, part(number, 3, profile=profile))
    alone = complete_cohort(cohort, tmp_path / "alone", model, SETTINGS, CohortSettings(profile=profile))
    manifest = json.loads((Layout(tmp_path / "out", profile).records / "manifest.json").read_text())
    assert [*manifest["failed"]] == sorted(alone.failed)
    assert len(manifest["failed"]) == (5 if profile == "challenge" else 1)  # which takes BraTS' grid only
    assert volumes(tmp_path / "out") == volumes(tmp_path / "alone")


def test_names_that_bids_cannot_tell_apart_fail_in_every_part(model, tmp_path):
    for name in ("P_1", "P-1", "Q"):
        write_images(tmp_path / "cohort", name, ("t1n", "t2w"))
    for number in (1, 2):
        complete_cohort(tmp_path / "cohort", tmp_path / "out", model, SETTINGS, part(number, 2, profile="bids"))
    manifest = json.loads((tmp_path / "out" / "crossmr" / "manifest.json").read_text())
    assert (sorted(manifest["failed"]), [*manifest["completed"]]) == (["P-1", "P_1"], ["Q"])


def test_a_run_in_the_middle_has_a_report(model, cohort, tmp_path):
    from crossmr.cli import report

    out = tmp_path / "out"
    complete_cohort(cohort, out, model, SETTINGS, part(1, 2))
    report(out)
    page = (out / "report.html").read_text()
    assert "This run is not finished: 2 studies are left." in page
    assert 'data-case="Ann"' in page
    assert find_run(out) is not None
    complete_cohort(cohort, out, model, SETTINGS, part(2, 2))
    report(out)
    assert "not finished" not in (out / "report.html").read_text()


def test_a_damaged_list_says_what_to_do(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS, part(1, 2))
    (out / ".crossmr" / "studies.jsonl").write_text('{"root": "x"}\n{"case"')
    with pytest.raises(OutputError, match=r"studies\.jsonl cannot be read .* Delete it"):
        complete_cohort(small, out, model, SETTINGS, part(1, 2))
    (out / ".crossmr" / "studies.jsonl").unlink()
    assert complete_cohort(small, out, model, SETTINGS, part(1, 1)).skipped == ["Ann"]


def test_stopping_gives_back_what_was_claimed(model, cohort, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "complete_study", stop)
    with pytest.raises(KeyboardInterrupt):
        complete_cohort(cohort, tmp_path / "out", model, SETTINGS, part(1, 1))
    assert not (tmp_path / "out" / ".crossmr" / "claims").exists()
    assert read_progress(tmp_path / "out").lines()[-1].startswith("Nobody works on it")


def test_a_case_that_another_process_took_over_is_not_written(model, small, tmp_path, monkeypatch):
    out, listener = tmp_path / "out", Listener()
    usual = cases.complete_study

    def hang(study, *given):
        made = usual(study, *given)
        (out / ".crossmr" / "claims" / "Ann.1").write_text("{}")  # as who takes this process for dead does
        monkeypatch.setattr(cases, "complete_study", usual)
        os.utime(out / ".crossmr" / "claims" / "Ann.1", (0, 0))  # and then dies
        return made

    monkeypatch.setattr(cases, "complete_study", hang)
    summary = complete_cohort(small, out, model, SETTINGS, part(1, 1), display=listener)
    assert any("Ann: another process has taken it over" in line for line in listener.said)
    assert ([*summary.completed], summary.failed) == (["Ann"], {})


def test_the_pages_of_a_report(model, cohort, tmp_path, monkeypatch):
    from crossmr.output import report

    monkeypatch.setattr(report, "CASES_PER_PAGE", 2)
    out = tmp_path / "out"
    complete_cohort(cohort, out, model, SETTINGS)
    first = report_completion(out).read_text()
    second = (out / "report" / "2.html").read_text()
    assert 'id="Ann"' in first
    assert 'id="Cem"' not in first
    assert 'href="report/2.html#Cem"' in first
    assert '<a href="../report.html">Ann … Bob</a>' in second
    assert 'id="Cem"' in second
    assert "<b>4</b>" not in second
    monkeypatch.setattr(report, "CASES_PER_PAGE", 200)
    report_completion(out)
    with contextlib.suppress(FileNotFoundError):
        assert os.listdir(out / "report") == []


def test_parts_of_dicom_share_its_folders(model, tmp_path):
    for number in range(3):
        dicoms.write(tmp_path / "in" / f"p{number}", ("t1n", "t2w"), patient=f"MRN-{number}")
    dicoms.write(tmp_path / "in" / "o", ("t1n",), patient="MRN-0")  # who lies in a folder of each part
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, part(1, 2))
    assert read_progress(tmp_path / "out").studies == 2
    complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, part(2, 2))
    shutil.rmtree(tmp_path / "in" / "o")
    alone = complete_cohort(tmp_path / "in", tmp_path / "alone", model, SETTINGS)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    ((failed, why),) = manifest["failed"].items()
    assert manifest["completed"] == {case: made for case, made in alone.completed.items() if case != failed}
    assert "its patient lies in several folders" in why
    assert str(tmp_path) not in why
    shutil.rmtree(tmp_path / "alone" / failed)
    shutil.rmtree(tmp_path / "alone" / "scans" / failed)
    shutil.rmtree(tmp_path / "out" / "scans" / failed)
    assert volumes(tmp_path / "out") == volumes(tmp_path / "alone")
    assert len([*(tmp_path / "out").glob("*/*_dicom")]) == 4


def test_calls_that_share_an_output_sum_it_up_together(model, cohort, tmp_path, monkeypatch):
    """The second one begins while the first one ends, so that it finds its run over."""
    out, usual = tmp_path / "out", cases.complete_study
    share = CohortSettings(share=True)

    def others_come_and_go(study, *given):
        monkeypatch.setattr(cases, "complete_study", usual)
        complete_cohort(cohort / "Bob", out, model, SETTINGS, share)  # sums up, as far as it goes
        shutil.rmtree(out / ".crossmr")  # as if it had not seen the first one
        return usual(study, *given)

    monkeypatch.setattr(cases, "complete_study", others_come_and_go)
    first = complete_cohort([cohort / "Ann", cohort / "Dan"], out, model, SETTINGS, share)
    assert ([*first.completed], [*first.failed]) == (["Ann"], ["Dan"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["finished"], sorted(manifest["verdicts"])) == (True, ["Ann", "Bob", "Dan"])
    with (out / "status.csv").open() as file:
        assert [line["case"] for line in csv.DictReader(file)] == ["Ann", "Bob", "Dan"]
    assert not (out / ".crossmr").exists()
    again = complete_cohort(cohort / "Eve", out, model, SETTINGS, share)
    assert again.complete == ["Eve"]
    assert sorted(json.loads((out / "manifest.json").read_text())["verdicts"]) == ["Ann", "Bob", "Dan", "Eve"]


def test_a_part_of_dicom_sees_what_lies_beside_it(model, tmp_path):
    """As without parts: what may be the missing contrast and is not read keeps it unfilled."""
    for number in range(2):
        dicoms.write(tmp_path / "in" / f"p{number}", ("t1n", "t2w"), patient=f"MRN-{number}")
    (tmp_path / "in" / "p0" / "FLAIR.nii.gz.part").write_bytes(b"half a download")
    alone = complete_cohort(tmp_path / "in", tmp_path / "alone", model, SETTINGS)
    for number in (1, 2):
        complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS, part(number, 2))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["unread"] == alone.unread
    assert [*alone.unread.values()] == [{"t2f": ["a file beside the DICOM"]}]
    assert manifest["completed"] == alone.completed
