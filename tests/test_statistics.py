"""Means, intervals and paired tests of scores: over the right patients, in the right pairs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from crossmr.baselines import BASELINES
from crossmr.evaluation.measures import (
    INTENSITY,
    METRICS,
    STD,
    CalibrationPoint,
    ContrastScore,
    Score,
    UncertaintyScore,
)
from crossmr.evaluation.statistics import (
    out_of_reach,
    patients_of,
    say_out_of_reach,
    summarise,
    summarise_calibration,
    summarise_contrasts,
    summarise_uncertainty,
    summarise_uncertainty_by_target,
)
from crossmr.metrics import holm

CASES = [f"P{k}" for k in range(10)]


MEASURES = [*UncertaintyScore.__dataclass_fields__][5:]


def score(case, predictor, region="brain", patient=None, **metrics):
    values = {**dict.fromkeys(METRICS, 0.5), **metrics}
    return Score(case, patient or case, "t1n", "t2f", predictor, "volume", region, **values)


def contrast(case, kept, patient=None, **names):
    names = {"target": "t2f", "predictor": "own", "structure": "lesion"} | names
    return ContrastScore(case, patient or case, "t1n", truth=2.0, predicted=2 * kept, kept=kept, **names)


def uncertainty(case, name, patient=None, **measures):
    return UncertaintyScore(case, patient or case, "t1n", "t2f", name, **{**dict.fromkeys(MEASURES, 0.5), **measures})


@pytest.fixture
def paired():
    """Scores of two predictors by case, whose order over the cases differs: each wrong pairing has another p-value."""
    rng = np.random.default_rng(7)
    own = rng.normal(0, 1, len(CASES))
    other = own + rng.normal(0.3, 0.3, len(CASES))
    p = wilcoxon(other - own).pvalue
    wrong = [(np.sort(other), np.sort(own)), *((other, o) for o in (np.sort(own), own[::-1], np.roll(own, 1)))]
    assert all(abs(wilcoxon(a - b).pvalue - p) > 1e-3 for a, b in wrong)
    return dict(zip(CASES, own.tolist(), strict=True)), dict(zip(CASES, other.tolist(), strict=True)), p


def test_the_paired_test_pairs_each_case_with_itself(paired):
    own, other, p = paired
    rows = [score(case, "own", mae=own[case]) for case in CASES]
    rows += [score(case, "other", mae=other[case]) for case in (*CASES[5:], *CASES[:5])]  # in whatever order
    first, second = summarise(rows)
    assert "p_uncorrected_against_first" not in first["mae"]
    assert second["mae"]["p_uncorrected_against_first"] == pytest.approx(p)
    assert second["ssim"]["p_uncorrected_against_first"] == 1


def test_the_paired_test_takes_the_cases_that_both_have(paired):
    own, other, p = paired
    rows = [score(case, "own", mae=value) for case, value in own.items()]
    rows += [score("alone", "other", mae=100.0), *(score(case, "other", mae=other[case]) for case in CASES)]
    rows += [score("alone", "third", mae=1.0)]
    _, second, third = summarise(rows)
    assert second["patients"] == 11
    assert second["mae"]["p_uncorrected_against_first"] == pytest.approx(p)
    assert third["mae"]["p_uncorrected_against_first"] is None


@pytest.mark.parametrize("field", ["region", "target", "sources", "protocol"])
def test_what_is_compared_is_of_one_region_target_and_source(paired, field):
    own, other, p = paired
    rows = [score(case, name, mae=of[case]) for name, of in (("own", own), ("other", other)) for case in CASES]
    there = {"own": {case: 2 * value for case, value in other.items()}, "other": own}
    rows += [replace(row, mae=there[row.predictor][row.case], **{field: "another"}) for row in rows]
    p_values = {
        (entry[field] == "another", entry["predictor"]): entry["mae"].get("p_uncorrected_against_first")
        for entry in summarise(rows)
    }
    differences = [own[case] - 2 * other[case] for case in CASES]
    assert len(p_values) == 4
    assert p_values[False, "other"] == pytest.approx(p)
    assert p_values[True, "other"] == pytest.approx(wilcoxon(differences).pvalue)
    assert 0.1 < p_values[True, "other"] < 1


def test_a_pair_is_of_the_cases_that_both_have(paired):
    """A second visit that one predictor lacks, or has no score for, does not enter the other's side of the pair."""
    own, other, p = paired
    rows = [score(case, name, mae=of[case]) for name, of in (("own", own), ("other", other)) for case in CASES]
    rows += [score(f"{case} again", "own", patient=case, mae=k * 10.0) for k, case in enumerate(CASES)]
    rows += [score(f"{case} again", "other", patient=case, mae=math.nan) for case in CASES[:5]]
    _, second = summarise(rows)
    assert second["mae"]["p_uncorrected_against_first"] == pytest.approx(p)
    rows = [uncertainty(case, name, ause=of[case]) for name, of in ((STD, own), (INTENSITY, other)) for case in CASES]
    rows += [uncertainty(f"{case} again", STD, patient=case, ause=k * 10.0) for k, case in enumerate(CASES)]
    assert summarise_uncertainty(rows)[1]["p_uncorrected_against_std"] == pytest.approx(p)


def test_p_values_are_corrected_over_predictors_and_regions_of_one_metric_and_task(paired):
    own, _, _ = paired
    rng = np.random.default_rng(3)
    rows = [score(case, "own", region=r, mae=own[case]) for case in CASES for r in ("brain", "deep")]
    shifts = {("b", "brain"): 0.8, ("b", "deep"): 0.3, ("c", "brain"): 0.5, ("c", "deep"): 0.1}
    for (name, region), shift in shifts.items():
        rows += [score(c, name, region=region, mae=own[c] + rng.normal(shift, 0.4)) for c in CASES]
    rows += [replace(row, target="t1c") for row in rows if row.predictor != "c"]  # another table, of two p-values
    entries = {(e["target"], e["predictor"], e["region"]): e["mae"] for e in summarise(rows)}
    for target, number in (("t2f", 4), ("t1c", 2)):
        family = [entries[target, name, r] for name, r in shifts if (target, name, r) in entries]
        raw = [e["p_uncorrected_against_first"] for e in family]
        assert len(set(raw)) == len(raw) == number
        assert [e["p_holm_against_first"] for e in family] == pytest.approx(holm(raw))
        assert min(e["p_holm_against_first"] for e in family) == pytest.approx(number * min(raw))
    assert "p_holm_against_first" not in entries["t2f", "own", "brain"]


def test_baselines_are_a_family_of_their_own(paired):
    """What a model differs from a constant by does not count against its difference from another model."""
    own, other, p = paired
    rows = [score(case, "own", mae=own[case]) for case in CASES]
    rows += [score(case, "against: x", mae=other[case]) for case in CASES]
    rows += [score(case, name, mae=own[case] + k + 1) for k, name in enumerate(BASELINES) for case in CASES]
    rows += [replace(row, region="deep", mae=0.5) for row in rows]
    corrected = {(e["predictor"], e["region"]): e["mae"].get("p_holm_against_first") for e in summarise(rows)}
    assert corrected["against: x", "brain"] == pytest.approx(2 * p)
    assert corrected["constant", "brain"] == pytest.approx(6 * 2 / 2**10)


@pytest.mark.parametrize(("patients", "regions", "least"), [(9, 4, None), (7, 4, 4 / 64), (6, 1, None), (2, 4, 1.0)])
def test_where_no_difference_can_be_significant_the_least_p_is_known(patients, regions, least):
    rows = [
        score(f"P{k}", name, region=f"r{r}", mae=0.1 * k + 1.0 * shift, correlation=math.nan)
        for k in range(patients)
        for r in range(regions)
        for name, shift in (("own", 0), ("against: x", 1), *((name, 2) for name in BASELINES))
    ]
    entries = summarise(rows)
    found = out_of_reach(entries)
    assert found.get("against: x") == (least and (patients, least))
    holm_p = min(e["mae"]["p_holm_against_first"] for e in entries if e["predictor"] == "against: x")
    assert holm_p == pytest.approx(min(1, regions * 2.0 ** (1 - patients)))
    of_baselines = (patients, p) if (p := min(1.0, 3 * regions * 2.0 ** (1 - patients))) >= 0.05 else None
    assert [found.get(name) for name in BASELINES] == [of_baselines] * len(BASELINES)
    assert out_of_reach([e for e in entries if e["predictor"] == "own"]) == {}


def test_images_of_few_patients_are_out_of_reach_by_their_own_number():
    """Of twelve patients two have images of another program; the other models' tests are not out of reach."""
    of = {"own": 12, "against: x": 12, "images: a": 2}
    rows = [score(f"P{k}", name, mae=0.1 * k + 0.01 * len(name)) for name, count in of.items() for k in range(count)]
    entries = summarise(rows)
    assert patients_of(entries) == of
    found = out_of_reach(entries)
    assert found == {"images: a": (2, 0.5)}
    holm_p = {e["predictor"]: e["mae"].get("p_holm_against_first") for e in entries}
    assert holm_p["images: a"] == 0.5
    assert holm_p["against: x"] == pytest.approx(2 * 2.0**-11)
    assert say_out_of_reach(found, 12) == [
        "2 patients are too few for a significant difference of images: a (p is 0.5 at least)"
    ]


def test_p_values_of_uncertainty_are_corrected_over_all_targets(paired):
    stds, intensities, p = paired
    rows = [uncertainty(case, STD, ause=stds[case]) for case in CASES]
    rows += [uncertainty(case, INTENSITY, ause=intensities[case]) for case in CASES]
    entries = summarise_uncertainty(rows + [replace(row, target="t1c") for row in rows])
    assert [e.get("p_holm_against_std") for e in entries] == [None, pytest.approx(2 * p), None, pytest.approx(2 * p)]


def test_means_and_intervals_are_of_the_cases(paired):
    own, other, _ = paired
    rows = [score(case, name, psnr=of[case]) for case in CASES for name, of in (("own", own), ("other", other))]
    for entry, values in zip(summarise(rows), (own, other), strict=True):
        estimate = entry["psnr"]
        assert entry["patients"] == len(CASES)
        assert estimate["mean"] == pytest.approx(np.mean([*values.values()]))
        half = 1.96 * np.std([*values.values()]) / np.sqrt(len(CASES))
        assert estimate["low"] == pytest.approx(estimate["mean"] - half, abs=0.3 * half)
        assert estimate["high"] == pytest.approx(estimate["mean"] + half, abs=0.3 * half)


@pytest.mark.parametrize(("patients", "interval"), [(1, False), (5, False), (6, True)])
def test_of_few_patients_there_is_no_interval_but_their_range(patients, interval):
    """Of two patients half of the bootstrap intervals would not hold the mean."""
    values = [1.0, 5.0, 2.0, 4.0, 3.0, 9.0, math.nan][:patients]
    (summary,) = summarise([score(f"P{k}", "own", psnr=value) for k, value in enumerate([*values, math.nan])])
    estimate = summary["psnr"]
    assert (estimate["least"], estimate["most"]) == (min(values), max(values))
    assert [estimate[bound] is not None for bound in ("low", "high")] == [interval] * 2


def test_scores_that_do_not_exist_are_null_and_left_out_of_the_mean():
    rows = [score("A", "own", psnr=math.inf, nmse=math.nan, mae=math.nan), score("B", "own", nmse=math.nan, mae=0.25)]
    (summary,) = summarise(rows)
    none = dict.fromkeys(("mean", "low", "high", "least", "most"))
    assert summary["psnr"] == none | {"least": 0.5}
    assert summary["nmse"] == none
    assert summary["mae"] == none | dict.fromkeys(("mean", "least", "most"), 0.25)
    json.dumps(summary, allow_nan=False)


def test_two_visits_of_a_patient_count_once(paired):
    """Means, intervals and p-values are those of one case a patient that lies between the two visits."""
    own, other, p = paired
    offsets = (0.4, -0.4)
    visits, once = [], []
    for name, values in (("own", own), ("other", other)):
        for case, value in values.items():
            once.append(score(case, name, mae=value))
            visits += [score(f"{case}-{k}", name, patient=case, mae=value + by) for k, by in enumerate(offsets)]
    visits += [score("P0-9", "other", patient="P0", mae=math.nan)]  # has no score: leaves the patient's mean as it is
    for one, two in zip(summarise(once), summarise(visits), strict=True):
        assert two["patients"] == one["patients"] == len(CASES)
        assert two["mae"] == pytest.approx(one["mae"])
    assert summarise(visits)[1]["mae"]["p_uncorrected_against_first"] == pytest.approx(p)


def test_patients_with_many_visits_do_not_outweigh_the_others():
    often = [*(("A", value) for value in (1.0, 1.0, 1.0)), ("B", 0.0)]
    rows = [score(f"{patient}{k}", "own", patient=patient, ssim=value) for k, (patient, value) in enumerate(often)]
    assert summarise(rows)[0]["ssim"]["mean"] == 0.5
    rows = [uncertainty(f"{who}{k}", STD, patient=who, ause=value) for k, (who, value) in enumerate(often)]
    (summary,) = summarise_uncertainty(rows)
    assert (summary["patients"], summary["ause"]) == (2, 0.5)
    points = [
        CalibrationPoint(f"{who}{k}", who, "t1n", "t2f", 1, 5 * value, 7 * value)
        for k, (who, value) in enumerate(often)
    ]
    (curve,) = summarise_calibration(points)
    assert (curve["std"], curve["error"]) == (pytest.approx(5 / math.sqrt(2)), pytest.approx(7 / math.sqrt(2)))
    rows = [contrast(f"{who}{k}", value, patient=who) for k, (who, value) in enumerate(often)]
    (summary,) = summarise_contrasts(rows)
    assert (summary["patients"], summary["kept"], summary["median"]) == (2, 0.5, 0.5)


def test_contrasts_are_kept_between_seven_and_fourteen_tenths():
    shares = {"A": 0.69, "B": 0.7, "C": 1.4, "D": 1.41, "E": -1.0, "F": math.nan, "G": 1.0}
    (summary,) = summarise_contrasts([contrast(case, share) for case, share in shares.items()])
    assert summary == {
        **{"sources": "t1n", "target": "t2f", "predictor": "own", "structure": "lesion"},
        **{"patients": 6, "kept": 0.5, "median": pytest.approx(0.85)},
    }


def test_contrasts_are_of_one_target_predictor_and_structure():
    places = [(t, p, s) for t in ("t1c", "t2f") for p in ("own", "other") for s in ("lesion", "fluid")]
    rows = [
        contrast("A", n / 10, target=target, predictor=predictor, structure=structure)
        for n, (target, predictor, structure) in enumerate(places)
    ]
    summary = {(e["target"], e["predictor"], e["structure"]): e["median"] for e in summarise_contrasts(rows)}
    assert summary == {place: n / 10 for n, place in enumerate(places)}
    (nothing,) = summarise_contrasts([contrast("A", math.nan)])
    assert (nothing["patients"], nothing["kept"], nothing["median"]) == (0, None, None)
    assert summarise_contrasts([]) == []


def test_lost_lesions_are_summarised_by_themselves():
    lesions = {"A": (0.2, 3.0, 1.2), "B": (0.49, 5.0, 1.4), "C": (0.5, 1.0, 2.0), "D": (math.nan, math.nan, math.nan)}
    (summary,) = summarise_uncertainty(
        [uncertainty(c, STD, lesion_kept=k, error_ratio=e, std_ratio=s) for c, (k, e, s) in lesions.items()]
    )
    assert summary["error_ratio"] == pytest.approx(3)
    assert summary["std_ratio"] == pytest.approx(4.6 / 3)
    assert (summary["patients"], summary["patients_lost"]) == (4, 2)
    assert summary["error_ratio_lost"] == pytest.approx(4)
    assert summary["std_ratio_lost"] == pytest.approx(1.3)
    (none,) = summarise_uncertainty([uncertainty("C", STD, lesion_kept=1.0)])
    assert (none["patients_lost"], none["error_ratio_lost"], none["std_ratio_lost"]) == (0, None, None)


def test_uncertainty_is_the_mean_over_cases_and_its_test_pairs_each_case_with_itself(paired):
    stds, intensities, p = paired
    rows = [uncertainty(case, STD, ause=stds[case], coverage_95=k / 10) for k, case in enumerate(CASES)]
    rows += [uncertainty(case, INTENSITY, ause=intensities[case], correlation=math.nan) for case in reversed(CASES)]
    of_std, of_intensity = summarise_uncertainty(rows)
    assert of_std["patients"] == of_intensity["patients"] == len(CASES)
    assert of_std["ause"] == pytest.approx(np.mean([*stds.values()]))
    assert of_intensity["ause"] == pytest.approx(np.mean([*intensities.values()]))
    assert of_std["coverage_95"] == pytest.approx(0.45)
    assert of_intensity["coverage_95"] is None  # it is no standard deviation
    assert of_intensity["correlation"] is None
    assert "p_uncorrected_against_std" not in of_std
    assert of_intensity["p_uncorrected_against_std"] == pytest.approx(p)


def test_uncertainty_of_a_target_is_the_mean_over_patients_not_over_subsets():
    """One patient who lacks a contrast is one of twenty."""
    rows = [uncertainty(f"P{k}", STD, error=0.04, coverage_95=0.95) for k in range(19)]
    rows += [replace(uncertainty("P19", STD, error=0.2, coverage_95=0.15), sources="t2w")]
    rows += [replace(uncertainty("P18", STD, error=0.08, coverage_95=0.95), sources="t1n+t2w")]
    (summary,) = summarise_uncertainty_by_target(rows)
    assert summary["patients"] == 20
    assert summary["error"] == pytest.approx((18 * 0.04 + 0.06 + 0.2) / 20)
    assert summary["coverage_95"] == pytest.approx((19 * 0.95 + 0.15) / 20)
    assert summary["sources"] == "any"


def test_calibration_is_the_root_mean_square_of_each_decile():
    points = [
        CalibrationPoint(case, case, sources, target, decile, decile * factor, 2 * decile * factor)
        for case, factor in (("A", 0.1), ("B", 0.7))
        for sources in ("t1n", "t1n+t2w")
        for target in ("t1c", "t2f")
        for decile in range(1, 11)
    ]
    summary = summarise_calibration(points)
    assert [(e["target"], e["decile"]) for e in summary] == [(t, d) for t in ("t1c", "t2f") for d in range(1, 11)]
    for entry in summary:
        assert entry["std"] == pytest.approx(0.5 * entry["decile"])  # sqrt((.01 + .49) / 2)
        assert entry["error"] == pytest.approx(entry["decile"])
    assert summarise_calibration([]) == []
