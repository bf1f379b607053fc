"""How a synthesis is measured: two protocols on intensities above air, contrasts kept, and uncertainty.

Networks predict on the scale of `data.head`: 1/3 is the median within the head, and air may lie anywhere. As the field
measures raw images, in which air is 0, prediction and truth are first mapped alike to their intensity above the truth's
air: volume - air where the volume is above 0, at least 0, and 0 where it is 0 (masked, or nothing acquired).

volume  Within the head's bounding box and 4 voxels around it. Prediction and truth are scaled by the 0 to 99.9
        percentile range of the truth; the prediction is never scaled by itself. PSNR, SSIM (3D, Gaussian of 1.5
        voxels), MAE, NMSE, HaarPSI (axial slices with head), Pearson's correlation, and PSNR after the best affine
        map of the prediction (least squares within the region); over the whole box, the brain (the head mask where
        the skull is there), the brain 5 mm and more from its rim in each axial slice ('deep'), and the tumour.
slice   As CDM, ResViT and SynDiff measure: each axial slice, divided by the 99.9th percentile of the truth's whole
        volume and clipped to [0, 1], SSIM in 2D. The mean is over the slices that hold at least a tenth of the head
        area of the fullest one and in which the target was acquired.

Contrast kept: how far a structure stands out in the prediction, as a share of how far it does in the truth. A contrast
is the mean of the structure minus the median of the rest of the brain, in quartile ranges of that rest, so that neither
scale nor offset of an image matters; 0 where the rest is constant. The rest is what no lesion is outlined in, nor
fluid where that is the structure. Both need 50 voxels in which the target was acquired.
lesion  All labels of the tumour; of T1ce its enhancing part. Where the true contrast is above 0.5.
fluid   Outside the lesion, T2 2.5 robust standard deviations above its median, and FLAIR (T1 where there is none)
        below its own by 1 or more. Where the true contrast is above 0.5 or below -0.5.
It counts as kept between 0.7 and 1.4 of the true one, and a lesion as lost below 0.5.

Patients are the units: the mean over a patient's cases comes first; then means, 95 % bootstrap intervals (percentile)
and paired Wilcoxon tests are over patients. With few patients these intervals are too narrow: of normal values 87 % of
them hold the mean with six patients, 90 % with ten, 94 % with thirty. Of fewer than six there is none, but the least
and the most. p-values are corrected by Holm's procedure over all regions of one metric, target and set of sources:
those of other models and guidance modes together, and those of the baselines.

A model of any subset is measured with each modality hidden in turn and all others given, or with every subset given
and all the rest hidden. The head mask is found on all volumes of a study, the hidden ones included; it places the
box and scales the sources. Of it counts what the target has: neither a skull nor slices that only others have, and
there predictions are set to 0. The model's own image comes first. Beside it stand other guidance modes, a second
model, images that another program made, mapped as the truth is, and the baselines; not the linear regression where no
training patient had these sources together with the target.

Where the model gives a standard deviation for each voxel, it is compared with the absolute error within the head, on
the [0, 1] scale, beside the predicted intensity, which ranks errors too and which every network has. The calibration
curve compares the standard deviation of each decile of the voxels with their error. In studies with a lesion, the mean
standard deviation within it over that in the rest of the brain stands beside the same ratio of the absolute errors: the
two are equal where the standard deviation knows the lesion to be hard. Lost lesions are summarised separately as well.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy import ndimage

from crossmr import metrics
from crossmr.data.head import MEDIAN_OF_HEAD, STD_OF_HEAD
from crossmr.errors import StudyError
from crossmr.evaluation.subjects import Array, Mask, Subject
from crossmr.tensors import foreground_slices

Metric = Literal["psnr", "ssim", "mae", "nmse", "haarpsi", "correlation", "psnr_affine"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Structure = Literal["lesion", "fluid"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
STD, INTENSITY = "std", "predicted intensity"
"""What is compared with the error of each voxel."""
RIM_MM = 5.0
"""So far from the brain's rim within its slice is deep."""
MIN_VOXELS = 50
"""Voxels of a structure, and of the rest, that make a contrast."""
STANDS_OUT = 0.5
"""Quartile ranges of the rest: the least true contrast of which a share is taken."""
KEPT, LOST = (0.7, 1.4), 0.5
"""Shares of the true contrast between which it counts as kept, and below which a lesion is lost."""
PROTOCOL = (__doc__ or "").strip()


@dataclass(frozen=True)
class Score:
    """The quality of one predictor's image: a row of metrics.csv."""

    case: str
    patient: str
    sources: str
    """Joined by '+'."""
    target: str
    predictor: str
    protocol: str
    """'volume' or 'slice'."""
    region: str
    """'volume', 'brain', 'deep' or 'tumour'; 'slices' of the protocol 'slice'."""
    psnr: float
    ssim: float
    mae: float
    nmse: float
    haarpsi: float
    correlation: float
    psnr_affine: float


class Quality(NamedTuple):
    """The metrics of one image in one region."""

    psnr: float
    ssim: float
    mae: float
    nmse: float
    haarpsi: float
    correlation: float
    psnr_affine: float


@dataclass(frozen=True)
class UncertaintyScore:
    """How well an uncertainty tells where the errors are: a row of uncertainty.csv.

    See `metrics.error_against_uncertainty`.
    """

    case: str
    patient: str
    sources: str
    target: str
    uncertainty: str
    """STD or INTENSITY."""
    correlation: float
    error: float
    error_most_certain_90: float
    ause: float
    coverage_95: float
    std_ratio: float
    """Mean uncertainty within the lesion over that in the rest of the brain; nan without a lesion."""
    error_ratio: float
    """The same of the absolute error."""
    lesion_kept: float
    """Share of the lesion's contrast that the image keeps; nan where that is not defined."""


@dataclass(frozen=True)
class ContrastScore:
    """How far a structure stands out in one predictor's image: a row of contrasts.csv."""

    case: str
    patient: str
    sources: str
    target: str
    predictor: str
    structure: Structure
    truth: float
    """The true contrast, in quartile ranges of the rest of the brain."""
    predicted: float
    """The prediction's, in its own."""
    kept: float
    """Predicted over true; nan where the true one does not stand out."""


@dataclass(frozen=True)
class CalibrationPoint:
    """Standard deviation and error of a tenth of the voxels, both root mean squares: a row of calibration.csv."""

    case: str
    patient: str
    sources: str
    target: str
    decile: int
    """1 holds the most certain voxels, 10 the least."""
    std: float
    error: float


Row = Score | ContrastScore | UncertaintyScore | CalibrationPoint


def measure(subject: Subject, sources: Sequence[str], images: Mapping[str, Mapping[str, Array]]) -> list[Score]:
    """Score the images of one study, predictor → target → volume, by both protocols and in every region it has.

    Raises:
        StudyError: a target is constant.
    """
    scores = []
    for target, predicted in _by_target(images):
        truth, regions = above_air(subject.volumes[target], subject.air[target]), regions_of(subject, target)
        slices = foreground_slices(_acquired(subject, target).sum((1, 2)).tolist())
        for predictor, volume in predicted.items():
            pair = above_air(volume, subject.air[target]), truth
            try:
                by_region = _volume_quality(regions, *pair)
            except ValueError as error:
                raise StudyError(f"{subject.name}: {target} cannot be measured: {error}") from error
            common = (subject.name, subject.patient, "+".join(sources), target, predictor)
            scores += [Score(*common, "volume", region, *quality) for region, quality in by_region.items()]
            scores.append(Score(*common, "slice", "slices", *_slice_quality(slices, *pair)))
    return scores


def above_air(volume: Array, air: float) -> Array:
    """Intensities as the field measures them, air being 0: float32 (Z, Y, X), at least 0; what is 0 stays 0."""
    above: Array = np.where(volume > 0, np.maximum(volume - np.float32(air), np.float32(0)), np.float32(0))
    return above


def measure_contrasts(
    subject: Subject, sources: Sequence[str], images: Mapping[str, Mapping[str, Array]]
) -> list[ContrastScore]:
    """Compare how far lesion and fluid stand out in the images of one study, predictor → target → volume."""
    scores = []
    for target, predicted in _by_target(images):
        structures = structures_of(subject, target).items()
        for (predictor, made), (structure, places) in itertools.product(predicted.items(), structures):
            truth, its = (_contrast(volume, *places) for volume in (subject.volumes[target], made))
            common = (subject.name, subject.patient, "+".join(sources), target, predictor)
            scores.append(ContrastScore(*common, structure, truth, its, _share(structure, truth, its)))
    return scores


def measure_uncertainty(
    subject: Subject, sources: Sequence[str], predicted: Mapping[str, Array], stds: Mapping[str, Array]
) -> list[UncertaintyScore]:
    """Compare the errors within the head with the standard deviations, and with the predicted intensity."""
    scores = []
    for target, std in stds.items():
        inside, error = _errors(subject, target, predicted[target])
        lesion = structures_of(subject, target).get("lesion")
        contrasts = [_contrast(v, *lesion) for v in (subject.volumes[target], predicted[target])] if lesion else []
        for name, uncertainty in ((STD, std), (INTENSITY, predicted[target])):
            measured = metrics.error_against_uncertainty(
                torch.from_numpy(error[inside]), torch.from_numpy(uncertainty[inside])
            )
            scores.append(
                UncertaintyScore(
                    case=subject.name,
                    patient=subject.patient,
                    sources="+".join(sources),
                    target=target,
                    uncertainty=name,
                    correlation=measured["correlation"],
                    error=measured["error"],
                    error_most_certain_90=measured["error_most_certain_90"],
                    ause=measured["ause"],
                    coverage_95=measured["coverage_95"],
                    std_ratio=_ratio(uncertainty, *lesion) if lesion else math.nan,
                    error_ratio=_ratio(error, *lesion) if lesion else math.nan,
                    lesion_kept=_share("lesion", *contrasts) if lesion else math.nan,
                )
            )
    return scores


def measure_calibration(
    subject: Subject, sources: Sequence[str], predicted: Mapping[str, Array], stds: Mapping[str, Array]
) -> list[CalibrationPoint]:
    """Standard deviation and error of each decile of the voxels within the head."""
    points = []
    for target, std in stds.items():
        inside, error = _errors(subject, target, predicted[target])
        curve = metrics.calibration_curve(torch.from_numpy(error[inside]), torch.from_numpy(std[inside])).tolist()
        common = (subject.name, subject.patient, "+".join(sources), target)
        points += [CalibrationPoint(*common, n, *pair) for n, pair in enumerate(curve, 1)]
    return points


def _by_target(images: Mapping[str, Mapping[str, Array]]) -> Iterator[tuple[str, dict[str, Array]]]:
    """Each target, and predictor → volume, of predictor → target → volume."""
    for target in dict.fromkeys(target for volumes in images.values() for target in volumes):
        having = {predictor: volumes[target] for predictor, volumes in images.items() if target in volumes}
        yield target, {predictor: np.ascontiguousarray(volume) for predictor, volume in having.items()}


def _acquired(subject: Subject, target: str) -> Mask:
    """What the target has of the head, but for slices where it is constant: those were not acquired."""
    truth, inside = subject.volumes[target], subject.head_of(target)
    low, high = truth.min((1, 2), where=inside, initial=np.inf), truth.max((1, 2), where=inside, initial=-np.inf)
    acquired: Mask = inside & (low < high)[:, None, None]
    return acquired


def _errors(subject: Subject, target: str, predicted: Array) -> tuple[Mask, Array]:
    """The voxels within the head, of slices where the target was acquired, and the absolute errors (Z, Y, X)."""
    return _acquired(subject, target), np.abs(predicted - subject.volumes[target])


def regions_of(subject: Subject, target: str) -> dict[str, Mask]:
    """What the protocol 'volume' is measured in, of what the target has; no tumour where none is outlined."""
    head = subject.head_of(target)
    planes = np.pad(head, ((0, 0), (1, 1), (1, 1)))  # where the field of view ends, the brain does
    deep = [ndimage.distance_transform_edt(plane, subject.spacing_mm[1:])[1:-1, 1:-1] >= RIM_MM for plane in planes]
    regions = {
        "volume": np.ones_like(head),
        "brain": head,
        "deep": np.stack(deep),
        "tumour": subject.tumour & head,
    }
    return {region: mask for region, mask in regions.items() if mask.any()}


def structures_of(subject: Subject, target: str) -> dict[Structure, tuple[Mask, Mask]]:
    """Lesion and fluid where the target was acquired, each with the rest of the brain; those that are large enough."""
    inside = _acquired(subject, target)
    healthy = inside & ~subject.tumour
    fluid = healthy & _fluid(subject)
    pairs: dict[Structure, tuple[Mask, Mask]] = {
        "lesion": (inside & (subject.enhancing if target == "t1c" else subject.tumour), healthy),
        "fluid": (fluid, healthy & ~fluid),
    }
    return {structure: pair for structure, pair in pairs.items() if min(mask.sum() for mask in pair) >= MIN_VOXELS}


def _fluid(subject: Subject) -> Mask:
    """Where T2 is bright, and FLAIR, or T1 without one, is dark; nowhere in a study that lacks these."""
    dark = next((m for m in ("t2f", "t1n") if m in subject.volumes), None)
    if dark is None or "t2w" not in subject.volumes:
        return np.zeros_like(subject.head)
    bright = subject.volumes["t2w"] > MEDIAN_OF_HEAD + 2.5 * STD_OF_HEAD
    acquired = _acquired(subject, "t2w") & _acquired(subject, dark)
    fluid: Mask = acquired & bright & (subject.volumes[dark] < MEDIAN_OF_HEAD - STD_OF_HEAD)
    return fluid


def _contrast(volume: Array, structure: Mask, rest: Mask) -> float:
    """How far a structure is above the median of the rest, in quartile ranges of the rest; 0 where that is constant."""
    q25, median, q75 = (float(p) for p in np.percentile(volume[rest], (25, 50, 75)))
    return (float(volume[structure].mean(dtype=np.float64)) - median) / (q75 - q25) if q75 > q25 else 0.0


def _share(structure: Structure, true: float, predicted: float) -> float:
    """The share of the true contrast that is kept; nan where that does not stand out, a lesion's to the bright side."""
    return predicted / true if (true if structure == "lesion" else abs(true)) > STANDS_OUT else math.nan


def _ratio(values: Array, lesion: Mask, rest: Mask) -> float:
    """The mean within the lesion over that in the rest of the brain; nan where the latter is 0."""
    inside, outside = (float(values[mask].mean(dtype=np.float64)) for mask in (lesion, rest))
    return inside / outside if outside > 0 else math.nan


def _volume_quality(regions: Mapping[str, Mask], predicted: Array, truth: Array) -> dict[str, Quality]:
    """The quality in each region by the protocol 'volume', of intensities above air (Z, Y, X)."""
    scaled, reference = metrics.scale_by_truth(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
    slices = foreground_slices(regions["brain"].sum((1, 2)).tolist())
    similarity = metrics.ssim_map(scaled, reference, 1.0)  # (1, Z, Y, X), as all three
    quality = {}
    for region, chosen in regions.items():
        mask = torch.from_numpy(chosen)[None]
        perceptual = metrics.haarpsi(scaled[0, slices], reference[0, slices], 1.0, mask[0, slices])
        x, y = (image[mask].reshape(1, 1, -1) for image in (scaled, reference))  # faster than masks
        quality[region] = Quality(
            psnr=float(metrics.psnr(x, y, 1.0)),
            ssim=float(similarity[mask].mean()),
            mae=float(metrics.mae(x, y)),
            nmse=float(metrics.nmse(x, y)),
            haarpsi=float(perceptual.nanmean()),
            correlation=float(metrics.correlation(x, y)),
            psnr_affine=float(metrics.psnr_affine(x, y, 1.0)),
        )
    return quality


def _slice_quality(slices: Sequence[int], predicted: Array, truth: Array) -> Quality:
    """The mean quality of some slices by the protocol 'slice', of intensities above air (Z, Y, X)."""
    brightest = np.percentile(truth, 99.9).astype(np.float32)
    x, y = (torch.from_numpy(np.clip(volume[slices] / brightest, 0, 1)) for volume in (predicted, truth))  # (N, Y, X)
    return Quality(
        psnr=float(metrics.psnr(x, y, 1.0).mean()),
        ssim=float(metrics.ssim(x, y, 1.0).mean()),
        mae=float(metrics.mae(x, y).mean()),
        nmse=float(metrics.nmse(x, y).mean()),
        haarpsi=float(metrics.haarpsi(x, y, 1.0).nanmean()),
        correlation=float(metrics.correlation(x, y).nanmean()),
        psnr_affine=float(metrics.psnr_affine(x, y, 1.0).mean()),
    )
