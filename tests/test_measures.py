"""The numbers of an evaluation are right: against other implementations, and where nothing must count."""

import math
from dataclasses import replace

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
    ContrastScore,
    Score,
    UncertaintyScore,
    above_air,
    measure,
    measure_calibration,
    measure_contrasts,
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
    nowhere = np.zeros_like(head)
    return Subject("P", "P", {"t2f": truth}, {"t2f": 0.0}, head, nowhere, nowhere)


@pytest.fixture(scope="module")
def brain():
    """A stripped brain on the scale of `data.head`, with a lesion that is bright in T2 and FLAIR, and fluid.

    The lesion's enhancing part is bright in T1ce; the fluid is bright in T2, and dark in all others.
    """
    rng = np.random.default_rng(0)
    head, tumour, enhancing, fluid = (np.zeros((20, 30, 30), bool) for _ in range(4))
    head[2:18, 3:27, 3:27] = True
    tumour[6:12, 6:12, 6:12] = True
    enhancing[8:12, 8:12, 8:12] = True
    fluid[6:12, 18:24, 6:12] = True
    levels = {"t1n": (0, -1, -3), "t1c": (0, 4, -3), "t2w": (3, 3, 6), "t2f": (3, 3, -3)}
    volumes = {}
    for modality, (of_tumour, of_enhancing, of_fluid) in levels.items():
        deviations = rng.normal(0, 1, head.shape)
        for mask, level in ((tumour, of_tumour), (enhancing, of_enhancing), (fluid, of_fluid)):
            deviations[mask] = level + 0.2 * deviations[mask]
        volumes[modality] = np.where(head, np.clip((5 + deviations) / 15, 2**-10, 1), 0).astype(np.float32)
    air = dict.fromkeys(volumes, -0.3)
    subject = Subject("P1", "P", volumes, air, head, tumour, enhancing)
    return subject, fluid


def without_top(block):
    """The same, but its target reaches only slices 2 to 7."""
    truth = block.volumes["t2f"].copy()
    truth[8:] = 0
    return replace(block, volumes={"t2f": truth})


def by_region(scores):
    return {score.region: score for score in scores}


def values(score):
    return [getattr(score, metric) for metric in METRICS]


@pytest.mark.parametrize("air", [-0.2, 0.1])
def test_numbers_equal_an_independent_recomputation(subject, air):
    subject = replace(subject, air={"t2f": air})
    truth = subject.volumes["t2f"].astype(np.float64)
    predicted = (ndimage.gaussian_filter(truth, 1) * 0.9 + 0.02).astype(np.float32)
    scores = by_region(measure(subject, SOURCES, {"it": {"t2f": predicted}}))
    assert list(scores) == ["volume", "brain", "deep", "tumour", "slices"]
    pair = (volume.astype(np.float64) for volume in (predicted, truth))
    predicted, truth = (np.where(volume > 0, np.maximum(volume - air, 0), 0) for volume in pair)
    low, high = np.percentile(truth, (0, 99.9))
    a, b = (predicted - low) / (high - low), (truth - low) / (high - low)
    _, ssim = structural_similarity(a, b, full=True, **SIMILAR)
    regions = {"volume": np.ones_like(subject.head), "brain": subject.head, "tumour": subject.tumour}
    for region, mask in regions.items():
        error, score = (a - b)[mask], scores[region]
        assert score.psnr == pytest.approx(-10 * np.log10(np.mean(error**2)), abs=1e-3)
        assert score.ssim == pytest.approx(ssim[mask].mean(), abs=1e-4)
        assert score.mae == pytest.approx(np.abs(error).mean(), rel=1e-4)
        assert score.nmse == pytest.approx(np.sum(error**2) / np.sum(b[mask] ** 2), rel=1e-4)
        assert score.correlation == pytest.approx(np.corrcoef(a[mask], b[mask])[0, 1], abs=1e-5)
        mapped = np.polyval(np.polyfit(a[mask], b[mask], 1), a[mask])
        assert score.psnr_affine == pytest.approx(-10 * np.log10(np.mean((mapped - b[mask]) ** 2)), abs=1e-3)
    areas = subject.head.sum((1, 2))
    chosen = [z for z, area in enumerate(areas) if area >= 0.1 * areas.max()]
    assert 0 < len(chosen) < len(areas)
    predicted, truth = (np.clip(volume / np.percentile(truth, 99.9), 0, 1) for volume in (predicted, truth))
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
    assert len(set(together)) == 2 * 2 * 5
    assert {(s.case, s.patient, s.sources) for s in together} == {("A", "A", "t1n+t2w")}
    assert all(score.protocol == ("slice" if score.region == "slices" else "volume") for score in together)


def test_a_perfect_prediction_is_perfect(subject):
    for score in measure(subject, SOURCES, {"it": {"t2f": subject.volumes["t2f"]}}):
        assert (score.psnr, score.mae, score.nmse) == (math.inf, 0, 0)
        assert score.ssim == pytest.approx(1, abs=1e-5)
        assert score.haarpsi == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-100, 900), (50, 1000)])
def test_numbers_are_those_of_raw_images(subject, low, high):
    """As the field measures: raw, 0 in air; air may lie below the scale that networks use, or on it."""
    head = subject.head
    raw = [np.where(head, 51 + np.random.default_rng(n).gamma(9, 20, head.shape), 0) for n in range(2)]
    predicted, truth = (np.where(head, (image - low) / (high - low), 0).astype(np.float32) for image in raw)
    stripped = replace(subject, volumes={"t2f": truth}, air={"t2f": (0 - low) / (high - low)})
    score = by_region(measure(stripped, SOURCES, {"it": {"t2f": predicted}}))["brain"]
    squares = (raw[0] - raw[1])[head] ** 2
    assert score.nmse == pytest.approx(squares.sum() / (raw[1] ** 2).sum(), rel=1e-4)
    assert score.psnr == pytest.approx(10 * np.log10(np.percentile(raw[1], 99.9) ** 2 / squares.mean()), abs=1e-3)


def test_intensities_above_air_are_never_negative_and_what_is_masked_stays_0():
    volume = np.array([[[0, 2**-10, 0.2, 0.5]]], np.float32)
    for air, expected in ((-0.3, [0, 0.3 + 2**-10, 0.5, 0.8]), (0.2, [0, 0, 0, 0.3])):
        made = above_air(volume, air)
        np.testing.assert_allclose(made, [[expected]], atol=1e-6)
        assert made.dtype == np.float32


def test_predictions_are_never_rescaled(subject):
    """Half as far above air is half the image; after the best affine map it is perfect."""
    subject, air = replace(subject, air={"t2f": 0.1}), np.float32(0.1)
    above = np.maximum(subject.volumes["t2f"] - air, 0)
    score = by_region(measure(subject, SOURCES, {"half": {"t2f": air + above / 2}}))["brain"]
    assert score.nmse == pytest.approx(0.25, abs=0.01)
    assert score.ssim < 0.9
    assert score.psnr < 20
    assert score.psnr_affine > 100
    assert score.correlation == pytest.approx(1)


def test_deep_is_five_millimetres_and_more_from_the_rim_within_the_slice(block):
    """Voxels of 9 × 2.5 × 1 mm: the rim is 1 voxel wide in y and 4 in x, and no slice of the head is left out."""
    subject = replace(block, spacing_mm=(9.0, 2.5, 1.0))
    deep = np.zeros_like(block.head)
    deep[2:10, 4:16, 7:13] = True
    predicted = block.volumes["t2f"].copy()
    predicted[~deep] = 1 - predicted[~deep]
    by = by_region(measure(subject, SOURCES, {"it": {"t2f": predicted}}))
    assert by["deep"].correlation == pytest.approx(1)
    assert by["deep"].mae == 0
    assert by["brain"].correlation < 0.5
    just_inside = deep.copy()
    just_inside[2, 4, 7] = False
    predicted[~just_inside] = 1 - block.volumes["t2f"][~just_inside]
    assert by_region(measure(subject, SOURCES, {"it": {"t2f": predicted}}))["deep"].mae > 0
    assert "deep" not in by_region(measure(replace(block, spacing_mm=(1.0, 0.5, 0.5)), SOURCES, {"it": block.volumes}))


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
    predicted = cut.volumes["t2f"] * np.float32(0.9)
    predicted[8:] = 1  # where nothing was acquired
    score = by_region(measure(cut, SOURCES, {"it": {"t2f": predicted}}))["slices"]
    assert score.nmse == pytest.approx(0.01, rel=0.05)
    darkest = np.where(block.head & (block.volumes["t2f"] > 0), np.maximum(cut.volumes["t2f"], np.float32(2**-10)), 0)
    saturated = replace(cut, volumes={"t2f": darkest.astype(np.float32)})  # or where the scale has its end
    assert by_region(measure(saturated, SOURCES, {"it": {"t2f": predicted}}))["slices"].nmse == score.nmse


def test_a_target_without_the_skull_that_others_have_is_measured_within_its_brain(brain):
    """As if no volume had a skull: what was synthesised of it has no truth."""
    subject, _ = brain
    wide = replace(subject, head=ndimage.binary_dilation(subject.head, iterations=2))
    rng = np.random.default_rng(1)
    truth = subject.volumes["t2f"]
    predicted = np.where(subject.head, np.clip(truth + rng.normal(0, 0.05, truth.shape), 0.01, 1), 0)
    images, std = {"t2f": predicted.astype(np.float32)}, {"t2f": np.full(truth.shape, 0.05, np.float32)}
    both = (subject, wide)
    for_each = [(measure, {"it": images}), (measure_contrasts, {"it": images})]
    for function, its in for_each:
        alone, beside = (function(one, SOURCES, its) for one in both)
        assert alone == beside
        assert len(alone) > 1
    for function in (measure_uncertainty, measure_calibration):
        alone, beside = (map(repr, function(one, SOURCES, images, std)) for one in both)  # some of it is nan
        assert [*alone] == [*beside]


def test_a_constant_target_is_refused(block):
    flat = replace(block, volumes={"t2f": np.zeros_like(block.volumes["t2f"])})
    with pytest.raises(StudyError, match="P: t2f cannot be measured"):
        measure(flat, SOURCES, {"it": {"t2f": block.volumes["t2f"]}})


# Contrasts


def contrasts(subject, images):
    return {(s.target, s.predictor, s.structure): s for s in measure_contrasts(subject, SOURCES, images)}


def replaced(volume, mask, value):
    return np.where(mask, np.float32(value), volume)


def test_a_lesion_is_kept_by_its_truth_halved_by_half_of_it_and_lost_where_it_is_erased(brain):
    subject, _ = brain
    truth, lesion = subject.volumes["t2f"], subject.tumour
    median = np.median(truth[subject.head & ~lesion])
    images = {
        "truth": truth,
        "half": np.where(lesion, (truth + median) / 2, truth),
        "erased": replaced(truth, lesion, median),
        "dark": np.where(lesion, 2 * median - truth, truth),
        "other scale": 0.5 * truth + 0.3,
        "constant": np.full_like(truth, 1 / 3),
    }
    scores = contrasts(subject, {name: {"t2f": image.astype(np.float32)} for name, image in images.items()})
    rest = truth[subject.head & ~lesion].astype(np.float64)
    true = (truth[lesion].mean() - np.median(rest)) / np.subtract(*np.percentile(rest, (75, 25)))
    expected = {"truth": 1, "half": 0.5, "erased": 0, "dark": -1, "other scale": 1, "constant": 0}
    for name, kept in expected.items():
        score = scores["t2f", name, "lesion"]
        assert (score.case, score.patient, score.sources) == ("P1", "P", "t1n+t2w")
        assert score.truth == pytest.approx(true, rel=1e-4)
        assert score.kept == pytest.approx(kept, abs=1e-3)
        assert score.predicted == pytest.approx(kept * true, abs=1e-3)


def test_of_t1ce_the_lesion_is_its_enhancing_part(brain):
    subject, _ = brain
    volume = subject.volumes["t1c"]
    erased = {"rim": subject.tumour & ~subject.enhancing, "enhancement": subject.enhancing}
    images = {name: {"t1c": replaced(volume, mask, 1 / 3)} for name, mask in erased.items()}
    scores = contrasts(subject, images)
    assert scores["t1c", "rim", "lesion"].kept == pytest.approx(1)
    assert scores["t1c", "enhancement", "lesion"].kept == pytest.approx(0, abs=0.02)
    unenhancing = replace(subject, enhancing=np.zeros_like(subject.enhancing))
    assert ("t1c", "rim", "lesion") not in contrasts(unenhancing, images)
    assert ("t2f", "rim", "lesion") in contrasts(unenhancing, {"rim": {"t2f": volume}})


def test_a_lesion_that_does_not_stand_out_to_the_bright_side_has_no_share(brain):
    subject, _ = brain
    score = contrasts(subject, {"it": {"t1n": subject.volumes["t1n"]}})["t1n", "it", "lesion"]
    assert -1 < score.truth < 0.5
    assert math.isnan(score.kept)


def test_a_lesion_of_fewer_than_fifty_voxels_is_left_out(brain):
    subject, _ = brain
    for voxels, is_there in ((49, False), (50, True)):
        lesion = np.zeros_like(subject.tumour)
        lesion[np.unravel_index(np.flatnonzero(subject.tumour)[:voxels], lesion.shape)] = True
        images = {"it": {"t2f": subject.volumes["t2f"]}}
        assert (("t2f", "it", "lesion") in contrasts(replace(subject, tumour=lesion), images)) is is_there


def test_fluid_is_found_in_the_truth_and_compared(brain):
    """The fluid of each target; dark in FLAIR, bright in T2, and nothing where it is tissue in the prediction."""
    subject, fluid = brain
    images = {"truth": subject.volumes}
    images["tissue"] = {m: replaced(volume, fluid, 1 / 3) for m, volume in subject.volumes.items()}
    scores = contrasts(subject, images)
    for target, volume in subject.volumes.items():
        rest = volume[subject.head & ~fluid & ~subject.tumour]
        true = (volume[fluid].mean() - np.median(rest)) / np.subtract(*np.percentile(rest, (75, 25)))
        assert scores[target, "truth", "fluid"].truth == pytest.approx(true, abs=0.05)  # noise is fluid here and there
        assert scores[target, "truth", "fluid"].kept == pytest.approx(1)
        assert scores[target, "tissue", "fluid"].kept == pytest.approx(0, abs=0.05)
    assert scores["t2f", "truth", "fluid"].truth < -1 < 1 < scores["t2w", "truth", "fluid"].truth


def test_fluid_needs_t2_and_flair_or_t1(brain):
    subject, _ = brain
    for modalities, is_there in (
        (("t2w", "t2f"), True),
        (("t2w", "t1n"), True),
        (("t2w", "t1c"), False),
        (("t1n", "t2f"), False),
    ):
        some = replace(subject, volumes={m: subject.volumes[m] for m in modalities})
        target = modalities[0]
        images = {"it": {target: subject.volumes[target]}}
        assert ((target, "it", "fluid") in contrasts(some, images)) is is_there


def test_fluid_is_not_looked_for_where_flair_was_not_acquired(brain):
    subject, fluid = brain
    cut = subject.volumes["t2f"].copy()
    cut[9:] = 0
    erased = subject.volumes["t2w"].copy()
    erased[9:][fluid[9:]] = 1 / 3
    subject = replace(subject, volumes={**subject.volumes, "t2f": cut})
    score = contrasts(subject, {"it": {"t2w": erased}})["t2w", "it", "fluid"]
    assert score.kept == pytest.approx(1, abs=0.1)


def test_slices_that_a_target_does_not_reach_have_no_contrast(brain):
    subject, _ = brain
    cut = subject.volumes["t2f"].copy()
    cut[9:] = 0  # half of the lesion, and of the fluid
    wild = cut.copy()
    wild[9:] = 1
    subject = replace(subject, volumes={**subject.volumes, "t2f": cut})
    scores = contrasts(subject, {"truth": {"t2f": cut}, "wild": {"t2f": wild}})
    for structure in ("lesion", "fluid"):
        assert scores["t2f", "wild", structure].predicted == scores["t2f", "truth", structure].predicted
        assert abs(scores["t2f", "truth", structure].truth) > 1


# Uncertainty


def test_errors_and_standard_deviations_are_compared_in_lesions(brain):
    subject, _ = brain
    truth, lesion, rest = subject.volumes["t2f"], subject.tumour, subject.head & ~subject.tumour
    predicted = replaced(truth + np.where(rest, np.float32(0.02), 0), lesion, np.median(truth[rest]) + 0.02)
    std = np.where(lesion, 0.06, np.where(rest, 0.02, 0.5)).astype(np.float32)
    of_std, of_intensity = measure_uncertainty(subject, SOURCES, {"t2f": predicted}, {"t2f": std})
    assert of_std.std_ratio == pytest.approx(3, rel=1e-4)
    assert of_std.error_ratio == pytest.approx(np.abs(predicted - truth)[lesion].mean() / 0.02, rel=1e-3)
    assert of_std.lesion_kept == pytest.approx(0, abs=1e-3)
    assert of_intensity.std_ratio == pytest.approx(predicted[lesion].mean() / predicted[rest].mean(), rel=1e-4)
    assert (of_intensity.error_ratio, of_intensity.lesion_kept) == (of_std.error_ratio, of_std.lesion_kept)
    nowhere = np.zeros_like(lesion)
    for score in measure_uncertainty(replace(subject, tumour=nowhere), SOURCES, {"t2f": predicted}, {"t2f": std}):
        assert all(math.isnan(value) for value in (score.std_ratio, score.error_ratio, score.lesion_kept))


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
    task = ["case", "patient", "sources", "target"]
    assert [*Score.__dataclass_fields__] == [*task, "predictor", "protocol", "region", *METRICS]
    assert [*ContrastScore.__dataclass_fields__] == [*task, "predictor", "structure", "truth", "predicted", "kept"]
    assert [*CalibrationPoint.__dataclass_fields__] == [*task, "decile", "std", "error"]
    measures = ["correlation", "error", "error_most_certain_90", "ause", "coverage_95"]
    lesions = ["std_ratio", "error_ratio", "lesion_kept"]
    assert [*UncertaintyScore.__dataclass_fields__] == [*task, "uncertainty", *measures, *lesions]
