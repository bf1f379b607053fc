"""Image quality as pure functions, and the statistics of a table of scores.

Images are (B, H, W) or volumes (B, D, H, W), no channels, floating point; `mask` is boolean of the same shape
and restricts a score to a region, item by item; `data_range`, a float or (B,), is the intensities' full span.
Scores are (B,); an empty mask scores nan.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_SIGMA, SSIM_RADIUS, SSIM_K1, SSIM_K2 = 1.5, 5, 0.01, 0.03
HAARPSI_C, HAARPSI_ALPHA = 30.0, 4.2
DRAWN_AT_ONCE = 4_000_000
"""Scores that the resamples of a bootstrap interval hold in memory."""


def mae(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error, (B,), in the images' unit."""
    _check(prediction, truth, mask)
    return _mean((prediction - truth).abs(), mask)


def mse(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error, (B,), in the images' unit squared."""
    _check(prediction, truth, mask)
    return _mean((prediction - truth).square(), mask)


def nmse(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error over the truth's energy, (B,): 0 is perfect, 1 as bad as zeros; inf where the truth is 0."""
    return mse(prediction, truth, mask) / _mean(truth.square(), mask)


def psnr(prediction: Tensor, truth: Tensor, data_range: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio, (B,), in dB: 10 log10(data_range² / MSE); inf for identical images."""
    span = torch.as_tensor(data_range).to(truth)
    return 10 * torch.log10(span.square() / mse(prediction, truth, mask))


def psnr_affine(prediction: Tensor, truth: Tensor, data_range: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR, (B,), in dB, after the affine map of the prediction that fits the truth best (least squares).

    What a wrong scale or offset costs is the difference to `psnr`.
    """
    _check(prediction, truth, mask)
    x, y = _centred(prediction, mask), _centred(truth, mask)
    slope = (_mean(x * y, mask) / _mean(x.square(), mask)).nan_to_num()  # 0 of a constant prediction
    error = _mean((y - slope.reshape(-1, *[1] * (y.ndim - 1)) * x).square(), mask)
    return 10 * torch.log10(torch.as_tensor(data_range).to(y).square() / error)


def correlation(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pearson's correlation, (B,), in [-1, 1]; nan where either is constant."""
    _check(prediction, truth, mask)
    x, y = _centred(prediction, mask), _centred(truth, mask)
    return _mean(x * y, mask) / (_mean(x.square(), mask) * _mean(y.square(), mask)).sqrt()


def ssim(prediction: Tensor, truth: Tensor, data_range: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity, (B,), at most 1: the mean of the full-size `ssim_map`, within the mask if any.

    scikit-image's scalar leaves out a border of 5 voxels; this mean does not.
    """
    _check(prediction, truth, mask)
    return _mean(ssim_map(prediction, truth, data_range), mask)


def ssim_map(prediction: Tensor, truth: Tensor, data_range: float | Tensor) -> Tensor:
    """Structural similarity of each voxel's surroundings (Wang et al. 2004, Eq. 13), shape as the images'.

    Gaussian window of sigma 1.5 voxels and 11 taps an axis, population covariance, borders mirrored with the
    edge voxel repeated: the map of scikit-image's `structural_similarity` with `gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False`.
    """
    _check(prediction, truth)
    span = torch.as_tensor(data_range).to(truth).reshape(-1, *[1] * (truth.ndim - 1))
    c1, c2 = (SSIM_K1 * span) ** 2, (SSIM_K2 * span) ** 2
    x, y = prediction, truth
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_gaussian(moment) for moment in (x, y, x * x, y * y, x * y))
    variances = mean_xx - mean_x**2 + mean_yy - mean_y**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * (mean_xy - mean_x * mean_y) + c2) / (variances + c2)


def haarpsi(prediction: Tensor, truth: Tensor, data_range: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Haar wavelet perceptual similarity of grey images (Reisenhofer et al. 2018), in (0, 1].

    Images (B, H, W), scaled to 0..255 and halved first, as the authors do. The two finer scales are compared,
    the third weights each pixel; the mask, also halved, multiplies these weights, so that only its region counts
    (wavelets at its border reach some 8 pixels beyond). Returns (B,); nan where all weights are 0, as of two
    images that are 0 everywhere.
    """
    _check(prediction, truth, mask)
    if truth.ndim != 3:
        raise ValueError(
            f"haarpsi takes images (B, H, W), not {tuple(truth.shape)}; pass a volume's slices as a batch."
        )
    scale = 255 / torch.as_tensor(data_range).to(truth).reshape(-1, 1, 1)
    x, y = _halve(prediction * scale), _halve(truth * scale)
    region = torch.ones_like(y) if mask is None else _halve(mask.to(y))
    (x_1, x_2, x_3), (y_1, y_2, y_3) = ([_haar(image, level) for level in (1, 2, 3)] for image in (x, y))
    similarity = _agreement(x_1, y_1) + _agreement(x_2, y_2)  # (2, B, H/2, W/2), twice the local similarity
    weight = torch.maximum(x_3, y_3) * region  # (2, B, H/2, W/2)
    squashed = (weight * torch.sigmoid(HAARPSI_ALPHA * similarity / 2)).sum((0, 2, 3)) / weight.sum((0, 2, 3))
    return (torch.logit(squashed) / HAARPSI_ALPHA).square()


def scale_by_truth(prediction: Tensor, truth: Tensor, low: float = 0.0, high: float = 99.9) -> tuple[Tensor, Tensor]:
    """Map the truth's percentiles `low` and `high`, item by item, to 0 and 1, in both images alike.

    Nothing is clipped, and the prediction is not rescaled by itself: a wrong scale stays wrong.

    Raises:
        ValueError: an item of the truth is constant between the two percentiles.
    """
    _check(prediction, truth)
    bounds = [np.percentile(item.cpu().numpy(), (low, high)) for item in truth.detach()]  # torch's stops at 16M
    for index, (bottom, top) in enumerate(bounds):
        if not top > bottom:
            raise ValueError(
                f"Item {index} of the truth has no range to scale by: percentiles {low} and {high} are "
                f"{bottom:g} and {top:g}. Leave it out."
            )
    bottom, top = torch.tensor(np.array(bounds)).to(truth).reshape(-1, 2, *[1] * (truth.ndim - 1)).unbind(1)
    return (prediction - bottom) / (top - bottom), (truth - bottom) / (top - bottom)


def error_against_uncertainty(error: Tensor, uncertainty: Tensor) -> dict[str, float]:
    """How well predicted standard deviations (N,) agree with the absolute errors (N,).

    correlation: Pearson's, nan where either is constant.
    error, error_most_certain_90: mean error of all voxels, and of the 90 % with the smallest standard deviations.
    ause: area between the sparsification curves by uncertainty and by the error itself (Ilg et al. 2018), over the mean
        error: 0 is perfect, some .5 random. A curve is the mean error as the least certain voxels are left out.
    coverage_95: fraction of errors within 1.96 standard deviations; .95 where errors are Gaussian with these.

    Raises:
        ValueError: the two differ in shape, or are empty.
    """
    if error.shape != uncertainty.shape or error.ndim != 1 or not len(error):
        raise ValueError(f"error and uncertainty are one (N,) each; got {error.shape} and {uncertainty.shape}.")
    e, u = error.double(), uncertainty.double()
    varied = e.min() < e.max() and u.min() < u.max()
    correlation = torch.corrcoef(torch.stack([e, u]))[0, 1] if varied else torch.tensor(torch.nan)
    count = torch.arange(1, len(e) + 1, dtype=torch.float64, device=e.device)
    # equally certain voxels share their mean error
    _, group, size = u.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    shared = torch.zeros_like(size, dtype=e.dtype).index_add_(0, group, e) / size
    by_uncertainty = shared.repeat_interleave(size).cumsum(0) / count  # mean error of the n most certain voxels
    by_error = e.sort().values.cumsum(0) / count
    return {
        "correlation": float(correlation),
        "error": float(e.mean()),
        "error_most_certain_90": float(by_uncertainty[max(0, round(0.9 * len(e)) - 1)]),
        "ause": float((by_uncertainty - by_error).mean() / e.mean()) if e.mean() > 0 else 0.0,
        "coverage_95": float((e <= 1.96 * u).double().mean()),
    }


def calibration_curve(error: Tensor, std: Tensor, bins: int = 10) -> Tensor:
    """Predicted standard deviations against errors, (bins, 2), from the most certain voxels to the least.

    The voxels (N,) are sorted by standard deviation into bins of equal number; a row holds the root mean squares of a
    bin's standard deviations and of its absolute errors, equal where the former are right (Levi et al. 2022).

    Raises:
        ValueError: the two differ in shape, or there are fewer voxels than bins.
    """
    if error.shape != std.shape or error.ndim != 1 or len(error) < bins:
        raise ValueError(f"error and std are one (N,) each, N at least {bins}; got {error.shape} and {std.shape}.")
    order = std.argsort(stable=True)
    pairs = torch.stack([std[order], error[order]], 1).double()
    return torch.stack([chunk.square().mean(0).sqrt() for chunk in torch.tensor_split(pairs, bins)])


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), nan left out; (nan, nan) without values."""
    scores = np.asarray(values, dtype=np.float64)
    scores = scores[~np.isnan(scores)]
    if scores.size == 0:
        return float("nan"), float("nan")
    # scipy.stats.bootstrap takes neither one score nor infinite ones
    generator, means = np.random.default_rng(seed), np.empty(resamples)
    block = max(1, DRAWN_AT_ONCE // scores.size)
    for start in range(0, resamples, block):
        some = means[start : start + block]
        indices = generator.integers(scores.size, size=(len(some), scores.size), dtype=np.int32)
        some[:] = scores[indices].mean(axis=1)
    means.sort()
    rank = round((1 - confidence) / 2 * (resamples - 1))
    return float(means[rank]), float(means[-1 - rank])


def paired_wilcoxon(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test (1945) of paired scores.

    Pairs with a nan are left out. nan without pairs, 1 where no pair differs.
    """
    from scipy.stats import wilcoxon

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_wilcoxon: {first.size} scores against {second.size}; pass pairs.")
    paired = ~np.isnan(first) & ~np.isnan(second)
    if not paired.any():
        return float("nan")
    differing = paired & (first != second)  # two infinite PSNRs are a tie
    return float(wilcoxon(first[differing] - second[differing]).pvalue) if differing.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure (1979), in their order, at most 1."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        corrected[k] = largest
    return corrected


def _check(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> None:
    """Refuse shapes that would broadcast in silence, and integers, whose differences wrap around."""
    shapes = [tuple(tensor.shape) for tensor in (prediction, truth, mask) if tensor is not None]
    if len(set(shapes)) > 1 or truth.ndim not in (3, 4):
        raise ValueError(f"prediction, truth and mask must share one shape, (B, H, W) or (B, D, H, W); got {shapes}.")
    if not (prediction.is_floating_point() and truth.is_floating_point()):
        raise ValueError(f"prediction and truth must be floating point; got {prediction.dtype} and {truth.dtype}.")


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, *spatial) to (B,): the mean over each item, or over its masked part; nan where that is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    return torch.where(mask.bool(), values, 0).flatten(1).sum(1) / mask.bool().flatten(1).sum(1)


def _centred(image: Tensor, mask: Tensor | None) -> Tensor:
    """The deviations (B, *spatial), float64, from each item's mean, or from that of its masked part.

    They are exactly 0 where that is constant.
    """
    values = image.double()
    inside = values if mask is None else torch.where(mask.bool(), values, -torch.inf)
    shifted = values - inside.flatten(1).amax(1).reshape(-1, *[1] * (image.ndim - 1))
    return shifted - _mean(shifted, mask).reshape(-1, *[1] * (image.ndim - 1))


def _gaussian(image: Tensor) -> Tensor:
    """Smooth every spatial axis of (B, *spatial), mirrored as c b a | a b c | c b a, however short it is.

    Shifted sums rather than a convolution: those may round to TF32 on a GPU, which spoils variances.
    """
    taps = [np.exp(-0.5 * (k / SSIM_SIGMA) ** 2) for k in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    for axis in range(1, image.ndim):
        size = image.shape[axis]
        index = torch.arange(-SSIM_RADIUS, size + SSIM_RADIUS, device=image.device) % (2 * size)
        padded = image.index_select(axis, torch.minimum(index, 2 * size - 1 - index))
        image = torch.zeros_like(image)
        for k, tap in enumerate(taps):
            image.add_(padded.narrow(axis, k, size), alpha=float(tap / sum(taps)))
    return image


def _halve(image: Tensor) -> Tensor:
    """Means of 2 x 2 blocks of (B, H, W), a zero row or column appended to odd sizes."""
    return F.avg_pool2d(F.pad(image, (0, image.shape[2] % 2, 0, image.shape[1] % 2)), 2)


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of two magnitudes, in (0, 1], of their shape."""
    return (2 * a * b + HAARPSI_C) / (a**2 + b**2 + HAARPSI_C)


def _haar(image: Tensor, level: int) -> Tensor:
    """Magnitudes of both Haar responses of 2^level pixels, zeros beyond the border, (2, B, H, W)."""
    half = 2 ** (level - 1)
    padded = F.pad(image, (half - 1, half, half - 1, half))
    rows = F.avg_pool2d(padded, (half, 2 * half), stride=1)  # (B, H + half, W)
    columns = F.avg_pool2d(padded, (2 * half, half), stride=1)  # (B, H, W + half)
    edges = rows[:, half:] - rows[:, :-half], columns[:, :, half:] - columns[:, :, :-half]
    responses: Tensor = half * torch.stack(edges)
    return responses.abs()
