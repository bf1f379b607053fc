"""What the scores of all cases come to: means, intervals and paired tests, as metrics.json holds them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from crossmr import metrics
from crossmr.evaluation.measures import INTENSITY, STD, CalibrationPoint, Metric, Score, UncertaintyScore


class Estimate(TypedDict):
    """One metric over the cases; None is what does not exist, or is infinite."""

    mean: float | None
    low: float | None
    """Of the 95 % bootstrap interval of the mean."""
    high: float | None
    p_against_first: NotRequired[float | None]
    """Of the paired Wilcoxon test over cases against the first predictor, the model's own; which has none."""


class Summary(TypedDict):
    """One predictor over the cases, in one region of one target from one set of sources."""

    sources: str
    target: str
    predictor: str
    protocol: str
    region: str
    cases: int
    psnr: Estimate
    ssim: Estimate
    mae: Estimate
    nmse: Estimate
    haarpsi: Estimate


class UncertaintySummary(TypedDict):
    """Means over the cases of how well an uncertainty tells where the errors are."""

    sources: str
    target: str
    uncertainty: str
    cases: int
    correlation: float | None
    error: float | None
    error_most_certain_90: float | None
    ause: float | None
    coverage_95: float | None
    """None of the predicted intensity, which is no standard deviation."""
    p_against_std: NotRequired[float | None]
    """Of the paired Wilcoxon test of AUSE against the standard deviation's, for the predicted intensity."""


class CalibrationSummary(TypedDict):
    """Root mean squares over cases and subsets of sources of one decile of a target's voxels."""

    target: str
    decile: int
    std: float
    error: float


class _Key(NamedTuple):
    """What is summarised together."""

    sources: str
    target: str
    predictor: str
    protocol: str
    region: str


def summarise(scores: Sequence[Score]) -> list[Summary]:
    """Summarise each predictor by sources, target, protocol and region; the first score's predictor is the model's own.

    Paired tests take the cases that both predictors have.
    """
    first = scores[0].predictor
    by_case: dict[_Key, dict[str, Score]] = {}
    for s in scores:
        by_case.setdefault(_Key(s.sources, s.target, s.predictor, s.protocol, s.region), {})[s.case] = s
    return [
        _summary(key, cases, None if key.predictor == first else by_case.get(key._replace(predictor=first), {}))
        for key, cases in by_case.items()
    ]


def _summary(key: _Key, cases: Mapping[str, Score], own: Mapping[str, Score] | None) -> Summary:
    """Case → score of one predictor, beside those of the model's own if that is another."""

    def estimate(metric: Metric) -> Estimate:
        values = {case: float(getattr(score, metric)) for case, score in cases.items()}
        low, high = metrics.bootstrap_interval(list(values.values()))
        estimated = Estimate(mean=_mean(list(values.values())), low=_finite(low), high=_finite(high))
        if own is not None:
            pairs = [(value, getattr(own[case], metric)) for case, value in values.items() if case in own]
            estimated["p_against_first"] = _p_value(pairs)
        return estimated

    return Summary(
        sources=key.sources,
        target=key.target,
        predictor=key.predictor,
        protocol=key.protocol,
        region=key.region,
        cases=len(cases),
        psnr=estimate("psnr"),
        ssim=estimate("ssim"),
        mae=estimate("mae"),
        nmse=estimate("nmse"),
        haarpsi=estimate("haarpsi"),
    )


def summarise_uncertainty(scores: Sequence[UncertaintyScore]) -> list[UncertaintySummary]:
    """Means over the cases by sources, target and uncertainty."""
    by_case: dict[tuple[str, str, str], dict[str, UncertaintyScore]] = {}
    for score in scores:
        by_case.setdefault((score.sources, score.target, score.uncertainty), {})[score.case] = score
    summaries = []
    for (sources, target, uncertainty), cases in by_case.items():
        summary = UncertaintySummary(
            sources=sources,
            target=target,
            uncertainty=uncertainty,
            cases=len(cases),
            correlation=_mean([s.correlation for s in cases.values()]),
            error=_mean([s.error for s in cases.values()]),
            error_most_certain_90=_mean([s.error_most_certain_90 for s in cases.values()]),
            ause=_mean([s.ause for s in cases.values()]),
            coverage_95=_mean([s.coverage_95 for s in cases.values()]) if uncertainty == STD else None,
        )
        if uncertainty == INTENSITY:
            stds = by_case[sources, target, STD]
            summary["p_against_std"] = _p_value([(s.ause, stds[case].ause) for case, s in cases.items()])
        summaries.append(summary)
    return summaries


def summarise_calibration(points: Sequence[CalibrationPoint]) -> list[CalibrationSummary]:
    """One calibration curve a target."""
    by_decile: dict[tuple[str, int], list[CalibrationPoint]] = {}
    for point in points:
        by_decile.setdefault((point.target, point.decile), []).append(point)
    return [
        CalibrationSummary(
            target=target,
            decile=decile,
            std=_root_mean_square([point.std for point in some]),
            error=_root_mean_square([point.error for point in some]),
        )
        for (target, decile), some in by_decile.items()
    ]


def _p_value(pairs: Sequence[tuple[float, float]]) -> float | None:
    return _finite(metrics.paired_wilcoxon(*zip(*pairs, strict=True))) if pairs else None


def _mean(values: Sequence[float]) -> float | None:
    """Over the values that exist, or None."""
    return _finite(float(np.nanmean(values))) if np.isfinite(values).any() else None


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None
