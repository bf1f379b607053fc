"""Cohorts: one bad patient stops nobody, nothing is half-written, what is finished is kept, no order matters."""

import errno
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import (
    Listener,
    header_alone,
    image,
    make_head,
    save_untrained,
    sha256,
    tree,
    voxels,
    write_images,
    write_study,
)

from crossmr import files
from crossmr.completion import case as cases
from crossmr.completion import inputs, writing
from crossmr.completion.cohort import CohortSettings, CohortSummary, complete_cohort, plan_cohort
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT, complete, memory_needed
from crossmr.data.naming import find_studies
from crossmr.data.study import load_study
from crossmr.errors import NamingError, OutputError, StudyError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model

SHAPE = (26, 28, 22)
SETTINGS = InferenceSettings(ddim_steps=3, device="cpu", precision="float32")
AGAIN = CohortSettings(overwrite=True)


def test_one_bad_patient_is_reported_and_the_others_finish(completed):
    out, summary = completed
    assert summary.completed == {"Ann": ["t1c", "t2f"], "Bob": ["t2f"]}
    assert set(summary.not_filled) == {"Cem"}
    assert set(summary.not_filled["Cem"]) == {"t1c", "t2w", "t2f"}
    assert set(summary.failed) == {"Dan"}
    assert re.search("Dan.*t2w is 24×28×22.*t1n is 26×28×22", summary.failed["Dan"])
    assert summary.skipped == []
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    volumes = {"Ann/Ann-t1c_synthetic.nii.gz", "Ann/Ann-t2f_synthetic.nii.gz", "Bob/Bob-t2f_synthetic.nii.gz"}
    manifests = {"manifest.json", *(f"{case}/manifest.json" for case in ("Ann", "Bob", "Cem", "Eve"))}
    assert written == volumes | manifests | {
        "pictures/Ann.webp",
        "pictures/Bob.webp",
        "private_paths.json",
        "status.csv",
    }
    picture = json.loads((out / "Ann" / "manifest.json").read_text())["picture"]
    assert picture["file"] == "pictures/Ann.webp"
    assert [(panel["modality"], panel["kind"]) for panel in picture["panels"]] == [
        *((m, "acquired") for m in ("t1n", "t2w")),
        *((m, "synthetic") for m in ("t1c", "t2f")),
    ]


def test_the_manifest_names_the_files_that_plainer_ones_replaced(completed, small, model, tmp_path):
    shutil.copy(small / "Ann" / "Ann-t1n.nii.gz", small / "Ann" / "Ann-t1n_bet.nii.gz")
    complete_cohort(small, tmp_path / "out", model, SETTINGS)
    without, beside = (
        json.loads((out / "Ann" / "manifest.json").read_text()) for out in (completed[0], tmp_path / "out")
    )
    assert beside["passed_over"] == ["Ann-t1n_bet.nii.gz"]
    assert "passed_over" not in without


def test_what_is_returned_is_what_the_manifest_says(completed, small, model, tmp_path):
    listed = {"format": "crossmr-completion", "finished": True, "profile": "labelled"}
    out, summary = completed
    manifest = json.loads((out / "manifest.json").read_text())
    assert isinstance(summary, CohortSummary)
    assert summary.complete == ["Eve"]
    assert manifest == {**listed, **asdict(summary), "settings": manifest["settings"]}
    assert manifest["settings"] == json.loads((out / "Ann" / "manifest.json").read_text())["settings"]
    nib.save(image(make_head("t2f", shape=SHAPE), description="SYNTHETIC"), small / "Ann" / "Ann-t2f.nii.gz")
    for _ in range(2):  # first completed, then skipped
        summary = complete_cohort(small, tmp_path / "out", model, SETTINGS)
        assert summary.notes == {"Ann": ["t2f is itself synthetic, so it was not used as an input."]}
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest == {**listed, **asdict(summary), "settings": manifest["settings"]}
    assert (summary.completed, summary.skipped) == ({}, ["Ann"])


def test_manifest_tells_everything(cohort, completed, model_folder):
    out, _ = completed
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    paths = {m: cohort / "Ann" / f"Ann-{m}.nii.gz" for m in ("t1n", "t2w")}
    assert manifest["case"] == "Ann"
    assert manifest["inputs"] == {m: {"file": path.name, "sha256": sha256(path)} for m, path in paths.items()}
    assert manifest["acquired"] == ["t1n", "t2w"]
    assert set(manifest["synthetic"]) == {"t1c", "t2f"}
    for modality, entry in manifest["synthetic"].items():
        assert (out / "Ann" / entry["file"]).exists()
        assert set(entry) == {"file", "std", "from", "verdict", "warnings", "scale"}
        assert entry["std"] is None
        assert entry["from"] == ["t1n", "t2w"]
        assert DISCLAIMER in entry["warnings"]
        assert (ENHANCEMENT in entry["warnings"]) == (modality == "t1c")
    study = load_study(paths)
    for modality in paths:
        low, high = (manifest["normalisation"][modality][key] for key in ("low", "high"))
        assert (low, high) == (study.normalisation[modality].low, study.normalisation[modality].high)
    assert manifest["settings"] == {
        "model_sha256": sha256_of_model(model_folder),
        "sources": ["t1n", "t2w"],
        "targets": ["t1c", "t2f"],
        "guidance": "sample",
        "planes": 1,
        "ddim_steps": 3,
        "samples": 1,
        "reference": None,
        "seed": 0,
        "register": "never",
        "scale": "unit",
        "device": "cpu",
        "precision": "float32",
    }
    assert set(manifest["versions"]) == {"crossmr", "torch", "monai", "nibabel"}
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["intensity"]["range"] == [0, 1]
    assert manifest["seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["created"])


def sha256_of_model(folder):
    """The hash that config.json carries of itself."""
    return json.loads((folder / "config.json").read_text())["sha256"]


def test_an_unsaved_model_claims_no_hash(model_folder, cohort):
    unsaved = read_model(model_folder)
    unsaved.record = {}
    assert complete(cohort / "Ann", unsaved, SETTINGS).manifest["settings"]["model_sha256"] is None


def test_finished_cases_are_skipped_and_overwrite_redoes_them(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (out / "Ann").iterdir()}
    assert len(before) == 3
    listener = Listener()
    again = complete_cohort(small, out, model, SETTINGS, display=listener)
    assert again.skipped == ["Ann"]
    assert again.completed == {}
    assert {path: path.stat().st_mtime_ns for path in (out / "Ann").iterdir()} == before
    assert not any("other settings" in line for line in listener.said)
    first = {path: path.read_bytes() for path in before if path.suffix == ".gz"}
    redone = complete_cohort(small, out, model, SETTINGS, AGAIN)
    assert redone.completed == {"Ann": ["t1c", "t2f"]}
    assert redone.skipped == []
    assert all(path.stat().st_mtime_ns > before[path] for path in before)
    assert {path: path.read_bytes() for path in first} == first


def test_what_was_not_asked_for_then_is_made_now_and_what_goes_is_said(model, small, tmp_path):
    out, listener = tmp_path / "out", Listener()
    fluid, enhanced = (replace(SETTINGS, targets=(m,)) for m in ("t2f", "t1c"))
    assert complete_cohort(small, out, model, fluid).completed == {"Ann": ["t2f"]}
    assert complete_cohort(small, out, model, enhanced).skipped == ["Ann"]  # t2f would go
    assert complete_cohort(small, out, model, SETTINGS, display=listener).completed == {"Ann": ["t1c", "t2f"]}
    assert "Ann: finished before, and done again: t1c was not asked for then" in listener.said
    assert complete_cohort(small, out, model, fluid).skipped == ["Ann"]
    redone = complete_cohort(small, out, model, fluid, AGAIN, display=listener)
    assert redone.completed == {"Ann": ["t2f"]}
    assert "Ann: synthesised before, not made now, and deleted: t1c" in listener.said
    assert not list(out.rglob("*t1c*"))


def test_a_full_disk_ends_the_run(model, small, tmp_path, monkeypatch):
    for name in ("Bob", "Cem"):
        shutil.copytree(small / "Ann", small / name)
        for path in (small / name).iterdir():
            path.rename(path.with_name(path.name.replace("Ann", name)))
    break_writing(monkeypatch, "second volume", OSError(errno.ENOSPC, "No space left on device"))
    failed = complete_cohort(small, tmp_path / "out", model, SETTINGS).failed
    assert all("could not be written" in failed[name] for name in ("Ann", "Bob"))
    assert failed["Cem"].startswith("Cem: not tried, because nothing can be written; make room")


@pytest.mark.parametrize("failing", ["second volume", "manifest"])
@pytest.mark.parametrize("again", [False, True], ids=["first-time", "overwriting"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OutputError("disk full")])
def test_a_write_that_fails_leaves_no_volume_without_manifest(
    model, small, tmp_path, monkeypatch, failing, again, error
):
    out = tmp_path / "out"
    if again:
        complete_cohort(small, out, model, SETTINGS)
    break_writing(monkeypatch, failing, error)
    result = complete_cohort(small, out, model, SETTINGS, CohortSettings(overwrite=again))
    assert set(result.failed) == {"Ann"}
    assert re.search("could not be written: No space left|disk full", result.failed["Ann"])
    assert result.completed == {}
    assert list((out / "Ann").iterdir()) == []
    monkeypatch.undo()
    assert complete_cohort(small, out, model, SETTINGS).completed == {"Ann": ["t1c", "t2f"]}


@pytest.mark.parametrize("failing", ["second volume", "manifest"])
def test_ctrl_c_stops_the_cohort_and_leaves_no_volume_without_manifest(model, small, tmp_path, monkeypatch, failing):
    break_writing(monkeypatch, failing, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        complete_cohort(small, tmp_path / "out", model, SETTINGS)
    assert list((tmp_path / "out" / "Ann").iterdir()) == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["finished"] is False


def break_writing(monkeypatch, failing, error):
    write_volume, write_json = writing.write_volume, cases.write_json

    def volume(made, path):
        if failing == "second volume" and "t2f" in path.name:
            raise error
        write_volume(made, path)

    def manifest(path, data):
        if failing == "manifest" and path.parent.name == "Ann":
            raise error
        write_json(path, data)

    monkeypatch.setattr(writing, "write_volume", volume)
    monkeypatch.setattr(cases, "write_json", manifest)


def test_completing_in_place_adds_to_the_cohort_and_can_be_repeated(model, cohort, tmp_path):
    place = tmp_path / "cohort"
    shutil.copytree(cohort, place)
    shutil.rmtree(place / "Dan")
    acquired = tree(place)
    first = complete_cohort(place, place, model, SETTINGS)
    assert first.completed == {"Ann": ["t1c", "t2f"], "Bob": ["t2f"]}
    assert first.failed == {}
    after = tree(place)
    assert acquired.items() < after.items()  # every acquired file is as it was
    second = complete_cohort(place, place, model, SETTINGS)
    assert second.failed == {}
    assert sorted(second.skipped) == ["Ann", "Bob", "Cem", "Eve"]
    redone = complete_cohort(place, place, model, SETTINGS, AGAIN)
    assert redone.failed == {}
    assert redone.completed == first.completed
    manifest = json.loads((place / "Ann" / "manifest.json").read_text())
    assert manifest["acquired"] == ["t1n", "t2w"]
    assert set(manifest["inputs"]) == {"t1n", "t2w"}
    assert manifest["notes"] == []  # what was synthesised is known by its name
    timed = ("manifest.json", "status.csv")  # which say how many seconds it took
    assert {k: v for k, v in tree(place).items() if not k.endswith(timed)} == {
        k: v for k, v in after.items() if not k.endswith(timed)
    }


def test_an_acquired_scan_is_never_replaced(model, cohort, tmp_path):
    """A scan that has a synthetic one's name leaves t1c a gap, but is not a file to write over."""
    shutil.copytree(cohort / "Bob", tmp_path / "Bob")
    shutil.move(tmp_path / "Bob" / "Bob-t1c.nii.gz", tmp_path / "Bob" / "Bob-t1c_synthetic.nii.gz")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"Bob-t1c_synthetic\.nii\.gz is not crossmr's, so it is not replaced"):
        complete_cohort(tmp_path, tmp_path, model, SETTINGS)
    assert tree(tmp_path) == before


def test_a_damaged_manifest_may_be_anybody_s_and_stops_it(model, small, tmp_path):
    out = tmp_path / "out"
    complete_cohort(small, out, model, SETTINGS)
    (out / "Ann" / "manifest.json").write_text("{")
    for options in (CohortSettings(), AGAIN):
        with pytest.raises(OutputError, match=r"Ann/manifest\.json is not crossmr's.*Name another folder, or move it"):
            complete_cohort(small, out, model, SETTINGS, options)
    (out / "Ann" / "manifest.json").unlink()
    assert complete_cohort(small, out, model, SETTINGS).completed == {"Ann": ["t1c", "t2f"]}


def test_an_out_that_cannot_be_written_is_an_output_error(model, small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match="could not be written"):
            complete_cohort(small, out, model, SETTINGS)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        complete_cohort(small, tmp_path / "out", model, SETTINGS)


def test_mapping_and_model_folder_are_passed_on(model_folder, tmp_path):
    folder = tmp_path / "cohort" / "P"
    folder.mkdir(parents=True)
    for modality, name in {"t1n": "MPRAGE", "t2w": "TSE"}.items():
        nib.save(image(make_head(modality, shape=SHAPE)), folder / f"P_{name}.nii.gz")
    options = CohortSettings({"t1n": "*_MPRAGE*", "t2w": "*_TSE*"})
    result = complete_cohort(tmp_path / "cohort", tmp_path / "out", Path(model_folder), SETTINGS, options)
    assert result.completed == {"P": ["t1c", "t2f"]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(NamingError, match=r"no volume"):
        complete_cohort(tmp_path / "empty", tmp_path / "new", model_folder, SETTINGS)
    assert not (tmp_path / "new").exists()


def test_somebody_else_s_manifest_is_never_replaced(model, small, tmp_path):
    (tmp_path / "manifest.json").write_text('{"mine": true}')
    with pytest.raises(OutputError, match=r"manifest\.json is not crossmr's, so it is not replaced\. Name another"):
        complete_cohort(small, tmp_path, model, SETTINGS)
    assert (tmp_path / "manifest.json").read_text() == '{"mine": true}'
    assert {path.name for path in tmp_path.iterdir()} == {"small", "manifest.json"}


def test_a_study_that_lacks_nothing_is_listed_as_complete(model, small, tmp_path):
    filled = complete_cohort(small, tmp_path / "out", model, SETTINGS).completed["Ann"]
    folder = next(small.rglob("Ann-t1n.nii.gz")).parent
    for modality in {"t1n", "t1c", "t2w", "t2f"} - {p.name.split("-")[-1][:3] for p in folder.glob("*.nii.gz")}:
        shutil.copy(folder / "Ann-t1n.nii.gz", folder / f"Ann-{modality}.nii.gz")
    again = complete_cohort(small, tmp_path / "out", model, SETTINGS, AGAIN)
    assert filled
    assert again.complete == ["Ann"]
    assert again.completed == {}
    assert not list((tmp_path / "out" / "Ann").glob("*.nii.gz"))


def test_masks_make_no_case_and_are_not_read(model, small, tmp_path):
    folder = next(small.rglob("Ann-t1n.nii.gz")).parent
    for mask in ("Ann-seg", "Ann-mask", "mask_FLAIR", "Ann-t1n-mask", "Ann-brain-mask", "masks/Bob-seg"):
        (folder / "masks").mkdir(exist_ok=True)
        (folder / f"{mask}.nii.gz").write_bytes(b"nobody reads this")
    result = complete_cohort(small, tmp_path / "out", model, SETTINGS)
    assert ([*result.completed], result.failed) == (["Ann"], {})


def test_a_case_is_the_same_in_any_order_and_any_cohort(model, cohort, completed, monkeypatch, tmp_path):
    out, _ = completed
    found = find_studies(cohort)
    monkeypatch.setattr(inputs, "find_studies", lambda *_: found[::-1])
    complete_cohort(cohort, tmp_path / "reversed", model, SETTINGS)
    monkeypatch.undo()
    write_images(tmp_path / "other", "Aaa", ("t1n", "t2w"), seed=9)
    shutil.copytree(cohort / "Bob", tmp_path / "other" / "Bob")
    complete_cohort(tmp_path / "other", tmp_path / "elsewhere", model, SETTINGS)
    torch.manual_seed(12345)
    np.random.default_rng()
    alone = complete(cohort / "Bob", model, SETTINGS)
    expected = voxels(out / "Bob" / "Bob-t2f_synthetic.nii.gz")
    for place in ("reversed", "elsewhere"):
        np.testing.assert_array_equal(voxels(tmp_path / place / "Bob" / "Bob-t2f_synthetic.nii.gz"), expected)
    np.testing.assert_array_equal(np.asarray(alone.images["t2f"].dataobj), expected)
    # the order changes no byte of any other volume either
    volumes = [path.relative_to(out) for path in out.rglob("*.nii.gz")]
    assert len(volumes) == 3
    for path in volumes:
        assert (tmp_path / "reversed" / path).read_bytes() == (out / path).read_bytes()


# Memory


def test_a_study_that_cannot_fit_is_refused_by_its_headers_and_the_others_go_on(model, small, tmp_path):
    (small / "Big").mkdir()
    for modality in ("t1n", "t2w"):
        header_alone(small / "Big" / f"Big-{modality}.nii.gz", 20_000)
    summary = complete_cohort(small, tmp_path / "out", model, SETTINGS)
    assert list(summary.completed) == ["Ann"]
    numbers = r"needs about \d+\.\d GB of memory, \d+\.\d GB are available\. Give the job more"
    assert re.match(f"Big: {numbers}", summary.failed["Big"])
    with pytest.raises(StudyError, match=numbers):
        complete(small / "Big", model, SETTINGS)


def test_memory_is_estimated_by_the_headers_of_files_and_images_alike(model, tmp_path):
    files = {m: tmp_path / f"{m}.nii.gz" for m in ("t1n", "t2w")}
    for path in files.values():
        header_alone(path, 500)
    needed = memory_needed(files, model, SETTINGS)
    assert 30 * 500**3 < needed < 100 * 500**3
    images = {m: nib.Nifti1Image(np.broadcast_to(np.int16(0), (500,) * 3), np.eye(4)) for m in files}
    assert memory_needed(images, model, SETTINGS) == needed
    assert memory_needed(files, model, replace(SETTINGS, register="if needed")) > needed
    assert memory_needed({"t1n": files["t1n"]}, model, SETTINGS) < needed
    files["t1n"].write_bytes(b"no image")
    assert memory_needed({"t1n": files["t1n"], "t2w": tmp_path / "none"}, model, SETTINGS) == 0


def test_what_crossmr_wrote_among_the_scans_is_no_scan(tmp_path):
    """OUT lies in the cohort, beside that of an earlier run."""
    cohort, both = tmp_path / "cohort", dict.fromkeys(("sources", "targets"), ("t1n", "t1c", "t2w", "t2f"))
    any_model = read_model(save_untrained(tmp_path / "model", guidance="last", uncertainty=True, **both))
    write_study(cohort, "Ann", ("t1n", "t2w", "t2f"))
    before = tree(cohort)
    first = complete_cohort(cohort, cohort / "out", any_model, SETTINGS)
    assert first.completed == {"Ann": ["t1c"]}
    made = tree(cohort / "out" / "Ann")
    for _ in range(2):  # the same again, and beside another output
        assert complete_cohort(cohort, cohort / "out", any_model, SETTINGS).skipped == ["Ann"]
        assert tree(cohort / "out" / "Ann") == made
        (planned,) = plan_cohort(cohort, cohort / "second", any_model, SETTINGS)
        assert ([*planned.acquired], planned.synthesise) == (["t1n", "t2w", "t2f"], ["t1c"])
        second = complete_cohort(cohort, cohort / "second", any_model, SETTINGS, CohortSettings(overwrite=True))
        assert second.completed == {"Ann": ["t1c"]}
    assert {name: content for name, content in tree(cohort).items() if name in before} == before
