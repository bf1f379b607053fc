"""Layouts: BraSyn's flat folder holds its files alone, and a BIDS derivative passes the official validator."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import image, judge, make_head, save_untrained, write_study

from crossmr import parts
from crossmr.completion import case as cases
from crossmr.completion.cohort import CohortSettings, complete_cohort, plan_cohort
from crossmr.completion.layout import Layout, bids_entities, records_of
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT
from crossmr.completion.work import Work
from crossmr.data.naming import find_studies
from crossmr.errors import ConfigError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output.nnunet import export_nnunet
from crossmr.output.report import report_completion
from crossmr.output.viewer import view_case

SETTINGS = InferenceSettings(precision="float32")
REMEDY = "Rename them, or use --profile labelled and another OUT."
BIDS, CHALLENGE = (CohortSettings(profile=profile) for profile in ("bids", "challenge"))
MODALITIES = ("t1n", "t1c", "t2w", "t2f")
VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    both = {"sources": MODALITIES, "targets": MODALITIES}
    return read_model(save_untrained(tmp_path_factory.mktemp("model"), guidance="last", uncertainty=True, **both))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A BIDS dataset: two sessions, one of them enhanced, a sidecar for one file only, and somebody's derivatives."""
    root = tmp_path_factory.mktemp("bids") / "raw"
    about = {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    for path, text in (("dataset_description.json", json.dumps(about)), ("README", "A test.\n" * 20)):
        root.mkdir(exist_ok=True)
        (root / path).write_text(text)
    for name, modality in (
        ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "t1n"),
        ("sub-01/ses-a/anat/sub-01_ses-a_ce-gadolinium_T1w", "t1c"),
        ("sub-01/ses-b/anat/sub-01_ses-b_T2w", "t2w"),
        ("sub-02/anat/sub-02_FLAIR", "t2f"),
        ("sub-02/anat/sub-02_T1w", "t1n"),
        ("derivatives/other/sub-02/anat/sub-02_desc-preproc_T1w", "t1n"),
    ):
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = image(make_head(modality))
        made.header.set_xyzt_units("mm", "sec")
        nib.save(made, path)
    (root / "sub-02/anat/sub-02_T1w.json").write_text('{"MagneticFieldStrength": 3}')
    (root / "derivatives/other/dataset_description.json").write_text(json.dumps({**about, "DatasetType": "derivative"}))
    return root


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def validate(folder):
    """What the official validator says: errors and warnings."""
    ran = subprocess.run(
        [judge("bids-validator-deno", VALIDATOR), "--json", folder], capture_output=True, text=True, timeout=120
    )
    issues = json.loads(ran.stdout)["issues"]["issues"]
    return {
        severity: {issue["code"]: issue.get("location") for issue in issues if issue["severity"] == severity}
        for severity in ("error", "warning")
    }


def test_a_bids_dataset_becomes_a_valid_derivative(dataset, model, tmp_path):
    assert validate(dataset)["error"] == {}  # the validator works
    raw = shutil.copytree(dataset, tmp_path / "raw")
    out = raw / "derivatives" / "crossmr"
    result = complete_cohort(raw, out, model, SETTINGS, BIDS)
    assert result.failed == {}
    assert result.completed == {
        "sub-01_ses-a": ["t2w", "t2f"],
        "sub-01_ses-b": ["t1n", "t1c", "t2f"],
        "sub-02": ["t1c", "t2w"],
    }
    said = validate(out)
    assert said["error"] == {}, said
    report_completion(out)
    view_case(out, "sub-02")
    assert validate(out) == said  # the records are not in its way
    enhanced = out / "sub-01/ses-b/anat/sub-01_ses-b_ce-gadolinium_desc-synthetic_T1w.nii.gz"
    sidecar = json.loads(enhanced.with_name(enhanced.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz"]
    assert DISCLAIMER in sidecar["Description"]
    assert ENHANCEMENT in sidecar["Description"]
    assert sidecar["SkullStripped"] is False
    std = out / "sub-02/anat/sub-02_desc-syntheticstd_T2w.json"
    assert "the error of sub-02_desc-synthetic_T2w.nii.gz, on its scale" in json.loads(std.read_text())["Description"]
    assert std.with_suffix(".nii.gz").exists()
    about = json.loads((out / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    assert (out / about["DatasetLinks"]["raw"]).resolve() == raw.resolve()
    assert nib.load(enhanced).header["descrip"].item().startswith(b"SYNTHETIC")
    assert (out / "crossmr" / "report.html").exists()
    assert (out / "crossmr" / "view" / "sub-02.html").exists()
    # what was synthesised is no input of the next run, even where both lie in one tree
    shutil.copytree(dataset, tmp_path / "both")
    shutil.copytree(out, tmp_path / "both", dirs_exist_ok=True)
    assert find_studies(tmp_path / "both")[-1].images().keys() == {"t1n", "t2f"}


def test_a_derivative_elsewhere_does_not_say_where_the_scans_lie(dataset, model, tmp_path):
    raw = tmp_path / "DOE_JOHN"
    shutil.copytree(dataset, raw, ignore=shutil.ignore_patterns("sub-01"))
    complete_cohort(raw, tmp_path / "out", model, SETTINGS, BIDS)
    assert validate(tmp_path / "out")["error"] == {}
    assert "DatasetLinks" not in json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    sidecars = list((tmp_path / "out").rglob("anat/*.json"))
    assert sidecars
    assert not [path for path in sidecars if "Sources" in path.read_text()]


def test_any_name_becomes_a_bids_name(model, tmp_path):
    assert bids_entities("BraTS-GLI-00000-000") == ("sub-BraTSGLI00000000",)
    assert bids_entities("sub-01_ses-b") == ("sub-01", "ses-b")
    assert bids_entities("sub-01_sess-b") == ("sub-01", "ses-b")
    (tmp_path / "A-1").mkdir()
    nib.save(image(make_head("t1n")), tmp_path / "A-1" / "A-1-t1n.nii.gz")
    complete_cohort(tmp_path / "A-1", tmp_path / "out", model, SETTINGS, BIDS)
    assert validate(tmp_path / "out")["error"] == {}


def test_brasyn_s_folder_holds_its_files_and_nothing_else(model, tmp_path):
    shape = (240, 240, 155)
    (tmp_path / "in" / "BraTS-GLI-1").mkdir(parents=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for seed, modality in enumerate(("t1n", "t2f", "t2w")):  # three images, not one
        head, noise = np.zeros(shape, np.float32), np.random.default_rng(seed).random((60, 60, 8))
        head[90:150, 90:150, 60:68] = make_head("t2w", air=False, shape=(60, 60, 8)) + 1 + 30 * noise
        nib.save(nib.Nifti1Image(head, affine), tmp_path / "in" / "BraTS-GLI-1" / f"BraTS-GLI-1-{modality}.nii.gz")
    (tmp_path / "in" / "small").mkdir()
    nib.save(image(make_head("t1n")), tmp_path / "in" / "small" / "small-t1n.nii.gz")
    out = tmp_path / "out"
    result = complete_cohort(tmp_path / "in", out, model, SETTINGS, CHALLENGE)
    assert result.completed == {"BraTS-GLI-1": ["t1c"]}
    assert "small: is 28×32×24 at 6×6×7 mm, but BraSyn's are 240×240×155" in result.failed["small"]
    report_completion(out)
    assert files(out) == {"BraTS-GLI-1-t1c.nii.gz"}
    made = nib.load(out / "BraTS-GLI-1-t1c.nii.gz")
    assert made.shape == shape
    np.testing.assert_array_equal(made.affine, affine)
    records = tmp_path / "out_records"
    assert records_of(out) == records
    assert files(records) == {
        *("manifest.json", "report.html", "BraTS-GLI-1/manifest.json", "pictures/BraTS-GLI-1.webp"),
        *("private_paths.json", "status.csv"),
    }
    manifest = json.loads((records / "BraTS-GLI-1" / "manifest.json").read_text())["synthetic"]["t1c"]
    assert (records / "BraTS-GLI-1" / manifest["file"]).resolve() == out / "BraTS-GLI-1-t1c.nii.gz"
    assert manifest["std"] is None
    again = complete_cohort(tmp_path / "in", out, model, SETTINGS, CHALLENGE)
    assert again.skipped == ["BraTS-GLI-1"]


def test_a_profile_that_is_none_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="--profile is 'flat'; expected one of labelled, challenge, bids"):
        Layout(tmp_path, "flat")


@pytest.mark.parametrize(
    ("folder", "names", "case"),
    [
        ("UPENN-GBM-00001_11", {"t1n": "T1", "t1c": "T1GD", "t2f": "FLAIR"}, "UPENN-GBM-00001_11"),
        (".", {"t1n": "T1", "t1c": "T1GD", "t2f": "FLAIR"}, "UPENN-GBM-00001_11"),
        ("BraTS20_Training_001", {"t1n": "t1", "t1c": "t1ce", "t2f": "flair"}, "BraTS20_Training_001"),
    ],
)
def test_other_layouts_from_end_to_end(model, tmp_path, folder, names, case):
    """Named as UPenn-GBM or the older BraTS name them: completed, looked at, and exported to nnU-Net."""
    (tmp_path / "in" / folder).mkdir(parents=True)
    for modality, name in names.items():
        nib.save(image(make_head(modality)), tmp_path / "in" / folder / f"{case}_{name}.nii.gz")
    result = complete_cohort(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert result.completed == {case: ["t2w"]}
    assert (tmp_path / "out" / case / f"{case}-t2w_synthetic.nii.gz").exists()
    assert case in report_completion(tmp_path / "out").read_text()
    assert view_case(tmp_path / "out")[1] == []
    record = export_nnunet(tmp_path / "in", tmp_path / "out", tmp_path / "Dataset001")
    assert record["synthetic"] == {case: ["t2w"]}


def test_cases_of_one_name_in_bids_are_refused_not_replaced(tmp_path, model):
    for case in ("P1_11", "P11_1", "P2"):
        write_study(tmp_path / "cohort", case, ("t1n", "t2w"))
    result = complete_cohort(tmp_path / "cohort", tmp_path / "out", model, SETTINGS, BIDS)
    assert list(result.completed) == ["P2"]
    assert result.failed == {
        "P11_1": f"P11_1: BIDS has one name for it and P1_11, sub-P111. {REMEDY}",
        "P1_11": f"P1_11: BIDS has one name for it and P11_1, sub-P111. {REMEDY}",
    }
    assert not (tmp_path / "out" / "sub-P111").exists()
    planned = plan_cohort(tmp_path / "cohort", tmp_path / "other", model, SETTINGS, BIDS)
    assert {one.case: one.failed for one in planned if one.outcome == "would fail"} == result.failed
    labelled = complete_cohort(tmp_path / "cohort", tmp_path / "labelled", model, SETTINGS)
    assert sorted(labelled.completed) == ["P11_1", "P1_11", "P2"]


def test_a_case_of_one_name_in_bids_with_an_earlier_one_is_refused_by_every_call(tmp_path, model):
    """Alone in its cohort, so that only OUT knows of the other one."""
    for folder, case in (("first", "P-1"), ("second", "P1"), ("second", "Q")):
        write_study(tmp_path / folder, case, ("t1n", "t2w"))
    out = tmp_path / "out"
    complete_cohort(tmp_path / "first", out, model, SETTINGS, BIDS)
    before = {path: path.read_bytes() for path in out.rglob("sub-P1*.*")}
    why = "P1: BIDS has one name for it and P-1, sub-P1. Rename them, or use another OUT."
    (planned, _) = plan_cohort(tmp_path / "second", out, model, SETTINGS, BIDS)
    assert (planned.outcome, planned.failed) == ("would fail", why)
    for options in (BIDS, replace(BIDS, overwrite=True), replace(BIDS, share=True)):
        result = complete_cohort(tmp_path / "second", out, model, SETTINGS, options)
        assert result.failed == {"P1": why}
    assert before
    assert {path: path.read_bytes() for path in out.rglob("sub-P1*.*")} == before
    assert complete_cohort(tmp_path / "first", out, model, SETTINGS, BIDS).skipped == ["P-1"]


def test_a_case_of_one_name_in_bids_with_one_that_was_written_meanwhile_is_refused(tmp_path, model, monkeypatch):
    for folder, case in (("first", "P-1"), ("second", "P1")):
        write_study(tmp_path / folder, case, ("t1n", "t2w"))
    out, share, usual = tmp_path / "out", replace(BIDS, share=True), cases.complete_study

    def another_is_faster(study, *given):
        monkeypatch.setattr(cases, "complete_study", usual)
        assert complete_cohort(tmp_path / "first", out, model, SETTINGS, share).failed == {}
        return usual(study, *given)

    monkeypatch.setattr(cases, "complete_study", another_is_faster)
    result = complete_cohort(tmp_path / "second", out, model, SETTINGS, share)
    assert "BIDS has one name for it and P-1, sub-P1" in result.failed["P1"]
    assert not (out / "crossmr" / "P1" / "manifest.json").exists()
    assert [path.parent.name for path in out.rglob("manifest.json")] == ["crossmr", "P-1"]


def test_who_writes_what_bids_calls_alike_waits_for_the_other(tmp_path, monkeypatch):
    """Two processes that write P-1 and P1 at once: the second one begins when the first one has ended."""
    layout, waited = Layout(tmp_path / "out", "bids"), []
    with closing(Work(layout)) as one, closing(Work(layout)) as other:

        def wait(_):
            waited.append(True)
            one.claims.give_back(held)

        monkeypatch.setattr(parts.time, "sleep", wait)
        for case, waits in (("P1", True), ("sub-P1", False)):  # who is called so has claimed that name as its own
            held = one.claims.take("sub-P1")
            with cases.place_of_its_own(SimpleNamespace(layout=layout, work=other), case):
                assert waited == [True] * waits
            one.claims.give_back(held)
            waited.clear()


def test_a_name_without_a_letter_that_bids_knows_gets_a_hash(tmp_path, model):
    for case in ("患者", "病人"):
        write_study(tmp_path / "cohort", case, ("t1n", "t2w"))
    result = complete_cohort(tmp_path / "cohort", tmp_path / "out", model, SETTINGS, BIDS)
    assert (len(result.completed), result.failed) == (2, {})
    names = [path.name for path in (tmp_path / "out").glob("sub-*")]
    assert len(names) == 2
    assert all(re.fullmatch("sub-[0-9a-f]{10}", name) for name in names)
    assert validate(tmp_path / "out")["error"] == {}


def test_sources_are_the_names_in_the_dataset_wherever_they_link_to(dataset, model, tmp_path):
    """As git-annex and DataLad keep images; and where the dataset itself is reached by a link."""
    raw, elsewhere = tmp_path / "raw", tmp_path / "DOE_JOHN"
    shutil.copytree(dataset, raw, ignore=shutil.ignore_patterns("sub-01"))
    for name, place in (("T1w", raw / ".git" / "annex" / "MD5E-1"), ("FLAIR", elsewhere)):
        place.mkdir(parents=True)
        scan = raw / "sub-02" / "anat" / f"sub-02_{name}.nii.gz"
        scan.rename(place / "1.nii.gz")
        scan.symlink_to(place / "1.nii.gz")
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "patient").symlink_to(raw / "sub-02")
    for given in ("raw", "link", "patient"):
        out = raw / "derivatives" / given
        complete_cohort(tmp_path / given, out, model, SETTINGS, BIDS)
        sidecar = json.loads((out / "sub-02" / "anat" / "sub-02_desc-synthetic_T2w.json").read_text())
        assert sidecar["Sources"] == [f"bids:raw:sub-02/anat/sub-02_{name}.nii.gz" for name in ("T1w", "FLAIR")]


def test_a_source_that_is_not_in_the_dataset_is_not_named(dataset, tmp_path):
    layout = Layout(dataset / "derivatives" / "new", "bids")
    manifest = {"synthetic": {"t2w": {"warnings": [], "std": None}}, "skull_stripped": False}
    for inputs, named in (("sub-02/anat/a.nii", "sub-02/anat/a.nii"), ("../DOE_JOHN/a.nii", None)):
        (path,) = layout.finish("sub-02", manifest, dataset, [dataset / inputs])
        assert json.loads(path.read_text()).get("Sources") == (named and [f"bids:raw:{named}"])
        shutil.rmtree(layout.out)
