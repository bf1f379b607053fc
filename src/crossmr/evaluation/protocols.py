"""Two protocols of others, on the whole scan with its background: BraSyn's, and that of published tables.

Images are taken as intensities above air, as `measures` has them, 0 outside the head, on the whole grid of the scan
(240 x 240 x 155 voxels in BraTS). SSIM is that of torchmetrics' defaults in 3D: Gaussian of 1.5 voxels, 11 taps an
axis, k1 .01, k2 .03, borders mirrored without the edge voxel, population covariance, mean over every voxel of the grid.

brasyn     One contrast of each case is dropped, by the challenge's rule: of N cases in the order of their names,
           `numpy.random.seed(123456)` and `randint(0, 4, size=N)` choose from t1c, t1n, t2f, t2w. Prediction and truth
           are each clipped to their own 0.5th and 99.5th percentile, the lower at least 0, and scaled to [0, 1]. Both
           are multiplied by the tumour's mask ('tumour'), by its complement ('healthy'), or by nothing ('whole'); the
           data range of SSIM is the larger of the two ranges that are left. Cases are the units.
           What it hides: nearly all of what is averaged is background, in which any two images agree, so that zeros
           score some .97 in the tumour, and the truth with its lesion erased scores as well as a linear regression.
published  Prediction and truth are divided by the 99.5th percentile of the truth over the whole grid and clipped to
           [0, 1]; PSNR and SSIM over the whole grid, of data range 1. Every target from the sources that the model has.
           Papers differ in percentile and grid; more background, or a higher percentile, gives higher numbers.
           What it hides: the lesion is a hundredth of what is averaged, so that the truth with its lesion erased
           may score higher than a synthesis that shows it.

Dice, where a segmenter is given: the overlap of what it outlines on the three real contrasts and the image with the
study's labels, 2 |A and B| / (|A| + |B|), 1 where both are empty; of the whole tumour (WT, every label), its core (TC,
labels 1, 3 and 4) and its enhancing part (ET, labels 3 and 4). The ceiling is the same with the real contrast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crossmr.data.head import bounding_box
from crossmr.errors import StudyError
from crossmr.evaluation.measures import above_air
from crossmr.evaluation.subjects import Array, Mask, Subject
from crossmr.metrics import SSIM_K1, SSIM_K2, SSIM_RADIUS, SSIM_SIGMA

OtherProtocol = Literal["brasyn", "published"]
OTHER_PROTOCOLS: tuple[OtherProtocol, ...] = get_args(OtherProtocol)
TEXT = (__doc__ or "").strip()
DROPPED = ("t1c", "t1n", "t2f", "t2w")
"""The contrasts of BraSyn, in the order in which its numbers count them."""
ZEROS, ERASED, REAL = "all zero", "truth, lesion erased", "real image"
"""Images that no model made."""
DICE = {"dice_wt": (1, 2, 3, 4), "dice_tc": (1, 3, 4), "dice_et": (3, 4)}
"""Measure → the labels that count; 3 (4 before 2023) is enhancing tumour."""
Labels = npt.NDArray[np.uint8]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class OtherScore:
    """One measure of one image by another protocol: a row of metrics.csv."""

    case: str
    sources: str
    """Joined by '+'."""
    target: str
    predictor: str
    measure: str
    value: float


def dropped_contrasts(cases: Sequence[str]) -> dict[str, str]:
    """Case → the contrast that BraSyn's rule drops of it, given the names of all cases."""
    drawn = np.random.RandomState(123456).randint(0, len(DROPPED), size=len(cases))
    return {case: DROPPED[index] for case, index in zip(sorted(cases), drawn, strict=True)}


def measure_by(
    protocol: OtherProtocol, subject: Subject, target: str, images: Mapping[str, Array]
) -> dict[str, dict[str, float]]:
    """Predictor → measure → value of each image (Z, Y, X) in [0, 1] of one target, and of images that nobody made.

    Those are zeros, and the truth whose lesion has the median of the rest of the head.

    Raises:
        StudyError: the truth has no range to be scaled by.
    """
    truth = above_air(subject.volumes[target], subject.air[target])
    made = {name: above_air(image, subject.air[target]) for name, image in images.items()}
    made[ZEROS] = np.zeros_like(truth)
    if subject.tumour.any():
        rest = subject.head_of(target) & ~subject.tumour
        made[ERASED] = np.where(subject.tumour, np.median(truth[rest]), truth)
    whole, tumour = on_whole_grid(truth, subject), on_whole_grid(subject.tumour, subject)
    if not np.percentile(whole, 99.5) > 0:
        raise StudyError(
            f"{subject.name}: {target} cannot be measured: its 99.5th percentile over the whole scan is that of air."
        )
    full = {name: on_whole_grid(image, subject) for name, image in made.items()}
    if protocol == "published":
        return {name: _published(image, whole) for name, image in full.items()}
    scaled = own_scale(whole)
    return {name: _brasyn(own_scale(image), scaled, tumour) for name, image in full.items()}


def on_whole_grid(cropped: npt.NDArray[Kind], subject: Subject) -> npt.NDArray[Kind]:
    """What lies within the head's box, (Z, Y, X), on the grid of the whole scan; 0 elsewhere."""
    full = np.zeros(subject.grid, cropped.dtype)
    full[tuple(slice(at, at + n) for at, n in zip(subject.corner, cropped.shape, strict=True))] = cropped
    return full


def own_scale(image: Array) -> Array:
    """An image clipped to its own 0.5th (at least 0) and 99.5th percentile, in [0, 1]; zeros where these are equal."""
    low, high = (float(bound) for bound in np.percentile(image, (0.5, 99.5)))
    low = max(low, 0.0)
    if not high > low:
        return np.zeros_like(image)
    scaled: Array = ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)
    return scaled


def whole_ssim(x: Array, y: Array, data_range: float | None = None) -> float:
    """SSIM of two volumes (Z, Y, X), the mean over every voxel, as torchmetrics' defaults have it.

    Without `data_range`, the larger of the two images' ranges; nan where that is 0.
    """
    span = max(float(np.ptp(x)), float(np.ptp(y))) if data_range is None else data_range
    if not span > 0:
        return float("nan")
    either = (x != 0) | (y != 0)
    if not either.any():
        return 1.0
    box = bounding_box(either, 2 * SSIM_RADIUS)  # beyond it, and on its outer half, both are 0, which is similarity 1
    similarity = _ssim_map(x[box], y[box], span)
    return 1.0 + float((similarity - 1).sum(dtype=np.float64)) / x.size


def dice(outlined: Labels, truth: Labels) -> dict[str, float]:
    """Measure → Dice of the whole tumour, its core and its enhancing part; 1 where neither has any."""
    scores = {}
    for name, labels in DICE.items():
        a, b = np.isin(outlined, labels), np.isin(truth, labels)
        both = int(a.sum()) + int(b.sum())
        scores[name] = 2 * int((a & b).sum()) / both if both else 1.0
    return scores


def _brasyn(scaled: Array, truth: Array, tumour: Mask) -> dict[str, float]:
    """SSIM in each region of two scaled images; the regions are the whole where no tumour is outlined."""
    scores = {"ssim_whole": whole_ssim(scaled, truth)}
    if tumour.any():
        scores["ssim_tumour"] = whole_ssim(scaled * tumour, truth * tumour)
        scores["ssim_healthy"] = whole_ssim(scaled * ~tumour, truth * ~tumour)
    return scores


def _published(image: Array, truth: Array) -> dict[str, float]:
    brightest = np.float32(np.percentile(truth, 99.5))
    x, y = (np.clip(volume / brightest, 0, 1) for volume in (image, truth))
    error = float(np.square(x - y, dtype=np.float64).mean())
    return {"psnr": -10 * float(np.log10(error)) if error else float("inf"), "ssim": whole_ssim(x, y, 1.0)}


def _ssim_map(x: Array, y: Array, data_range: float) -> Array:
    """Similarity of each voxel's surroundings; `metrics.ssim_map` with other borders, and variances at least 0."""
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
        ndimage.gaussian_filter(moment, SSIM_SIGMA, mode="mirror", truncate=SSIM_RADIUS / SSIM_SIGMA)
        for moment in (x, y, x * x, y * y, x * y)
    )
    variances = np.maximum(mean_xx - mean_x**2, 0) + np.maximum(mean_yy - mean_y**2, 0)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similarity: Array = luminance * (2 * (mean_xy - mean_x * mean_y) + c2) / (variances + c2)
    return similarity
