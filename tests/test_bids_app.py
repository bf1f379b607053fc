"""crossmr-bids: the arguments of a BIDS-App, parts of a dataset by the names of the whole, and a valid derivative."""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import pytest
from conftest import image, judge, make_head, save_untrained, tree
from test_layout import validate

from crossmr.bids_app import chosen, main, parser
from crossmr.completion.inputs import Inputs
from crossmr.completion.layout import Layout
from crossmr.completion.work import Work
from crossmr.data.naming import StudyFiles, find_studies

ROOT = Path(__file__).parents[1]
DESCRIPTOR = ROOT / "packaging" / "boutiques" / "crossmr-bids.json"
BOSH = Path(sys.executable).with_name("bosh")
SCANS = {
    "sub-01/ses-a/anat/sub-01_ses-a_T1w": "t1n",
    "sub-01/ses-a/anat/sub-01_ses-a_T2w": "t2w",
    "sub-01/ses-b/anat/sub-01_ses-b_T1w": "t1n",
    "sub-01/ses-b/anat/sub-01_ses-b_FLAIR": "t2f",
    "sub-02/anat/sub-02_T1w": "t1n",
    "sub-02/anat/sub-02_acq-second_T1w": "t1c",
    "sub-03/anat/sub-03_T2w": "t2w",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three participants, one with two sessions; a sidecar at the root says that acq-second is enhanced."""
    root = tmp_path_factory.mktemp("bids") / "raw"
    for name, modality in SCANS.items():
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = image(make_head(modality, seed=len(name)))
        made.header.set_xyzt_units("mm", "sec")
        nib.save(made, path)
    about = {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "README").write_text("A test.\n" * 20)
    (root / "acq-second_T1w.json").write_text('{"ContrastBolusIngredient": "GADOLINIUM"}')
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    both = dict.fromkeys(("sources", "targets"), ("t1n", "t1c", "t2w", "t2f"))
    return save_untrained(tmp_path_factory.mktemp("model"), guidance="last", uncertainty=True, **both)


def crossmr_bids(*arguments):
    """The exit code, and what was said on the standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, arguments)])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_both_spellings_and_labels_with_their_entity_are_one():
    hyphens = "in out participant --participant-label 01 sub-02 --session-label a --skip-bids-validation --dry-run"
    scores = "in out participant --participant_label 01 --participant_label sub-02 --session_label a"
    hyphens, scores = hyphens.split(), [*scores.split(), "--skip_bids_validation", "--dry_run"]
    assert parser().parse_args(hyphens) == parser().parse_args(scores)
    assert parser().parse_args(scores).participant_label == ["01", "sub-02"]


def test_what_a_model_cannot_do_is_refused_as_by_complete(dataset, model, tmp_path):
    code, _, err = crossmr_bids(dataset, tmp_path / "out", "participant", "--planes", "3", "--model", model)
    assert (code, "--planes is 3; this model has learnt 1" in " ".join(err.split())) == (1, True), err


@pytest.mark.parametrize(
    ("participants", "sessions", "folders"),
    [
        ((), (), ["."]),
        (("02",), (), ["sub-02"]),
        (("sub-03", "01"), (), ["sub-01", "sub-03"]),
        ((), ("b",), ["sub-01/ses-b"]),
        (("01", "02"), ("ses-a", "b"), ["sub-01/ses-a", "sub-01/ses-b"]),
    ],
)
def test_a_part_of_a_dataset_has_the_studies_of_the_whole(dataset, participants, sessions, folders):
    """Names, patients, files and contrasts are equal, the one that a sidecar at the root decides included."""
    paths = chosen(dataset, participants, sessions)
    assert [path.relative_to(dataset).as_posix() for path in paths] == folders
    found = [study for path in paths for study in find_studies(path)]
    whole = [study for study in find_studies(dataset) if any(path in study.paths()[0].parents for path in paths)]
    assert found == whole
    assert [study.case for study in found if "t1c" in study.candidates] == ["sub-02"] * any(
        study.case == "sub-02" for study in found
    )


def test_jobs_of_participants_share_a_valid_derivative_and_the_group_s_report_has_all(dataset, model, tmp_path):
    raw = shutil.copytree(dataset, tmp_path / "raw")
    before, out = tree(raw), tmp_path / "out"
    code, said, _ = crossmr_bids(raw, out, "participant", "--participant_label", "01", "sub-03", "--model", model)
    assert (code, "3 studies: 0 failed, 3 synthesised" in said) == (0, True), said
    assert not (out / "sub-02").exists()
    code, said, _ = crossmr_bids(raw, out, "participant", "--participant-label", "02", "--model", model)
    assert (code, "1 study: 0 failed, 1 synthesised" in said) == (0, True), said
    code, said, _ = crossmr_bids(raw, out, "group")
    assert (code, said) == (0, f"report: {out / 'crossmr' / 'report.html'}\n")
    page = (out / "crossmr" / "report.html").read_text()
    assert all(case in page for case in ("sub-01_ses-a", "sub-01_ses-b", "sub-02", "sub-03"))
    assert validate(out)["error"] == {}
    made = {path.name.removesuffix(".nii.gz") for path in out.rglob("sub-02*_desc-synthetic_*.nii.gz")}
    assert made == {"sub-02_desc-synthetic_T2w", "sub-02_desc-synthetic_FLAIR"}
    assert tree(raw) == before


def test_jobs_of_other_participants_write_at_the_same_time(dataset, model, tmp_path):
    out = tmp_path / "out"
    run = (dataset, out, "participant", "--participant-label", "03", "--model", model)
    with Layout(out, "bids").locked(shared=True), closing(Work(Layout(out, "bids"))) as other:
        other.share(Inputs(dataset, [StudyFiles("sub-99", "sub-99", {}, (), ())]))
        assert other.claims.take("sub-99")
        code, said, err = crossmr_bids(*run)
        assert (code, "others work on it, or have not begun: crossmr status" in said) == (0, True), err
        assert not (out / "crossmr" / "report.html").exists()
        code, said, err = crossmr_bids(dataset, out, "group")
        assert code == 0, err
        assert "This run is not finished: 1 study is left." in (out / "crossmr" / "report.html").read_text()
    (next((out / "crossmr" / ".crossmr").glob("studies-*.jsonl"))).unlink()
    with Layout(out, "bids").locked():
        code, _, err = crossmr_bids(*run)
    assert (code, "is being written to by another crossmr. Wait for it" in err) == (1, True), err


def test_a_study_that_fails_makes_the_exit_code_one(dataset, model, tmp_path):
    raw = shutil.copytree(dataset, tmp_path / "raw")
    (raw / "sub-03/anat/sub-03_T2w.nii.gz").write_bytes(b"damaged")
    code, _, err = crossmr_bids(raw, tmp_path / "out", "participant", "--session-label", "b", "--model", model)
    assert code == 0, err
    code, _, err = crossmr_bids(raw, tmp_path / "out", "participant", "--participant-label", "03", "--model", model)
    assert (code, "sub-03 failed: " in err) == (1, True), err


def test_a_participant_without_images_stops_no_other(dataset, model, tmp_path):
    raw = shutil.copytree(dataset, tmp_path / "raw")
    (raw / "sub-04" / "beh").mkdir(parents=True)
    run = (raw, tmp_path / "out", "participant", "--model", model, "--participant-label")
    code, said, err = crossmr_bids(*run, "03", "04")
    assert (code, "sub-04: no image lies in it; passed over" in err) == (0, True), err
    assert "1 study: 0 failed" in said
    code, _, err = crossmr_bids(*run, "04")
    assert (code, "sub-04: no volume" in err) == (1, True), err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["raw", "out", "participants"], "invalid choice: 'participants'"),
        (["raw", "out"], "the following arguments are required: level"),
        (["raw", "out", "participant", "--particpant-label", "01"], "unrecognized arguments"),
        (
            ["raw", "out", "participant", "--participant-label", "09"],
            "sub-09: no such folder in raw; there are sub-01,",
        ),
        (["raw", "out", "participant", "--session-label", "c"], "ses-c: no such folder in 3 folders of raw; there are"),
        (["nowhere", "out", "participant"], "nowhere is no BIDS dataset: it has no dataset_description.json"),
        (["raw/sub-01", "out", "group"], "raw/sub-01 is no BIDS dataset"),
        (["raw", "raw", "participant"], "OUT raw is BIDS_DIR, or in or around it. Name raw/derivatives/crossmr"),
        (["raw", "raw/sub-01/new", "group"], "OUT raw/sub-01/new is BIDS_DIR, or in or around it"),
        (["raw", "out", "participant", "--targets", "t2f,nonsense"], "'nonsense' is not a modality"),
        (["raw", "out", "participant", "--targets", "nonsense", "--targets", "t2f"], "'nonsense' is not a modality"),
        (["raw", ".", "participant"], "OUT . is BIDS_DIR, or in or around it"),
    ],
)
def test_arguments_that_make_no_sense_are_a_usage_error(dataset, tmp_path, monkeypatch, arguments, match):
    shutil.copytree(dataset, tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, _, err = crossmr_bids(*arguments)
    assert (code, match in err) == (2, True), err
    assert tree(tmp_path) == before


def test_a_group_without_participants_fails(dataset, tmp_path):
    code, _, err = crossmr_bids(dataset, tmp_path / "out", "group")
    assert (code, "crossmr-bids: " in err and "does not exist" in err) == (1, True), err


def test_a_folder_that_may_not_be_listed_is_named(dataset, tmp_path, monkeypatch):
    usual = os.scandir

    def scandir(place):
        if str(place).endswith("sub-03/anat"):
            raise PermissionError(13, "Permission denied")
        return usual(place)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, err = crossmr_bids(dataset, tmp_path / "out", "participant", "--participant-label", "03")
    where = dataset / "sub-03" / "anat"
    told = f"crossmr-bids: {where}: cannot be listed (Permission denied). Check its permissions.\n"
    assert (code, err) == (1, told)


def test_the_version_is_that_of_crossmr():
    code, said, _ = crossmr_bids("--version")
    assert (code, said.startswith("crossmr ")) == (0, True)


def bosh(*arguments):
    """Run the Boutiques program in this process."""
    from boutiques import bosh as run

    judge("boutiques", BOSH)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run([*map(str, arguments)])
    return said.getvalue()


def test_the_boutiques_descriptor_is_valid_and_calls_the_command(tmp_path):
    bosh("validate", DESCRIPTOR)
    labels = {"participant_label": ["01", "sub-02"], "session_label": ["a"], "overwrite": True, "targets": "t2f"}
    invocation = tmp_path / "invocation.json"
    invocation.write_text(json.dumps({"bids_dir": "raw", "out": "new", "level": "participant", **labels}))
    bosh("invocation", DESCRIPTOR, "-i", invocation)
    (line,) = [line for line in bosh("exec", "simulate", DESCRIPTOR, "-i", invocation).splitlines() if "raw" in line]
    _, *arguments = shlex.split(line)
    given = vars(parser().parse_args(arguments))
    assert (str(given["bids_dir"]), str(given["out"]), given["level"]) == ("raw", "new", "participant")
    assert {name: given[name] for name in labels} == {**labels, "targets": ["t2f"]}


def test_the_boutiques_descriptor_says_the_version_and_every_option():
    descriptor = json.loads(DESCRIPTOR.read_text())
    assert descriptor["tool-version"] == version("crossmr")
    known = {option for action in parser()._actions for option in action.option_strings}
    flags = {entry["command-line-flag"] for entry in descriptor["inputs"] if "command-line-flag" in entry}
    assert flags < known


def test_a_failure_is_in_the_report_of_the_group_until_it_is_completed(dataset, model, tmp_path):
    raw, out = shutil.copytree(dataset, tmp_path / "raw"), tmp_path / "out"
    scan = raw / "sub-03/anat/sub-03_T2w.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(b"damaged")
    for label, expected in (("03", 1), ("02", 0)):
        code, _, err = crossmr_bids(raw, out, "participant", "--participant-label", label, "--model", model)
        assert code == expected, err
    assert crossmr_bids(raw, out, "group")[0] == 0
    manifest = json.loads((out / "crossmr" / "manifest.json").read_text())
    assert ([*manifest["failed"]], sorted(manifest["verdicts"])) == (["sub-03"], ["sub-02", "sub-03"])
    assert "sub-03,refuse" in (out / "crossmr" / "status.csv").read_text()
    scan.write_bytes(whole)
    code, _, err = crossmr_bids(raw, out, "participant", "--participant-label", "03", "--model", model)
    assert code == 0, err
    assert json.loads((out / "crossmr" / "manifest.json").read_text())["failed"] == {}


def test_files_that_bids_does_not_name_are_called_alike_in_a_part_and_in_the_whole(dataset, tmp_path):
    raw = tmp_path / "raw"
    for participant, session in (("01", "1"), ("01", "2"), ("02", "1")):
        place = raw / f"sub-{participant}" / f"ses-{session}" / "anat"
        place.mkdir(parents=True)
        for name in ("t1n", "t2f"):
            image(make_head(name)).to_filename(place / f"{name}.nii.gz")
    shutil.copy(dataset / "dataset_description.json", raw)
    whole = find_studies(raw)
    assert [study.case for study in whole] == ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    assert [study for label in ("01", "02") for study in find_studies(raw / f"sub-{label}")] == whole
