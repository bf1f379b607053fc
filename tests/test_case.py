"""One case: what is finished is kept, and said where its settings or files have changed."""

import json
import os
import re
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from conftest import Listener, image, make_head, tree, write_study

from crossmr.completion import layout
from crossmr.completion.case import CohortSettings
from crossmr.completion.cohort import complete_cohort, plan_cohort
from crossmr.completion.layout import PROFILES, Layout
from crossmr.completion.private import NAME, read_paths
from crossmr.completion.work import read_progress
from crossmr.display import Display
from crossmr.errors import ConfigError
from crossmr.files import remove
from crossmr.networks.inference import InferenceSettings
from crossmr.parts import Part

SHAPE = (26, 28, 22)
SETTINGS = InferenceSettings(ddim_steps=3, device="cpu", precision="float32")
AGAIN = CohortSettings(overwrite=True)


def test_a_part_is_understood_as_the_command_line_gives_it():
    assert CohortSettings(part="1/2") == CohortSettings(part=Part(1, 2))
    for wrong, said in (("3/2", "--part is 3/2"), (2, "part is 2; expected text such as '3/100'")):
        with pytest.raises(ConfigError, match=said):
            CohortSettings(part=wrong)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"guidance": "unconditional"}, {"targets": ("t1c",)}, {"ddim_steps": 4}]
)
def test_other_settings_are_noticed_and_said(model, small, tmp_path, change):
    complete_cohort(small, tmp_path / "out", model, SETTINGS)
    before = tree(tmp_path / "out" / "Ann")
    listener = Listener()
    result = complete_cohort(small, tmp_path / "out", model, replace(SETTINGS, **change), display=listener)
    assert result.skipped == ["Ann"]
    assert [line for line in listener.said if "Ann: finished before with other settings" in line]
    assert tree(tmp_path / "out" / "Ann") == before


def test_overwriting_leaves_nothing_that_the_new_manifest_does_not_name(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    complete_cohort(small, out, model, replace(SETTINGS, targets=("t1c",)), AGAIN)
    assert {path.name for path in (out / "Ann").iterdir()} == {"Ann-t1c_synthetic.nii.gz", "manifest.json"}
    # a scan that has been acquired in the meantime closes its gap
    nib.save(image(make_head("t1c", shape=SHAPE)), small / "Ann" / "Ann-t1c.nii.gz")
    complete_cohort(small, out, model, SETTINGS, AGAIN)
    assert {path.name for path in (out / "Ann").iterdir()} == {"Ann-t2f_synthetic.nii.gz", "manifest.json"}


def test_a_finished_case_is_not_taken_for_another_patient_of_its_name(model, small, tmp_path):
    out, others = tmp_path / "out", tmp_path / "others"
    complete_cohort(small, out, model, SETTINGS)
    before, known = tree(out / "Ann"), (out / NAME).read_bytes()
    for path in sorted(small.rglob("*.nii.gz")):
        place = others / path.relative_to(small)
        place.parent.mkdir(parents=True, exist_ok=True)
        old = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(old.dataobj) * 2, old.affine, old.header), place)
        os.utime(place, (0, 0))  # older than the result, as what was copied with its times is
    again = complete_cohort(others, out, model, SETTINGS)
    assert (again.skipped, [*again.completed], [*again.failed]) == ([], [], ["Ann"])
    assert "what was made of other scans of this name (t1n, t2w are not the same)" in again.failed["Ann"]
    assert "Name another folder with -o, or replace it with --overwrite." in again.failed["Ann"]
    assert (tree(out / "Ann"), (out / NAME).read_bytes()) == (before, known)
    (planned,) = plan_cohort(others, out, model, SETTINGS)
    assert (planned.outcome, planned.failed) == ("would fail", again.failed["Ann"])
    assert complete_cohort(small, out, model, SETTINGS).skipped == ["Ann"]
    assert [*complete_cohort(others, out, model, SETTINGS, AGAIN).completed] == ["Ann"]
    assert tree(out / "Ann") != before


def test_a_finished_case_whose_scans_moved_is_kept_and_where_they_lie_is_known(model, small, tmp_path):
    out, place = tmp_path / "out", tmp_path / "elsewhere"
    complete_cohort(small, out, model, SETTINGS)
    before = tree(out / "Ann")
    shutil.copytree(small, place, copy_function=shutil.copyfile)  # with other times
    shutil.rmtree(small)
    assert complete_cohort(place, out, model, SETTINGS).skipped == ["Ann"]
    assert tree(out / "Ann") == before
    paths = read_paths(out, "Ann")
    assert {path.resolve() for path in paths.values()} == {path.resolve() for path in place.rglob("*.nii.gz")}


def test_a_finished_case_with_more_or_fewer_scans_is_kept_and_said(model, small, tmp_path, capsys):
    targets = replace(SETTINGS, targets=("t1c",))
    complete_cohort(small, tmp_path / "out", model, targets)
    nib.save(image(make_head("t2f", shape=SHAPE)), small / "Ann" / "Ann-t2f.nii.gz")
    assert complete_cohort(small, tmp_path / "out", model, targets, display=Display()).skipped == ["Ann"]
    assert "Ann: finished before with more scans now (t2f), and kept; --overwrite" in capsys.readouterr().out


def test_a_case_of_which_nothing_could_be_made_is_done_when_the_scan_has_come(model, small, tmp_path):
    out, aside = tmp_path / "out", tmp_path / "Ann-t2w.nii.gz"
    (scan,) = small.rglob("Ann-t2w.nii.gz")
    shutil.move(scan, aside)
    complete_cohort(small, out, model, SETTINGS)
    assert not json.loads((out / "Ann" / "manifest.json").read_text())["synthetic"]
    assert complete_cohort(small, out, model, SETTINGS).skipped == ["Ann"]
    shutil.move(aside, scan)
    listener = Listener()
    assert [*complete_cohort(small, out, model, SETTINGS, display=listener).completed] == ["Ann"]
    assert any("done again: nothing was synthesised, with other scans" in line for line in listener.said)
    assert {*json.loads((out / "Ann" / "manifest.json").read_text())["synthetic"]} == {"t1c", "t2f"}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("what", ["image", "std", "everything"])
def test_a_case_whose_files_are_gone_is_done_again(model, small, tmp_path, monkeypatch, profile, what):
    monkeypatch.setattr(layout, "CHALLENGE_GRID", "26×28×22 at 6×6×7 mm")
    out, options, settings = tmp_path / "out", CohortSettings(profile=profile), replace(SETTINGS, samples=2)
    assert complete_cohort(small, out, model, settings, options).failed == {}
    before, place = tree(out), Layout(out, profile)
    lost = {"image": place.image("Ann", "t2f"), "std": place.std("Ann", "t2f"), "everything": out / "sub-Ann"}[what]
    lost = out if what == "everything" and profile != "bids" else lost
    if lost is None:  # BraSyn's folder has no standard deviations
        return
    remove(lost)
    known = (place.records / "manifest.json").exists()
    if known:
        progress = read_progress(out)
        assert (progress.finished, progress.done, progress.left, [*progress.gone]) == (False, 0, 1, ["Ann"])
        assert progress.lines()[-1].endswith("The same command goes on where it stopped.")
    (planned,) = plan_cohort(small, out, model, settings, options)
    assert planned.outcome == "to be synthesised"
    assert bool(re.search("Ann: finished before, and would be done again: .* gone", str(planned.lines()))) == known
    listener = Listener()
    again = complete_cohort(small, out, model, settings, options, display=listener)
    assert (again.completed, again.skipped) == ({"Ann": ["t1c", "t2f"]}, [])
    more = " and [13] more are" if what == "everything" else " is"
    said = [
        line
        for line in listener.said
        if re.match(rf"Ann: finished before, and done again: .*\.nii\.gz{more} gone", line)
    ]
    assert bool(said) == known
    assert {name: content for name, content in tree(out).items() if name.endswith(".gz")} == {
        name: content for name, content in before.items() if name.endswith(".gz")
    }
    assert complete_cohort(small, out, model, settings, options).skipped == ["Ann"]
    assert read_progress(out).finished


def test_a_case_whose_files_are_gone_keeps_what_was_made_of_other_scans(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    (out / "Ann" / "Ann-t1c_synthetic.nii.gz").unlink()
    write_study(small, "Ann", ("t1n", "t2w"), seed=9)
    before = tree(out / "Ann")
    assert "other scans of this name" in complete_cohort(small, out, model, SETTINGS).failed["Ann"]
    assert tree(out / "Ann") == before


def test_a_series_that_is_gone_is_written_again(model, tmp_path):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    dicoms.write(tmp_path / "in", ("t1n", "t2w"))
    out, settings = tmp_path / "out", replace(SETTINGS, samples=2)
    ((case, made),) = complete_cohort(tmp_path / "in", out, model, settings).completed.items()
    for kind in ("", "std"):
        remove(folder := Layout(out).dicom(case, "t2f", kind))
        (planned,) = plan_cohort(tmp_path / "in", out, model, settings)
        assert (planned.outcome, read_progress(out).gone) == ("to be synthesised", {case: [folder.name]})
        assert complete_cohort(tmp_path / "in", out, model, settings).completed == {case: made}
        assert folder.exists()


@pytest.mark.parametrize("changed", [("t1n",), ("t1n", "t2w")])
def test_what_was_refused_is_tried_again_where_some_scans_are_still_the_same(model, small, tmp_path, changed):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    path = out / "Ann" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "refused": {"t1c": "T1 seems to be another's."}}))
    for modality in changed:
        (scan,) = small.rglob(f"Ann-{modality}.nii.gz")
        old = nib.load(scan)
        nib.save(nib.Nifti1Image(np.asarray(old.dataobj) * 2, old.affine, old.header), scan)
    listener = Listener()
    again = complete_cohort(small, out, model, SETTINGS, display=listener)
    if len(changed) == 1:
        assert [*again.completed] == ["Ann"]
        assert any("done again: t1c was refused, with other scans" in line for line in listener.said)
    else:
        assert [*again.failed] == ["Ann"]


def test_a_study_called_like_a_file_of_the_output_fails_alone(model, tmp_path):
    for seed, name in enumerate(("Ann", "status.csv", "report.html")):
        write_study(tmp_path / "in", name, ("t1n", "t2w"), seed=seed)
    done = complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert [*done.completed] == ["Ann"]
    assert done.failed["status.csv"] == "status.csv: crossmr writes a file of this name into OUT. Rename the study."
    assert done.failed.keys() == {"status.csv", "report.html"}
    assert (tmp_path / "out" / "status.csv").is_file()
