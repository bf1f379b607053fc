"""Evaluation by another protocol: what is dropped, what is written, and what is refused."""

import csv
import json
import math
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import SHAPE, make_head, save_untrained, write_study
from typer.testing import CliRunner

from crossmr.baselines import fit_baselines
from crossmr.cli import app
from crossmr.data.naming import find_studies
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.display import LOG, Display
from crossmr.errors import ConfigError, OutputError, StudyError
from crossmr.evaluation import evaluate as evaluating
from crossmr.evaluation.challenge import ProtocolSettings, evaluate_by_protocol, summarise_scores, warnings_of
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.protocols import ERASED, REAL, ZEROS, OtherScore, dice, measure_by
from crossmr.evaluation.segmenter import Segmenter
from crossmr.evaluation.subjects import subject_of_files
from crossmr.evaluation.tables import BASELINE, other_tables
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_evaluation
from crossmr.parts import Part

ALL = ("t1n", "t1c", "t2w", "t2f")
CASES = ("A1", "B2", "C3", "D4")
DROPPED = {"A1": "t1n", "B2": "t2f", "C3": "t2f", "D4": "t1n"}
OWN = "unguided"
SEGMENTER = """
import sys, pathlib, nibabel as nib, numpy as np
study, labels = map(pathlib.Path, sys.argv[1:])
images = {m: nib.load(study / f"{study.name}-{m}.nii.gz") for m in ("t1n", "t1c", "t2w", "t2f")}
bright = [np.asarray(i.dataobj) > np.quantile(i.dataobj, 0.99) for i in images.values()]
found = np.logical_and.reduce(bright).astype(np.uint8) * 3
nib.save(nib.Nifti1Image(found, images["t1n"].affine), labels)
"""


def settings(protocol="brasyn", segmenter=None, **changes):
    changes = {"inference": InferenceSettings(ddim_steps=3, precision="float32"), **changes}
    return ProtocolSettings(protocol, segmenter, EvaluationSettings(**changes))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mean(summary, predictor, measure, target="all"):
    (found,) = [e for e in summary if (e["predictor"], e["measure"], e["target"]) == (predictor, measure, target)]
    return found["mean"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four patients, of whom three have a lesion outlined, the third's FLAIR alone being without it."""
    folder = tmp_path_factory.mktemp("cohort")
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:16, 14:18, 9:15] = 3
    for seed, case in enumerate(CASES):
        bright = np.float32(150) * (labels > 0) * (case != "D4")
        made = {m: make_head(m, seed=seed, air=False) + bright for m in ALL}
        write_study(folder, case, replace={**made, **({"seg": labels} if case != "D4" else {})}, modalities=())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cohort):
    """A model of any subset."""
    fitted = fit_baselines([lambda f=f: subject_of_files(f).volumes for f in find_studies(cohort)], ALL)
    place = tmp_path_factory.mktemp("any") / "model"
    return save_untrained(place, guidance="none", sources=ALL, targets=ALL, baselines=fitted)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A model of T1 and T2 to T1ce and FLAIR."""
    return save_untrained(tmp_path_factory.mktemp("fixed") / "model", guidance="none")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    script = tmp_path_factory.mktemp("segmenter") / "segment.py"
    script.write_text(SEGMENTER)
    return Segmenter(f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{study}} {{labels}}")


@pytest.fixture(scope="module")
def measured(cohort, folder, segmenter, tmp_path_factory):
    """The cohort by BraSyn's protocol, with Dice: the folder, what was returned and the rows."""
    out = tmp_path_factory.mktemp("measured")
    result = evaluate_by_protocol(folder, cohort, out, settings(segmenter=segmenter))
    return out, result, rows_of(out / "metrics.csv")


def test_one_contrast_of_each_case_is_dropped_by_the_challenges_rule(measured):
    _, result, rows = measured
    assert result["dropped"] == DROPPED
    assert {row["case"]: row["target"] for row in rows} == DROPPED
    for row in rows:
        assert set(row["sources"].split("+")) == {*ALL} - {row["target"]}


def test_a_warning_of_memory_is_kept_in_the_log(cohort, fixed, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "check_memory", lambda case, _: f"{case}: close other programs")
    shutil.copytree(cohort / "A1", tmp_path / "cohort" / "A1")
    evaluate_by_protocol(
        fixed, tmp_path / "cohort", tmp_path / "out", settings("published"), display=Display(quiet=True)
    )
    assert "A1: close other programs" in (tmp_path / "out" / LOG).read_text()


def test_every_image_is_measured_beside_trivial_ones(measured, cohort):
    _, result, rows = measured
    assert result["own"] == OWN
    of_a1 = {(row["predictor"], row["measure"]): float(row["value"]) for row in rows if row["case"] == "A1"}
    ssim = [f"ssim_{region}" for region in ("whole", "tumour", "healthy")]
    dices = [f"dice_{region}" for region in ("wt", "tc", "et")]
    expected = {(p, m) for p in (OWN, BASELINE, ZEROS, ERASED) for m in ssim}
    assert set(of_a1) == expected | {(p, m) for p in (OWN, BASELINE, REAL) for m in dices}
    subject = subject_of_files(find_studies(cohort)[0])
    for name, values in measure_by("brasyn", subject, "t1n", {}).items():
        for measure, value in values.items():
            assert of_a1[name, measure] == pytest.approx(value, abs=1e-6)
    without_labels = {(row["predictor"], row["measure"]) for row in rows if row["case"] == "D4"}
    assert without_labels == {(p, "ssim_whole") for p in (OWN, BASELINE, ZEROS)}


def test_dice_of_the_real_image_is_the_ceiling(measured, cohort):
    """The segmenter finds what is bright in all four, so that it depends on the image that was made."""
    _, result, rows = measured
    summary = result["summary"]
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:16, 14:18, 9:15] = 3
    for row in rows:
        if row["predictor"] == REAL and row["measure"] == "dice_et":
            images = [make_head(m, seed=CASES.index(row["case"]), air=False) + 150.0 * (labels > 0) for m in ALL]
            found = np.logical_and.reduce([image > np.quantile(image, 0.99) for image in images])
            assert float(row["value"]) == pytest.approx(dice(3 * found.astype(np.uint8), labels)["dice_et"])
    assert mean(summary, REAL, "dice_et") > 0.8
    assert mean(summary, OWN, "dice_et") < mean(summary, REAL, "dice_et")


def test_means_are_over_cases_all_and_by_target(measured):
    _, result, rows = measured
    for target, cases in (("all", CASES), ("t1n", ("A1", "D4")), ("t2f", ("B2", "C3"))):
        values = [
            float(row["value"])
            for row in rows
            if (row["predictor"], row["measure"]) == (OWN, "ssim_whole") and row["case"] in cases
        ]
        assert len(values) == len(cases)
        assert mean(result["summary"], OWN, "ssim_whole", target) == pytest.approx(np.mean(values))


def test_what_is_written_is_what_is_returned_and_names_no_place(measured, cohort):
    out, result, _ = measured
    text = (out / "metrics.json").read_text()
    assert json.loads(text) == result | {
        "segmenter": f"{sys.executable.rsplit('/')[-1]} segment.py {{study}} {{labels}}"
    }
    assert str(cohort) not in text
    assert result["protocol"] == "brasyn"
    assert "What it hides" in result["text"]
    assert result["patients"] == {case: case for case in CASES}
    assert warnings_of(result) == ["The model does not say on whom it was trained: these patients may be among them."]


def test_a_prepared_set_gives_the_same(measured, cohort, folder, tmp_path):
    """Up to its half precision; but no Dice."""
    prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(1.0, 0.0, 0.0)))
    evaluate_by_protocol(folder, tmp_path / "set", tmp_path / "out", settings(split="train"))
    rows = {(r["case"], r["predictor"], r["measure"]): float(r["value"]) for r in rows_of(tmp_path / "out/metrics.csv")}
    _, _, expected = measured
    assert len(rows) == sum(row["measure"].startswith("ssim") for row in expected)
    for row in expected:
        if row["measure"].startswith("ssim"):
            assert rows[row["case"], row["predictor"], row["measure"]] == pytest.approx(float(row["value"]), abs=0.01)


def test_published_takes_every_target_of_any_model(cohort, folder, fixed, tmp_path):
    result = evaluate_by_protocol(fixed, cohort, tmp_path / "out", settings("published", against=fixed))
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    assert {(row["sources"], row["target"]) for row in rows} == {("t1n+t2w", "t1c"), ("t1n+t2w", "t2f")}
    assert {row["measure"] for row in rows} == {"psnr", "ssim"}
    second = result["against"]["predictor"]
    assert {row["predictor"] for row in rows} == {OWN, second, ZEROS, ERASED}
    assert mean(result["summary"], OWN, "psnr") == pytest.approx(mean(result["summary"], second, "psnr"))
    result = evaluate_by_protocol(folder, cohort, tmp_path / "any", settings("published"))
    assert {entry["target"] for entry in result["summary"]} == {"all", *ALL}
    assert result["dropped"] == {}


def test_a_case_that_lacks_a_contrast_fails_alone_and_keeps_its_place_in_the_draw(cohort, folder, tmp_path):
    for case in CASES:
        (tmp_path / "cohort" / case).mkdir(parents=True)
        for path in (cohort / case).iterdir():
            if (case, path.name) != ("B2", "B2-t1c.nii.gz"):
                (tmp_path / "cohort" / case / path.name).symlink_to(path)
    result = evaluate_by_protocol(folder, tmp_path / "cohort", tmp_path / "out", settings())
    assert result["failed"] == {"B2": "B2: lacks t1c; BraSyn's studies have all four contrasts."}
    assert result["cases"] == ["A1", "C3", "D4"]
    assert {r["case"]: r["target"] for r in rows_of(tmp_path / "out/metrics.csv")}["C3"] == DROPPED["C3"]


def test_a_segmenter_that_fails_fails_its_cases(cohort, folder, tmp_path):
    broken = Segmenter(f"{shlex.quote(sys.executable)} -c 'raise SystemExit(\"no GPU\")' {{study}} {{labels}}")
    result = evaluate_by_protocol(folder, cohort, tmp_path / "out", settings(segmenter=broken))
    assert result["cases"] == ["D4"]  # without labels nothing is outlined
    assert list(result["failed"]) == ["A1", "B2", "C3"]
    assert result["failed"]["A1"].startswith("A1: the segmenter ended with code 1: no GPU. ")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "A1").symlink_to(cohort / "A1")
    with pytest.raises(StudyError, match=r"No study of .* could be measured: A1: the segmenter ended .*: no GPU"):
        evaluate_by_protocol(folder, tmp_path / "one", tmp_path / "none", settings(segmenter=broken))
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("metrics*"))


def test_a_segmenter_without_any_labels_is_said(measured):
    _, result, _ = measured
    bare = result | {"summary": [e for e in result["summary"] if not e["measure"].startswith("dice")]}
    assert warnings_of(bare)[-1] == "No Dice was measured: no study has labels."


def test_what_a_protocol_is_not_for_is_refused(cohort, folder, fixed, segmenter, tmp_path):
    with pytest.raises(ConfigError, match="the model makes t1c, t2f from fixed sources"):
        evaluate_by_protocol(fixed, cohort, tmp_path / "out", settings())
    with pytest.raises(ConfigError, match=r"--segmenter is 'true': it lacks \{study\}"):
        settings(segmenter="true")
    with pytest.raises(ConfigError, match="expected crossmr, brasyn or published"):
        settings("brats")
    for given in ({"every_subset": True}, {"part": Part(1, 2)}):
        with pytest.raises(ConfigError, match="--every-subset and --part are for --protocol crossmr"):
            settings(**given)
    with pytest.raises(ConfigError, match="--segmenter is for --protocol brasyn"):
        settings("published", segmenter)
    prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(1.0, 0.0, 0.0)))
    with pytest.raises(ConfigError, match="--segmenter needs a folder of studies"):
        evaluate_by_protocol(folder, tmp_path / "set", tmp_path / "out", settings(segmenter=segmenter))
    assert not (tmp_path / "out").exists()


def test_evaluations_by_several_protocols_never_replace_one_another(measured, cohort, folder, tmp_path):
    out, _, _ = measured
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(OutputError, match=r"with --protocol brasyn, and this is --protocol crossmr\. Name another"):
        evaluate(folder, cohort, out)
    with pytest.raises(OutputError, match=r"with --protocol brasyn, and this is --protocol published\. Name another"):
        evaluate_by_protocol(folder, cohort, out, settings("published"))
    with pytest.raises(OutputError, match=r"by another protocol, which has no page: see its metrics\.csv"):
        report_evaluation(out)
    assert (out / "metrics.json").read_bytes() == before
    (tmp_path / "metrics.csv").write_text("mine\n")
    with pytest.raises(OutputError, match=r"metrics\.csv"):
        evaluate_by_protocol(folder, cohort, tmp_path, settings())


def test_a_table_for_all_targets_and_one_for_each(measured):
    _, result, _ = measured
    tables = other_tables("brasyn", result["summary"])
    assert [str(table.title) for table in tables] == [
        "all by the protocol 'brasyn': mean over 4 images",
        "t1n by the protocol 'brasyn': mean over 2 images",
        "t2f by the protocol 'brasyn': mean over 2 images",
    ]
    columns = {str(column.header): list(column.cells) for column in tables[0].columns}
    assert columns["predictor"] == [OWN, BASELINE, ZEROS, ERASED, REAL]
    assert columns["SSIM\nwhole"][0] == f"{mean(result['summary'], OWN, 'ssim_whole'):.4f}"
    assert columns["Dice\nWT"][2:] == ["–", "–", f"{mean(result['summary'], REAL, 'dice_wt'):.3f}\nof 3 images"]


def test_the_command_prints_the_table_and_its_summary(cohort, folder, segmenter, tmp_path):
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "A1").symlink_to(cohort / "A1")
    line = ["evaluate", str(folder), str(tmp_path / "cohort"), "-o", str(tmp_path / "out"), "--precision", "float32"]
    run = CliRunner().invoke(app, [*line, "--protocol", "brasyn", "--segmenter", segmenter.command, "--json"])
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout)
    assert printed["counts"] == {"failed": 0, "measured": 1}
    assert printed["summary"] == json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]
    assert "t1n by the protocol 'brasyn': mean over 1 image" in run.stderr
    run = CliRunner().invoke(app, [*line, "--segmenter", segmenter.command])
    assert isinstance(run.exception, ConfigError)
    assert str(run.exception) == "--segmenter is for --protocol brasyn."


def test_rows_are_the_fields_of_a_score(measured):
    _, _, rows = measured
    assert list(rows[0]) == list(OtherScore.__dataclass_fields__)


def test_a_measure_that_an_image_does_not_have_is_left_out_of_its_mean():
    scores = [
        OtherScore(case, "t1n", "t2f", OWN, "ssim_tumour", value) for case, value in (("A", 0.5), ("B", math.nan))
    ]
    (summary,) = summarise_scores(scores)
    assert (summary["mean"], summary["images"]) == (0.5, 1)
    (summary,) = summarise_scores(scores[1:])
    assert (summary["mean"], summary["images"]) == (None, 0)
