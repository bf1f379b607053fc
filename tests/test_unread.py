"""An acquired contrast is never silently replaced: what was not read, and may be it, stays unfilled and is named."""

import json
import shutil
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import SHAPE, Listener, image, make_head, voxels, write_study
from typer.testing import CliRunner

from crossmr.cli import app
from crossmr.completion.cohort import CohortSettings, complete_cohort, plan_cohort
from crossmr.completion.inputs import find_inputs
from crossmr.completion.study import complete
from crossmr.completion.unread import Unread, files_beside, reasons, unread_files, unread_series
from crossmr.data.naming import find_studies
from crossmr.errors import ConfigError
from crossmr.networks.inference import InferenceSettings

SETTINGS = InferenceSettings(ddim_steps=2, device="cpu", precision="float32")
ALL = ["t1n", "t1c", "t2w", "t2f"]


@pytest.fixture
def cohort(tmp_path):
    """One patient, P1, of T1 and T2."""
    write_study(tmp_path / "in", "P1", ("t1n", "t2w"))
    return tmp_path / "in"


def scan(path, modality="t1c"):
    """A head in a file of any name; what is no NIfTI is not opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        image(make_head(modality)).to_filename(path)
    else:
        path.write_bytes(b"x")
    return path


def doubted(cohort):
    (study,) = find_studies(cohort)
    return unread_files(study, files_beside(cohort, [study]).get(study.case, ()), ["t1c", "t2f"])


@pytest.mark.parametrize(
    ("name", "may_be"),
    [
        ("P1_T1_Gdbolus.nii.gz", "t1c"),
        ("P1_T1_AX.nii.gz", "t1c"),
        ("P1_weird.nii.gz", "t1c t2f"),
        ("P1_FLAIR_something.nii.gz", "t2f"),
        ("P1_T1ce.mnc", "t1c"),
        ("P1_T1ce.mif.gz", "t1c"),
        ("P1_T1ce.gipl", "t1c"),
        ("P1_T1ce.img", "t1c"),
        ("T1ce/T1Gd.mnc", "t1c"),
        ("P1_FLAIR.nii.gz.part", "t2f"),
        ("P1_FLAIR.nii.gz.crdownload", "t2f"),
        ("P1_FLAIR.nii.xz", "t2f"),
        ("P1_FLAIR.nii.bz2", "t2f"),
        ("FLAIR.tar.gz", "t2f"),
        ("P1_T1_bet.nii.gz", ""),
        ("P1_T1_pre.mnc", ""),
        ("P1_T2_SAG.nii.gz", ""),
        ("P1_SWI.nii.gz", ""),
        ("P1_DTI_eddy_FA.nii.gz", ""),
        ("P1_ADC.mif", ""),
        ("P1_brainmask.mnc", ""),
        ("aseg.mgz", ""),
        ("mri/brain.finalsurfs.mgz", ""),
        ("P1_T1ce_mask.nrrd", ""),
        ("P1.json", ""),
    ],
)
def test_what_a_file_may_be(name, may_be, cohort):
    path = scan(cohort / "P1" / name)
    assert {m for one in doubted(cohort) for m in one.may_be} == {*may_be.split()}
    assert [one.name for one in doubted(cohort)] == ([path.name] if may_be else [])


@pytest.mark.parametrize("kind", ["several images", "colours", "a segmentation", "synthetic"])
def test_what_the_content_says_is_no_scan(kind, cohort):
    data, description = make_head("t1c"), ""
    if kind == "several images":
        data = np.stack([data] * 3, -1)
    elif kind == "colours":
        data = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    elif kind == "a segmentation":
        data = (data > 100).astype(np.uint8)
    else:
        description = "SYNTHETIC t1c"
    path = cohort / "P1" / "P1_T1_necrosis.nii.gz"
    nib.save(image(data, description=description), path)
    assert doubted(cohort) == []
    scan(path)
    assert len(doubted(cohort)) == 1


def test_an_archive_is_what_it_holds_beside_what_is_there(cohort):
    with zipfile.ZipFile(cohort / "P1" / "download.zip", "w") as archive:
        archive.writestr("P1/P1-t1n.nii.gz", "")
        archive.writestr("P1/notes.txt", "")
    assert doubted(cohort) == []
    with zipfile.ZipFile(cohort / "P1" / "download.zip", "a") as archive:
        archive.writestr("P1/P1_FLAIR.nii.gz", "")
    ((one),) = doubted(cohort)
    assert (one.name, one.may_be) == ("download.zip", {"t2f"})
    (cohort / "P1" / "download.zip").write_bytes(b"")  # damaged: its name says nothing
    assert {m for one in doubted(cohort) for m in one.may_be} == {"t1c", "t2f"}


def test_whose_a_file_is(tmp_path):
    for case in ("P1", "P2"):
        write_study(tmp_path / "tree", case, ("t1n",))
        shutil.copytree(tmp_path / "tree" / case, tmp_path / "flat", dirs_exist_ok=True)
    for name in ("P1/mri/T1ce.mnc", "P2/P1_T2.mnc", "P3/T1ce.mnc", "T1ce.mnc"):
        scan(tmp_path / "tree" / name)
    for name in ("P2_T1ce.mnc", "P22_T1ce.mnc"):
        scan(tmp_path / "flat" / name)

    def beside(folder):
        found = files_beside(folder, find_studies(folder))
        return {case: [path.name for path in paths] for case, paths in found.items()}

    nobodys = ["T1ce.mnc", "T1ce.mnc"]  # P3's, of which nothing can be read, and one beside them all
    assert beside(tmp_path / "tree") == {"P1": ["T1ce.mnc", "P1_T2.mnc"], "": nobodys}
    assert beside(tmp_path / "flat") == {"P2": ["P2_T1ce.mnc"], "": ["P22_T1ce.mnc"]}


def test_derivatives_of_bids_are_not_searched(tmp_path):
    scan(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz", "t1n")
    scan(tmp_path / "derivatives" / "tool" / "sub-01" / "sub-01_T1ce.mnc")
    (study,) = find_studies(tmp_path)
    assert list(files_beside(tmp_path, [study])) == ["sub-01"]
    (tmp_path / "dataset_description.json").write_text("{}")
    assert list(files_beside(tmp_path, [study])) == []


def test_it_is_not_filled_and_the_manifest_names_it(cohort, model, tmp_path):
    scan(cohort / "P1" / "P1_T1_Gdbolus.nii.gz")
    summary = complete_cohort(cohort, tmp_path / "out", model, SETTINGS)
    assert summary.completed == {"P1": ["t2f"]}
    assert summary.unread == {"P1": {"t1c": ["P1_T1_Gdbolus.nii.gz"]}}
    assert summary.not_filled["P1"]["t1c"] == (
        "P1_T1_Gdbolus.nii.gz may be it and has a name that says no contrast for sure; name it, such as --map "
        "t1c='*_T1_Gdbolus.nii.gz'. To synthesise T1ce all the same, pass --targets t1c."
    )
    manifest = json.loads((tmp_path / "out" / "P1" / "manifest.json").read_text())
    assert manifest["unread"] == summary.unread["P1"]
    again = complete_cohort(cohort, tmp_path / "out", model, SETTINGS)
    assert (again.skipped, again.unread) == (["P1"], summary.unread)
    (planned,) = plan_cohort(cohort, tmp_path / "new", model, SETTINGS)
    assert (planned.synthesise, planned.unread) == (["t2f"], ["t1c"])
    result = complete(cohort / "P1", model, SETTINGS)
    assert list(result.images) == ["t2f"]
    assert result.manifest["unread"] == summary.unread["P1"]


def test_targets_that_name_it_are_synthesised_and_it_is_said(cohort, model, tmp_path):
    scan(cohort / "P1" / "P1_T1_Gdbolus.nii.gz")
    complete_cohort(cohort, tmp_path / "out", model, SETTINGS)
    asked = InferenceSettings(ddim_steps=2, device="cpu", precision="float32", targets=("t1c",))
    summary = complete_cohort(cohort, tmp_path / "out", model, asked)  # done again: it was in doubt
    assert summary.completed == {"P1": ["t1c"]}
    assert summary.unread == {}
    assert summary.notes["P1"] == ["P1_T1_Gdbolus.nii.gz may be t1c, which was asked for by name."]
    named = CohortSettings({"t1c": "*_T1_Gdbolus*"}, overwrite=True)
    summary = complete_cohort(cohort, tmp_path / "out", model, SETTINGS, named)
    assert summary.completed == {"P1": ["t2f"]}
    assert summary.unread == {}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_the_exit_code_is_1_and_terminal_and_report_name_it(dry, cohort, model_folder, tmp_path):
    command = ["complete", str(cohort), "-o", str(tmp_path / "out"), "--model", str(model_folder), "--device", "cpu"]
    command += ["--ddim-steps", "2", *dry]
    assert CliRunner().invoke(app, command).exit_code == 0
    scan(cohort / "P1" / "P1_T1ce.mnc")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "P1: t1c not synthesised: P1_T1ce.mnc may be it and is of a format that is not read; convert it" in said
    if not dry:
        assert "P1: finished before, and done again: t1c (P1_T1ce.mnc) was synthesised and has arrived since" in said
        assert "P1_T1ce.mnc may be it" in (tmp_path / "out" / "report.html").read_text()
        assert not list((tmp_path / "out" / "P1").glob("*t1c*"))
        (cohort / "P1" / "P1_T1ce.mnc").unlink()
        result = CliRunner().invoke(app, command)
        assert "done again: t1c is no longer in doubt" in " ".join(result.output.split())
        assert result.exit_code == 0
        assert (tmp_path / "out" / "P1" / "P1-t1c_synthetic.nii.gz").exists()


def test_what_no_model_can_make_is_no_failure(cohort, model_folder, tmp_path):
    """Nothing that the user could do; and a study that lacks nothing may have anything beside."""
    (cohort / "P1" / "P1-t2w.nii.gz").unlink()
    write_study(cohort, "P2", ALL)
    scan(cohort / "P2" / "P2_T1ce.mnc")
    scan(cohort / "P2" / "P2_weird.nii.gz")
    command = ["complete", str(cohort), "-o", str(tmp_path / "out"), "--model", str(model_folder), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert "t2f not synthesised: the model needs t1n, t2w" in result.output
    assert result.exit_code == 0


def test_a_scan_that_arrives_later_replaces_what_was_synthesised(cohort, model, tmp_path):
    out, listener = tmp_path / "out", Listener()
    assert complete_cohort(cohort, out, model, SETTINGS).completed == {"P1": ["t1c", "t2f"]}
    synthetic = shutil.copy(out / "P1" / "P1-t1c_synthetic.nii.gz", cohort / "P1" / "P1-t1c.nii.gz")
    assert complete_cohort(cohort, out, model, SETTINGS).skipped == ["P1"]  # the header tells that it is no scan
    scan(cohort / "P1" / "P1-t1c.nii.gz")
    acquired = voxels(synthetic)
    summary = complete_cohort(cohort, out, model, SETTINGS, display=listener)
    assert summary.completed == {"P1": ["t2f"]}
    assert (voxels(cohort / "P1" / "P1-t1c.nii.gz") == acquired).all()
    assert not list((out / "P1").glob("*t1c*"))
    assert list(json.loads((out / "P1" / "manifest.json").read_text())["synthetic"]) == ["t2f"]
    assert (
        "P1: finished before, and done again: t1c (P1-t1c.nii.gz) was synthesised and has arrived since, so the "
        "synthetic one goes"
    ) in listener.said
    assert complete_cohort(cohort, out, model, SETTINGS).skipped == ["P1"]


def test_a_file_that_is_not_crossmrs_stays_though_a_scan_arrives(cohort, model, tmp_path):
    out = tmp_path / "out"
    complete_cohort(cohort, out, model, SETTINGS)
    foreign = scan(out / "P1" / "P1-t1c_synthetic.nii.gz")
    before = foreign.read_bytes()
    scan(cohort / "P1" / "P1-t1c.nii.gz")
    complete_cohort(cohort, out, model, SETTINGS)
    assert foreign.read_bytes() == before


def test_reasons_name_each_file_once_and_for_each_cause():
    unread = [
        Unread("a", frozenset({"t1c"}), "x"),
        Unread("b", frozenset({"t1c", "t2f"}), "x"),
        Unread("c", frozenset({"t1c"}), "y"),
    ]
    assert reasons(unread, ["t1c", "t2w"]) == {
        "t1c": "a, b may be it and x; c may be it and y. To synthesise T1ce all the same, pass --targets t1c."
    }


# ---------------------------------------------------------------- DICOM


def series_of(folder, *made):
    """What is unread of a study of series, each (contrast, description, tags); numbered from 2."""
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    from crossmr.dicom.series import find_series

    for number, (contrast, description, tags) in enumerate(made, 2):
        place, head = folder / str(number), dicoms.head(contrast)
        paths = dicoms.write_series(
            place, head, dicoms.OBLIQUE, contrast, number=number, description=description, **dicoms.TIMING["t1n"] | tags
        )
        for path in paths[5:] if "few" in description else ():
            path.unlink()
        if "lost" in description:
            paths[9].unlink()
        if tags is TWICE:
            for k, path in enumerate(paths):
                second = pydicom.dcmread(path)
                second.SOPInstanceUID, second.PixelData = f"1.2.{k}", bytes(len(second.PixelData))
                second.save_as(path.with_name(f"second-{k}.dcm"))
    return {one.name: {*one.may_be} for one in unread_series(find_series(folder))}


AGENT, PLAIN, UNTIMED = (
    {"ContrastBolusAgent": "Gadavist"},
    {"ContrastBolusAgent": "NONE"},
    {"RepetitionTime": None, "EchoTime": None},
)
T2 = {"RepetitionTime": 4500, "EchoTime": 95}
FAST = {"ScanningSequence": "GR", "RepetitionTime": 5, "EchoTime": 2}
CAPTURED, SEGMENTED = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "1.2.840.10008.5.1.4.1.1.66.4"
TWICE = {"RepetitionTime": 3000, "EchoTime": 15}
"""Of which each place has two images."""


@pytest.mark.parametrize(
    ("made", "unread"),
    [
        ([("t1n", "AX T1", {}), ("t1n", "AX T1", {})], {"series 3": {"t1c"}}),
        (
            [("t1n", "AX T1", {}), ("t1n", "SAG T1", {}), ("t1n", "COR T1", {})],
            {"series 3": {"t1c"}, "series 4": {"t1c"}},
        ),
        ([("t1n", "AX T1 PRE", {}), ("t1n", "AX T1", {})], {"series 3": {"t1c"}}),
        ([("t1n", "AX T1", {}), ("t1n", "SAG T1", {}), ("t2w", "AX T2", T2)], {}),  # before all others: both plain
        ([("t1n", "AX T1", {}), ("t2w", "AX T2", T2), ("t1n", "SAG T1", {})], {"series 4": {"t1c"}}),
        ([("t1n", "AX T1", {}), ("t2w", "AX PD/T2", TWICE)], {"series 3": {"pdw", "t2w"}}),
        ([("t1n", "AX T1 PRE", {}), ("t1n", "SAG T1 NATIV", {})], {}),
        ([("t1n", "AX T1", PLAIN), ("t1n", "SAG T1", PLAIN)], {}),
        ([("t1n", "AX T1", {}), ("t1n", "SAG T1", {}), ("t1c", "AX T1 GD", {})], {}),
        ([("t1n", "AX T1", AGENT), ("t1c", "AX T1 GD", AGENT)], {"series 2": {"t1n"}}),
        ([("t1n", "AX T1", {}), ("t1c", "AX T1 GD lost", {})], {"series 3": {"t1c"}}),
        (
            [("t1n", "AX T1", {}), ("t2f", "FLAIR lost", {"RepetitionTime": 9000, "EchoTime": 120})],
            {"series 3": {"t2f"}},
        ),
        ([("t1n", "AX T1", {}), ("t1n", "AX", UNTIMED)], {"series 3": {"t1n", "t1c", "t2w", "t2f", "pdw"}}),
        ([("t1n", "AX T1", {}), ("t1n", "SWI", UNTIMED)], {}),
        ([("t1n", "AX T1", {}), ("t1c", "T1 GD LOC", AGENT)], {"series 3": {"t1c"}}),
        ([("t1n", "SAG T1 CAL", {}), ("t2w", "AX T2", T2)], {"series 2": {"t1n"}}),
        ([("t1n", "AX T1", {}), ("t1c", "AX T1 POST PERF", AGENT)], {}),
        ([("t1n", "AX T1", {}), ("t1n", "T1 LOC few", {})], {}),
        ([("t1n", "AX T1", {}), ("t2f", "MAGiC FLAIR", UNTIMED)], {"series 3": {"t2f"}}),
        (
            [("t1n", "AX T1 SIMPLE", AGENT), ("t1c", "COR T1 BASAL", AGENT), ("t2w", "AX T2", T2)],
            {"series 2": {"t1n"}},
        ),
        ([("t1n", "AX T1", {}), ("t1c", "T1 GD MIP", {"ImageType": ["DERIVED", "SECONDARY", "MIP"]})], {}),
        ([("t1n", "AX T1", {}), ("t1c", "AX T1 GD", CAPTURED)], {"series 3": {"t1c"}}),
        ([("t1n", "AX T1", {}), ("t1c", "AX T1 GD", {"Modality": "OT"})], {"series 3": {"t1c"}}),
        ([("t1n", "AX T1", {}), ("t1n", "POST GD", CAPTURED | UNTIMED)], {"series 3": {"t1c"}}),
        ([("t1n", "AX T1", {}), ("t1n", "Screen Save", CAPTURED | UNTIMED)], {}),
        ([("t1n", "AX T1", {}), ("t1c", "HEAD CT POST CONTRAST", CAPTURED | {"Modality": "CT"})], {}),
        ([("t1n", "AX T1", {}), ("t1c", "T1 GD tumour", {"SOPClassUID": SEGMENTED, "Modality": "SEG"})], {}),
        ([("t1n", "AX T1", {}), ("t1c", "AX T1 GD", CAPTURED | {"SamplesPerPixel": 3})], {}),
    ],
)
def test_what_a_series_that_is_not_used_may_be(made, unread, tmp_path):
    assert series_of(tmp_path, *made) == unread


def test_a_faulty_series_may_be_what_a_person_says(tmp_path):
    """Whatever its description says; localisers that a pattern matches by chance are none."""
    from crossmr.dicom.series import find_series

    mapping = {"t2f": "*sub*"}
    series_of(tmp_path, ("t1n", "AX T1", {}), ("t2f", "AX SUB lost", {}))
    assert {one.name: {*one.may_be} for one in unread_series(find_series(tmp_path, mapping))} == {"series 3": {"t2f"}}
    for path in sorted((tmp_path / "3").iterdir())[3:]:
        path.unlink()
    assert unread_series(find_series(tmp_path, mapping)) == []


@pytest.mark.parametrize(
    ("made", "modality", "why"),
    [
        (("t1n", "T1 VIBE DCE", FAST), "t1n", "by its tags; name it, such as --map t1n='DESCRIPTION'. To"),
        (("t1n", "T1 VIBE DCE", FAST), "t1c", "by its tags; name it, such as --map t1c='DESCRIPTION'. To"),
        (("t1n", "", UNTIMED), "t2f", "tell its contrast; name it, such as --map t2f='series 2'. To"),
        (("t2w", "T2 collo", T2), "t2w", "than the head; name it, such as --map t2w='DESCRIPTION'. To"),
        (("t2w", "T2 lost", T2), "t2w", "some are missing. Export the whole series. To"),
    ],
)
def test_the_remedy_names_what_is_missing(made, modality, why, tmp_path):
    from crossmr.dicom.series import find_series

    series_of(tmp_path, made)
    assert why in reasons(unread_series(find_series(tmp_path)), [modality])[modality]


def test_dicom_beside_nifti_belongs_to_the_nearest_study(tmp_path, model):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    for case in ("P1", "P2"):
        write_study(tmp_path, case, ("t1n", "t2w"))
    dicoms.write(tmp_path / "P1" / "dicom", ("t1c", "t2w"))
    inputs = find_inputs([tmp_path])
    first, second = inputs.studies
    assert [(one.name, {*one.may_be}) for one in inputs.unread(first, ["t1n", "t2w"], model)] == [
        ("series 2", {"t1c"}),
        ("series 3", {"t2w"}),
    ]
    assert inputs.unread(second, ["t1n", "t2w"], model) == []
    summary = complete_cohort(tmp_path, tmp_path / "out", model, SETTINGS)
    assert summary.completed == {"P1": ["t2f"], "P2": ["t1c", "t2f"]}
    assert "convert it with: crossmr convert" in summary.not_filled["P1"]["t1c"]


def test_dicom_is_in_doubt_without_pydicom(tmp_path, model, monkeypatch):
    write_study(tmp_path, "P1", ("t1n", "t2w"))
    scan(tmp_path / "P1" / "IM001").write_bytes(bytes(128) + b"DICM")

    def refuse(*_):
        raise ConfigError("DICOM needs pydicom")

    monkeypatch.setattr("crossmr.completion.unread.find_series", refuse)
    summary = complete_cohort(tmp_path, tmp_path / "out", model, SETTINGS)
    assert summary.unread == {"P1": {"t1c": ["DICOM (IM001)"], "t2f": ["DICOM (IM001)"]}}


def test_nifti_beside_dicom(tmp_path, model):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    dicoms.write(tmp_path, ("t1n", "t2w"))
    scan(tmp_path / "JaneDoe_KM.nii.gz")
    listener = Listener()
    (planned,) = plan_cohort(tmp_path, tmp_path / "out", model, SETTINGS, display=listener)
    assert (planned.synthesise, planned.unread) == (["t2f"], ["t1c"])
    assert listener.said == ["JaneDoe_KM.nii.gz lies beside the DICOM, and is not read."]
    assert "JaneDoe" not in planned.not_synthesised["t1c"]  # as the cases have pseudonyms


def test_what_crossmr_wrote_beside_dicom_is_not_said(tmp_path, model):
    dicoms = pytest.importorskip("dicoms", reason="pip install crossmr[dicom]", exc_type=ImportError)
    pytest.importorskip("dcm2niix", reason="pip install crossmr[dicom]")
    dicoms.write(tmp_path, ("t1n", "t2w"))
    complete_cohort(tmp_path, tmp_path / "out", model, replace(SETTINGS, samples=2))
    listener = Listener()
    (planned,) = plan_cohort(tmp_path, tmp_path / "second", model, SETTINGS, display=listener)
    assert (planned.synthesise, listener.said) == (["t1c", "t2f"], [])
