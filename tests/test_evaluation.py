"""Evaluation: the numbers are right, hidden targets stay hidden, and nothing that fails is kept quiet."""

import csv
import json
import math
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHAPE, image, make_head, save_untrained
from PIL import Image
from rich.console import Console
from skimage.metrics import structural_similarity

from crossmr import evaluation
from crossmr.completion import Settings, Synthesis
from crossmr.data.naming import find_studies
from crossmr.data.prepare import Split, prepare
from crossmr.errors import ConfigError, ModelError, NamingError, OutputError, StudyError
from crossmr.evaluation import METRICS, TWIN, Subject, evaluate, measure, patterns, predict_all, summarise, tables
from crossmr.model import load_model, pseudonym
from crossmr.picture import COLUMN, GAP
from crossmr.trivial import fit_trivial

SETTINGS = Settings(steps=3, precision="float32")
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
WHOLE = (*SOURCES, *TARGETS)
CASES = ("A1", "B2", "C3", "D4", "E5", "F6")
LABELLED = ("A1", "B2", "C3")
OWN, UNGUIDED = "guided: sample", "unguided"
TRIVIAL = ("zeros", "mean image", "linear mix")
PREDICTORS = {OWN, UNGUIDED, TWIN, *TRIVIAL}


def write_case(folder, case, modalities=WHOLE, *, seed=0, air=True, lesion=False):
    (folder / case).mkdir(parents=True, exist_ok=True)
    for modality in modalities:
        head = make_head(modality, seed=seed, air=air)
        nib.save(image(head), folder / case / f"{case}-{modality}.nii.gz")
    if lesion:
        labels = np.zeros(SHAPE, np.uint8)
        labels[12:16, 14:18, 10:13] = 3
        nib.save(image(labels), folder / case / f"{case}-seg.nii.gz")


def subjects(folder):
    """Every study of a folder as the evaluation sees it."""
    return {files.case: evaluation._from_files(files) for files in find_studies(folder)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six patients; three have a lesion outlined."""
    folder = tmp_path_factory.mktemp("cohort")
    for seed, case in enumerate(CASES):
        write_case(folder, case, seed=seed, lesion=case in LABELLED)
    return folder


@pytest.fixture(scope="module")
def trivial(tmp_path_factory):
    """The trivial predictors, fitted on two other patients."""
    folder = tmp_path_factory.mktemp("trivial")
    for seed in (20, 21):
        write_case(folder, f"T{seed}", seed=seed)
    return fit_trivial([lambda s=s: s.volumes for s in subjects(folder).values()], (*SOURCES, *TARGETS))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, trivial):
    training = {"patients": {"train": [pseudonym("A1"), pseudonym("Z9")], "val": [pseudonym("B2")]}}
    return save_untrained(tmp_path_factory.mktemp("model"), twin=True, trivial=trivial, training=training)


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(scope="module")
def evaluated(cohort, model, tmp_path_factory):
    """The cohort, measured once: the folder, what was returned and the rows."""
    out = tmp_path_factory.mktemp("evaluated")
    body = evaluate(model, cohort, out, guidances=["none"], settings=SETTINGS)
    return out, body, read_rows(out)


@pytest.fixture
def bare(model_folder):
    """The model alone, without twin and trivial predictors: one predictor to measure."""
    model = load_model(model_folder)
    model.twin, model.trivial = None, {}
    return model


def read_rows(out):
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) if key in METRICS else value for key, value in row.items()} for row in rows]


def indexed(rows):
    """Rows by case, target, predictor and region."""
    return {(r["case"], r["target"], r["predictor"], r["region"]): r for r in rows}


def entry(summary, target, predictor, region):
    (found,) = [e for e in summary if (e["target"], e["predictor"], e["region"]) == (target, predictor, region)]
    return found


# What is measured


def test_a_row_for_every_case_target_predictor_and_region(evaluated):
    _, body, rows = evaluated
    expected = {
        (case, target, predictor, region)
        for case in CASES
        for target in TARGETS
        for predictor in PREDICTORS
        for region in ("volume", "brain", "slices", *(["tumour"] if case in LABELLED else []))
    }
    assert len(rows) == len(expected)
    assert set(indexed(rows)) == expected
    for row in rows:
        assert row["protocol"] == ("slice" if row["region"] == "slices" else "volume")
        assert all(math.isfinite(row[metric]) for metric in METRICS)
    assert body["cases"] == sorted(CASES)
    assert body["own"] == OWN
    assert body["failed"] == {}


def test_regions_without_labels_and_targets_that_a_study_lacks_are_absent(bare, tmp_path):
    write_case(tmp_path / "cohort", "P", ("t1n", "t2w", "t2f"))
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", settings=SETTINGS)
    assert {(e["target"], e["region"]) for e in body["summary"]} == {
        ("t2f", "volume"),
        ("t2f", "brain"),
        ("t2f", "slices"),
    }


def test_json_is_strict_and_says_what_was_returned(evaluated, model):
    out, body, _ = evaluated

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    assert json.loads((out / "metrics.json").read_text(), parse_constant=refuse) == body
    assert body["finished"] is True
    assert body["model_sha256"] == model.record["sha256"]
    assert body["settings"] == {
        "seed": 0,
        "ddim_steps": 3,
        "samples": 1,
        "eta": 1.0,
        "device": "cpu",
        "precision": "float32",
    }
    assert "slice" in body["protocol"]
    assert set(body["versions"]) == {"crossmr", "torch"}


def test_cases_trained_on_are_flagged(evaluated):
    _, body, _ = evaluated
    assert body["trained_on"] == ["A1"]  # B2 was watched, not trained on


def test_pictures_are_written_of_every_case_and_target(evaluated):
    out, body, _ = evaluated
    files = [f"{case}-{target}.webp" for case in CASES for target in TARGETS]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == files
    assert [picture["file"] for picture in body["pictures"]] == [f"pictures/{name}" for name in files]
    shown = body["pictures"][0]
    assert (shown["case"], shown["sources"], shown["target"]) == ("A1", list(SOURCES), "t1c")
    kinds = ["acquired", "acquired", "synthetic", "unguided twin", "truth", "error"]
    assert [column["kind"] for column in shown["columns"]] == kinds
    with Image.open(out / shown["file"]) as picture:
        assert picture.width == 6 * (COLUMN + GAP) - GAP
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    truth, error = (pixels[:, n * (COLUMN + GAP) :][:, :COLUMN] for n in (4, 5))
    assert truth.std() > 10
    assert np.ptp(truth, axis=2).max() < 8 < np.ptp(error, axis=2).max()  # grey, and in colours


# Whether the numbers are right


@pytest.mark.parametrize("predictor", [OWN, "linear mix"])
def test_numbers_equal_an_independent_recomputation(evaluated, cohort, model, predictor):
    _, _, rows = evaluated
    subject = subjects(cohort)["A1"]
    predictions, _ = predict_all(model, subject, SOURCES, ["sample", "none"], SETTINGS)
    assert set(predictions) == PREDICTORS
    areas = subject.head.sum((1, 2))
    kept = [z for z, area in enumerate(areas) if area >= 0.1 * areas.max()]
    assert 0 < len(kept) < len(areas)
    similar = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for target in TARGETS:
        made = predictions[predictor][target].astype(np.float64)
        truth = subject.volumes[target].astype(np.float64)
        low, high = np.percentile(truth, (0, 99.9))
        a, b = (made - low) / (high - low), (truth - low) / (high - low)
        _, ssim = structural_similarity(a, b, full=True, **similar)
        for region, mask in {
            "volume": np.ones_like(subject.head),
            "brain": subject.head,
            "tumour": subject.tumour,
        }.items():
            error = (a - b)[mask]
            row = indexed(rows)["A1", target, predictor, region]
            assert row["psnr"] == pytest.approx(-10 * np.log10(np.mean(error**2)), abs=1e-3)
            assert row["ssim"] == pytest.approx(ssim[mask].mean(), abs=1e-4)
            assert row["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
            assert row["nmse"] == pytest.approx(np.sum(error**2) / np.sum(b[mask] ** 2), rel=1e-4)
        row = indexed(rows)["A1", target, predictor, "slices"]
        error = made[kept] - truth[kept]
        planes = [structural_similarity(made[z], truth[z], full=True, **similar)[1].mean() for z in kept]
        assert row["psnr"] == pytest.approx(np.mean(-10 * np.log10((error**2).mean((1, 2)))), abs=1e-3)
        assert row["ssim"] == pytest.approx(np.mean(planes), abs=1e-4)
        assert row["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-4)


def test_near_empty_slices_do_not_count_in_the_slice_protocol():
    rng = np.random.default_rng(0)
    head = np.zeros((12, 20, 20), bool)
    head[2:10, 3:17, 3:17] = True
    head[10, 9:12, 9:12] = True  # 9 of 196 voxels: less than a tenth
    truth = np.where(head, rng.uniform(0.2, 1, head.shape), 0).astype(np.float32)
    volumes = dict.fromkeys(TARGETS, truth)
    subject = Subject("P", "P", volumes, head, np.zeros_like(head), False)
    noisy = truth + rng.normal(0, 0.1, truth.shape).astype(np.float32)

    def slices(*spoiled):
        made = noisy.copy()
        made[list(spoiled)] = 1
        rows = indexed(measure(subject, SOURCES, {"it": {"t2f": made}}))
        return {region: [rows["P", "t2f", "it", region][m] for m in METRICS] for region in ("slices", "volume")}

    assert slices(0, 1, 10, 11)["slices"] == slices()["slices"]
    assert slices(0, 1, 10, 11)["volume"] != slices()["volume"]
    assert slices(9)["slices"] != slices()["slices"]


def test_slices_that_the_target_does_not_reach_do_not_count_in_the_slice_protocol():
    head = np.zeros((12, 20, 20), bool)
    head[2:10, 3:17, 3:17] = True
    truth = np.where(head, np.float32(0.5), np.float32(0))
    truth[5, 9, 9] = 1
    truth[8:] = 0
    subject = Subject("P", "P", {"t2f": truth}, head, np.zeros_like(head), False)
    made = truth + np.float32(0.1)
    made[8:] = 1  # where nothing was acquired
    scores = indexed(measure(subject, SOURCES, {"it": {"t2f": made}}))["P", "t2f", "it", "slices"]
    assert scores["psnr"] == pytest.approx(20, abs=1e-3)
    assert scores["mae"] == pytest.approx(0.1, abs=1e-5)
    assert math.isfinite(scores["nmse"])


def test_predictions_are_never_rescaled(cohort):
    subject = subjects(cohort)["A1"]
    half = {"half": {t: subject.volumes[t] * np.float32(0.5) for t in TARGETS}}
    scores = indexed(measure(subject, SOURCES, half))["A1", "t2f", "half", "brain"]
    assert scores["nmse"] == pytest.approx(0.25, abs=0.01)
    assert scores["ssim"] < 0.9


def test_a_perfect_predictor_is_perfect_and_beats_the_trivial_ones(cohort, model, tmp_path, monkeypatch):
    truths = {case: subject.volumes for case, subject in subjects(cohort).items()}

    def oracle(model, sources, head, case, settings, *, network="synthesis"):
        whole = torch.from_numpy(np.stack([truths[case][t] for t in TARGETS]))
        return Synthesis(whole if network == "synthesis" else whole * 0.9, None)

    monkeypatch.setattr(evaluation, "synthesise", oracle)
    summary = evaluate(model, cohort, tmp_path, settings=SETTINGS)["summary"]
    rows = indexed(read_rows(tmp_path))
    for case in CASES:
        for region in ("volume", "brain", "slices"):
            row = rows[case, "t1c", OWN, region]
            assert row["ssim"] == pytest.approx(1, abs=1e-5)
            assert row["haarpsi"] == pytest.approx(1, abs=1e-4)
            assert row["mae"] == row["nmse"] == 0
            assert row["psnr"] == math.inf
    for target in TARGETS:
        best = entry(summary, target, OWN, "brain")
        assert best["psnr"]["mean"] is None  # infinite, which JSON cannot say
        for predictor in (TWIN, *TRIVIAL):
            other = entry(summary, target, predictor, "brain")
            assert best["mae"]["mean"] < other["mae"]["low"]
            assert best["ssim"]["mean"] > other["ssim"]["high"]
            assert other["ssim"]["p_against_first"] == pytest.approx(2 / 2**6)  # the least that six pairs can give
    assert [len(t.rows) for t in tables(summary)] == [5, 5]


# Hidden targets


def test_hidden_targets_are_never_inputs(model, cohort, tmp_path, monkeypatch):
    """Other truth inside the same skull-stripped head: other scores, the very same predictions."""
    for name in ("as it is", "changed"):
        write_case(tmp_path / name, "P", air=False, lesion=True)
    for target in TARGETS:
        path = tmp_path / "changed" / "P" / f"P-{target}.nii.gz"
        head = np.array(nib.load(path).get_fdata(dtype=np.float32))
        head[head != 0] = np.random.default_rng(1).uniform(10, 100, np.count_nonzero(head))
        nib.save(image(head), path)
    seen = []
    synthesise = evaluation.synthesise

    def spy(model, sources, *rest, **more):
        seen.append({m: volume.copy() for m, volume in sources.items()})
        return synthesise(model, sources, *rest, **more)

    monkeypatch.setattr(evaluation, "synthesise", spy)
    results = []
    for name in ("as it is", "changed"):
        subject = subjects(tmp_path / name)["P"]
        predictions, _ = predict_all(model, subject, SOURCES, ["sample", "unconditional", "none"], SETTINGS)
        results.append((subject, predictions, indexed(measure(subject, SOURCES, predictions))))
    (subject, first, scores), (_, second, others) = results
    assert set(first) == {*PREDICTORS, "guided: unconditional"}
    for name, volumes in first.items():
        for target in TARGETS:
            np.testing.assert_array_equal(volumes[target], second[name][target])
        assert scores["P", "t2f", name, "brain"]["mae"] != others["P", "t2f", name, "brain"]["mae"]
    assert len(seen) == 8
    for given in seen:
        assert list(given) == list(SOURCES)
        assert all(np.array_equal(given[m], subject.volumes[m]) for m in SOURCES)


def test_arms_differ_and_each_is_its_own_guidance(model, cohort):
    subject = subjects(cohort)["A1"]
    arms, _ = predict_all(model, subject, SOURCES, ["sample", "unconditional", "none"], SETTINGS)
    names = ["guided: sample", "guided: unconditional", UNGUIDED, TWIN]
    for k, name in enumerate(names):
        for other in names[k + 1 :]:
            assert np.abs(arms[name]["t1c"] - arms[other]["t1c"]).max() > 1e-3
    assert all(not volume.any() for volume in arms["zeros"].values())
    other, _ = predict_all(
        model, subject, SOURCES, ["none"], Settings(guidance="sample", seed=7, steps=3, precision="float32")
    )
    assert list(other) == [UNGUIDED, TWIN, *TRIVIAL]
    np.testing.assert_array_equal(other[UNGUIDED]["t1c"], arms[UNGUIDED]["t1c"])


def test_skull_stripped_predictions_are_zero_outside_the_head(model, tmp_path):
    write_case(tmp_path, "P", air=False)
    subject = subjects(tmp_path)["P"]
    assert subject.masked_background
    for volumes in predict_all(model, subject, SOURCES, ["sample"], SETTINGS)[0].values():
        assert all(not volume[~subject.head].any() for volume in volumes.values())


def test_a_synthetic_volume_is_no_truth(bare, tmp_path):
    write_case(tmp_path, "P", ("t1n", "t2w"))
    fake = image(make_head("t2f"), description="SYNTHETIC t2f by crossmr")
    nib.save(fake, tmp_path / "P" / "P-t2f.nii.gz")
    with pytest.raises(StudyError, match="P: cannot be measured: it has none of t1c, t2f"):
        evaluate(bare, tmp_path, tmp_path / "out", settings=SETTINGS)


# How sure


@pytest.fixture(scope="module")
def sure(cohort, tmp_path_factory):
    """A model with cells, measured guided and not: what was returned, the folder and the model."""
    model = load_model(save_untrained(tmp_path_factory.mktemp("sure model"), cell=8))
    model.calibration = {"variance": torch.tensor([[4.0, 0.01], [1.0, 0.0]])}
    out = tmp_path_factory.mktemp("sure")
    settings = Settings(samples=2, steps=2, precision="float32")
    return evaluate(model, cohort, out, guidances=["sample"], settings=settings), out, model


def test_deviations_are_held_against_the_errors_of_the_model_s_own_image(sure, cohort):
    body, out, model = sure
    assert body["own"] == "unguided"
    with open(out / "uncertainty.csv", newline="") as file:
        rows = {(r["case"], r["target"], r["uncertainty"]): r for r in csv.DictReader(file)}
    assert len(rows) == len(CASES) * len(TARGETS) * 2
    subject = subjects(cohort)["A1"]
    settings = Settings(precision="float32")
    sources = {source: subject.volumes[source] for source in SOURCES}
    made = evaluation.synthesise(model, sources, subject.head.sum((1, 2)).tolist(), "A1", settings)
    for index, target in enumerate(TARGETS):
        error = np.abs(made.images[index].numpy() - subject.volumes[target])[subject.head]
        deviation = made.deviations[index].numpy()[subject.head]
        row = rows["A1", target, "deviation"]
        assert float(row["error"]) == pytest.approx(error.mean(), rel=1e-4)
        assert float(row["coverage_95"]) == pytest.approx((error <= 1.96 * deviation).mean(), abs=1e-4)
        kept = error[np.argsort(deviation, kind="stable")][: round(0.9 * len(error))]
        assert float(row["certain_90"]) == pytest.approx(kept.mean(), rel=1e-2)


def test_the_summary_of_sureness_has_its_rival_beside_it(sure):
    body, _, _ = sure
    assert len(body["uncertainty"]) == 4
    for entry in body["uncertainty"]:
        assert entry["cases"] == len(CASES)
        trivial = entry["uncertainty"] == "predicted intensity"
        assert (entry["coverage_95"] is None) == trivial
        assert ("p_against_deviation" in entry) == trivial
    table = evaluation.sureness_table(body["uncertainty"])
    assert table.row_count == 4
    assert [column.header for column in table.columns][:2] == ["target", "uncertainty"]


def test_the_calibration_curve_of_each_case_and_of_all(sure, cohort):
    body, out, model = sure
    with open(out / "calibration.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(CASES) * len(TARGETS) * 10
    subject = subjects(cohort)["A1"]
    predictions, deviations = predict_all(model, subject, SOURCES, ["none"], Settings(precision="float32"))
    own = [r for r in rows if (r["case"], r["target"]) == ("A1", "t1c")]
    for column, volume in (
        ("deviation", deviations["t1c"]),
        ("error", predictions[UNGUIDED]["t1c"] - subject.volumes["t1c"]),
    ):
        mean_square = np.mean([float(row[column]) ** 2 for row in own])
        assert mean_square == pytest.approx((volume[subject.head].astype(float) ** 2).mean(), rel=1e-3)
    assert [row["tenth"] for row in body["calibration"]] == [*range(1, 11)] * 2
    for entry in body["calibration"]:
        all_of_it = [r for r in rows if (r["target"], int(r["tenth"])) == (entry["target"], entry["tenth"])]
        root = np.sqrt(np.mean([float(row["error"]) ** 2 for row in all_of_it]))
        assert entry["error"] == pytest.approx(root)


def test_where_a_model_says_nothing_of_its_sureness_nothing_is_measured(evaluated):
    out, body, _ = evaluated
    assert body["uncertainty"] == []
    assert body["calibration"] == []
    assert not (out / "uncertainty.csv").exists()
    assert not (out / "calibration.csv").exists()


def test_a_pooled_model_measures_unguided_beside_its_samples(bare, cohort, tmp_path):
    settings = Settings(samples=2, steps=2, precision="float32")
    body = evaluate(bare, cohort, tmp_path, guidances=["none"], settings=settings)
    assert {e["predictor"] for e in body["summary"]} == {OWN, UNGUIDED}
    assert {e["uncertainty"] for e in body["uncertainty"]} == {"deviation", "predicted intensity"}


def test_samples_of_nothing_are_refused(sure, bare, cohort, tmp_path):
    for model, guidance in ((sure[2], None), (bare, "none")):
        with pytest.raises(ConfigError, match="add --guidance sample"):
            evaluate(model, cohort, tmp_path, settings=Settings(guidance=guidance, samples=2))


# Statistics


def test_summary_has_mean_interval_and_paired_test_against_the_own_arm(evaluated):
    _, body, rows = evaluated
    assert {(e["target"], e["predictor"], e["region"]) for e in body["summary"]} == {
        (target, predictor, region)
        for target in TARGETS
        for predictor in PREDICTORS
        for region in ("volume", "brain", "tumour", "slices")
    }
    for e in body["summary"]:
        assert e["cases"] == (3 if e["region"] == "tumour" else 6)
        for metric in METRICS:
            values = [
                r[metric]
                for r in rows
                if (r["target"], r["predictor"], r["region"]) == (e["target"], e["predictor"], e["region"])
            ]
            assert e[metric]["mean"] == pytest.approx(np.mean(values))
            assert e[metric]["low"] <= e[metric]["mean"] <= e[metric]["high"]
            assert min(values) <= e[metric]["low"]
            assert e[metric]["high"] <= max(values)
            assert ("p_against_first" in e[metric]) == (e["predictor"] != OWN)
            assert 0 < e[metric].get("p_against_first", 1) <= 1
    assert entry(body["summary"], "t2f", "zeros", "brain")["mae"]["p_against_first"] == pytest.approx(2 / 2**6)


def row(case, predictor, region="brain", **scores):
    common = {
        "case": case,
        "sources": "t1n",
        "target": "t2f",
        "predictor": predictor,
        "protocol": "volume",
        "region": region,
    }
    return {**common, **dict.fromkeys(METRICS, 0.5), **scores}


def test_the_paired_test_pairs_by_case_and_skips_what_the_own_arm_lacks():
    mine = {f"P{k}": k / 10 for k in range(8)}
    rows = [row(case, "own", mae=value) for case, value in mine.items()]
    better = [row(case, "other", mae=value + 0.01) for case, value in reversed(mine.items())]
    lonely = row("alone", "other", mae=100.0)
    summary = summarise([*rows, *better, lonely])
    own, other = summary
    assert "p_against_first" not in own["mae"]
    assert other["cases"] == 9
    assert other["mae"]["p_against_first"] == pytest.approx(2 / 2**8)  # unpaired, they could not be told apart
    assert other["ssim"]["p_against_first"] == 1


def test_scores_that_do_not_exist_are_null_and_left_out_of_the_mean():
    rows = [row("A", "own", psnr=math.inf, nmse=math.nan, mae=math.nan), row("B", "own", nmse=math.nan, mae=0.25)]
    (summary,) = summarise(rows)
    assert summary["psnr"] == {"mean": None, "low": 0.5, "high": None}
    assert summary["nmse"] == {"mean": None, "low": None, "high": None}
    assert summary["mae"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    json.dumps(summary, allow_nan=False)


def test_the_csv_holds_names_that_are_no_unicode():
    text = evaluation._csv([row("caf\udce9, left", "own")], ("case", *METRICS)).decode(errors="surrogatepass")
    (line,) = csv.DictReader(text.splitlines())
    assert line["case"] == "caf\udce9, left"
    assert line["ssim"] == "0.5"


def test_tables_render(evaluated):
    _, body, _ = evaluated
    shown = tables(body["summary"])
    assert len(shown) == 2
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        for table in shown:
            console.print(table)
    text = console.export_text()
    assert all(name in text for name in (*PREDICTORS, *TARGETS, "PSNR", "HaarPSI", "tumour", "over 6 cases"))
    psnr = entry(body["summary"], "t2f", OWN, "brain")["psnr"]
    assert f"{psnr['mean']:.2f}" in text
    assert f"{psnr['low']:.2f}–{psnr['high']:.2f}" in text
    assert "nan" not in text
    assert "None" not in text


def test_a_table_shows_zero_as_zero_and_what_is_unknown_as_a_dash():
    rows = [row("A", "own", ssim=0.0, haarpsi=math.nan, psnr=math.inf), row("B", "own", ssim=0.0, haarpsi=math.nan)]
    (table,) = tables(summarise(rows))
    cells = {column.header: next(iter(column.cells)) for column in table.columns}
    assert cells["SSIM\nbrain"] == "0.000\n0.000–0.000"
    assert cells["HaarPSI\nbrain"] == cells["PSNR\nbrain"] == cells["SSIM\ntumour"] == "–"


# Sets, cohorts and failures


def test_set_and_cohort_agree(bare, cohort, tmp_path):
    prepare(cohort, tmp_path / "set", split=Split(0.5, 0.0, 0.5, seed=0))
    body = evaluate(bare, tmp_path / "set", tmp_path / "by set", settings=SETTINGS)
    evaluate(bare, cohort, tmp_path / "by cohort", settings=SETTINGS)
    of_set, of_cohort = indexed(read_rows(tmp_path / "by set")), indexed(read_rows(tmp_path / "by cohort"))
    parts = json.loads((tmp_path / "set" / "manifest.json").read_text())["split"]
    assert body["cases"] == parts["test"]
    assert 0 < len(body["cases"]) < len(CASES)
    assert {key[0] for key in of_set} == set(body["cases"])
    assert set(of_set) == {key for key in of_cohort if key[0] in body["cases"]}
    for key, scores in of_set.items():
        for metric in METRICS:  # float16 has 11 bits
            tolerance = 0.01 if metric == "psnr" else 1e-3
            assert scores[metric] == pytest.approx(of_cohort[key][metric], rel=2e-3, abs=tolerance), (key, metric)
    train = evaluate(bare, tmp_path / "set", tmp_path / "by train", part="train", settings=SETTINGS)
    assert train["cases"] == parts["train"]
    with pytest.raises(StudyError, match="the 'val' part is empty"):
        evaluate(bare, tmp_path / "set", tmp_path / "by val", part="val", settings=SETTINGS)
    with pytest.raises(ConfigError, match="'tset' is no part"):
        evaluate(bare, tmp_path / "set", tmp_path / "by typo", part="tset", settings=SETTINGS)


def test_failing_cases_are_listed_and_the_others_go_on(bare, cohort, tmp_path):
    mixed = tmp_path / "cohort"
    shutil.copytree(cohort / "B2", mixed / "B2")
    shutil.copytree(cohort / "D4", mixed / "D4")
    write_case(mixed, "A sourceless", ("t1n", "t2f"))
    write_case(mixed, "C broken")
    nib.save(image(make_head("t2w", shape=(26, 32, 24))), mixed / "C broken" / "C broken-t2w.nii.gz")
    write_case(mixed, "E targetless", SOURCES)
    body = evaluate(bare, mixed, tmp_path / "out", settings=SETTINGS)
    assert body["cases"] == ["B2", "D4"]
    assert set(body["failed"]) == {"A sourceless", "C broken", "E targetless"}
    assert "it lacks t2w" in body["failed"]["A sourceless"]
    assert "t2w is 26×32×24" in body["failed"]["C broken"]
    assert "it has none of t1c, t2f" in body["failed"]["E targetless"]
    assert {r["case"] for r in read_rows(tmp_path / "out")} == {"B2", "D4"}
    alone = evaluate(bare, cohort, tmp_path / "alone", settings=SETTINGS)
    assert alone["failed"] == {}
    everyone = indexed(read_rows(tmp_path / "alone"))
    assert all(everyone[key] == scores for key, scores in indexed(read_rows(tmp_path / "out")).items())


def test_nothing_measurable_is_an_error_and_no_finished_result(bare, tmp_path):
    write_case(tmp_path / "cohort", "P", SOURCES)
    with pytest.raises(StudyError, match=r"No study of .*cohort could be measured: P: .*none of t1c, t2f"):
        evaluate(bare, tmp_path / "cohort", tmp_path / "out", settings=SETTINGS)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"finished": False}
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_what_cannot_work_is_refused_before_anything_is_written(bare, cohort, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    with pytest.raises(NamingError, match=r"no \.nii"):
        evaluate(bare, tmp_path / "empty", out, settings=SETTINGS)
    with pytest.raises(ModelError, match="is no model"):
        evaluate(tmp_path / "empty", cohort, out, settings=SETTINGS)
    told_nothing = load_model(save_untrained(tmp_path / "model", guidance="none", conditional=False))
    with pytest.raises(ConfigError, match="knows no condition"):
        evaluate(told_nothing, cohort, out, guidances=["sample"], settings=SETTINGS)
    assert not out.exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        evaluate(bare, cohort, tmp_path / "file", settings=SETTINGS)


def test_own_arm_comes_first_whatever_is_measured_beside_it(model_folder, tmp_path):
    write_case(tmp_path / "cohort", "P", lesion=True)
    body = evaluate(
        str(model_folder),
        str(tmp_path / "cohort"),
        str(tmp_path / "out"),
        guidances=["unconditional", "none", "unconditional"],
        settings=Settings(guidance="none", steps=3, precision="float32"),
        device="cpu",
    )
    assert body["own"] == UNGUIDED
    names = list(dict.fromkeys(e["predictor"] for e in body["summary"]))
    assert names == [UNGUIDED, "guided: unconditional", TWIN, *TRIVIAL]


def test_a_mapping_is_passed_on(bare, tmp_path):
    for modality, name in {"t1n": "MPRAGE", "t2w": "TSE", "t2f": "TIRM"}.items():
        (tmp_path / "cohort").mkdir(exist_ok=True)
        nib.save(image(make_head(modality)), tmp_path / "cohort" / f"P_{name}.nii.gz")
    mapping = {"t1n": "*_MPRAGE*", "t2w": "*_TSE*", "t2f": "*_TIRM*"}
    body = evaluate(bare, tmp_path / "cohort", tmp_path / "out", mapping=mapping, settings=SETTINGS)
    assert body["cases"] == ["P"]


def test_a_3d_model_is_measured_too(tmp_path):
    write_case(tmp_path / "cohort", "P")
    folder = save_untrained(tmp_path / "model", spatial_dims=3, window=(16, 16, 16), guidance="none")
    body = evaluate(folder, tmp_path / "cohort", tmp_path / "out", settings=SETTINGS, device="cpu")
    assert entry(body["summary"], "t2f", UNGUIDED, "brain")["cases"] == 1


# Any subset


@pytest.fixture(scope="module")
def any_model(tmp_path_factory, trivial):
    modalities = (*SOURCES, *TARGETS)
    folder = tmp_path_factory.mktemp("any")
    return load_model(save_untrained(folder, cell=8, sources=modalities, targets=modalities, trivial=trivial))


@pytest.mark.parametrize("acquired", [("t1n", "t1c"), ("t1n", "t2w", "t2f"), ("t1n", "t2w", "t1c", "t2f")])
def test_every_subset_is_each_non_empty_proper_one(any_model, acquired):
    subject = Subject("P", "P", dict.fromkeys(acquired), None, None, False)
    config = any_model.config
    one_out = patterns(config, subject)
    assert {frozenset(acquired) - set(shown) for shown in one_out} == {frozenset([m]) for m in acquired}
    every = patterns(config, subject, every_subset=True)
    assert len(every) == len(set(every)) == 2 ** len(acquired) - 2
    assert all(0 < len(shown) < len(acquired) and set(shown) < set(acquired) for shown in every)
    with pytest.raises(StudyError, match="it has not two of t1n, t2w, t1c, t2f"):
        patterns(config, Subject("P", "P", {"t1n": None}, None, None, False))


def test_a_model_of_any_subset_is_measured_on_what_it_was_not_shown(any_model, tmp_path):
    write_case(tmp_path / "cohort", "P")
    write_case(tmp_path / "cohort", "Q", modalities=("t1n", "t1c", "t2f"), seed=1)
    settings = Settings(steps=2, precision="float32")
    body = evaluate(any_model, tmp_path / "cohort", tmp_path / "out", every_subset=True, settings=settings)
    rows = read_rows(tmp_path / "out")
    for case, acquired in (("P", (*SOURCES, *TARGETS)), ("Q", ("t1n", "t1c", "t2f"))):
        asked = {(r["sources"], r["target"]) for r in rows if r["case"] == case}
        assert len(asked) == sum(len(acquired) - len(shown.split("+")) for shown in {s for s, _ in asked})
        assert len({shown for shown, _ in asked}) == 2 ** len(acquired) - 2
        assert all(target in acquired and target not in shown.split("+") for shown, target in asked)
    subject = subjects(tmp_path / "cohort")["P"]
    made, deviations = predict_all(any_model, subject, ("t2w",), ["none"], settings)
    assert list(made["unguided"]) == list(deviations) == ["t1n", "t1c", "t2f"]
    (want,) = [
        r
        for r in measure(subject, ("t2w",), made)
        if (r["target"], r["predictor"], r["region"]) == ("t2f", "unguided", "brain")
    ]
    (found,) = [
        r
        for r in rows
        if (r["case"], r["sources"], r["target"], r["predictor"], r["region"])
        == ("P", "t2w", "t2f", "unguided", "brain")
    ]
    assert found["psnr"] == pytest.approx(want["psnr"], abs=1e-4)
    shown = tables(body["summary"])
    assert [table.row_count for table in shown] == [14, 14]
    assert evaluation.sureness_table(body["uncertainty"]).row_count == 8
    one_out = evaluate(any_model, tmp_path / "cohort", tmp_path / "one", settings=settings)
    assert {e["sources"].count("+") for e in one_out["summary"]} == {1, 2}


def test_every_subset_and_references_are_refused_where_they_mean_nothing(bare, any_model, cohort, tmp_path):
    with pytest.raises(ConfigError, match="any subset"):
        evaluate(bare, cohort, tmp_path / "out", every_subset=True)
    with pytest.raises(ConfigError, match="knows no reference"):
        evaluate(any_model, cohort, tmp_path / "out", guidances=["reference"])
    assert not (tmp_path / "out").exists()
