"""The numbers of an evaluation are right: against other implementations, and where nothing must count."""

import math

import numpy as np
import pytest
from conftest import write_study
from scipy import ndimage
from skimage.metrics import structural_similarity

from crossmr.data.naming import find_studies
from crossmr.errors import StudyError
from crossmr.evaluation.measures import (
    METRICS,
    CalibrationPoint,
    Score,
    measure,
    measure_calibration,
    measure_uncertainty,
)
from crossmr.evaluation.subjects import Subject, subject_of_files

SOURCES = ("t1n", "t2w")
SIMILAR = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A tiny head with a lesion."""
    folder = tmp_path_factory.mktemp("cohort")
    write_study(folder, "A", ("t1n", "t1c", "t2f"), lesion=True)
    return subject_of_files(find_studies(folder)[0])


@pytest.fixture(scope="module")
def block():
    """A head of noise in 12 slices: 2 without, 8 full, 1 near-empty, 1 without."""
    rng = np.random.default_rng(0)
    head = np.zeros((12, 20, 20), bool)
    head[2:10, 3:17, 3:17] = True
    head[10, 9:12, 9:12] = True  # 9 of 196 voxels: less than a tenth
    truth = np.where(head, rng.uniform(0.2, 1, head.shape), 0).astype(np.float32)
    return Subject("P", "P", {"t2f": truth}, head, np.zeros_like(head), False)


def without_top(block):
    """The same, but its target reaches only slices 2 to 7."""
    truth = block.volumes["t2f"].copy()
    truth[8:] = 0
    return Subject("P", "P", {"t2f": truth}, block.head, block.tumour, False)


def by_region(scores):
    return {score.region: score for score in scores}


def values(score):
    return [getattr(score, metric) for metric in METRICS]


def test_numbers_equal_an_independent_recomputation(subject):
    truth = subject.volumes["t2f"].astype(np.float64)
    predicted = (ndimage.gaussian_filter(truth, 1) * 0.9 + 0.02).astype(np.float32)
    scores = by_region(measure(subject, SOURCES, {"it": {"t2f": predicted}}))
    assert list(scores) == ["volume", "brain", "tumour", "slices"]
    low, high = np.percentile(truth, (0, 99.9))
    a, b = (predicted.astype(np.float64) - low) / (high - low), (truth - low) / (high - low)
    _, ssim = structural_similarity(a, b, full=True, **SIMILAR)
    regions = {"volume": np.ones_like(subject.head), "brain": subject.head, "tumour": subject.tumour}
    for region, mask in regions.items():
        error, score = (a - b)[mask], scores[region]
        assert score.psnr == pytest.approx(-10 * np.log10(np.mean(error**2)), abs=1e-3)
        assert score.ssim == pytest.approx(ssim[mask].mean(), abs=1e-4)
        assert score.mae == pytest.approx(np.abs(error).mean(), rel=1e-4)
        assert score.nmse == pytest.approx(np.sum(error**2) / np.sum(b[mask] ** 2), rel=1e-4)
    areas = subject.head.sum((1, 2))
    chosen = [z for z, area in enumerate(areas) if area >= 0.1 * areas.max()]
    assert 0 < len(chosen) < len(areas)
    error, score = predicted[chosen] - truth[chosen], scores["slices"]
    planes = [structural_similarity(predicted[z], truth[z], full=True, **SIMILAR)[1].mean() for z in chosen]
    assert score.psnr == pytest.approx(np.mean(-10 * np.log10((error**2).mean((1, 2)))), abs=1e-3)
    assert score.ssim == pytest.approx(np.mean(planes), abs=1e-4)
    assert score.mae == pytest.approx(np.mean(np.abs(error)), rel=1e-4)


def test_each_predictor_and_target_is_scored_by_itself(subject):
    images = {
        "half": {t: subject.volumes[t] * np.float32(0.5) for t in ("t1c", "t2f")},
        "other": {"t1c": subject.volumes["t2f"], "t2f": subject.volumes["t1c"]},
    }
    together = measure(subject, SOURCES, images)
    apart = [
        score
        for target in ("t1c", "t2f")
        for name in images
        for score in measure(subject, SOURCES, {name: {target: images[name][target]}})
    ]
    assert together == apart
    assert len(set(together)) == 2 * 2 * 4
    assert {(s.case, s.sources) for s in together} == {("A", "t1n+t2w")}
    assert all(score.protocol == ("slice" if score.region == "slices" else "volume") for score in together)


def test_a_perfect_prediction_is_perfect(subject):
    for score in measure(subject, SOURCES, {"it": {"t2f": subject.volumes["t2f"]}}):
        assert (score.psnr, score.mae, score.nmse) == (math.inf, 0, 0)
        assert score.ssim == pytest.approx(1, abs=1e-5)
        assert score.haarpsi == pytest.approx(1, abs=1e-4)


def test_predictions_are_never_rescaled(subject):
    half = {"half": {"t2f": subject.volumes["t2f"] * np.float32(0.5)}}
    score = by_region(measure(subject, SOURCES, half))["brain"]
    assert score.nmse == pytest.approx(0.25, abs=0.01)
    assert score.ssim < 0.9


def test_near_empty_slices_do_not_count_in_the_slice_protocol(block):
    noisy = block.volumes["t2f"] + np.random.default_rng(1).normal(0, 0.1, block.head.shape).astype(np.float32)

    def scores(*spoiled):
        predicted = noisy.copy()
        predicted[list(spoiled)] = 1
        by = by_region(measure(block, SOURCES, {"it": {"t2f": predicted}}))
        assert "tumour" not in by  # none is outlined
        return {region: values(by[region]) for region in ("slices", "volume")}

    assert scores(0, 1, 10, 11)["slices"] == scores()["slices"]
    assert scores(0, 1, 10, 11)["volume"] != scores()["volume"]
    assert scores(9)["slices"] != scores()["slices"]


def test_slices_that_the_target_does_not_reach_do_not_count_in_the_slice_protocol(block):
    cut = without_top(block)
    predicted = cut.volumes["t2f"] + np.float32(0.1)
    predicted[8:] = 1  # where nothing was acquired
    score = by_region(measure(cut, SOURCES, {"it": {"t2f": predicted}}))["slices"]
    assert score.psnr == pytest.approx(20, abs=1e-3)
    assert score.mae == pytest.approx(0.1, abs=1e-5)
    assert math.isfinite(score.nmse)


def test_a_constant_target_is_refused(block):
    flat = Subject("P", "P", {"t2f": np.zeros_like(block.volumes["t2f"])}, block.head, block.tumour, False)
    with pytest.raises(StudyError, match="P: t2f cannot be measured"):
        measure(flat, SOURCES, {"it": {"t2f": block.volumes["t2f"]}})


# Uncertainty


@pytest.fixture
def noisy(block):
    """A prediction of the block and the standard deviation of its noise, which differs from voxel to voxel."""
    rng = np.random.default_rng(2)
    std = rng.uniform(0.01, 0.2, block.head.shape).astype(np.float32)
    return (block.volumes["t2f"] + rng.normal(0, std)).astype(np.float32), std


def test_uncertainty_is_compared_with_the_errors_within_the_head(block, noisy):
    predicted, std = noisy
    of_std, of_intensity = measure_uncertainty(block, SOURCES, {"t2f": predicted}, {"t2f": std})
    assert [s.uncertainty for s in (of_std, of_intensity)] == ["std", "predicted intensity"]
    assert (of_std.case, of_std.sources, of_std.target) == ("P", "t1n+t2w", "t2f")
    error = np.abs(predicted - block.volumes["t2f"])[block.head].astype(np.float64)
    for score, guess in ((of_std, std[block.head]), (of_intensity, predicted[block.head])):
        assert score.error == pytest.approx(error.mean())
        assert score.correlation == pytest.approx(np.corrcoef(error, guess)[0, 1])
        assert score.coverage_95 == pytest.approx((error <= 1.96 * guess).mean(), abs=1e-6)
        certain = error[np.argsort(guess, kind="stable")][: round(0.9 * len(error))]
        assert score.error_most_certain_90 == pytest.approx(certain.mean(), rel=1e-4)
    assert of_std.coverage_95 == pytest.approx(0.95, abs=0.02)
    assert of_std.ause < 0.3 < of_intensity.ause


def test_the_calibration_curve_runs_from_the_most_certain_decile_to_the_least(block, noisy):
    predicted, std = noisy
    points = measure_calibration(block, SOURCES, {"t2f": predicted}, {"t2f": std})
    assert [point.decile for point in points] == [*range(1, 11)]
    inside = std[block.head].astype(np.float64)
    error = (predicted - block.volumes["t2f"])[block.head].astype(np.float64)
    tenths = np.array_split(np.argsort(inside, kind="stable"), 10)
    for point, chosen in zip(points, tenths, strict=True):
        assert point.std == pytest.approx(np.sqrt(np.mean(inside[chosen] ** 2)), rel=1e-5)
        assert point.error == pytest.approx(np.sqrt(np.mean(error[chosen] ** 2)), rel=1e-5)


def test_errors_outside_a_target_s_field_of_view_do_not_count_as_uncertainty(block, noisy):
    """Within the head, but in slices where the target was not acquired, there is no truth."""
    cut, (predicted, std) = without_top(block), noisy
    wild = predicted.copy()
    wild[8:] = 1
    for function in (measure_uncertainty, measure_calibration):
        scores = function(cut, SOURCES, {"t2f": predicted}, {"t2f": std})
        assert function(cut, SOURCES, {"t2f": wild}, {"t2f": std}) == scores
    reached = block.head.copy()
    reached[8:] = False
    error = np.abs(predicted - cut.volumes["t2f"])[reached]
    of_std, _ = measure_uncertainty(cut, SOURCES, {"t2f": wild}, {"t2f": std})
    assert of_std.error == pytest.approx(error.mean(dtype=np.float64))


def test_errors_outside_the_head_do_not_count_as_uncertainty(block, noisy):
    predicted, std = noisy
    wild = np.where(block.head, predicted, np.float32(1))
    for function in (measure_uncertainty, measure_calibration):
        scores = function(block, SOURCES, {"t2f": predicted}, {"t2f": std})
        assert function(block, SOURCES, {"t2f": wild}, {"t2f": std}) == scores


def test_without_standard_deviations_nothing_is_compared(block):
    assert measure_uncertainty(block, SOURCES, block.volumes, {}) == []
    assert measure_calibration(block, SOURCES, block.volumes, {}) == []


def test_the_rows_name_what_the_files_hold():
    assert [*Score.__dataclass_fields__] == ["case", "sources", "target", "predictor", "protocol", "region", *METRICS]
    assert [*CalibrationPoint.__dataclass_fields__] == ["case", "sources", "target", "decile", "std", "error"]
