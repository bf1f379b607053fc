"""What the scores of all cases come to: means, intervals and paired tests over patients, as metrics.json holds them.

The mean over a patient's cases comes first, so that a patient scanned twice counts once. A paired test takes the cases
that both have. p-values are corrected for their number (Holm 1979) within a family: of one metric, all regions of one
target from one set of sources, for all models and guidance modes or for all baselines; of uncertainty, all targets and
sets of sources.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

from crossmr import metrics
from crossmr.baselines import BASELINES
from crossmr.evaluation.measures import (
    INTENSITY,
    KEPT,
    LOST,
    METRICS,
    STD,
    CalibrationPoint,
    ContrastScore,
    Metric,
    Row,
    Score,
    Structure,
    UncertaintyScore,
)


class Estimate(TypedDict):
    """One metric over the patients; None is what does not exist, or is infinite."""

    mean: float | None
    low: float | None
    """Of the 95 % bootstrap interval of the mean; None of fewer than FEWEST patients, too."""
    high: float | None
    least: float | None
    """Of the patients' values."""
    most: float | None
    p_uncorrected_against_first: NotRequired[float | None]
    """Of the paired Wilcoxon test over patients against the first predictor, the model's own; which has none."""
    p_holm_against_first: NotRequired[float | None]
    """The same, corrected within its family."""


class Summary(TypedDict):
    """One predictor over the patients, in one region of one target from one set of sources."""

    sources: str
    target: str
    predictor: str
    protocol: str
    region: str
    patients: int
    psnr: Estimate
    ssim: Estimate
    mae: Estimate
    nmse: Estimate
    haarpsi: Estimate
    correlation: Estimate
    psnr_affine: Estimate


class ContrastSummary(TypedDict):
    """How often one predictor keeps the contrast of lesion or fluid in one target from one set of sources."""

    sources: str
    target: str
    predictor: str
    structure: Structure
    patients: int
    """Those in whom the true contrast stands out."""
    kept: float | None
    """The share of them whose share of the true contrast lies within KEPT."""
    median: float | None
    """Of their shares of the true contrast."""


class UncertaintySummary(TypedDict):
    """Means over the patients of how well an uncertainty tells where the errors are."""

    sources: str
    target: str
    uncertainty: str
    patients: int
    correlation: float | None
    error: float | None
    error_most_certain_90: float | None
    ause: float | None
    coverage_95: float | None
    """None of the predicted intensity, which is no standard deviation."""
    std_ratio: float | None
    """Within the lesion over the rest of the brain."""
    error_ratio: float | None
    patients_lost: int
    """Those with a lesion that is lost: less than LOST of its contrast is kept."""
    std_ratio_lost: float | None
    """The same of lost lesions alone."""
    error_ratio_lost: float | None
    p_uncorrected_against_std: NotRequired[float | None]
    """Of the paired Wilcoxon test of AUSE against the standard deviation's, for the predicted intensity."""
    p_holm_against_std: NotRequired[float | None]
    """The same, corrected within its family."""


class CalibrationSummary(TypedDict):
    """Root mean squares over patients and subsets of sources of one decile of a target's voxels."""

    target: str
    decile: int
    std: float
    error: float


FEWEST = 6
"""Patients of whom a mean has an interval at least: with five some 83 % of 95 % bootstrap intervals hold it, with six
87 %, with ten 90 %, with thirty 94 % (normal distribution)."""
SIGNIFICANT = 0.05
ANY_SOURCES = "any"
"""Stands for the sources where a summary is over all subsets of them."""


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
    first = scores[0].predictor if scores else ""
    groups: dict[_Key, list[Score]] = {}
    for s in scores:
        groups.setdefault(_Key(s.sources, s.target, s.predictor, s.protocol, s.region), []).append(s)
    summaries = [
        _summary(key, rows, None if key.predictor == first else groups.get(key._replace(predictor=first), []))
        for key, rows in groups.items()
    ]
    families: dict[tuple[str, str, Metric, bool], list[Estimate]] = {}
    for entry, metric in itertools.product(summaries, METRICS):
        if entry["predictor"] != first:
            family = entry["sources"], entry["target"], metric, entry["predictor"] in BASELINES
            families.setdefault(family, []).append(entry[metric])
    for estimates in families.values():
        corrected = _holm([estimate.get("p_uncorrected_against_first") for estimate in estimates])
        for estimate, p in zip(estimates, corrected, strict=True):
            estimate["p_holm_against_first"] = p
    return summaries


def out_of_reach(entries: Sequence[Summary]) -> dict[str, tuple[int, float]]:
    """Predictor → its patients, and the least corrected p that so few can give, where that is not significant.

    `entries` are of one target from one set of sources. Of n pairs that all differ to one side Wilcoxon's test gives
    2^(1-n), and Holm's procedure takes the least of m p-values m times, where those of predictors with more patients
    may be less.
    """
    others = [e for e in entries if "p_uncorrected_against_first" in e["psnr"]]
    patients = patients_of(others)
    found = {}
    for name, count in patients.items():
        family = [e for e in others if (e["predictor"] in BASELINES) == (name in BASELINES)]
        no_more = [e for e in family if patients[e["predictor"]] <= count]
        counts = [sum(e[m].get("p_uncorrected_against_first") is not None for e in no_more) for m in METRICS]
        tests = min((count for count in counts if count), default=0)
        least = min(1.0, tests * 2.0 ** (1 - count))
        if tests and least >= SIGNIFICANT:
            found[name] = count, least
    return found


def patients_of(entries: Sequence[Summary]) -> dict[str, int]:
    """Predictor → of how many patients its images are; not all of them may have a tumour."""
    found: dict[str, int] = {}
    for entry in entries:
        found[entry["predictor"]] = max(entry["patients"], found.get(entry["predictor"], 0))
    return found


def say_out_of_reach(found: Mapping[str, tuple[int, float]], patients: int) -> list[str]:
    """What `out_of_reach` found in a table of so many patients, in words."""
    said = {}
    for name, (count, p) in found.items():
        who = "from baselines" if name in BASELINES else f"of {name}" if count < patients else "between models"
        said[f"{count} patient{'s are' if count > 1 else ' is'} too few for a significant difference {who}"] = p
    return [f"{text} (p is {p:.2g} at least)" for text, p in said.items()]


def _summary(key: _Key, rows: Sequence[Score], own: Sequence[Score] | None) -> Summary:
    """One predictor's scores, beside those of the model's own if that is another."""

    def estimate(metric: Metric) -> Estimate:
        values = [value for value in _by_patient(rows, metric).values() if not math.isnan(value)]
        low, high = metrics.bootstrap_interval(values) if len(values) >= FEWEST else (math.nan, math.nan)
        least, most = (min(values), max(values)) if values else (math.nan, math.nan)
        estimated = Estimate(
            mean=_mean(values), low=_finite(low), high=_finite(high), least=_finite(least), most=_finite(most)
        )
        if own is not None:
            estimated["p_uncorrected_against_first"] = _p_value(_pairs(rows, own, metric))
        return estimated

    return Summary(
        sources=key.sources,
        target=key.target,
        predictor=key.predictor,
        protocol=key.protocol,
        region=key.region,
        patients=len({row.patient for row in rows}),
        psnr=estimate("psnr"),
        ssim=estimate("ssim"),
        mae=estimate("mae"),
        nmse=estimate("nmse"),
        haarpsi=estimate("haarpsi"),
        correlation=estimate("correlation"),
        psnr_affine=estimate("psnr_affine"),
    )


def summarise_contrasts(scores: Sequence[ContrastScore]) -> list[ContrastSummary]:
    """How often the contrast is kept, by sources, target, predictor and structure."""
    groups: dict[tuple[str, str, str, Structure], list[ContrastScore]] = {}
    for score in scores:
        groups.setdefault((score.sources, score.target, score.predictor, score.structure), []).append(score)
    summaries = []
    for (sources, target, predictor, structure), rows in groups.items():
        shares = [share for share in _by_patient(rows, "kept").values() if not math.isnan(share)]
        summaries.append(
            ContrastSummary(
                sources=sources,
                target=target,
                predictor=predictor,
                structure=structure,
                patients=len(shares),
                kept=_mean(float(KEPT[0] <= share <= KEPT[1]) for share in shares),
                median=statistics.median(shares) if shares else None,
            )
        )
    return summaries


def summarise_uncertainty(scores: Sequence[UncertaintyScore]) -> list[UncertaintySummary]:
    """Means over the patients by sources, target and uncertainty."""
    groups: dict[tuple[str, str, str], list[UncertaintyScore]] = {}
    for score in scores:
        groups.setdefault((score.sources, score.target, score.uncertainty), []).append(score)
    summaries = []
    for (sources, target, uncertainty), rows in groups.items():
        summary = _uncertainty_summary(sources, target, uncertainty, rows)
        if uncertainty == INTENSITY:
            summary["p_uncorrected_against_std"] = _p_value(_pairs(rows, groups[sources, target, STD], "ause"))
        summaries.append(summary)
    family = [entry for entry in summaries if "p_uncorrected_against_std" in entry]
    corrected = _holm([entry.get("p_uncorrected_against_std") for entry in family])
    for entry, p in zip(family, corrected, strict=True):
        entry["p_holm_against_std"] = p
    return summaries


def summarise_uncertainty_by_target(scores: Sequence[UncertaintyScore]) -> list[UncertaintySummary]:
    """The same whatever the sources: of each patient first the mean over all subsets of them."""
    groups: dict[tuple[str, str], list[UncertaintyScore]] = {}
    for score in scores:
        groups.setdefault((score.target, score.uncertainty), []).append(score)
    return [_uncertainty_summary(ANY_SOURCES, *names, rows) for names, rows in groups.items()]


def _uncertainty_summary(
    sources: str, target: str, uncertainty: str, rows: Sequence[UncertaintyScore]
) -> UncertaintySummary:
    kept = _by_patient(rows, "lesion_kept")
    lost = [row for row in rows if kept.get(row.patient, math.inf) < LOST]
    return UncertaintySummary(
        sources=sources,
        target=target,
        uncertainty=uncertainty,
        patients=len({row.patient for row in rows}),
        correlation=_mean_over_patients(rows, "correlation"),
        error=_mean_over_patients(rows, "error"),
        error_most_certain_90=_mean_over_patients(rows, "error_most_certain_90"),
        ause=_mean_over_patients(rows, "ause"),
        coverage_95=_mean_over_patients(rows, "coverage_95") if uncertainty == STD else None,
        std_ratio=_mean_over_patients(rows, "std_ratio"),
        error_ratio=_mean_over_patients(rows, "error_ratio"),
        patients_lost=len({row.patient for row in lost}),
        std_ratio_lost=_mean_over_patients(lost, "std_ratio"),
        error_ratio_lost=_mean_over_patients(lost, "error_ratio"),
    )


def summarise_calibration(points: Sequence[CalibrationPoint]) -> list[CalibrationSummary]:
    """One calibration curve a target."""
    by_decile: dict[tuple[str, int], dict[str, list[CalibrationPoint]]] = {}
    for point in points:
        by_decile.setdefault((point.target, point.decile), {}).setdefault(point.patient, []).append(point)
    return [
        CalibrationSummary(
            target=target,
            decile=decile,
            std=_root_mean_square([[point.std for point in some] for some in by_patient.values()]),
            error=_root_mean_square([[point.error for point in some] for some in by_patient.values()]),
        )
        for (target, decile), by_patient in by_decile.items()
    ]


def _by_patient(rows: Iterable[Row], field: str) -> dict[str, float]:
    """Patient → mean of a field over the patient's rows in which it exists; nan where it does in none."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.patient, []).append(getattr(row, field))
    return {patient: _nanmean(some) for patient, some in values.items()}


def _mean_over_patients(rows: Iterable[Row], field: str) -> float | None:
    return _mean(_by_patient(rows, field).values())


def _pairs(rows: Iterable[Row], others: Iterable[Row], field: str) -> list[tuple[float, float]]:
    """Of each patient a field's mean over `rows` and over `others`, both over the cases in which both exist."""
    theirs = {row.case: float(getattr(row, field)) for row in others}
    by_patient: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pair = float(getattr(row, field)), theirs.get(row.case, math.nan)
        if not any(map(math.isnan, pair)):
            by_patient.setdefault(row.patient, []).append(pair)
    return [
        (statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)) for pairs in by_patient.values()
    ]


def _holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrected p-values; None where there is none, which counts for nothing."""
    corrected = iter(metrics.holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def _p_value(pairs: Sequence[tuple[float, float]]) -> float | None:
    return _finite(metrics.paired_wilcoxon(*zip(*pairs, strict=True))) if pairs else None


def _nanmean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _mean(values: Iterable[float]) -> float | None:
    """Over the values that exist, or None."""
    return _finite(_nanmean(values))


def _root_mean_square(values: Sequence[Sequence[float]]) -> float:
    """Of each patient's values, then over the patients."""
    return math.sqrt(statistics.fmean(statistics.fmean(value**2 for value in some) for some in values))


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None
