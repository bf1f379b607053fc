"""The metrics, against scikit-image, scipy, numpy and plain re-derivations."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal, stats
from skimage.metrics import structural_similarity

from crossmr import metrics

NAN, INF = float("nan"), float("inf")
SHAPES = [(3, 40, 33), (2, 14, 17, 12)]


def pair(shape, noise=0.1, seed=0, dtype=torch.float32):
    """A smooth truth in about [0, 1] and a noisy prediction, (B, *spatial)."""
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.random(shape), (0, *[2] * (len(shape) - 1)))
    truth = (truth - truth.min()) / (truth.max() - truth.min())
    prediction = truth + noise * rng.standard_normal(shape)
    return torch.tensor(prediction, dtype=dtype), torch.tensor(truth, dtype=dtype)


def random_mask(shape, seed=3):
    return torch.tensor(np.random.default_rng(seed).random(shape) < 0.3)


# Errors a voxel


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_numpys_with_and_without_a_mask(shape):
    prediction, truth = pair(shape)
    mask = random_mask(shape)
    for region in (None, mask):
        scores = {
            "mae": metrics.mae(prediction, truth, region),
            "mse": metrics.mse(prediction, truth, region),
            "nmse": metrics.nmse(prediction, truth, region),
            "psnr": metrics.psnr(prediction, truth, 2.0, region),
        }
        for item in range(shape[0]):
            inside = slice(None) if region is None else region[item].numpy()
            p, t = prediction[item].double().numpy()[inside], truth[item].double().numpy()[inside]
            expected = {
                "mae": np.abs(p - t).mean(),
                "mse": ((p - t) ** 2).mean(),
                "nmse": ((p - t) ** 2).sum() / (t**2).sum(),
                "psnr": 10 * math.log10(4 / ((p - t) ** 2).mean()),
            }
            for name, value in expected.items():
                assert scores[name].shape == (shape[0],)
                assert scores[name][item].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_and_the_best_affine_map_are_numpys_with_and_without_a_mask(shape):
    prediction, truth = pair(shape)
    for region in (None, random_mask(shape)):
        correlation = metrics.correlation(prediction, truth, region)
        psnr = metrics.psnr_affine(prediction, truth, 2.0, region)
        assert correlation.shape == psnr.shape == (shape[0],)
        for item in range(shape[0]):
            inside = slice(None) if region is None else region[item].numpy()
            p, t = (image[item].double().numpy()[inside].ravel() for image in (prediction, truth))
            assert correlation[item].item() == pytest.approx(np.corrcoef(p, t)[0, 1], rel=1e-6)
            mapped = np.polyval(np.polyfit(p, t, 1), p)
            assert psnr[item].item() == pytest.approx(10 * math.log10(4 / ((mapped - t) ** 2).mean()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [0.3, -2.0])
def test_an_affine_map_of_the_truth_costs_nothing(shape, slope):
    _, truth = pair(shape)
    mask = random_mask(shape)
    mapped = torch.where(mask, slope * truth + 5, 1e3)  # what lies outside does not count
    assert (metrics.psnr(mapped, truth, 1.0, mask) < 0).all()
    assert (metrics.psnr_affine(mapped, truth, 1.0, mask) > 110).all()
    expected = torch.full((shape[0],), math.copysign(1, slope), dtype=torch.float64)
    torch.testing.assert_close(metrics.correlation(mapped, truth, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_a_constant_correlates_with_nothing_and_is_mapped_to_the_mean(value):
    _, truth = pair(SHAPES[0])
    constant = torch.full_like(truth, value)
    assert metrics.correlation(constant, truth).isnan().all()
    assert metrics.correlation(truth, constant).isnan().all()
    variance = truth.double().flatten(1).var(1, correction=0)
    torch.testing.assert_close(metrics.psnr_affine(constant, truth, 1.0), -10 * variance.log10())
    empty = torch.zeros(truth.shape, dtype=torch.bool)
    assert metrics.correlation(truth, truth, empty).isnan().all()
    assert metrics.psnr_affine(truth, truth, 1.0, empty).isnan().all()


def test_psnr_of_known_values():
    truth = torch.zeros(2, 4, 4)
    prediction = torch.stack([torch.full((4, 4), 0.1), torch.full((4, 4), 10.0)])
    scores = metrics.psnr(prediction, truth, torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(scores, torch.tensor([20.0, 20.0]))
    assert metrics.psnr(truth, truth, 1.0).tolist() == [INF, INF]


def test_nmse_of_zeros_is_one_and_of_an_empty_truth_infinite():
    prediction, truth = pair((2, 8, 8))
    torch.testing.assert_close(metrics.nmse(torch.zeros_like(truth), truth), torch.ones(2))
    assert metrics.nmse(prediction, torch.zeros_like(truth)).tolist() == [INF, INF]


@pytest.mark.parametrize("name", ["mae", "mse", "nmse", "psnr", "ssim", "haarpsi"])
def test_an_empty_mask_scores_nan_and_leaves_its_neighbours_alone(name):
    prediction, truth = pair((2, 20, 20))
    mask = torch.ones(2, 20, 20, dtype=torch.bool)
    mask[0] = False
    ranged = [1.0] if name in ("psnr", "ssim", "haarpsi") else []
    score = getattr(metrics, name)
    masked, whole = score(prediction, truth, *ranged, mask), score(prediction, truth, *ranged)
    assert masked[0].isnan()
    torch.testing.assert_close(masked[1], whole[1])


@pytest.mark.parametrize("name", ["mae", "mse", "nmse", "psnr"])
def test_what_lies_outside_the_mask_does_not_matter(name):
    prediction, truth = pair((2, 8, 8))
    mask = random_mask((2, 8, 8))
    ranged = [1.0] if name == "psnr" else []
    score = getattr(metrics, name)
    spoilt = prediction.masked_fill(~mask, NAN)
    torch.testing.assert_close(score(spoilt, truth, *ranged, mask), score(prediction, truth, *ranged, mask))


@pytest.mark.parametrize("name", ["mae", "mse", "nmse", "psnr", "ssim", "haarpsi"])
def test_a_batch_equals_its_items_one_by_one(name):
    prediction, truth = pair((3, 24, 20))
    mask, span = random_mask((3, 24, 20)), torch.tensor([1.0, 2.0, 3.0])
    score = getattr(metrics, name)

    def scored(i):
        ranged = [span[i]] if name in ("psnr", "ssim", "haarpsi") else []
        return score(prediction[i], truth[i], *ranged, mask[i])

    torch.testing.assert_close(scored(slice(None)), torch.cat([scored(slice(i, i + 1)) for i in range(3)]))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"share one shape.*\(1, 8, 8\)"):
        metrics.mae(torch.zeros(1, 8, 8), torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="share one shape"):
        metrics.ssim(torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), 1.0, torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="share one shape"):
        metrics.mse(torch.zeros(8, 8), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="floating point"):
        metrics.mae(torch.zeros(1, 8, 8, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.uint8))


# SSIM


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_map_is_scikit_images(shape, dtype, tolerance):
    prediction, truth = pair(shape, dtype=dtype)
    spans = torch.linspace(0.5, 2, shape[0], dtype=dtype)
    ours = metrics.ssim_map(prediction, truth, spans)
    assert (ours.shape, ours.dtype) == (prediction.shape, dtype)
    for item in range(shape[0]):
        _, theirs = structural_similarity(
            prediction[item].double().numpy(),
            truth[item].double().numpy(),
            data_range=spans[item].item(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        np.testing.assert_allclose(ours[item].numpy(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
def test_ssim_windows_are_scipys_on_axes_shorter_than_themselves(size):
    prediction, truth = pair((1, size, 30), dtype=torch.float64)

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, mode="reflect", radius=5)

    x, y = prediction[0].numpy(), truth[0].numpy()
    covariance = blur(x * y) - blur(x) * blur(y)
    variances = blur(x * x) - blur(x) ** 2 + blur(y * y) - blur(y) ** 2
    expected = (2 * blur(x) * blur(y) + 1e-4) * (2 * covariance + 9e-4)
    expected /= (blur(x) ** 2 + blur(y) ** 2 + 1e-4) * (variances + 9e-4)
    np.testing.assert_allclose(metrics.ssim_map(prediction, truth, 1.0)[0].numpy(), expected, atol=1e-10)


def test_ssim_is_the_mean_of_its_map_within_the_mask():
    prediction, truth = pair(SHAPES[1])
    mask = random_mask(SHAPES[1])
    similarity = metrics.ssim_map(prediction, truth, 1.0)
    expected = torch.stack([item[region].mean() for item, region in zip(similarity, mask, strict=True)])
    torch.testing.assert_close(metrics.ssim(prediction, truth, 1.0, mask), expected)
    torch.testing.assert_close(metrics.ssim(prediction, truth, 1.0), similarity.mean((1, 2, 3)))
    torch.testing.assert_close(metrics.ssim(truth, truth, 1.0), torch.ones(2))


# HaarPSI


def plain_haarpsi(prediction, truth, mask=None):
    """Reisenhofer et al. 2018 for one grey image in 0..255, convolution by convolution."""

    def windowed(image, kernel):  # MATLAB's 'same': the full convolution from floor(size / 2) on
        full, start = signal.convolve2d(image, kernel, mode="full"), kernel.shape[0] // 2
        return full[start : start + image.shape[0], start : start + image.shape[1]]

    def halved(image):
        return windowed(image, np.full((2, 2), 0.25))[::2, ::2]

    def responses(image, level, upright):
        step = np.sign(np.arange(2**level) - 2 ** (level - 1) + 0.5)[:, None]
        kernel = np.repeat(step, 2**level, axis=1) / 2**level
        return np.abs(windowed(halved(image), kernel if upright else kernel.T))

    region = 1.0 if mask is None else halved(mask.astype(float))
    above, below = 0.0, 0.0
    for upright in (True, False):
        likeness = 0.0
        for level in (1, 2):
            a, b = responses(prediction, level, upright), responses(truth, level, upright)
            likeness = likeness + (2 * a * b + 30) / (a * a + b * b + 30) / 2
        weight = np.maximum(responses(prediction, 3, upright), responses(truth, 3, upright)) * region
        above += (weight / (1 + np.exp(-4.2 * likeness))).sum()
        below += weight.sum()
    ratio = above / below
    return (np.log(ratio / (1 - ratio)) / 4.2) ** 2


@pytest.mark.parametrize("shape", [(2, 64, 48), (2, 41, 37), (1, 6, 5)])
def test_haarpsi_is_its_plain_definition(shape):
    prediction, truth = pair(shape)
    mask = random_mask(shape)
    for region in (None, mask):
        ours = metrics.haarpsi(4 * prediction, 4 * truth, 4.0, region)
        for item in range(shape[0]):
            inside = None if region is None else region[item].numpy()
            p, t = 255 * prediction[item].double().numpy(), 255 * truth[item].double().numpy()
            assert ours[item].item() == pytest.approx(plain_haarpsi(p, t, inside), abs=1e-5)


def test_haarpsi_is_one_for_identical_images_and_falls_with_noise_and_blur():
    _, truth = pair((1, 64, 64))
    assert metrics.haarpsi(truth, truth, 1.0).item() == pytest.approx(1, abs=1e-5)
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = [metrics.haarpsi(truth + level * noise, truth, 1.0).item() for level in (0.01, 0.03, 0.1, 0.3)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > noisy[3] > 0
    images = [torch.tensor(ndimage.gaussian_filter(truth[0].numpy(), sigma))[None] for sigma in (0.7, 2, 5)]
    blurred = [metrics.haarpsi(image, truth, 1.0).item() for image in images]
    assert 1 > blurred[0] > blurred[1] > blurred[2] > 0


def test_haarpsi_does_not_see_damage_far_from_the_mask():
    _, truth = pair((1, 64, 64))
    damaged, mask = truth.clone(), torch.zeros(1, 64, 64, dtype=torch.bool)
    damaged[:, :16] += 0.3 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    mask[:, 32:] = True
    assert metrics.haarpsi(damaged, truth, 1.0, mask).item() == pytest.approx(1, abs=1e-5)
    assert metrics.haarpsi(damaged, truth, 1.0, ~mask).item() < 0.9


def test_haarpsi_is_symmetric_and_undefined_for_nothing():
    prediction, truth = pair((2, 32, 32))
    forth, back = metrics.haarpsi(prediction, truth, 1.0), metrics.haarpsi(truth, prediction, 1.0)
    torch.testing.assert_close(forth, back)
    empty = torch.zeros(1, 32, 32)
    assert metrics.haarpsi(empty, empty, 1.0).isnan().all()


def test_haarpsi_refuses_volumes():
    with pytest.raises(ValueError, match="slices as a batch"):
        metrics.haarpsi(torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 8, 8), 1.0)


# Scaling


@pytest.mark.parametrize(("low", "high"), [(0.0, 99.9), (0.5, 99.5), (0.0, 100.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_images_are_scaled_by_the_truths_percentiles(shape, low, high):
    prediction, truth = pair(shape, seed=1)
    prediction, truth = 900 * prediction - 30, 700 * truth + 20
    scaled = metrics.scale_by_truth(prediction, truth, low, high)
    for item in range(shape[0]):
        bottom, top = np.percentile(truth[item].double().numpy(), (low, high))
        for ours, image in zip(scaled, (prediction, truth), strict=True):
            expected = (image[item].double().numpy() - bottom) / (top - bottom)
            np.testing.assert_allclose(ours[item].numpy(), expected, atol=1e-4)
            assert ours.dtype == torch.float32
    assert (high == 100.0) == (scaled[1].max().item() <= 1 + 1e-6)  # nothing is clipped


def test_scaling_undoes_a_change_of_unit_but_keeps_a_wrong_scale_wrong():
    prediction, truth = pair((2, 16, 16))
    torch.testing.assert_close(
        metrics.scale_by_truth(1000 * prediction + 5, 1000 * truth + 5),
        metrics.scale_by_truth(prediction, truth),
    )
    doubled, scaled = metrics.scale_by_truth(2 * truth, truth)
    assert metrics.mae(doubled, scaled).min().item() > 0.1


def test_percentiles_of_more_voxels_than_torch_quantile_takes():
    size = 2**24 + 1
    truth = torch.arange(size, dtype=torch.float64).reshape(1, 1, size)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(truth.flatten(), 0.999)
    _, scaled = metrics.scale_by_truth(truth, truth, 0.0, 99.9)
    assert scaled.max().item() == pytest.approx(1 / 0.999, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 3.5, NAN])
def test_a_truth_without_range_is_refused(value):
    _, truth = pair((2, 8, 8))
    truth[1] = value
    with pytest.raises(ValueError, match="Item 1 of the truth has no range"):
        metrics.scale_by_truth(truth, truth)


# Statistics


def test_bootstrap_agrees_with_scipy_and_the_normal_interval():
    values = np.random.default_rng(0).normal(30, 2, size=200)
    low, high = metrics.bootstrap_interval(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", random_state=np.random.default_rng(1))
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.03)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_widens_with_confidence_and_depends_on_the_seed_alone():
    values = [1.0, 2.0, 5.0, 7.0, 11.0]
    narrow = metrics.bootstrap_interval(values, confidence=0.5)
    wide = metrics.bootstrap_interval(values, confidence=0.99)
    assert wide[0] < narrow[0] < np.mean(values) < narrow[1] < wide[1]
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval([*values, NAN])
    few = [metrics.bootstrap_interval(values, seed=seed, resamples=20) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_bootstrap_is_the_same_however_many_resamples_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(3).normal(size=37).tolist()
    whole = metrics.bootstrap_interval(values)
    monkeypatch.setattr(metrics, "DRAWN_AT_ONCE", 1000)
    assert metrics.bootstrap_interval(values) == whole


def test_bootstrap_of_one_value_of_none_and_of_a_perfect_score():
    assert metrics.bootstrap_interval([4.2]) == (4.2, 4.2)
    assert all(math.isnan(bound) for bound in metrics.bootstrap_interval([]))
    assert all(math.isnan(bound) for bound in metrics.bootstrap_interval([NAN]))
    low, high = metrics.bootstrap_interval([1.0, 2.0, 3.0, 4.0, INF])
    assert math.isinf(high)
    assert low >= 1


def test_wilcoxon_is_exact_for_few_pairs():
    ours = metrics.paired_wilcoxon([5, 6, 7, 8, 9, 10], [4.9, 5.8, 6.7, 7.6, 8.5, 9.4])
    assert ours == pytest.approx(2 / 2**6)  # all six of one sign, two-sided
    assert metrics.paired_wilcoxon([1.0], [2.0]) == 1.0


@pytest.mark.parametrize("size", [8, 30, 80])
def test_wilcoxon_is_scipys_and_leaves_nan_pairs_out(size):
    a, b = np.random.default_rng(size).normal([[0.0], [0.3]], 1, size=(2, size))
    expected = stats.wilcoxon(a, b).pvalue
    assert metrics.paired_wilcoxon([*a, NAN, 1.0], [*b, 2.0, NAN]) == pytest.approx(expected)
    assert metrics.paired_wilcoxon(b, a) == pytest.approx(expected)


def test_wilcoxon_without_pairs_without_differences_and_with_infinite_scores():
    assert math.isnan(metrics.paired_wilcoxon([], []))
    assert math.isnan(metrics.paired_wilcoxon([NAN], [1.0]))
    assert metrics.paired_wilcoxon([1.0, 2.0, INF], [1.0, 2.0, INF]) == 1.0
    a, b = [30.0, 31.0, 32.0, INF, INF], [29.0, 29.0, 29.0, 29.0, INF]
    assert metrics.paired_wilcoxon(a, b) == metrics.paired_wilcoxon([4, 3, 2, 1], [0, 0, 0, 0])
    with pytest.raises(ValueError, match="pass pairs"):
        metrics.paired_wilcoxon([1.0], [1.0, 2.0])


# Uncertainty


def test_uncertainty_that_ranks_as_the_error_does_is_perfect():
    error = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measures = metrics.error_against_uncertainty(error, error**2 / 7)
    oracle = error.sort().values[:90].mean().item()
    assert measures["ause"] == pytest.approx(0, abs=1e-12)
    assert measures["error_most_certain_90"] == pytest.approx(oracle)
    assert measures["error"] == pytest.approx(error.mean().item()) != pytest.approx(oracle)
    assert 0.9 < measures["correlation"] < 1
    assert metrics.error_against_uncertainty(error, 3 * error + 1)["correlation"] == pytest.approx(1)


def test_uncertainty_that_ranks_backwards_is_worse_than_a_guess():
    rng = np.random.default_rng(0)
    error = torch.tensor(rng.random(4000))
    guess, backwards = (
        metrics.error_against_uncertainty(error, u) for u in (torch.tensor(rng.random(4000)), 1 - error)
    )
    assert guess["ause"] == pytest.approx(0.5, abs=0.03)  # of errors that are uniform
    assert guess["correlation"] == pytest.approx(0, abs=0.05)
    assert guess["error_most_certain_90"] == pytest.approx(guess["error"], rel=0.03)
    assert backwards["ause"] == pytest.approx(1, abs=0.03)
    assert backwards["correlation"] == pytest.approx(-1)
    assert backwards["error_most_certain_90"] > 1.05 * backwards["error"]


def test_sparsification_of_known_values():
    measures = metrics.error_against_uncertainty(torch.tensor([4.0, 1.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    by_uncertainty, by_error = [0, 4 / 2, 5 / 3, 8 / 4], [0, 1 / 2, 4 / 3, 8 / 4]
    assert measures["ause"] == pytest.approx((sum(by_uncertainty) - sum(by_error)) / 4 / 2)
    assert measures["error_most_certain_90"] == 2  # round(3.6) voxels
    assert measures["coverage_95"] == 3 / 4


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_right_stds_cover_and_wrong_ones_cover_too_little_or_too_much(factor):
    rng = np.random.default_rng(0)
    std = rng.uniform(0.01, 1, 50_000)
    error = torch.tensor(np.abs(rng.normal(0, std)))
    measures = metrics.error_against_uncertainty(error, torch.tensor(std * factor))
    assert measures["coverage_95"] == pytest.approx(2 * stats.norm.cdf(1.96 * factor) - 1, abs=0.005)
    assert 0 < measures["ause"] < 0.5


def test_equally_certain_voxels_are_taken_together():
    error = torch.tensor([0.1, 0.2, 0.3, 0.4])
    forwards, backwards = (metrics.error_against_uncertainty(e, torch.full((4,), 0.1)) for e in (error, error.flip(0)))
    assert forwards["ause"] == pytest.approx(backwards["ause"])
    assert forwards["error_most_certain_90"] == pytest.approx(0.25)
    assert math.isnan(metrics.error_against_uncertainty(torch.rand(6), torch.full((6,), 0.1))["correlation"])


def test_uncertainty_without_anything_to_tell():
    certain = metrics.error_against_uncertainty(torch.tensor([0.5, 1.0]), torch.zeros(2))
    assert math.isnan(certain["correlation"])
    assert certain["coverage_95"] == 0
    flawless = metrics.error_against_uncertainty(torch.zeros(2), torch.tensor([0.5, 1.0]))
    assert (flawless["error"], flawless["ause"], flawless["coverage_95"]) == (0, 0, 1)
    for wrong in [((3,), (4,)), ((2, 2), (2, 2)), ((0,), (0,)), ((1,), ())]:
        with pytest.raises(ValueError, match="one \\(N,\\) each"):
            metrics.error_against_uncertainty(*(torch.ones(shape) for shape in wrong))


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_the_calibration_curve_is_the_diagonal_of_right_stds(factor):
    rng = np.random.default_rng(0)
    std = rng.uniform(0.01, 1, 50_000)
    error = torch.tensor(np.abs(rng.normal(0, std)))
    curve = metrics.calibration_curve(error, torch.tensor(std * factor))
    assert curve.shape == (10, 2)
    assert (curve[1:, 0] > curve[:-1, 0]).all()
    torch.testing.assert_close(curve[:, 0] / factor, curve[:, 1], rtol=0.04, atol=0)


def test_bins_of_known_values():
    error, std = torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.tensor([0.3, 0.1, 0.4, 0.1])
    curve = metrics.calibration_curve(error, std, bins=2)
    assert curve.flatten().tolist() == pytest.approx([0.1, math.sqrt(2.5), math.sqrt(0.125), math.sqrt(12.5)])
    for wrong in [(torch.ones(4), torch.ones(3)), (torch.ones(1), torch.ones(1)), (torch.ones(2, 2), torch.ones(2, 2))]:
        with pytest.raises(ValueError, match="one \\(N,\\) each, N at least 2"):
            metrics.calibration_curve(*wrong, bins=2)


def test_holm_s_correction():
    """Example of Holm's procedure: .01, .02, .03 of three; a later one is never below an earlier one."""
    assert metrics.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert metrics.holm([0.3]) == [0.3]
    assert metrics.holm([]) == []
