"""Evaluate a model by the protocol of a challenge or of published tables; see `protocols`.

OUT gets metrics.csv, a row for each measure of each image, and metrics.json, with means over the cases.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from crossmr.config import check_kind, read_text
from crossmr.data.labels import as_counted
from crossmr.data.naming import in_usual_order
from crossmr.data.patients import merge
from crossmr.data.study import Study
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, StudyError, names_only
from crossmr.evaluation.evaluate import (
    BY_PROTOCOL,
    EvaluationSettings,
    SecondModel,
    describe,
    refuse_others,
    say_notes,
    set_and_split,
    settings_of,
    versions,
    warn_of_memory,
)
from crossmr.evaluation.others import PREFIX, OtherImages, counted, find_images, read_images, say_images
from crossmr.evaluation.overlap import Overlap, find_overlap, say_overlap
from crossmr.evaluation.predictors import AGAINST, Predictor, find_predictors, predict
from crossmr.evaluation.protocols import (
    DICE,
    DROPPED,
    OTHER_PROTOCOLS,
    REAL,
    TEXT,
    OtherProtocol,
    OtherScore,
    dice,
    dropped_contrasts,
    measure_by,
    on_whole_grid,
)
from crossmr.evaluation.segmenter import EXAMPLE, Segmenter
from crossmr.evaluation.subjects import (
    SPLIT,
    Array,
    FoundSubject,
    Subject,
    each_study,
    find_subjects,
    open_prepared,
    patterns,
    subject_of_study,
)
from crossmr.evaluation.tables import BASELINE, OtherSummary, is_table, write_csv
from crossmr.files import locked, refuse_foreign, write_json
from crossmr.networks.model import CrossConditionedModel
from crossmr.registry import load_model

ALL = "all"
"""What stands for a target where the mean is over all of them."""


@dataclass(frozen=True)
class ProtocolSettings:
    """By which protocol, and by which segmenter."""

    protocol: OtherProtocol = "brasyn"
    segmenter: Segmenter | None = None
    """Measures Dice, too; with 'brasyn' and a folder of studies."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """The studies, and how to synthesise; every subset and parts are not for these protocols."""

    def __post_init__(self) -> None:
        check_kind(self.evaluation, EvaluationSettings, "evaluation")
        read_text(self, "segmenter", Segmenter | None, Segmenter, EXAMPLE)
        if self.protocol not in OTHER_PROTOCOLS:
            raise ConfigError(f"--protocol is '{self.protocol}'; expected crossmr, {' or '.join(OTHER_PROTOCOLS)}.")
        if self.evaluation.every_subset or self.evaluation.part is not None:
            raise ConfigError("--every-subset and --part are for --protocol crossmr alone; leave them out.")
        if self.segmenter is not None and self.protocol != "brasyn":
            raise ConfigError("--segmenter is for --protocol brasyn.")


class ProtocolEvaluation(TypedDict):
    """What metrics.json holds."""

    format: str
    protocol: str
    text: str
    """What the protocols are."""
    summary: list[OtherSummary]
    own: str
    """The predictor that is the model's own."""
    against: SecondModel | None
    cases: list[str]
    dropped: dict[str, str]
    """Case → the contrast that was dropped, by BraSyn's rule; of every study found."""
    segmenter: str | None
    overlap: Overlap
    patients: dict[str, str]
    """Case → patient."""
    failed: dict[str, str]
    images: dict[str, int]
    """Name of other images → studies of which one was measured."""
    notes: list[str]
    """What the numbers of other images do not say."""
    model_sha256: str | None
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Measured:
    """What was measured of one study."""

    patient: str
    scans: tuple[str, ...]
    scores: list[OtherScore]
    notes: list[str]
    """Of images of other programs: those that were not measured, and those in doubt."""


def evaluate_by_protocol(
    model: CrossConditionedModel | Path | str,
    data: Path | str,
    out: Path | str,
    settings: ProtocolSettings = ProtocolSettings(),
    *,
    display: Display = SILENT,
) -> ProtocolEvaluation:
    """Measure every study by another protocol, and return what OUT/metrics.json holds; see `evaluate`.

    Raises:
        CrossmrError: nothing could be measured, the model or the data is not for this protocol, or OUT holds something
            else that has the name of a file to be written. A study that fails is listed under 'failed'.
    """
    check_kind(settings, ProtocolSettings)
    out, data, chosen = Path(out), Path(data), settings.evaluation
    model = load_model(model, chosen.inference.device)
    _check(model, data, settings)
    predictors = find_predictors(model, chosen.inference, chosen.guidances, chosen.against)
    source = chosen.mapping, chosen.inference.register, chosen.patients
    subjects = find_subjects(data, chosen.split, *source, display.say)
    dropped = dropped_contrasts([one.name for one in subjects]) if settings.protocol == "brasyn" else {}
    images = find_images(chosen.images, [one.name for one in subjects], model.config.targets) if subjects else []

    with locked(out):
        refuse_others(out, settings.protocol)
        refuse_foreign(out / "metrics.csv", partial(is_table, kind=OtherScore))
        with display.logged(out / LOG) as logging:

            def measure_one(found: FoundSubject) -> _Measured:
                warn_of_memory(found, predictors, logging)
                return _measure_study(found, predictors, images, settings, dropped.get(found.name), logging)

            outcomes = list(each_study(subjects, measure_one, logging))
        measured = {name: one for name, one, _ in outcomes if one is not None}
        failed = {name: reason for name, _, reason in outcomes if reason}
        if not measured:
            reason = next(iter(failed.values()), f"the split '{chosen.split or SPLIT}' is empty")
            raise StudyError(f"No study of {data} could be measured: {reason}")
        result = _summarise(measured, predictors, settings, set_and_split(data, chosen), [one.name for one in images])
        result |= {"dropped": dropped, "failed": failed}
        write_csv(out / "metrics.csv", [score for one in measured.values() for score in one.scores])
        paths = {one.name: [*one.paths, data, out] for one in subjects}
        write_json(
            out / "metrics.json", {**result, "failed": {n: names_only(why, paths[n]) for n, why in failed.items()}}
        )
    return result


def warnings_of(result: ProtocolEvaluation) -> list[str]:
    """What the numbers do not say of new patients, in sentences."""
    said = say_overlap("model", result["overlap"], result["patients"])
    if result["against"] is not None:
        said += say_overlap("second model", result["against"]["overlap"], result["patients"])
    if result["segmenter"] is not None and not any(entry["measure"] in DICE for entry in result["summary"]):
        said.append("No Dice was measured: no study has labels.")
    return said + result["notes"]


def summarise_scores(scores: Sequence[OtherScore]) -> list[OtherSummary]:
    """Means over the cases by target, predictor and measure: over every target first, then of each one."""
    targets = in_usual_order({score.target for score in scores})
    summaries = []
    for target in [ALL, *(targets if len(targets) > 1 else [])]:
        groups: dict[tuple[str, str], list[float]] = {}
        for score in scores:
            if target in (ALL, score.target):
                groups.setdefault((score.predictor, score.measure), []).append(score.value)
        for (predictor, measure), values in groups.items():
            known = [value for value in values if not math.isnan(value)]
            mean = statistics.fmean(known) if known else math.nan
            summaries.append(
                OtherSummary(
                    target=target if len(targets) > 1 else targets[0],
                    predictor=predictor,
                    measure=measure,
                    images=len(known),
                    mean=mean if math.isfinite(mean) else None,
                )
            )
    return summaries


def _check(model: CrossConditionedModel, data: Path, settings: ProtocolSettings) -> None:
    """Refuse what a protocol is not for."""
    config = model.config
    if settings.protocol == "brasyn" and not (config.any_subset and set(DROPPED) <= set(config.targets)):
        raise ConfigError(
            "--protocol brasyn drops any one of T1, T1ce, T2 and FLAIR, but the model makes "
            f"{', '.join(config.targets)}{'' if config.any_subset else ' from fixed sources'}. Train one with --recipe "
            "any, or use --protocol published."
        )
    if settings.segmenter is not None and open_prepared(data) is not None:
        raise ConfigError(
            f"--segmenter needs a folder of studies: {data} is a prepared set, which keeps neither the scanners' "
            "intensities nor the place of a voxel."
        )


def _measure_study(
    found: FoundSubject,
    predictors: Sequence[Predictor],
    others: Sequence[OtherImages],
    settings: ProtocolSettings,
    dropped: str | None,
    display: Display,
) -> _Measured:
    """Measure one study; `dropped` is the contrast to be hidden, None for every one that the model makes."""
    study = found.study() if settings.segmenter is not None and found.study is not None else None
    subject = say_notes(found.read() if study is None else subject_of_study(study), display)
    config, (made, doubts) = predictors[0].model.config, read_images(others, subject)
    for line in doubts:
        display.say(f"warning: {line}")
    if dropped is None:
        subsets = patterns(config, subject)
    else:
        if lacking := [m for m in DROPPED if m not in subject.volumes]:
            raise StudyError(f"{found.name}: lacks {', '.join(lacking)}; BraSyn's studies have all four contrasts.")
        subsets = [tuple(m for m in config.modalities if m in DROPPED and m != dropped)]
    scores = []
    for sources in subsets:
        predicted = predict(subject, sources, predictors, made).images
        shown = [
            name
            for name in predicted
            if name == BASELINE or name.startswith(PREFIX) or name in {p.name for p in predictors}
        ]
        for target in predicted[predictors[0].name] if dropped is None else [dropped]:
            images = {name: predicted[name][target] for name in shown if target in predicted[name]}
            common = (subject.name, "+".join(sources), target)
            measured = measure_by(settings.protocol, subject, target, images)
            if settings.segmenter is not None and study is not None:
                for name, values in _dice(settings.segmenter, study, subject, target, images).items():
                    measured.setdefault(name, {}).update(values)
            scores += [OtherScore(*common, name, what, v) for name, its in measured.items() for what, v in its.items()]
    return _Measured(subject.patient, subject.scans, scores, doubts)


def _dice(
    segmenter: Segmenter, study: Study, subject: Subject, target: str, images: Mapping[str, Array]
) -> dict[str, dict[str, float]]:
    """Predictor → Dice of each region, the real image's as the ceiling; of a study without labels, nothing."""
    if study.labels is None:
        return {}
    full = {name: on_whole_grid(image, subject) for name, image in images.items()}
    others = [m for m in DROPPED if m != target]
    outlined = segmenter.outline(study, target, full, others)
    return {name or REAL: dice(as_counted(labels, study.case), study.labels) for name, labels in outlined}


def _summarise(
    measured: Mapping[str, _Measured],
    predictors: Sequence[Predictor],
    settings: ProtocolSettings,
    of_set: tuple[str, str] | None,
    images: Sequence[str],
) -> ProtocolEvaluation:
    """What metrics.json says but for what failed or was dropped; `images` are names of other images."""
    of_images = {(s.predictor, name) for name, one in measured.items() for s in one.scores if s.predictor in images}
    notes = [note for one in measured.values() for note in one.notes]
    own, second = predictors[0], next((p for p in predictors if p.name.startswith(AGAINST)), None)
    scans = {name: one.scans for name, one in measured.items()}
    patients, _ = merge({name: one.patient for name, one in measured.items()}, scans)
    return ProtocolEvaluation(
        format=BY_PROTOCOL,
        protocol=settings.protocol,
        text=TEXT,
        summary=summarise_scores([score for one in measured.values() for score in one.scores]),
        own=own.name,
        against=None if second is None else describe(second, patients, scans, of_set),
        cases=sorted(measured),
        dropped={},
        segmenter=None if settings.segmenter is None else names_only(settings.segmenter.command),
        overlap=find_overlap(own.model, patients, scans, of_set),
        patients=dict(sorted(patients.items())),
        failed={},
        images=counted(images, of_images),
        notes=[*notes, *say_images(images, of_images, sorted(measured))],
        model_sha256=own.model.record.get("sha256"),
        settings=settings_of(own),
        versions=versions(),
    )
