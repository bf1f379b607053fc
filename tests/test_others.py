"""Images of other programs: found by name, put on the scale of the studies, measured beside a model's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import Listener, save_untrained, write_study
from typer.testing import CliRunner

from crossmr.cli import app
from crossmr.data.head import Normalisation
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.errors import ConfigError, StudyError
from crossmr.evaluation.challenge import ProtocolSettings, evaluate_by_protocol
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate, warnings_of
from crossmr.evaluation.others import PREFIX, find_images, say_images
from crossmr.evaluation.protocols import dropped_contrasts
from crossmr.evaluation.subjects import find_subjects
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_evaluation

ALL = ("t1n", "t1c", "t2w", "t2f")
CASES = ("A1", "B2", "C3")
INFERENCE = InferenceSettings(precision="float32")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for seed, case in enumerate(CASES):
        write_study(folder, case, ALL, seed=seed)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of any subset, untrained."""
    place = tmp_path_factory.mktemp("model") / "any"
    return save_untrained(place, guidance="none", sources=ALL, targets=ALL)


def nearly(voxels):
    """The truth itself is refused."""
    return voxels * np.float32(1.0001)


def write_images(cohort: Path, folder: Path, change=nearly, cases=CASES, target="t2f") -> Path:
    """The true images of a contrast, changed, as another program might have written them."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        true = nib.load(cohort / case / f"{case}-{target}.nii.gz")
        made = nib.Nifti1Image(change(true.get_fdata(dtype=np.float32)), true.affine)
        nib.save(made, folder / f"{case}-{target}.nii.gz")
    return folder


def settings(**changes) -> EvaluationSettings:
    return EvaluationSettings(inference=INFERENCE, **changes)


@pytest.mark.parametrize("scale", ["of the scan", "of crossmr"])
def test_the_truth_is_perfect_in_its_own_units_and_on_the_scale_of_a_set(cohort, tmp_path, scale):
    folder = write_images(cohort, tmp_path / "images")
    for found in find_subjects(cohort) if scale == "of crossmr" else ():
        path, subject = folder / f"{found.name}-t2f.nii.gz", found.read()
        image = nib.load(path)
        voxels = subject.normalisation["t2f"].apply(image.get_fdata(dtype=np.float32))
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    (images,) = find_images({"mine": folder}, CASES, ALL)
    assert images.name == f"{PREFIX}mine"
    for found in find_subjects(cohort):
        subject = found.read()
        assert {*images.files[subject.name]} == {"t2f"}
        made, doubt = images.of(subject, "t2f")
        np.testing.assert_allclose(made, subject.volumes["t2f"], atol=1e-4)
        assert doubt == ""


def scaled(cohort, folder, change):
    """Images on crossmr's scale, changed."""
    for found in find_subjects(cohort):
        subject = found.read()
        path = write_images(cohort, folder, cases=[found.name]) / f"{found.name}-t2f.nii.gz"
        image = nib.load(path)
        voxels = subject.normalisation["t2f"].scale(image.get_fdata(dtype=np.float32))
        nib.save(nib.Nifti1Image(change(voxels).astype(np.float32), image.affine), path)
    return folder


def outside(voxels, value):
    changed = voxels.copy()
    changed[0], changed[:, :, -1] = value, value
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda v: np.clip(v, 0, 1),
        lambda v: v,  # not clipped
        lambda v: outside(v, -1),
        lambda v: outside(v, np.nan),
        lambda v: v + np.random.default_rng(0).normal(0, 1e-3, v.shape),
    ],
)
def test_what_lies_beyond_the_scale_or_the_head_does_not_matter(cohort, tmp_path, change):
    (images,) = find_images({"mine": scaled(cohort, tmp_path / "images", change)}, CASES, ALL)
    subject = find_subjects(cohort)[0].read()
    head = subject.head_of("t2f")
    made, _ = images.of(subject, "t2f")
    assert np.abs(made - subject.volumes["t2f"])[head].mean() < 2e-3


@pytest.mark.parametrize(
    "change", [lambda v: 255 * np.clip(v, 0, 1), lambda v: 2 * np.clip(v, 0, 1) - 1, lambda v: (v - 1 / 3) * 15]
)
def test_other_units_are_refused(cohort, tmp_path, change):
    """Bytes, [-1, 1] and robust standard deviations, where the scans have units of their own."""
    far = write_images(cohort, tmp_path / "cohort", lambda voxels: voxels * np.float32(40) + np.float32(900))
    subject = find_subjects(cohort)[0].read()
    (images,) = find_images({"far": far}, CASES, ALL)
    with pytest.raises(StudyError, match=r"A1-t2f.nii.gz has other units: .* Write the images in"):
        images.of(subject, "t2f")
    wide = replace(subject, normalisation={"t2f": Normalisation(low=-4000, high=8000, air=-3000)})
    (images,) = find_images({"mine": scaled(cohort, tmp_path / "images", change)}, CASES, ALL)
    with pytest.raises(StudyError, match="has other units"):
        images.of(wide, "t2f")


def test_the_true_scans_are_no_images(cohort):
    (images,) = find_images({"mine": cohort}, CASES, ALL)
    with pytest.raises(StudyError, match=r"A1-t2f.nii.gz is the true scan"):
        images.of(find_subjects(cohort)[0].read(), "t2f")


def test_a_smoother_image_is_not_stretched(cohort, tmp_path):
    """By its own quartiles it would be."""

    def halved(voxels):
        middle = np.median(voxels[voxels > voxels.mean()])
        return middle + (voxels - middle) / np.float32(2)

    folder = write_images(cohort, tmp_path / "images", halved)
    (images,) = find_images({"mine": folder}, CASES, ALL)
    subject = find_subjects(cohort)[0].read()
    head = subject.head_of("t2f")
    made, true = (np.percentile(v[head], (25, 75)) for v in (images.of(subject, "t2f")[0], subject.volumes["t2f"]))
    assert np.ptp(made) == pytest.approx(np.ptp(true) / 2, rel=0.01)


def test_they_stand_beside_the_model_with_all_its_measures_and_in_its_report(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images", lambda voxels: voxels + np.float32(0.01))
    result = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": folder}))
    rows = {(e["target"], e["predictor"]): e for e in result["summary"] if e["region"] == "brain"}
    assert rows["t2f", "images: mine"]["correlation"]["mean"] == pytest.approx(1, abs=1e-4)
    assert ("t1c", "images: mine") not in rows
    assert rows["t2f", result["own"]]["correlation"]["mean"] < 0.999
    kept = {(e["target"], e["predictor"], e["structure"]) for e in result["contrasts"]}
    assert not kept or any(name == "images: mine" for _, name, _ in kept)
    shown = [p for p in result["pictures"] if p["target"] == "t2f"]
    assert all("other model" in {panel["kind"] for panel in p["panels"]} for p in shown)
    assert "images: mine" in report_evaluation(tmp_path / "out").read_text()


def test_a_prepared_set_knows_the_shape_alone(cohort, model, tmp_path):
    prepare(cohort, tmp_path / "set", PrepareSettings(split="34/33/33"))
    folder = write_images(cohort, tmp_path / "images")
    result = evaluate(model, tmp_path / "set", tmp_path / "out", settings(images={"mine": folder}))
    (row,) = [e for e in result["summary"] if (e["predictor"], e["region"]) == ("images: mine", "brain")]
    assert row["correlation"]["mean"] == pytest.approx(1, abs=1e-3)


def test_parts_join_where_they_are_of_the_same_images_by_whatever_path(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images")
    shutil.copytree(folder, tmp_path / "copy")
    first = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": folder}, part="1/2"))
    assert not first["finished"]
    last = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": tmp_path / "copy"}, part="2/2"))
    assert last["finished"]
    (row,) = [e for e in last["summary"] if (e["predictor"], e["region"]) == ("images: mine", "brain")]
    assert row["patients"] == len(CASES)
    evaluate(model, cohort, tmp_path / "other", settings(part="1/2"))
    alone = evaluate(model, cohort, tmp_path / "other", settings(images={"mine": folder}, part="2/2"))
    assert not alone["finished"]


def test_of_every_subset_they_stand_beside_the_largest(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images")
    result = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": folder}, every_subset=True))
    sources = {e["sources"] for e in result["summary"] if e["predictor"] == "images: mine"}
    assert sources == {"t1n+t1c+t2w"}


def test_what_lies_elsewhere_or_holds_no_numbers_is_left_out_with_a_word(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images")
    moved = nib.load(folder / "B2-t2f.nii.gz")
    affine = moved.affine.copy()
    affine[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asanyarray(moved.dataobj), affine), folder / "B2-t2f.nii.gz")
    holes = nib.load(folder / "C3-t2f.nii.gz")
    voxels = holes.get_fdata(dtype=np.float32)
    voxels[14, 16, 12] = np.nan
    nib.save(nib.Nifti1Image(voxels, holes.affine), folder / "C3-t2f.nii.gz")
    listener = Listener()
    result = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": folder}), display=listener)
    assert (result["cases"], result["failed"]) == ([*CASES], {})  # the model's own go on
    (row,) = [e for e in result["summary"] if (e["predictor"], e["region"]) == ("images: mine", "brain")]
    assert row["patients"] == 1
    said = "\n".join(listener.said)
    assert "B2-t2f.nii.gz is" in said
    assert "lies up to 3 mm elsewhere. Write the images on the grid" in said
    assert "C3-t2f.nii.gz has voxels within the head that are NaN" in said
    (subject,) = [found.read() for found in find_subjects(cohort) if found.name == "A1"]
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), folder / "A1-t2f.nii.gz")
    with pytest.raises(StudyError, match=r"A1: images: mine: A1-t2f.nii.gz is 5×6×7 at 1×1×1 mm, but the study is"):
        find_images({"mine": folder}, CASES, ALL)[0].of(subject, "t2f")


def test_studies_without_images_are_said_and_names_that_match_none_are_refused(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images", cases=CASES[:2])
    listener = Listener()
    result = evaluate(model, cohort, tmp_path / "out", settings(images={"mine": folder}), display=listener)
    said = warnings_of(result)
    assert any("images of 2 of 3 studies were measured" in line and "C3 lack" in line for line in said)
    assert any("by a training on whom, nobody here knows" in line for line in said)
    assert "images of 2 of 3 studies were measured" in report_evaluation(tmp_path / "out").read_text()
    with pytest.raises(
        ConfigError, match=r"--images mine: .* has no t1c of these studies: it has A1, B2, and they are"
    ):
        find_images({"mine": folder}, CASES, ("t1c",))
    with pytest.raises(ConfigError, match="it has A1, B2, and they are Z9"):
        find_images({"mine": folder}, ("Z9",), ALL)
    assert say_images([], [], CASES) == []


def test_by_another_protocol_and_on_the_command_line(cohort, model, tmp_path):
    folder = write_images(cohort, tmp_path / "images")
    chosen = ProtocolSettings("published", None, settings(images={"mine": folder}))
    result = evaluate_by_protocol(model, cohort, tmp_path / "published", chosen)
    rows = {(e["target"], e["predictor"]) for e in result["summary"]}
    assert ("t2f", "images: mine") in rows
    said = CliRunner().invoke(
        app, ["evaluate", str(model), str(cohort), "-o", str(tmp_path / "out"), "--images", f"mine={folder}"]
    )
    assert said.exit_code == 0, said.output
    assert "images: mine" in said.output


def test_what_crossmr_wrote_itself_can_be_given(cohort, model, tmp_path):
    """Its files are marked as synthetic, and are no scans; here they are what is measured."""
    shutil.copytree(cohort, tmp_path / "less")
    for case in CASES:
        (tmp_path / "less" / case / f"{case}-t2f.nii.gz").unlink()
    said = CliRunner().invoke(
        app, ["complete", str(tmp_path / "less"), "-o", str(tmp_path / "made"), "--model", str(model)]
    )
    assert (tmp_path / "made").exists(), said.output
    (images,) = find_images({"earlier": tmp_path / "made"}, CASES, ("t2f",))
    assert {case: [*files] for case, files in images.files.items()} == {case: ["t2f"] for case in CASES}
    assert all("std" not in path.name for files in images.files.values() for path in files.values())


def test_what_crossmr_wrote_in_a_scan_s_units_is_refused(cohort, tmp_path):
    """With --scale input it is in those of a source, not of the scan that is missing."""
    folder = write_images(cohort, tmp_path / "made")
    for path in folder.iterdir():
        image = nib.load(path)
        marked = nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 50 + 100, image.affine)
        marked.header["descrip"] = b"SYNTHETIC t2f by crossmr"
        nib.save(marked, path)
    (images,) = find_images({"made": folder}, CASES, ("t2f",))
    with pytest.raises(StudyError, match=r"was written with --scale input.*--scale unit"):
        images.of(find_subjects(cohort)[0].read(), "t2f")


def test_units_that_may_be_others_are_said_and_measured(cohort, tmp_path):
    folder = scaled(cohort, tmp_path / "images", lambda v: np.clip((v - 1 / 3) * 0.4 + 1 / 3 + 0.08, 0, 1))
    (images,) = find_images({"mine": folder}, CASES, ALL)
    image, doubt = images.of(find_subjects(cohort)[0].read(), "t2f")
    assert image.any()
    assert "may have other units, and is measured as it is: within the head its median lies 1.2 robust" in doubt


def test_images_none_of_which_can_be_measured_fail_the_command_and_stand_in_the_record(cohort, model, tmp_path):
    out = tmp_path / "out"
    said = CliRunner().invoke(app, ["evaluate", str(model), str(cohort), "-o", str(out), "--images", f"x={cohort}"])
    assert said.exit_code == 1
    words = " ".join(said.output.split())
    assert "images: x: images of 0 of 3 studies were measured, so it is in no table." in words
    assert "3 studies: 0 failed, 3 measured" in words
    body = json.loads((out / "metrics.json").read_text())
    assert body["images"] == {"images: x": 0}
    assert sum("is the true scan" in note for note in body["notes"]) == len(CASES) * len(ALL)
    assert str(tmp_path) not in json.dumps(body)


def test_of_the_challenge_s_dropped_contrasts_those_with_images_count(cohort, model, tmp_path):
    """FLAIR alone has images; of two of the three studies it is what is dropped."""
    folder = write_images(cohort, tmp_path / "images")
    dropped = dropped_contrasts(CASES)
    chosen = ProtocolSettings("brasyn", None, settings(images={"mine": folder}))
    result = evaluate_by_protocol(model, cohort, tmp_path / "out", chosen)
    count = [*dropped.values()].count("t2f")
    assert 0 < count < len(CASES)
    assert result["images"] == {"images: mine": count}
    assert any(f"images of {count} of 3 studies were measured" in line for line in result["notes"])


def test_a_name_stands_for_one_folder(cohort, model, tmp_path):
    folders = [write_images(cohort, tmp_path / name) for name in ("a", "b")]
    given = [part for folder in folders for part in ("--images", f"mine={folder}")]
    said = CliRunner().invoke(app, ["evaluate", str(model), str(cohort), "-o", str(tmp_path / "out"), *given])
    with pytest.raises(ConfigError, match="--images names 'mine' twice"):
        raise said.exception
