"""How a synthesis is measured: two protocols, both on intensities normalised per volume.

Normalised, 0 is air and 1 is four times the median within the head.

volume  Within the head's bounding box and 4 voxels around it. Prediction and truth are scaled by the 0 to 99.9
        percentile range of the truth; the prediction is never scaled by itself. PSNR, SSIM (3D, Gaussian of 1.5
        voxels), MAE, NMSE and HaarPSI (axial slices with head) over the whole box, the brain (the head mask where
        the skull is there) and the tumour.
slice   As CDM, ResViT and SynDiff measure: PSNR, SSIM (2D, Gaussian of 1.5 voxels) and MAE of each axial slice in
        [0, 1]. The mean is over the slices that hold at least a tenth of the head area of the fullest one and in
        which the target was acquired.

A model of any subset is measured with each modality hidden in turn and all others given, or with every subset given
and all the rest hidden. The head mask is found on all volumes of a study, the hidden ones included; it places the
box and scales the sources. The model's own image comes first. Beside it stand other guidance modes, a second model
and the baselines.

Where the model gives a standard deviation for each voxel, it is compared with the absolute error within the head, on
the [0, 1] scale, beside the predicted intensity, which ranks errors too and which every network has. The calibration
curve compares the standard deviation of each decile of the voxels with their error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from crossmr import metrics
from crossmr.errors import StudyError
from crossmr.evaluation.subjects import Array, Mask, Subject
from crossmr.tensors import foreground_slices

Metric = Literal["psnr", "ssim", "mae", "nmse", "haarpsi"]
METRICS: tuple[Metric, ...] = get_args(Metric)
STD, INTENSITY = "std", "predicted intensity"
"""What is compared with the error of each voxel."""
PROTOCOL = (__doc__ or "").strip()


@dataclass(frozen=True)
class Score:
    """The quality of one predictor's image: a row of metrics.csv."""

    case: str
    sources: str
    """Joined by '+'."""
    target: str
    predictor: str
    protocol: str
    """'volume' or 'slice'."""
    region: str
    """'volume', 'brain' or 'tumour'; 'slices' of the protocol 'slice'."""
    psnr: float
    ssim: float
    mae: float
    nmse: float
    haarpsi: float


class Quality(NamedTuple):
    """The metrics of one image in one region."""

    psnr: float
    ssim: float
    mae: float
    nmse: float
    haarpsi: float


@dataclass(frozen=True)
class UncertaintyScore:
    """How well an uncertainty tells where the errors are: a row of uncertainty.csv.

    See `metrics.error_against_uncertainty`.
    """

    case: str
    sources: str
    target: str
    uncertainty: str
    """STD or INTENSITY."""
    correlation: float
    error: float
    error_most_certain_90: float
    ause: float
    coverage_95: float


@dataclass(frozen=True)
class CalibrationPoint:
    """Standard deviation and error of a tenth of the voxels, both root mean squares: a row of calibration.csv."""

    case: str
    sources: str
    target: str
    decile: int
    """1 holds the most certain voxels, 10 the least."""
    std: float
    error: float


def measure(subject: Subject, sources: Sequence[str], images: Mapping[str, Mapping[str, Array]]) -> list[Score]:
    """Score the images of one study, predictor → target → volume, by both protocols and in every region it has.

    Raises:
        StudyError: a target is constant.
    """
    scores = []
    targets = dict.fromkeys(target for volumes in images.values() for target in volumes)
    for target, (predictor, volumes) in ((t, image) for t in targets for image in images.items()):
        predicted, truth = np.ascontiguousarray(volumes[target]), subject.volumes[target]
        try:
            by_region = _volume_quality(subject, predicted, truth)
        except ValueError as error:
            raise StudyError(f"{subject.name}: {target} cannot be measured: {error}") from error
        common = (subject.name, "+".join(sources), target, predictor)
        scores += [Score(*common, "volume", region, *quality) for region, quality in by_region.items()]
        scores.append(Score(*common, "slice", "slices", *_slice_quality(subject, predicted, truth)))
    return scores


def measure_uncertainty(
    subject: Subject, sources: Sequence[str], predicted: Mapping[str, Array], stds: Mapping[str, Array]
) -> list[UncertaintyScore]:
    """Compare the errors within the head with the standard deviations, and with the predicted intensity."""
    scores = []
    for target, std in stds.items():
        inside, error = _errors(subject, target, predicted[target])
        for name, uncertainty in ((STD, std), (INTENSITY, predicted[target])):
            measured = metrics.error_against_uncertainty(error, torch.from_numpy(uncertainty[inside]))
            scores.append(
                UncertaintyScore(
                    case=subject.name,
                    sources="+".join(sources),
                    target=target,
                    uncertainty=name,
                    correlation=measured["correlation"],
                    error=measured["error"],
                    error_most_certain_90=measured["error_most_certain_90"],
                    ause=measured["ause"],
                    coverage_95=measured["coverage_95"],
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
        curve = metrics.calibration_curve(error, torch.from_numpy(std[inside])).tolist()
        points += [
            CalibrationPoint(subject.name, "+".join(sources), target, n, *pair) for n, pair in enumerate(curve, 1)
        ]
    return points


def _errors(subject: Subject, target: str, predicted: Array) -> tuple[Mask, Tensor]:
    """The voxels within the head, of slices where the target was acquired, and their absolute errors (N,)."""
    truth = subject.volumes[target]
    inside = subject.head & (truth.max((1, 2)) > 0)[:, None, None]
    return inside, torch.from_numpy(np.abs(predicted - truth)[inside])


def _volume_quality(subject: Subject, predicted: Array, truth: Array) -> dict[str, Quality]:
    """The quality in each region by the protocol 'volume'."""
    regions = {"volume": np.ones_like(subject.head), "brain": subject.head, "tumour": subject.tumour}
    slices = foreground_slices(subject.head.sum((1, 2)).tolist())
    scaled, reference = metrics.scale_by_truth(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
    similarity = metrics.ssim_map(scaled, reference, 1.0)  # (1, Z, Y, X), as all three
    quality = {}
    for region, chosen in regions.items():
        if not chosen.any():
            continue  # no tumour is outlined
        mask = torch.from_numpy(chosen)[None]
        perceptual = metrics.haarpsi(scaled[0, slices], reference[0, slices], 1.0, mask[0, slices])
        quality[region] = Quality(
            psnr=float(metrics.psnr(scaled, reference, 1.0, mask)),
            ssim=float(similarity[mask].mean()),
            mae=float(metrics.mae(scaled, reference, mask)),
            nmse=float(metrics.nmse(scaled, reference, mask)),
            haarpsi=float(perceptual.nanmean()),
        )
    return quality


def _slice_quality(subject: Subject, predicted: Array, truth: Array) -> Quality:
    """The quality by the protocol 'slice'."""
    slices = [z for z in foreground_slices(subject.head.sum((1, 2)).tolist()) if truth[z].max() > 0]
    pair = torch.from_numpy(predicted[slices]), torch.from_numpy(truth[slices])  # (N, Y, X) each
    return Quality(
        psnr=float(metrics.psnr(*pair, 1.0).mean()),
        ssim=float(metrics.ssim(*pair, 1.0).mean()),
        mae=float(metrics.mae(*pair).mean()),
        nmse=float(metrics.nmse(*pair).mean()),
        haarpsi=float(metrics.haarpsi(*pair, 1.0).nanmean()),
    )
