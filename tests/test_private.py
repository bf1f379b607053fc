"""No folder's name in anything that may be shared: names of patients are found in folders."""

import base64
import gzip
import json
import os
import re
import shutil
import sys
import zipfile

import dicoms
import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, image, make_head, save_untrained, write_study

from crossmr.cli import main
from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.completion.private import NAME, NOTE, read_paths, write_paths
from crossmr.data.naming import find_studies
from crossmr.display import LOG
from crossmr.errors import OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output.viewer import view_case

PATIENT = "DOE, JOHN_19610203"
SETTINGS = InferenceSettings(ddim_steps=2, precision="float32")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Studies below a folder that is named after a patient; each verb fails on some of them, in different words."""
    folder = tmp_path_factory.mktemp("archive") / PATIENT
    for seed, case in enumerate(("P1", "P2", "P3")):
        write_study(folder, case, ("t1n", "t2w", "t1c", "t2f"), seed=seed)
    write_study(folder, "gaps", ("t1n", "t2w"), seed=7)
    write_study(folder, "flat", ("t1n", "t2w", "t2f"), replace={"t2f": np.zeros(SHAPE, np.float32)})
    write_study(folder, "twice", ("t1n", "t2w"))
    nib.save(image(make_head("t2w")), folder / "twice" / "twice_T2.nii.gz")
    write_study(folder, "broken", ("t1n", "t2w"))
    (folder / "broken" / "broken-t2w.nii.gz").write_bytes(b"no scan")
    (folder / "gone").mkdir()
    (folder / "gone" / "gone-t1n.nii.gz").symlink_to(folder / "nowhere" / "gone-t1n.nii.gz")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model"), guidance="none")


def crossmr(*said):
    """Run a command; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["crossmr", *map(str, said)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code or 0


def content(path):
    """All bytes of a file, as they are and unpacked: of gzip, zip, and of what a page holds."""
    stored = path.read_bytes()
    yield stored
    if path.suffix == ".gz":
        yield gzip.decompress(stored)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())
    for packed in re.findall(rb"[A-Za-z0-9+/]{200,}={0,2}", stored) if path.suffix == ".html" else ():
        part = base64.b64decode(packed[: len(packed) // 4 * 4])
        yield gzip.decompress(part) if part.startswith(b"\x1f\x8b") else part


def mentions(folder, *words):
    """The files of a folder whose name or content has one of some words."""
    words = [word.encode() for word in words]
    return {
        path.name
        for path in folder.rglob("*")
        if any(word in str(path.relative_to(folder)).encode() for word in words)
        or (path.is_file() and any(word in part for part in content(path) for word in words))
    }


@pytest.mark.parametrize("given", [".", PATIENT], ids=["above", "itself"])
def test_nothing_that_is_written_names_a_folder(archive, given, model, tmp_path, capsys):
    """Of complete, prepare, train, evaluate, nnunet, export and the pages; all fail on some studies and say why."""
    cohort = archive.parent / given
    machine = [str(archive.parent), str(tmp_path)]
    out = {
        name: tmp_path / "out" / name for name in ("completed", "bids", "set", "run", "of_cohort", "of_set", "nnunet")
    }
    assert crossmr("complete", cohort, "-o", out["completed"], "--model", model) == 1
    assert crossmr("complete", cohort, "-o", out["bids"], "--model", model, "--profile", "bids") == 1
    assert crossmr("view", out["completed"], "gaps", "--no-open") == 0
    assert crossmr("prepare", cohort, "-o", out["set"], "--workers", "1", "--split", "34/33/33") == 1
    assert crossmr("evaluate", model, cohort, "-o", out["of_cohort"]) == 1
    assert crossmr("evaluate", model, out["set"], "-o", out["of_set"]) == 0
    assert crossmr("nnunet", cohort, out["completed"], "-o", out["nnunet"]) == 1
    assert crossmr("models", "export", model, tmp_path / "out" / "model.zip") == 0
    said = capsys.readouterr().err
    for place in ("completed", "bids"):
        private = next(out[place].rglob(NAME))
        assert PATIENT in private.read_text()
        private.unlink()
    for log in (tmp_path / "out").rglob(LOG):  # says in its first line that it is not for sharing
        assert "not for sharing" in log.read_text().splitlines()[0]
        log.unlink()
    for name, stored in (
        ("completed", "manifest.json"),
        ("set", "manifest.json"),
        ("of_cohort", "metrics.json"),
        ("nnunet", "crossmr.json"),
    ):
        text = (out[name] / stored).read_text()
        assert "2 files claim to be t2w: twice-t2w.nii.gz, twice_T2.nii.gz" in text
        assert name == "nnunet" or re.search(r"gone-t1n\.nii\.gz:? is a link to a file that is not there", text)
    for part in (PATIENT, PATIENT.split(", ")[1], *machine):
        assert mentions(tmp_path / "out", part) == set()
    assert str(archive / "twice" / "twice_T2.nii.gz") in said  # the terminal says it in full


def test_the_search_itself_finds_what_is_hidden(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"DOE"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", b"DOE" * 99)
    (tmp_path / "c.html").write_bytes(b'<img src="data:x;base64,' + base64.b64encode(b"." * 200 + b"DOE") + b'">')
    (tmp_path / "d.html").write_bytes(b"'" + base64.b64encode(gzip.compress(bytes(range(256)) * 9 + b"DOE")) + b"'")
    (tmp_path / "DOE").mkdir()
    assert mentions(tmp_path, "DOE") == {"a.gz", "b.zip", "c.html", "d.html", "DOE"}


def test_a_training_keeps_no_names_of_folders(archive, tmp_path, capsys):
    whole = tmp_path / PATIENT
    for case in ("P1", "P2", "P3"):
        shutil.copytree(archive / case, whole / case)
    assert crossmr("prepare", whole, "-o", tmp_path / "out" / "set", "--workers", "1", "--split", "34/33/33") == 0
    tiny = ("--recipe", "tiny", "--steps", "1", "--set", "crop=32,32")
    small = ("--set", "synthesis.channels=4", "--set", "synthesis.multipliers=1,2")
    assert crossmr("train", tmp_path / "out" / "set", "-o", tmp_path / "out" / "run", *tiny, *small) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"model: {tmp_path / 'out' / 'run' / 'model'}"
    assert last in (tmp_path / "out" / "run" / LOG).read_text()
    for log in (tmp_path / "out" / "set" / LOG, tmp_path / "out" / "run" / LOG):
        assert "not for sharing" in log.read_text().splitlines()[0]
        log.unlink()
    assert mentions(tmp_path / "out", PATIENT, str(tmp_path)) == set()


def test_nothing_made_of_dicom_names_folder_or_patient(model, tmp_path, capsys):
    """Neither convert nor complete, but for the derived series, which are the patient's: names lie in tags as well."""
    archive = tmp_path / PATIENT
    dicoms.write(archive / "good", ("t1n", "t2w"), description="DOE JOHN head")
    dicoms.write(archive / "more", ("t1n",), patient="MRN-1", description="DOE JOHN again")
    dicoms.write_series(archive / "no head", np.ones((32, 32, 3), int), dicoms.OBLIQUE, patient="MRN-2")
    (archive / "DOE.dcm").write_bytes(bytes(128) + b"DICM" + b"\x08\x00")
    converted, completed = tmp_path / "out" / "converted", tmp_path / "out" / "completed"
    assert crossmr("convert", archive, "-o", converted) == 1
    assert crossmr("complete", archive, "-o", completed, "--model", model) == 1
    capsys.readouterr()
    assert len(list(converted.glob("*/series.json"))) == 2
    series = list(completed.glob("*/*_dicom"))
    assert len(series) == 2
    for folder in series:
        assert "0001.dcm" in mentions(folder, "MRN-0042")  # of the patient's own record
        shutil.rmtree(folder)
    assert not list(completed.rglob(NAME))  # its scans lie in the output
    for log in (converted / LOG, completed / LOG):
        assert "not for sharing" in log.read_text().splitlines()[0]
        log.unlink()
    words = ("DOE JOHN", "DOE.dcm", "Doe^", "Roe^", "MRN-", "19700101", "20240131", "2.25.", "no head")
    for word in (PATIENT, PATIENT.split(", ")[1], *words, str(tmp_path)):
        assert mentions(tmp_path / "out", word) == set(), word


# The one file that says where scans lie


def test_view_finds_the_scans_by_the_private_file_alone(archive, model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(archive / "gaps", tmp_path / "in" / "gaps")
    complete_cohort(tmp_path / "in", out, read_model(model), SETTINGS)
    assert json.loads((out / NAME).read_text())["note"] == NOTE
    assert NOTE.startswith("NOT FOR SHARING")
    assert [*json.loads((out / NAME).read_text())] == ["note", "format", "cases"]
    page, notes = view_case(out, "gaps")
    assert notes == []
    assert "T1 acquired" in page.read_text()
    shutil.move(tmp_path / "in", tmp_path / "there" / "in")
    shutil.move(out, tmp_path / "there" / "out")
    out = tmp_path / "there" / "out"  # moved together, they still belong together
    assert view_case(out, "gaps")[1] == []
    (out / NAME).unlink()
    page, (note,) = view_case(out, "gaps")
    assert "name their folder with --scans" in note
    assert "T1 acquired" not in page.read_text()
    assert view_case(out, "gaps", scans=tmp_path / "there" / "in")[1] == []


def test_the_private_file_keeps_cases_of_an_earlier_run_and_skips_what_is_unclear(archive, tmp_path):
    studies = {study.case: study for study in find_studies(archive)}
    write_paths(tmp_path, [studies["P1"], studies["twice"]])
    write_paths(tmp_path, [studies["P2"]])
    for case in ("P1", "P2"):
        assert {m: path.resolve() for m, path in read_paths(tmp_path, case).items()} == studies[case].images()
    with pytest.raises(OutputError, match="does not say where the scans of twice lie"):
        read_paths(tmp_path, "twice")
    (tmp_path / NAME).write_text('{"cases": 3}')
    with pytest.raises(OutputError, match="does not say where"):
        read_paths(tmp_path, "P1")


def test_paths_in_the_manifests_of_earlier_versions_are_deleted(archive, model, tmp_path):
    shutil.copytree(archive / "gaps", tmp_path / "in" / "gaps")
    complete_cohort(tmp_path / "in", tmp_path / "out", read_model(model), SETTINGS)
    path = tmp_path / "out" / "gaps" / "manifest.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "paths": {"t1n": f"../{PATIENT}/t1.nii.gz"}}))
    complete_cohort(tmp_path / "in", tmp_path / "out", read_model(model), SETTINGS, CohortSettings())
    assert path.read_text() == whole


def test_scans_on_another_drive_are_named_in_full(archive, tmp_path, monkeypatch):
    studies = {study.case: study for study in find_studies(archive)}

    def relpath(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    write_paths(tmp_path, [studies["P1"]])
    assert read_paths(tmp_path, "P1") == studies["P1"].images()
