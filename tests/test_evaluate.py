"""Evaluation as a whole: every file agrees, a second model stands beside the first, and what fails is listed."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHAPE, Listener, header_alone, image, make_head, rows_of, save_untrained, tree, write_study
from PIL import Image

from crossmr import main_memory
from crossmr.baselines import BASELINES, fit_baselines
from crossmr.cli import report as report_command
from crossmr.data.dataset import PreparedDataset
from crossmr.data.naming import find_studies
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.display import LOG, Display
from crossmr.errors import ConfigError, ModelError, NamingError, OutputError, StudyError
from crossmr.evaluation import evaluate as evaluation
from crossmr.evaluation import predictors as module
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate, warnings_of
from crossmr.evaluation.measurements import measured_parts
from crossmr.evaluation.measures import METRICS, measure, measure_contrasts
from crossmr.evaluation.predictors import find_predictors, memory_needed, predict
from crossmr.evaluation.subjects import find_subjects, subject_of_files
from crossmr.evaluation.tables import read_scores, tables, uncertainty_table
from crossmr.networks.inference import InferenceSettings, Synthesis
from crossmr.networks.model import read_model
from crossmr.networks.trained_on import names_of, remember
from crossmr.output.report import report_evaluation
from crossmr.parts import WORK, Part
from crossmr.picture import GAP, PANEL

INFERENCE = InferenceSettings(ddim_steps=3, precision="float32")
SETTINGS = EvaluationSettings(inference=INFERENCE)
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
ALL = (*SOURCES, *TARGETS)
CASES = ("A1", "B2", "C3", "D4", "E5", "F6")
WITH_LESION = ("A1", "B2", "C3")
OWN, GUIDED, AGAINST = "unguided", "guided: sample", "against: other"
PREDICTORS = (OWN, GUIDED, AGAINST, *BASELINES)


def settings(**changes):
    return EvaluationSettings(**{"inference": INFERENCE, **changes})


def listed(train, val=()):
    """The list of a training on patients by name."""
    return remember(*([name for patient in part for name in names_of(patient, ())] for part in (train, val)))


def subjects(folder):
    """Every study of a folder as the evaluation reads it."""
    return {files.case: subject_of_files(files) for files in find_studies(folder)}


def within(subject, target):
    """The head without those of its slices in which the target is wholly as dark as the scale goes: its poles."""
    slices = [
        bool(inside.any() and np.ptp(plane[inside]))
        for plane, inside in zip(subject.volumes[target], subject.head, strict=True)
    ]
    return subject.head & np.array(slices)[:, None, None]


def indexed(scores):
    return {(s.case, s.target, s.predictor, s.region): s for s in scores}


def entry(summary, target, predictor, region):
    (chosen,) = [e for e in summary if (e["target"], e["predictor"], e["region"]) == (target, predictor, region)]
    return chosen


def write_lesion(folder, case, seed=0):
    """A study with a bright lesion of 96 voxels, outlined as enhancing."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:16, 14:18, 9:15] = 3
    volumes = {m: make_head(m, seed=seed) + np.float32(60) * (labels > 0) for m in ALL}
    return write_study(folder, case, replace={**volumes, "seg": labels})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six patients; three have a lesion outlined."""
    folder = tmp_path_factory.mktemp("cohort")
    for seed, case in enumerate(CASES):
        if case in WITH_LESION:
            write_lesion(folder, case, seed)
        else:
            write_study(folder, case, ALL, seed=seed)
    return folder


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """Baselines fitted on two other patients."""
    folder = tmp_path_factory.mktemp("others")
    for seed in (20, 21):
        write_study(folder, f"T{seed}", ALL, seed=seed)
    return fit_baselines([lambda s=s: s.volumes for s in subjects(folder).values()], ALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, baselines):
    """The model measured, which gives standard deviations."""
    patients = [listed(["A1", "Z9"], ["B2"])]
    place = tmp_path_factory.mktemp("main") / "model"
    return save_untrained(place, guidance="last", uncertainty=True, baselines=baselines, patients=patients)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second model, always guided, trained on other patients."""
    known = {"training": {"recipe": "paper"}, "patients": [listed(["C3", "D4"])]}
    return save_untrained(tmp_path_factory.mktemp("runs") / "other" / "model", guidance="joint", seed=1, **known)


@pytest.fixture(scope="module")
def model(folder):
    model = read_model(folder)
    model.calibration = {"variance": torch.tensor([[4.0, 0.01], [1.0, 0.0]])}
    return model


@pytest.fixture(scope="module")
def evaluated(cohort, model, other, tmp_path_factory):
    """The cohort, measured once: the folder, what was returned and the scores."""
    out = tmp_path_factory.mktemp("evaluated")
    body = evaluate(model, cohort, out, settings(guidances=("sample",), against=other))
    return out, body, read_scores(out / "metrics.csv")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A plain U-Net: one predictor to measure."""
    return read_model(save_untrained(tmp_path_factory.mktemp("bare"), guidance="none"))


# Every file


def test_a_row_for_every_case_target_predictor_and_region(evaluated):
    _, body, scores = evaluated
    expected = {
        (case, target, predictor, region)
        for case in CASES
        for target in TARGETS
        for predictor in PREDICTORS
        for region in ("volume", "brain", "deep", "slices", *(["tumour"] if case in WITH_LESION else []))
    }
    assert len(scores) == len(expected)
    assert set(indexed(scores)) == expected
    for score in scores:
        assert score.sources == "t1n+t2w"
        assert score.protocol == ("slice" if score.region == "slices" else "volume")
        assert score.patient == score.case
        assert all(math.isfinite(getattr(score, metric)) for metric in METRICS if metric != "correlation")
        if score.predictor in BASELINES and score.region in ("brain", "deep"):  # what is untrained may be constant
            assert math.isnan(score.correlation) == (score.predictor == "constant")
    assert body["cases"] == sorted(CASES)
    assert body["own"] == OWN
    assert body["failed"] == {}
    assert tuple(dict.fromkeys(e["predictor"] for e in body["summary"])) == PREDICTORS


def test_the_scores_are_of_each_case_s_own_predictions(evaluated, cohort, model, other):
    _, _, scores = evaluated
    by_key = indexed(scores)
    predictors = find_predictors(model, INFERENCE, ("sample",), other)
    for case in ("A1", "E5"):
        subject = subjects(cohort)[case]
        again = measure(subject, SOURCES, predict(subject, SOURCES, predictors).images)
        assert {score.predictor for score in again} == set(PREDICTORS)
        for score in again:
            written = by_key[case, score.target, score.predictor, score.region]
            for metric in METRICS:
                assert getattr(written, metric) == pytest.approx(getattr(score, metric), rel=1e-4, nan_ok=True)


def test_the_summary_is_over_the_scores(evaluated):
    _, body, scores = evaluated
    assert {(e["target"], e["predictor"], e["region"]) for e in body["summary"]} == {
        (target, predictor, region)
        for target in TARGETS
        for predictor in PREDICTORS
        for region in ("volume", "brain", "deep", "tumour", "slices")
    }
    for e in body["summary"]:
        assert e["patients"] == (3 if e["region"] == "tumour" else 6)
        chosen = [s for s in scores if (s.target, s.predictor, s.region) == (e["target"], e["predictor"], e["region"])]
        for metric in METRICS:
            values = [value for s in chosen if not math.isnan(value := getattr(s, metric))]
            assert ("p_uncorrected_against_first" in e[metric]) == (e["predictor"] != OWN)
            if not values:
                assert metric == "correlation"
                assert set(e[metric].values()) == {None}
                continue
            assert e[metric]["mean"] == pytest.approx(np.mean(values))
            interval = [e[metric][bound] for bound in ("low", "high")]
            if e["region"] == "tumour":  # of three patients
                assert interval == [None, None]
            else:
                bounds = (min(values) - 1e-9, interval[0], e[metric]["mean"], interval[1], max(values) + 1e-9)
                assert list(bounds) == sorted(bounds)
            assert (e[metric]["least"], e[metric]["most"]) == pytest.approx((min(values), max(values)))
            assert 0 < e[metric].get("p_uncorrected_against_first", 1) <= 1
    assert entry(body["summary"], "t2f", "constant", "brain")["mae"]["p_uncorrected_against_first"] == pytest.approx(
        2 / 2**6
    )


def test_json_is_strict_and_holds_what_was_returned(evaluated, model):
    out, body, _ = evaluated

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    assert json.loads((out / "metrics.json").read_text(), parse_constant=refuse) == body
    assert body["finished"] is True
    assert body["model_sha256"] == model.record["sha256"]
    wanted = {"seed": 0, "planes": 1, "ddim_steps": 3, "samples": 0, "device": "cpu", "precision": "float32"}
    assert body["settings"] == wanted
    assert "slice" in body["protocol"]
    assert set(body["versions"]) == {"crossmr", "torch"}


def test_cases_that_a_model_has_seen_are_named(evaluated):
    _, body, _ = evaluated
    assert body["overlap"] == {"known": True, "trained_on": ["A1"], "validated_on": ["B2"]}
    assert warnings_of(body) == [
        "The model was trained on 1 of these patients (A1): for them its numbers say nothing about new patients.",
        "The model was validated during training, and its standard deviations were calibrated, on 1 of these patients "
        "(B2): for them its numbers may be better than for new patients.",
        "The second model was trained on 2 of these patients (C3, D4): for them its numbers say nothing about new "
        "patients.",
    ]


def test_a_patient_who_was_trained_on_is_known_by_a_scan_under_another_name(cohort, tmp_path):
    """In a folder of studies and in a prepared set."""
    shutil.copytree(cohort / "B2", tmp_path / "cohort" / "X")
    for path in (tmp_path / "cohort" / "X").iterdir():
        path.rename(path.with_name(path.name.replace("B2", "X")))
    shutil.copytree(cohort / "C3", tmp_path / "cohort" / "C3")
    scan = subjects(cohort)["B2"].scans[0]
    patients = [remember(names_of("B2", [scan]), [])]
    model = read_model(save_untrained(tmp_path / "model", guidance="none", patients=patients))
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1.0, 0.0, 0.0)))
    for folder, split in {"cohort": None, "set": "train"}.items():
        body = evaluate(model, tmp_path / folder, tmp_path / "of" / folder, settings(split=split))
        assert body["overlap"]["trained_on"] == ["X"]


def test_patients_of_the_model_s_own_set_are_known_without_a_list(cohort, tmp_path):
    """The parts of the set that it was trained on say who was seen; nobody else is known."""
    prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(0.4, 0.3, 0.3, seed=0)))
    own = PreparedDataset(tmp_path / "set").fingerprint
    for fingerprint, known in ((own, True), ("another", False)):
        folder = save_untrained(tmp_path / fingerprint, guidance="none", training={"set": fingerprint})
        for split, key in (("train", "trained_on"), ("val", "validated_on"), ("test", None)):
            body = evaluate(folder, tmp_path / "set", tmp_path / "out", settings(split=split))
            nobody = {"known": known, "trained_on": [], "validated_on": []}
            assert body["overlap"] == nobody | ({key: body["cases"]} if known and key else {})
            if not known:
                (warning,) = warnings_of(body)
                assert warning == "The model does not say on whom it was trained: these patients may be among them."


def test_all_visits_of_a_patient_who_was_seen_are_named(cohort, tmp_path):
    for number, case in enumerate(("P1_baseline", "P1_followup", "P2_baseline")):
        write_study(tmp_path / "cohort", case, ALL, seed=number)
    model = read_model(save_untrained(tmp_path / "model", guidance="none", patients=[listed(["P1"], ["P2"])]))
    body = evaluate(model, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    assert body["overlap"]["trained_on"] == ["P1_baseline", "P1_followup"]
    assert body["overlap"]["validated_on"] == ["P2_baseline"]
    assert warnings_of(body)[0].startswith("The model was trained on 1 of these patients (P1_baseline, P1_fo")


def test_the_second_model_is_named_by_hash_and_training(evaluated, other, bare, cohort, tmp_path):
    _, body, _ = evaluated
    assert body["against"] == {
        "predictor": AGAINST,
        "guidance": "sample",
        "sha256": read_model(other).record["sha256"],
        "training": {"recipe": "paper"},
        "overlap": {"known": True, "trained_on": ["C3", "D4"], "validated_on": []},
    }
    shutil.copytree(cohort / "A1", tmp_path / "cohort" / "A1")
    assert evaluate(bare, tmp_path / "cohort", tmp_path / "out", SETTINGS)["against"] is None


def test_the_second_model_beside_itself_differs_nowhere(bare, cohort, tmp_path):
    again = save_untrained(tmp_path / "again", guidance="none")
    body = evaluate(bare, cohort / "A1", tmp_path / "out", settings(against=again))
    assert {e["predictor"] for e in body["summary"]} == {"unguided", "against: again"}
    for target in TARGETS:
        own, second = (entry(body["summary"], target, name, "brain") for name in ("unguided", "against: again"))
        for metric in METRICS:
            assert second[metric].pop("p_uncorrected_against_first") == 1
            assert second[metric].pop("p_holm_against_first") == 1
            assert second[metric] == own[metric]


def test_pictures_are_written_of_every_case_and_target(evaluated, cohort, model, other):
    out, body, _ = evaluated
    files = [f"{case}-{target}.webp" for case in CASES for target in TARGETS]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == files
    assert [picture["file"] for picture in body["pictures"]] == [f"pictures/{name}" for name in files]
    picture = body["pictures"][0]
    assert (picture["case"], picture["sources"], picture["target"]) == ("A1", list(SOURCES), "t1c")
    assert [(panel["modality"], panel["kind"]) for panel in picture["panels"]] == [
        *(("t1n", "acquired"), ("t2w", "acquired"), ("t1c", "synthetic"), ("t1c", "other model")),
        *(("t1c", "truth"), ("t1c", "error"), ("t1c", "standard deviation")),
    ]
    with Image.open(out / picture["file"]) as opened:
        assert opened.width == 7 * (PANEL + GAP) - GAP
        pixels = np.asarray(opened.convert("RGB")).astype(float)
    panels = [pixels[:, n * (PANEL + GAP) :][:, :PANEL] for n in range(7)]
    assert all(panel.std() > 10 for panel in panels[:5])
    for grey, colours in zip(panels[:2], panels[5:], strict=True):
        assert np.ptp(grey, axis=2).max() < 8 < np.ptp(colours, axis=2).max()
    subject = subjects(cohort)["A1"]
    images = predict(subject, SOURCES, find_predictors(model, INFERENCE, (), other)).images
    means = [images[OWN]["t1c"].mean(), images[AGAINST]["t1c"].mean(), subject.volumes["t1c"].mean()]
    assert np.argsort([panel.mean() for panel in panels[2:5]]).tolist() == np.argsort(means).tolist()


def test_a_perfect_predictor_is_perfect_and_beats_the_baselines(cohort, folder, tmp_path, monkeypatch):
    truths = {case: subject.volumes for case, subject in subjects(cohort).items()}

    def oracle(model, head, case, settings):
        return Synthesis(
            settings.targets, torch.from_numpy(np.stack([truths[case][t] for t in settings.targets])), None
        )

    monkeypatch.setattr(module, "synthesise", oracle)
    summary = evaluate(folder, cohort, tmp_path, SETTINGS)["summary"]
    scores = indexed(read_scores(tmp_path / "metrics.csv"))
    for case in CASES:
        for region in ("volume", "brain", "slices"):
            score = scores[case, "t1c", OWN, region]
            assert (score.mae, score.nmse, score.psnr) == (0, 0, math.inf)
            assert score.ssim == pytest.approx(1, abs=1e-5)
    for target in TARGETS:
        best = entry(summary, target, OWN, "brain")
        assert best["psnr"]["mean"] is None  # infinite, which JSON cannot say
        for predictor in BASELINES:
            baseline = entry(summary, target, predictor, "brain")
            assert best["mae"]["mean"] < baseline["mae"]["low"]
            assert best["ssim"]["mean"] > baseline["ssim"]["high"]
            assert baseline["ssim"]["p_uncorrected_against_first"] == pytest.approx(
                2 / 2**6
            )  # the least that six pairs can give
    assert [table.row_count for table in tables(summary)] == [4, 4]


# Contrasts and patients


def test_contrasts_are_of_every_study_with_a_lesion_and_their_summary_is_over_them(evaluated, cohort, model):
    out, body, _ = evaluated
    rows = {
        (r["case"], r["target"], r["predictor"]): r
        for r in rows_of(out / "contrasts.csv")
        if r["structure"] == "lesion"
    }
    assert set(rows) == {(c, t, p) for c in WITH_LESION for t in TARGETS for p in PREDICTORS}
    subject = subjects(cohort)["A1"]
    images = predict(subject, SOURCES, find_predictors(model, INFERENCE)).images
    for score in measure_contrasts(subject, SOURCES, images):
        if score.structure == "lesion":
            assert float(rows["A1", score.target, score.predictor]["kept"]) == pytest.approx(score.kept, rel=1e-3)
            assert score.truth > 0.5
    summary = [e for e in body["contrasts"] if e["structure"] == "lesion"]
    assert {(e["target"], e["predictor"]) for e in summary} == {(t, p) for t in TARGETS for p in PREDICTORS}
    for e in summary:
        shares = [float(rows[case, e["target"], e["predictor"]]["kept"]) for case in WITH_LESION]
        assert (e["patients"], e["median"]) == (3, pytest.approx(np.median(shares)))
        assert e["kept"] == pytest.approx(np.mean([0.7 <= share <= 1.4 for share in shares]))
    kept = {(e["predictor"], e["target"]): e["kept"] for e in summary}
    assert kept["constant", "t2f"] == kept["constant", "t1c"] == 0
    uncertain = [e for e in body["uncertainty"] if e["uncertainty"] == "std"]
    written = [r for r in rows_of(out / "uncertainty.csv") if r["uncertainty"] == "std"]
    for e in uncertain:
        chosen = [r for r in written if r["target"] == e["target"] and r["case"] in WITH_LESION]
        assert e["std_ratio"] == pytest.approx(np.mean([float(r["std_ratio"]) for r in chosen]))
        assert e["error_ratio"] == pytest.approx(np.mean([float(r["error_ratio"]) for r in chosen]))
        assert [float(r["lesion_kept"]) for r in chosen] == pytest.approx(
            [float(rows[r["case"], e["target"], OWN]["kept"]) for r in chosen]
        )
    assert all(r["std_ratio"] == "nan" for r in written if r["case"] not in WITH_LESION)


def test_two_visits_of_a_patient_are_one_patient(bare, tmp_path):
    for seed, case in enumerate(("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000")):
        write_lesion(tmp_path / "cohort", case, seed)
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    assert len(body["cases"]) == 3
    for name in ("metrics.csv", "contrasts.csv"):
        patients = {row["case"]: row["patient"] for row in rows_of(tmp_path / "out" / name)}
        assert len(patients) == 3
        assert len(set(patients.values())) == 2
    for e in (*body["summary"], *body["contrasts"]):
        assert e["patients"] == 2
    first, again, other = (
        score.mae
        for score in read_scores(tmp_path / "out" / "metrics.csv")
        if (score.target, score.region) == ("t2f", "brain")
    )
    mean = entry(body["summary"], "t2f", OWN, "brain")["mae"]["mean"]
    assert mean == pytest.approx(((first + again) / 2 + other) / 2)


def test_studies_that_share_a_scan_are_one_patient(bare, tmp_path):
    for seed, case in enumerate(("A", "B", "C")):
        write_lesion(tmp_path / "cohort", case, seed)
    for old in (tmp_path / "cohort" / "C").glob("*t2w*"):
        shutil.copy(tmp_path / "cohort" / "A" / "A-t2w.nii.gz", old)
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    assert body["patients"] == {"A": "A", "B": "B", "C": "A"}
    for name in ("metrics.csv", "contrasts.csv"):
        assert {row["case"]: row["patient"] for row in rows_of(tmp_path / "out" / name)} == body["patients"]
    assert {e["patients"] for e in body["summary"]} == {2}


def test_a_table_says_whose_the_studies_of_a_folder_are(bare, tmp_path):
    for seed, case in enumerate(("A", "B", "C")):
        write_lesion(tmp_path / "cohort", case, seed)
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\nA,P\nB,P\n")
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", settings(patients=table))
    assert body["patients"] == {"A": "P", "B": "P", "C": "C"}
    assert {e["patients"] for e in body["summary"]} == {2}
    prepare(tmp_path / "cohort", tmp_path / "set")
    with pytest.raises(ConfigError, match="--patients is for a folder of studies"):
        evaluate(bare, tmp_path / "set", tmp_path / "of set", settings(patients=table))


# Uncertainty


def test_standard_deviations_are_compared_with_the_errors_of_the_model_s_own_image(evaluated, cohort, model):
    out, body, _ = evaluated
    rows = {(r["case"], r["target"], r["uncertainty"]): r for r in rows_of(out / "uncertainty.csv")}
    assert len(rows) == len(CASES) * len(TARGETS) * 2
    subject = subjects(cohort)["A1"]
    predictions = predict(subject, SOURCES, find_predictors(model, INFERENCE))
    for target in TARGETS:
        inside = within(subject, target)
        error = np.abs(predictions.images[OWN][target] - subject.volumes[target])[inside]
        std = predictions.stds[target][inside]
        row = rows["A1", target, "std"]
        assert float(row["error"]) == pytest.approx(error.mean(), rel=1e-4)
        assert float(row["coverage_95"]) == pytest.approx((error <= 1.96 * std).mean(), abs=1e-4)
        certain = error[np.argsort(std, kind="stable")][: round(0.9 * len(error))]
        assert float(row["error_most_certain_90"]) == pytest.approx(certain.mean(), rel=1e-2)
    assert len(body["uncertainty"]) == 4
    for e in body["uncertainty"]:
        assert e["patients"] == len(CASES)
        assert (
            (e["coverage_95"] is None)
            == (e["uncertainty"] == "predicted intensity")
            == ("p_uncorrected_against_std" in e)
        )
    assert uncertainty_table(body["uncertainty_by_target"]).row_count == 4


def test_the_calibration_curve_of_each_case_and_of_all(evaluated, cohort, model):
    out, body, _ = evaluated
    rows = rows_of(out / "calibration.csv")
    assert len(rows) == len(CASES) * len(TARGETS) * 10
    subject = subjects(cohort)["A1"]
    predictions = predict(subject, SOURCES, find_predictors(model, INFERENCE))
    own = [r for r in rows if (r["case"], r["target"]) == ("A1", "t1c")]
    error = predictions.images[OWN]["t1c"] - subject.volumes["t1c"]
    for column, volume in (("std", predictions.stds["t1c"]), ("error", error)):
        mean_square = np.mean([float(row[column]) ** 2 for row in own])
        inside = volume[within(subject, "t1c")]
        assert mean_square == pytest.approx((inside.astype(float) ** 2).mean(), rel=1e-3)
    assert [e["decile"] for e in body["calibration"]] == [*range(1, 11)] * 2
    for e in body["calibration"]:
        chosen = [r for r in rows if (r["target"], int(r["decile"])) == (e["target"], e["decile"])]
        assert e["error"] == pytest.approx(np.sqrt(np.mean([float(row["error"]) ** 2 for row in chosen])))


def test_without_standard_deviations_no_uncertainty_is_measured(bare, cohort, other, tmp_path):
    body = evaluate(bare, cohort / "A1", tmp_path, settings(against=other))
    assert (body["uncertainty"], body["calibration"]) == ([], [])
    assert not (tmp_path / "uncertainty.csv").exists()
    assert not (tmp_path / "calibration.csv").exists()


def test_the_spread_of_samples_is_an_uncertainty_too(other, cohort, tmp_path):
    inference = InferenceSettings(samples=2, ddim_steps=2, precision="float32")
    body = evaluate(other, cohort / "A1", tmp_path, EvaluationSettings(inference=inference))
    assert body["own"] == GUIDED
    assert body["settings"]["samples"] == 2
    assert {e["uncertainty"] for e in body["uncertainty"]} == {"std", "predicted intensity"}


# Datasets, cohorts and failures


def test_a_damaged_evaluation_is_whole_after_the_same_command(bare, cohort, tmp_path):
    """metrics.json is the same; tables and pictures come back."""
    out, chosen = tmp_path / "out", settings()
    evaluate(bare, cohort, out, chosen)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.suffix in (".csv", ".webp")}
    assert before
    for path in before:
        (out / path).unlink()
    evaluate(bare, cohort, out, chosen)
    assert {path: (out / path).read_bytes() for path in before} == before
    assert not (out / WORK).exists()


def test_parts_that_are_measured_again_leave_nothing_behind(bare, cohort, tmp_path):
    for number in (1, 2, 2, 1):
        body = evaluate(bare, cohort, tmp_path / "out", settings(part=Part(number, 2)))
    assert body["finished"]
    assert not (tmp_path / "out" / WORK).exists()


def test_parts_wait_while_all_is_measured_otherwise_and_a_report_names_them(bare, other, cohort, tmp_path):
    out = tmp_path / "out"
    evaluate(bare, cohort, out, settings(part=Part(1, 2)))
    with pytest.raises(OutputError, match="not finished: of its parts there are 1/2"):
        report_command(out)
    evaluate(other, cohort, out, settings())
    assert measured_parts(out) == ["1/2"]
    body = evaluate(bare, cohort, out, settings(part=Part(2, 2)))
    assert body["finished"]


def test_parts_of_two_versions_are_not_joined(bare, cohort, tmp_path, monkeypatch):
    evaluate(bare, cohort, tmp_path / "out", settings(part=Part(1, 2)))
    monkeypatch.setattr(evaluation, "version", lambda name: "9.9")
    listener = Listener()
    body = evaluate(bare, cohort, tmp_path / "out", settings(part=Part(2, 2)), display=listener)
    assert not body["finished"]
    assert any("Part 1/2" in line and "is of other version of crossmr" in line for line in listener.said)


def test_parts_that_name_the_usual_split_and_that_do_not_are_of_one_evaluation(bare, cohort, tmp_path):
    prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(0.34, 0.0, 0.66, seed=0)))
    for number, split in enumerate(("test", None), 1):
        body = evaluate(bare, tmp_path / "set", tmp_path / "out", settings(split=split, part=Part(number, 2)))
    assert body["finished"]


def test_parts_on_two_devices_of_a_kind_with_one_rival_by_two_paths_are_of_one_evaluation(
    bare, other, cohort, tmp_path
):
    (tmp_path / "link").symlink_to(other)
    for number, (device, against) in enumerate((("cpu", other), ("cpu:0", tmp_path / "link")), 1):
        chosen = settings(part=Part(number, 2), against=against)
        chosen = replace(chosen, inference=replace(chosen.inference, device=device))
        body = evaluate(bare, cohort, tmp_path / "out", chosen)
    assert body["finished"]


def test_a_split_is_measured_alone(bare, cohort, tmp_path):
    manifest = prepare(cohort, tmp_path / "set", PrepareSettings(split=Split(0.67, 0.0, 0.33, seed=0)))
    for split in ("test", "train"):
        body = evaluate(bare, tmp_path / "set", tmp_path / split, settings(split=split))
        assert body["cases"] == manifest["split"][split]
        assert 0 < len(body["cases"]) < len(CASES)
    before = tree(tmp_path / "test")
    with pytest.raises(StudyError, match="the split 'val' is empty"):
        evaluate(bare, tmp_path / "set", tmp_path / "test", settings(split="val"))
    assert tree(tmp_path / "test") == before
    with pytest.raises(ConfigError, match="'tset'"):
        evaluate(bare, tmp_path / "set", tmp_path / "by typo", settings(split="tset"))


def test_failing_cases_are_listed_and_the_others_go_on(bare, cohort, tmp_path):
    mixed = tmp_path / "cohort"
    for case in ("B2", "D4"):
        shutil.copytree(cohort / case, mixed / case)
    write_study(mixed, "A sourceless", ("t1n", "t2f"))
    write_study(mixed, "C broken", ALL)
    nib.save(image(make_head("t2w", shape=(26, 32, 24))), mixed / "C broken" / "C broken-t2w.nii.gz")
    write_study(mixed, "E targetless", SOURCES)
    body = evaluate(bare, mixed, tmp_path / "out", SETTINGS)
    assert body["cases"] == ["B2", "D4"]
    assert set(body["failed"]) == {"A sourceless", "C broken", "E targetless"}
    assert "it lacks t2w" in body["failed"]["A sourceless"]
    assert "t2w is 26×32×24" in body["failed"]["C broken"]
    assert "it has none of t1c, t2f" in body["failed"]["E targetless"]
    for case in body["failed"]:
        shutil.rmtree(mixed / case)
    assert evaluate(bare, mixed, tmp_path / "alone", SETTINGS)["summary"] == body["summary"]


def test_a_study_that_cannot_fit_is_refused_by_its_headers_and_one_that_takes_much_is_said(
    bare, cohort, tmp_path, monkeypatch
):
    shutil.copytree(cohort / "B2", tmp_path / "cohort" / "B2")
    (tmp_path / "cohort" / "Big").mkdir()
    for modality in ALL:
        header_alone(tmp_path / "cohort" / "Big" / f"Big-{modality}.nii.gz", 20_000)
    (found, _) = find_subjects(tmp_path / "cohort")
    needed = memory_needed(found, find_predictors(bare, SETTINGS.inference))
    monkeypatch.setattr(main_memory, "available_memory", lambda: int(1.5 * needed))
    monkeypatch.setattr(main_memory, "reusable_memory", lambda: 0)
    said, display = [], Display(quiet=True)
    monkeypatch.setattr(Display, "say", lambda _, text: said.append(text))
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", SETTINGS, display=display)
    assert body["cases"] == ["B2"]
    assert re.match(r"Big: needs about \d+\.\d GB of memory, 0\.0 GB are available\. Give", body["failed"]["Big"])
    assert sum(line.startswith("B2: needs about 0.0 GB of memory, 0.0 GB are") for line in said) == 1


def test_what_nobody_foresaw_is_listed_too_and_leaves_no_half_study(bare, cohort, tmp_path, monkeypatch):
    def fail(model, head, case, settings):
        if case == "B2":
            raise TypeError("surprise")
        return Synthesis(settings.targets, torch.rand(2, *head.volumes["t1n"].shape), None)

    monkeypatch.setattr(module, "synthesise", fail)
    body = evaluate(bare, cohort, tmp_path, SETTINGS)
    assert body["failed"] == {"B2": "B2: TypeError: surprise; the traceback is in crossmr.log"}
    assert "B2" not in body["cases"]
    assert {score.case for score in read_scores(tmp_path / "metrics.csv")} == set(CASES) - {"B2"}


def test_nothing_measurable_is_an_error_and_no_finished_result(bare, tmp_path):
    write_study(tmp_path / "cohort", "P", SOURCES)
    with pytest.raises(StudyError, match=r"No study of .*cohort could be measured: P: .*none of t1c, t2f"):
        evaluate(bare, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    begun = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert begun == {"format": "crossmr-evaluation", "finished": False}
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_nothing_of_another_s_is_replaced(evaluated, bare, cohort, tmp_path):
    """Not one of all the files that an evaluation writes."""
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    report_evaluation(out)
    written = [path for path in sorted(out.rglob("*")) if path.is_file()]
    assert {path.suffix for path in written} == {".json", ".csv", ".html", ".webp"}
    for path in written:
        ours = path.read_bytes()
        for theirs in (b"mine", ours[:7] + b"mine"):
            path.write_bytes(theirs)
            before = tree(out)
            with pytest.raises(OutputError, match=rf"{path.name} is not crossmr's, so .*Name another folder"):
                evaluate(bare, cohort, out, SETTINGS)
            assert tree(out) == before
        path.write_bytes(ours)
    evaluate(bare, cohort, out, SETTINGS)  # of ours every one is


def test_what_cannot_work_is_refused_before_anything_is_written(bare, cohort, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    with pytest.raises(NamingError, match=r"no volume"):
        evaluate(bare, tmp_path / "empty", out, SETTINGS)
    with pytest.raises(ModelError, match="is not a model"):
        evaluate(tmp_path / "empty", cohort, out, SETTINGS)
    with pytest.raises(ModelError, match="is not a model"):
        evaluate(bare, cohort, out, settings(against=tmp_path / "empty"))
    with pytest.raises(ConfigError, match="without guidance"):
        evaluate(bare, cohort, out, settings(guidances=("sample",)))
    with pytest.raises(ConfigError, match="any subset"):
        evaluate(bare, cohort, out, settings(every_subset=True))
    narrow = save_untrained(tmp_path / "narrow", guidance="none", targets=("t1c",))
    with pytest.raises(ConfigError, match=r"--against .*narrow makes t1c from t1n, t2w, but the model makes t1c, t2f"):
        evaluate(bare, cohort, out, settings(against=narrow))
    assert not out.exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        evaluate(bare, cohort, tmp_path / "file", SETTINGS)


def test_settings_are_understood_as_the_command_line_gives_them():
    given = EvaluationSettings(patients="p.csv", part="1/2", guidances="none")
    assert given == EvaluationSettings(patients=Path("p.csv"), part=Part(1, 2), guidances=("none",))
    with pytest.raises(ConfigError, match="--part is '3'; expected K/N"):
        EvaluationSettings(part="3")
    with pytest.raises(ConfigError, match=r"patients is 5; expected text such as 'patients\.csv'"):
        EvaluationSettings(patients=5)


def test_settings_that_mean_nothing_are_refused():
    for wrong in (
        {"guidances": ("reference",)},
        {"inference": InferenceSettings(guidance="reference", reference="study")},
    ):
        with pytest.raises(ConfigError, match="knows no reference; measure sample, unconditional or none"):
            EvaluationSettings(**wrong)
    with pytest.raises(ConfigError, match="every target"):
        EvaluationSettings(inference=InferenceSettings(targets=("t1c",)))


def test_names_and_a_mapping_are_enough(folder, tmp_path):
    (tmp_path / "cohort").mkdir()
    for modality, name in {"t1n": "MPRAGE", "t2w": "TSE", "t2f": "TIRM"}.items():
        nib.save(image(make_head(modality)), tmp_path / "cohort" / f"P_{name}.nii.gz")
    mapping = {"t1n": "*_MPRAGE*", "t2w": "*_TSE*", "t2f": "*_TIRM*"}
    inference = InferenceSettings(guidance="sample", ddim_steps=3, precision="float32", device="cpu")
    chosen = EvaluationSettings(guidances=("none", "sample"), inference=inference, mapping=mapping)
    body = evaluate(str(folder), str(tmp_path / "cohort"), str(tmp_path / "out"), chosen)
    assert body["cases"] == ["P"]
    assert body["own"] == GUIDED
    assert list(dict.fromkeys(e["predictor"] for e in body["summary"])) == [GUIDED, OWN, *BASELINES]
    places = {(e["target"], e["region"]) for e in body["summary"]}  # no lesion is outlined, and there is no T1ce
    assert places == {("t2f", region) for region in ("volume", "brain", "deep", "slices")}
    assert body["contrasts"] == []
    assert not (tmp_path / "out" / "contrasts.csv").exists()


def test_a_3d_model_is_measured_too(tmp_path):
    write_study(tmp_path / "cohort", "P", ALL)
    folder = save_untrained(tmp_path / "model", spatial_dims=3, window=(16, 16, 16), guidance="none")
    body = evaluate(folder, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    assert entry(body["summary"], "t2f", OWN, "brain")["patients"] == 1


# Any subset


@pytest.fixture(scope="module")
def any_model(tmp_path_factory, baselines):
    folder = tmp_path_factory.mktemp("any")
    changes = {"sources": ALL, "targets": ALL, "guidance": "last", "uncertainty": True}
    return read_model(save_untrained(folder, baselines=baselines, **changes))


def test_a_model_of_any_subset_is_measured_on_what_is_hidden(any_model, tmp_path):
    studies = {"P": ("t1n", "t2w", "t1c"), "Q": ("t1n", "t2f")}
    for seed, (case, acquired) in enumerate(studies.items()):
        write_study(tmp_path / "cohort", case, acquired, seed=seed)
    second = save_untrained(tmp_path / "second", sources=ALL, targets=ALL, guidance="none", seed=4)
    body = evaluate(any_model, tmp_path / "cohort", tmp_path / "out", settings(every_subset=True, against=second))
    scores = read_scores(tmp_path / "out" / "metrics.csv")
    for case, acquired in studies.items():
        tasks = {(s.sources, s.target) for s in scores if s.case == case}
        assert len({sources for sources, _ in tasks}) == 2 ** len(acquired) - 2
        assert tasks == {(sources, t) for sources, _ in tasks for t in acquired if t not in sources.split("+")}
    subject = subjects(tmp_path / "cohort")["P"]
    images = predict(subject, ("t2w",), find_predictors(any_model, INFERENCE, (), second)).images
    assert list(images) == [OWN, "against: second", *BASELINES]
    for score in measure(subject, ("t2w",), images):
        key = ("P", "t2w", score.target, score.predictor, score.region)
        (written,) = [s for s in scores if (s.case, s.sources, s.target, s.predictor, s.region) == key]
        assert written.mae == pytest.approx(score.mae, rel=1e-4)
    assert [table.row_count for table in tables(body["summary"])] == [5] * 4 + [7] * 4
    assert uncertainty_table(body["uncertainty_by_target"]).row_count == 8
    pictures = {(picture["case"], picture["target"]): set(picture["sources"]) for picture in body["pictures"]}
    assert len(pictures) == len(body["pictures"])  # of each target one, from all other modalities
    assert pictures == {(case, m): {*acquired} - {m} for case, acquired in studies.items() for m in acquired}


def test_all_but_one_modality_are_given_unless_every_subset_is_asked_for(any_model, tmp_path):
    write_study(tmp_path / "cohort", "P", ALL)
    body = evaluate(any_model, tmp_path / "cohort", tmp_path / "out", SETTINGS)
    tasks = {(e["sources"], e["target"]) for e in body["summary"]}
    assert tasks == {("+".join(m for m in ALL if m != target), target) for target in ALL}


def test_tables_of_an_earlier_evaluation_do_not_stay_beside_those_of_another(evaluated, bare, cohort, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "out")
    assert (tmp_path / "out" / "uncertainty.csv").exists()
    evaluate(bare, cohort, tmp_path / "out", settings())
    left = {path.name for path in (tmp_path / "out").glob("*.csv")}
    assert left == {"metrics.csv", "contrasts.csv"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, StudyError])
def test_an_evaluation_that_does_not_end_leaves_an_earlier_one_as_it_is(
    evaluated, bare, cohort, tmp_path, monkeypatch, error
):
    """Where it is stopped while it measures, and where not one study can be measured."""
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    report_evaluation(out)
    before = {path: sha for path, sha in tree(out).items() if path != LOG}
    measured, usual = [], evaluation.measure_subject

    def stopped(subject, *given, **named):
        if error is StudyError or measured:
            raise error(f"{subject.name}: stopped")
        measured.append(usual(subject, *given, **named))
        return measured[-1]

    monkeypatch.setattr(evaluation, "measure_subject", stopped)
    with pytest.raises(error):
        evaluate(bare, cohort, out, SETTINGS)
    assert {path: sha for path, sha in tree(out).items() if path != LOG} == before
    assert len(measured) == (error is KeyboardInterrupt)


def test_nothing_of_an_earlier_evaluation_stays_beside_another(evaluated, bare, cohort, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    report_evaluation(out)
    shutil.copytree(cohort / "A1", tmp_path / "cohort" / "A1")
    (out / "pictures" / "mine.webp").write_bytes(b"mine")
    body = evaluate(bare, tmp_path / "cohort", out, SETTINGS)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {LOG}
    pictures = {picture["file"] for picture in body["pictures"]}
    assert left == {"metrics.json", "metrics.csv", "contrasts.csv", "pictures/mine.webp", *pictures}
