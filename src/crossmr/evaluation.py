"""Measuring a model: hide each target, synthesise it, and compare, always beside the trivial predictors.

Two protocols, both on intensities normalised per volume (0 air, 1 four times the median within the head):

volume  Within the head's bounding box plus 4 voxels (the empty rest would only flatter). Prediction and truth are
        scaled by the truth's 0–99.9 percentile range, the prediction never by itself. PSNR, SSIM (3D, Gaussian 1.5),
        MAE, NMSE and HaarPSI (axial slices with head) over the whole box, the brain (the head mask where the skull
        is there) and the tumour.
slice   As CDM, ResViT and SynDiff measure: PSNR, SSIM (2D, Gaussian 1.5) and MAE of each axial slice in [0, 1],
        averaged over the slices that hold at least a tenth of the head area of the fullest one and in which the
        target was acquired at all.

A model of any subset is measured with each modality hidden in turn, all others shown, or with every subset shown and
all the rest hidden.

The head mask is found on all of a study's volumes, the hidden one included; it places the box and scales the sources.
A model with cells has no twin: its unguided synthesis is what a network without guidance gives.

Where there is one, the standard deviation of each voxel is held against the absolute error within the head, on the
[0, 1] scale (`error_against_uncertainty`), beside the predicted intensity, which any network has: it ranks errors too.
The calibration curve holds what a tenth of the voxels are said to be off against what they are (`calibration_curve`).
"""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from crossmr import metrics
from crossmr.completion import Settings, check_settings, chosen_guidance, samples_drawn, synthesise
from crossmr.data.dataset import Case, PreparedSet, useful_slices
from crossmr.data.naming import StudyFiles, find_studies, in_usual_order
from crossmr.data.study import load_study
from crossmr.device import choose_device, choose_precision
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, StudyError
from crossmr.files import sole_writer, write_atomically, write_json
from crossmr.model import CrossConditionedModel, Guidance, ModelConfig, load_model, pseudonym
from crossmr.picture import Column, Kind, middle, save_columns, where_most
from crossmr.store import find_model
from crossmr.trivial import NAMES, predict_trivial

Array = npt.NDArray[np.float32]
Row = dict[str, Any]
KEYS = ("sources", "target", "predictor", "protocol", "region")
METRICS = ("psnr", "ssim", "mae", "nmse", "haarpsi")
SURENESS = ("correlation", "error", "certain_90", "ause", "coverage_95")
CURVE = ("tenth", "deviation", "error")
DEVIATION, INTENSITY = "deviation", "predicted intensity"
TWIN = "unguided twin"
HEADINGS = {"psnr": "PSNR", "ssim": "SSIM", "haarpsi": "HaarPSI"}
COLUMNS = (
    ("brain", "psnr", 2),
    ("brain", "ssim", 3),
    ("brain", "haarpsi", 3),
    ("tumour", "psnr", 2),
    ("tumour", "ssim", 3),
    ("slices", "psnr", 2),
    ("slices", "ssim", 3),
)
"""What the printed tables show: region, metric, digits."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One study as it is measured: head-cropped volumes (Z, Y, X) in [0, 1] and masks."""

    name: str
    patient: str
    volumes: Mapping[str, Array]
    head: npt.NDArray[np.bool_]
    tumour: npt.NDArray[np.bool_]
    masked_background: bool
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of (Z, Y, X)."""


@sole_writer("out")
def evaluate(
    model: CrossConditionedModel | Path | str,
    data: Path | str,
    out: Path | str,
    *,
    part: str = "test",
    every_subset: bool = False,
    guidances: Sequence[Guidance] = (),
    settings: Settings | None = None,
    device: str = "auto",
    mapping: Mapping[str, str] | None = None,
    display: Display = SILENT,
) -> dict[str, Any]:
    """Hide, synthesise and measure every target of every study, and return what OUT/metrics.json says.

    Args:
        model: a model, the folder of one, or the name of one at hand.
        data: a prepared set, of which `part` is measured, or a folder of studies.
        out: gets metrics.csv (a row a case, target, predictor and region), metrics.json, pictures, and with
            standard deviations uncertainty.csv and calibration.csv.
        part: 'train', 'val' or 'test' of a prepared set.
        every_subset: show a model of any subset every subset of what a study has, not only all but one modality.
        guidances: arms measured beside the model's own guidance.
        settings: seed, steps and precision of the completion.
        device: see `complete`.
        mapping: see `find_studies`.
        display: where progress goes.

    Raises:
        CrossmrError: nothing could be measured. A study that fails is listed under 'failed'.
    """
    out, settings = Path(out), settings or Settings()
    if "reference" in (*guidances, settings.guidance):
        raise ConfigError("An evaluation knows no reference; measure sample, mean, unconditional or none.")
    if not isinstance(model, CrossConditionedModel):
        model = load_model(find_model(model), choose_device(device))
    if every_subset and not model.config.any_subset:
        raise ConfigError(
            "--every-subset is for models of any subset; this one always needs its sources, so leave it out."
        )
    own = chosen_guidance(model, settings)
    for arm in (own, *guidances):
        check_settings(model, _of_arm(settings, arm))
    if {own, *guidances} == {"none"}:
        check_settings(model, replace(settings, guidance="none"))
    arms = list(dict.fromkeys((own, *guidances)))
    rows: list[Row] = []
    sureness: list[Row] = []
    curves: list[Row] = []
    failed: dict[str, str] = {}
    trained_on = set(model.record.get("training", {}).get("patients", {}).get("train", []))
    seen: list[str] = []
    pictures: list[dict[str, Any]] = []
    readers = list(_subjects(Path(data), part, mapping, bool(settings.registered)))
    write_json(out / "metrics.json", {"finished": False})
    with display.task("evaluate", len(readers)) as task:
        for name, read in readers:
            try:
                subject = read()
                measured: list[Row] = []
                sure: list[Row] = []
                curved: list[Row] = []
                shown: list[tuple[tuple[str, ...], dict[str, list[Column]]]] = []
                for sources in patterns(model.config, subject, every_subset=every_subset):
                    predictions, deviations = predict_all(model, subject, sources, arms, settings)
                    measured += measure(subject, sources, predictions)
                    sure += measure_sureness(subject, sources, predictions[predictor_name(own)], deviations)
                    curved += measure_calibration(subject, sources, predictions[predictor_name(own)], deviations)
                    shown = [one for one in shown if len(one[0]) == len(sources)]  # the largest subsets come last
                    shown.append((sources, _columns(subject, sources, predictions, deviations)))
                drawn = _draw(out, subject, shown)
                pictures += drawn
                rows += measured
                sureness += sure
                curves += curved
                if pseudonym(subject.patient) in trained_on:
                    seen.append(name)
            except CrossmrError as error:
                failed[name] = str(error)
            except Exception as error:  # nobody foresaw it: the other patients go on all the same
                failed[name] = f"{name}: {type(error).__name__}: {error}"
            task.advance(name)
    if not rows:
        reason = next(iter(failed.values()), f"the '{part}' part is empty")
        raise StudyError(f"No study of {data} could be measured: {reason}")
    body = {
        "finished": True,
        "protocol": (__doc__ or "").strip(),
        "summary": summarise(rows),
        "uncertainty": sureness_summary(sureness),
        "calibration": calibration_summary(curves),
        "own": predictor_name(own),
        "cases": sorted({row["case"] for row in rows}),
        "pictures": pictures,
        "trained_on": seen,
        "failed": failed,
        "model_sha256": model.record.get("sha256"),
        "settings": {
            "seed": settings.seed,
            "ddim_steps": settings.steps,
            "samples": samples_drawn(model, settings),
            "eta": settings.eta,
            "device": model.device.type,
            "precision": str(choose_precision(settings.precision, model.device)).removeprefix("torch."),
        },
        "versions": {name: version(name) for name in ("crossmr", "torch")},
    }
    write_atomically(out / "metrics.csv", _csv(rows, ("case", "sources", *KEYS[1:], *METRICS)))
    if sureness:
        write_atomically(
            out / "uncertainty.csv", _csv(sureness, ("case", "sources", "target", "uncertainty", *SURENESS))
        )
        write_atomically(out / "calibration.csv", _csv(curves, ("case", "sources", "target", *CURVE)))
    write_json(out / "metrics.json", body)
    return body


def _of_arm(settings: Settings, arm: Guidance) -> Settings:
    """The settings of one arm; without guidance there are no samples."""
    return replace(settings, guidance=arm, samples=settings.samples if arm != "none" else None)


def predictor_name(guidance: str) -> str:
    """How an arm of the model is called in tables and files."""
    return "unguided" if guidance == "none" else f"guided: {guidance}"


def _subjects(
    data: Path, part: str, mapping: Mapping[str, str] | None, registered: bool
) -> Iterator[tuple[str, Callable[[], Subject]]]:
    """Name and reader of each study of a prepared set's part, or of a folder of studies."""
    if (data / "manifest.json").exists() and (data / "cases").exists():
        for case in PreparedSet(data).part(part):
            yield case.name, lambda case=case: subject_from_set(case)  # type: ignore[misc]
        return
    for files in find_studies(data, mapping):
        yield files.case, lambda files=files: _from_files(files, registered)  # type: ignore[misc]


def subject_from_set(case: Case) -> Subject:
    masks = np.asarray(case.masks())
    volumes = {modality: case.volume(modality) for modality in case.modalities}
    return Subject(
        case.name, case.patient, volumes, masks[:, 0] > 0, masks[:, 1] > 0, case.masked_background, case.spacing_mm
    )


def _from_files(files: StudyFiles, registered: bool = False) -> Subject:
    study = load_study(files, registered=registered)
    box = study.box()
    volumes = {m: np.ascontiguousarray(study.normalised(m, box)) for m in study.volumes}
    head = study.mask[box]
    tumour = np.zeros_like(head) if study.labels is None else study.labels[box] > 0
    return Subject(
        study.case, study.patient, volumes, head, tumour, study.masked_background, study.reference.spacing_mm
    )


def patterns(config: ModelConfig, subject: Subject, *, every_subset: bool = False) -> list[tuple[str, ...]]:
    """Which sources a study is shown with: the model's, or, for any subset, all but one in turn, or every subset.

    Raises:
        StudyError: the study lacks a source, or has no target to compare with.
    """
    acquired = [m for m in config.modalities if m in subject.volumes]
    if config.any_subset:
        if len(acquired) < 2:
            raise StudyError(f"{subject.name}: cannot be measured: it has not two of {', '.join(config.modalities)}.")
        sizes = range(1, len(acquired)) if every_subset else [len(acquired) - 1]
        return [shown for size in sizes for shown in itertools.combinations(acquired, size)]
    lacking = [source for source in config.sources if source not in acquired]
    if lacking or not set(config.targets) & set(acquired):
        what = f"it lacks {', '.join(lacking)}" if lacking else f"it has none of {', '.join(config.targets)}"
        raise StudyError(f"{subject.name}: cannot be measured: {what}.")
    return [config.sources]


def predict_all(
    model: CrossConditionedModel,
    subject: Subject,
    sources: Sequence[str],
    arms: Sequence[Guidance],
    settings: Settings,
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Every predictor's targets for one study shown with `sources`: name → target → volume (Z, Y, X) in [0, 1].

    And the standard deviations of the first arm's, target → volume, empty if it has none. The targets are the others
    that the study has, and the model knows.
    """
    config = model.config
    targets = [m for m in config.targets if m in subject.volumes and m not in sources]
    given, head = {m: subject.volumes[m] for m in sources}, subject.head.sum((1, 2)).tolist()

    def apart(whole: Tensor) -> dict[str, Array]:
        return {target: whole[config.targets.index(target)].numpy() for target in targets}

    made = [synthesise(model, given, head, subject.name, _of_arm(settings, arm)) for arm in arms]
    predictions = {predictor_name(arm): apart(one.images) for arm, one in zip(arms, made, strict=True)}
    if model.twin is not None:
        predictions[TWIN] = apart(synthesise(model, given, head, subject.name, settings, network="twin").images)
    if model.trivial:
        for name, volumes in predict_trivial(model.trivial, config.modalities, given, targets).items():
            predictions[name] = dict(zip(targets, volumes, strict=True))
    deviations = {} if made[0].deviations is None else apart(made[0].deviations)
    if subject.masked_background:
        for volumes_of in (*predictions.values(), deviations):
            volumes_of |= {t: np.where(subject.head, v, np.float32(0)) for t, v in volumes_of.items()}
    return predictions, deviations


def measure_sureness(
    subject: Subject, sources: Sequence[str], predicted: Mapping[str, Array], deviations: Mapping[str, Array]
) -> list[Row]:
    """How errors within the head go with the standard deviations, and with the predicted intensity."""
    rows: list[Row] = []
    for target, deviation in deviations.items():
        inside, error = _errors(subject, target, predicted[target])
        for name, guess in ((DEVIATION, deviation), (INTENSITY, predicted[target])):
            scores = metrics.error_against_uncertainty(error, torch.from_numpy(guess[inside]))
            common = {"case": subject.name, "sources": "+".join(sources), "target": target, "uncertainty": name}
            rows.append({**common, **scores})
    return rows


def measure_calibration(
    subject: Subject, sources: Sequence[str], predicted: Mapping[str, Array], deviations: Mapping[str, Array]
) -> list[Row]:
    """Deviation and error of each tenth of the voxels within the head, from the most certain to the least."""
    rows: list[Row] = []
    for target, deviation in deviations.items():
        inside, error = _errors(subject, target, predicted[target])
        curve = metrics.calibration_curve(error, torch.from_numpy(deviation[inside])).tolist()
        common = {"case": subject.name, "sources": "+".join(sources), "target": target}
        rows += [{**common, **dict(zip(CURVE, (n, *pair), strict=True))} for n, pair in enumerate(curve, 1)]
    return rows


def _errors(subject: Subject, target: str, predicted: Array) -> tuple[npt.NDArray[np.bool_], Tensor]:
    """The voxels within the head, of slices where the target was acquired, and their absolute errors (N,)."""
    truth = subject.volumes[target]
    inside = subject.head & (truth.max((1, 2)) > 0)[:, None, None]
    return inside, torch.from_numpy(np.abs(predicted - truth)[inside])


def calibration_summary(rows: Sequence[Row]) -> list[Row]:
    """Root mean square over cases and subsets of each target's tenths."""
    summary = []
    for target, tenth in dict.fromkeys((row["target"], row["tenth"]) for row in rows):
        own = [row for row in rows if (row["target"], row["tenth"]) == (target, tenth)]
        pair = {key: math.sqrt(sum(row[key] ** 2 for row in own) / len(own)) for key in CURVE[1:]}
        summary.append({"target": target, "tenth": tenth, **pair})
    return summary


def sureness_summary(rows: Sequence[Row]) -> list[Row]:
    """Mean of each measure over the cases, by sources, target and uncertainty; AUSE with the deviation's p-value."""
    summary = []
    for sources, target, name in dict.fromkeys((row["sources"], row["target"], row["uncertainty"]) for row in rows):
        both = [row for row in rows if (row["sources"], row["target"]) == (sources, target)]
        own = [row for row in both if row["uncertainty"] == name]
        entry: Row = {"sources": sources, "target": target, "uncertainty": name, "cases": len(own)}
        entry |= {measure: _mean([row[measure] for row in own]) for measure in SURENESS}
        if name == INTENSITY:
            entry["coverage_95"] = None  # it is no deviation
            ranks = ([r["ause"] for r in both if r["uncertainty"] == u] for u in (name, DEVIATION))
            entry["p_against_deviation"] = _finite(metrics.paired_wilcoxon(*ranks))
        summary.append(entry)
    return summary


def measure(subject: Subject, sources: Sequence[str], predictions: Mapping[str, Mapping[str, Array]]) -> list[Row]:
    """Score every predictor of one study, name → target → volume, by both protocols, over every region it has."""
    rows = []
    slices = useful_slices(subject.head.sum((1, 2)).tolist())
    regions = {
        "volume": None,
        "brain": subject.head,
        "tumour": subject.tumour if subject.tumour.any() else None,
    }
    for target in dict.fromkeys(target for volumes in predictions.values() for target in volumes):
        truth = torch.from_numpy(subject.volumes[target])
        acquired = [z for z in slices if truth[z].max() > 0]
        for name, volumes in predictions.items():
            prediction = torch.from_numpy(np.ascontiguousarray(volumes[target]))
            common = {"case": subject.name, "sources": "+".join(sources), "target": target, "predictor": name}
            try:
                scores = _volume_scores(prediction, truth, regions, slices)
            except ValueError as error:
                raise StudyError(f"{subject.name}: {target} cannot be measured: {error}") from error
            rows += [{**common, "protocol": "volume", "region": region, **score} for region, score in scores.items()]
            by_slice = _slice_scores(prediction[acquired], truth[acquired])
            rows.append({**common, "protocol": "slice", "region": "slices", **by_slice})
    return rows


def _volume_scores(
    prediction: Tensor,
    truth: Tensor,
    regions: Mapping[str, npt.NDArray[np.bool_] | None],
    slices: Sequence[int],
) -> dict[str, dict[str, float]]:
    scaled, reference = metrics.scale_by_truth(prediction[None], truth[None])
    similarity = metrics.ssim_map(scaled, reference, 1.0)
    scores = {}
    for region, chosen in regions.items():
        if region == "tumour" and chosen is None:
            continue
        mask = torch.ones_like(truth, dtype=torch.bool)[None] if chosen is None else torch.from_numpy(chosen)[None]
        perceptual = metrics.haarpsi(scaled[0, slices], reference[0, slices], 1.0, mask[0, slices])
        scores[region] = {
            "psnr": float(metrics.psnr(scaled, reference, 1.0, mask)),
            "ssim": float(similarity[mask].mean()),
            "mae": float(metrics.mae(scaled, reference, mask)),
            "nmse": float(metrics.nmse(scaled, reference, mask)),
            "haarpsi": float(perceptual.nanmean()),
        }
    return scores


def _slice_scores(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    return {
        "psnr": float(metrics.psnr(prediction, truth, 1.0).mean()),
        "ssim": float(metrics.ssim(prediction, truth, 1.0).mean()),
        "mae": float(metrics.mae(prediction, truth).mean()),
        "nmse": float(metrics.nmse(prediction, truth).mean()),
        "haarpsi": float(metrics.haarpsi(prediction, truth, 1.0).nanmean()),
    }


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Mean, bootstrap 95 % interval and count of each metric by sources, target, predictor, protocol and region.

    `p_against_first` is the paired Wilcoxon test over cases of this predictor against the first one, the model's own.
    """
    first = rows[0]["predictor"]
    table: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        table.setdefault(tuple(row[key] for key in KEYS), {})[row["case"]] = row
    summary = []
    for key, cases in table.items():
        sources, target, predictor, protocol, region = key
        own = table.get((sources, target, first, protocol, region), {})
        entry: Row = {**dict(zip(KEYS, key, strict=True)), "cases": len(cases)}
        for metric in METRICS:
            values = [row[metric] for row in cases.values()]
            low, high = metrics.bootstrap_interval(values)
            entry[metric] = {
                "mean": _mean(values),
                "low": _finite(low),
                "high": _finite(high),
            }
            if predictor != first:
                paired = [(cases[c][metric], own[c][metric]) for c in cases if c in own]
                p = metrics.paired_wilcoxon(*zip(*paired, strict=True)) if paired else math.nan
                entry[metric]["p_against_first"] = _finite(p)
        summary.append(entry)
    return summary


def _mean(values: Sequence[float]) -> float | None:
    """Over what there is, or None."""
    return _finite(float(np.nanmean(values))) if np.isfinite(values).any() else None


def _finite(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None


def tables(summary: Sequence[Row], *, intervals: bool = True) -> list[Table]:
    """The summary as people read it: brain and tumour by our protocol, and the slice protocol.

    A table a target; where a target was synthesised from several subsets of sources, two over all of these instead.
    """
    asked = dict.fromkeys((e["target"], e["sources"]) for e in summary)
    if len(asked) > len({target for target, _ in asked}):
        arms = [name for name in dict.fromkeys(e["predictor"] for e in summary) if name not in (TWIN, *NAMES)]
        return [_subsets_table(summary, arm, m, digits) for arm in arms for m, digits in (("psnr", 2), ("ssim", 3))]
    shown = []
    for target, sources in asked:
        own = [e for e in summary if e["target"] == target]
        entries = {(e["predictor"], e["region"]): e for e in own}
        cases = max(e["cases"] for e in own)
        bounded = intervals and cases > 1
        what = "mean and 95 % interval" if bounded else "mean"
        title = f"{target} from {sources}: {what} over {cases} cases"
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
        table.add_column("predictor", no_wrap=True)
        for region, metric, _ in COLUMNS:
            table.add_column(f"{HEADINGS[metric]}\n{region}", justify="right", no_wrap=True)
        for predictor in dict.fromkeys(e["predictor"] for e in own):
            cells = (_cell(entries.get((predictor, r)), m, digits, bounded) for r, m, digits in COLUMNS)
            table.add_row(predictor, *cells)
        shown.append(table)
    return shown


def _subsets_table(summary: Sequence[Row], arm: str, metric: str, digits: int) -> Table:
    """Sources × target: one metric over the brain, of one arm and, in brackets, of the linear mix."""
    entries = {(e["sources"], e["target"], e["predictor"]): e for e in summary if e["region"] == "brain"}
    targets = in_usual_order({e["target"] for e in summary})
    title = f"{HEADINGS[metric]} over the brain, {arm} (linear mix)"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("from", no_wrap=True)
    table.add_column("cases", justify="right")
    for target in targets:
        table.add_column(target, justify="right", no_wrap=True)
    for sources in dict.fromkeys(e["sources"] for e in summary):
        cells = []
        for target in targets:
            pair = (entries.get((sources, target, name)) for name in (arm, "linear mix"))
            own, mix = (_cell(entry, metric, digits, False) for entry in pair)
            cells.append("" if own == "–" else f"{own} ({mix})")
        cases = max(entry["cases"] for entry in summary if entry["sources"] == sources)
        table.add_row(sources, str(cases), *cells)
    return table


def sureness_table(summary: Sequence[Row]) -> Table:
    """What the deviations are worth: error of all voxels and of the surest 90 %, AUSE, coverage of 95 %.

    Of a target that was synthesised from several subsets of sources, the mean over these.
    """
    table = Table(title="how sure: errors within the head", title_justify="left", box=SIMPLE, padding=(0, 1))
    for heading in ("target", "uncertainty", "error", "surest 90 %", "AUSE (0 is perfect)", "within 1.96 deviations"):
        table.add_column(heading, justify="left" if heading in ("target", "uncertainty") else "right")
    for target, name in dict.fromkeys((entry["target"], entry["uncertainty"]) for entry in summary):
        own = [entry for entry in summary if (entry["target"], entry["uncertainty"]) == (target, name)]
        cells = []
        for measure, digits in (("error", 4), ("certain_90", 4), ("ause", 2), ("coverage_95", 2)):
            values = [entry[measure] for entry in own if entry[measure] is not None]
            cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "–")
        table.add_row(target, name, *cells)
    return table


def _cell(entry: Row | None, metric: str, digits: int, interval: bool) -> str:
    if entry is None or entry[metric]["mean"] is None:
        return "–"
    mean, low, high = (entry[metric][key] for key in ("mean", "low", "high"))
    if not interval or low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}\n{low:.{digits}f}–{high:.{digits}f}"


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")  # file names may be no Unicode


def _columns(
    subject: Subject,
    sources: Sequence[str],
    predictions: Mapping[str, Mapping[str, Array]],
    deviations: Mapping[str, Array],
) -> dict[str, list[Column]]:
    """Of each target the sources, the synthesis, the twin's, the truth, the error and the deviation.

    Cut where there is most tumour, or else in the middle.
    """
    at = where_most(subject.tumour) if subject.tumour.any() else middle(subject.head)
    shown = {}
    for target, own in next(iter(predictions.values())).items():
        truth = subject.volumes[target]
        volumes: dict[Kind, Array] = {"synthetic": own}
        if TWIN in predictions:
            volumes["unguided twin"] = predictions[TWIN][target]
        volumes |= {"truth": truth, "error": np.abs(own - truth)}
        if target in deviations:
            volumes["deviation"] = deviations[target]
        shown[target] = [Column.of(m, "acquired", subject.volumes[m], at) for m in sources]
        shown[target] += [Column.of(target, kind, volume, at) for kind, volume in volumes.items()]
    return shown


def _draw(
    out: Path, subject: Subject, shown: Sequence[tuple[Sequence[str], Mapping[str, Sequence[Column]]]]
) -> list[dict[str, Any]]:
    """Write a picture a target, and say what each shows."""
    drawn = []
    for sources, by_target in shown:
        for target, columns in by_target.items():
            file = f"pictures/{subject.name}-{target}.webp"
            said = save_columns(out / file, columns, subject.spacing_mm)
            drawn.append(
                {"case": subject.name, "sources": list(sources), "target": target, "file": file, "columns": said}
            )
    return drawn
