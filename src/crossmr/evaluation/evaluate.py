"""Evaluate a model: hide each target, synthesise it and compare, beside a second model and the baselines.

What is measured, and how, is said in `measures`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np

from crossmr.config import check_kind, read_text
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.data.patients import read_patients
from crossmr.device import choose_precision
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, OutputError, StudyError, names_only
from crossmr.evaluation.measurements import (
    TABLES,
    Measurements,
    Outcome,
    Picture,
    read_parts,
    remove_parts,
    unlike_parts,
    write_part,
)
from crossmr.evaluation.measures import (
    PROTOCOL,
    Row,
    measure,
    measure_calibration,
    measure_contrasts,
    measure_uncertainty,
)
from crossmr.evaluation.others import PREFIX, OtherImages, counted, find_images, read_images, say_images
from crossmr.evaluation.overlap import Overlap, find_overlap, say_overlap
from crossmr.evaluation.predictors import AGAINST, Predictions, Predictor, find_predictors, memory_needed, predict
from crossmr.evaluation.statistics import (
    CalibrationSummary,
    ContrastSummary,
    Summary,
    UncertaintySummary,
    summarise,
    summarise_calibration,
    summarise_contrasts,
    summarise_uncertainty,
    summarise_uncertainty_by_target,
)
from crossmr.evaluation.subjects import (
    SPLIT,
    Array,
    FoundSubject,
    Subject,
    each_study,
    find_subjects,
    open_prepared,
    patterns,
)
from crossmr.evaluation.tables import is_table, write_csv
from crossmr.files import REPORT, digest, is_page, is_record, locked, read_json, refuse_foreign, remove, write_json
from crossmr.main_memory import check_memory
from crossmr.networks.inference import InferenceSettings, chosen_guidance, chosen_planes, samples_drawn
from crossmr.networks.model import CrossConditionedModel, Guidance
from crossmr.parts import WORK, Part
from crossmr.picture import Kind, Panel, is_picture, middle, save_panels, where_most, window
from crossmr.registry import load_model

FORMAT, BY_PROTOCOL = "crossmr-evaluation", "crossmr-evaluation-by-protocol"
OURS = "crossmr"
"""The protocol of this file, as `--protocol` calls it."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and how to synthesise it."""

    split: str | None = None
    """Of a prepared dataset: 'train', 'val' or 'test', which None means, too."""
    every_subset: bool = False
    """Give a model of any subset every subset of what a study has, not only all but one modality."""
    guidances: tuple[Guidance, ...] = ()
    """Guidance modes measured beside the model's own."""
    against: Path | str | None = None
    """The folder or name of a second model, measured beside the first by its own default guidance."""
    images: Mapping[str, Path] = field(default_factory=dict)
    """Name → folder of images that another program made of the studies, measured beside the models'; see `others`."""
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    """The model's own guidance, and seed, steps, device and precision of all."""
    mapping: Mapping[str, str] | None = None
    """See `find_studies`."""
    part: Part | None = None
    """Which part of the studies, where several processes share them, and OUT; None for all of them."""
    patients: Path | None = None
    """Of a folder of studies: table of whose each is, see `data.patients`; None goes by names."""

    def __post_init__(self) -> None:
        check_kind(self.inference, InferenceSettings, "inference")
        read_text(self, "part", Part | None, Part.parse, "3/100")
        read_text(self, "patients", Path | None, Path, "patients.csv")
        images: Any = self.images
        if not isinstance(images, Mapping) or not all(isinstance(path, str | Path) for path in images.values()):
            raise ConfigError(f"images is {images!r}; expected a folder for each name, such as {{'unet': 'IMAGES'}}.")
        read_text(self, "guidances", Sequence, lambda text: (text,), "unconditional")
        if "reference" in (*self.guidances, self.inference.guidance):
            raise ConfigError("An evaluation knows no reference; measure sample, unconditional or none.")
        if self.inference.targets is not None:
            raise ConfigError("An evaluation measures every target that the model knows; name none.")


class SecondModel(TypedDict):
    """The second model, as metrics.json names it."""

    predictor: str
    guidance: str
    sha256: str | None
    training: dict[str, Any]
    overlap: Overlap


class Evaluation(TypedDict):
    """What metrics.json holds."""

    format: str
    finished: bool
    protocol: str
    summary: list[Summary]
    contrasts: list[ContrastSummary]
    uncertainty: list[UncertaintySummary]
    uncertainty_by_target: list[UncertaintySummary]
    """The same whatever the sources."""
    calibration: list[CalibrationSummary]
    own: str
    """The predictor that is the model's own."""
    against: SecondModel | None
    cases: list[str]
    pictures: list[Picture]
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


def evaluate(
    model: CrossConditionedModel | Path | str,
    data: Path | str,
    out: Path | str,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    display: Display = SILENT,
) -> Evaluation:
    """Hide, synthesise and measure every target of every study, and return what OUT/metrics.json holds.

    `model` is a model, the folder of one or a registered name; `data` a prepared dataset or a folder of studies. OUT
    gets metrics.csv, metrics.json, pictures, contrasts.csv where a study has a lesion or fluid, and with standard
    deviations uncertainty.csv and calibration.csv.

    Nothing of an earlier evaluation in OUT is replaced before all is measured, and nothing of it stays then.

    Raises:
        CrossmrError: nothing could be measured, or OUT holds something else that has the name of a file to be written.
            A study that fails is listed under 'failed', and so are all further ones after an error of the device or of
            memory: in what is returned with paths, in what is written with the names of files only.
    """
    check_kind(settings, EvaluationSettings)
    out, part = Path(out), settings.part
    model = load_model(model, settings.inference.device)
    if settings.every_subset and not model.config.any_subset:
        raise ConfigError(
            "--every-subset is for models of any subset; this one always needs its sources, so leave it out."
        )
    predictors = find_predictors(model, settings.inference, settings.guidances, settings.against)
    source = settings.mapping, settings.inference.register, settings.patients
    subjects = find_subjects(Path(data), settings.split, *source, display.say)
    if not subjects:  # an earlier evaluation in OUT stays
        raise StudyError(f"No study of {data} could be measured: the split '{settings.split or SPLIT}' is empty")
    images = find_images(settings.images, [one.name for one in subjects], predictors[0].model.config.targets)
    own = subjects if part is None else part.take(subjects)
    of_set = set_and_split(Path(data), settings)
    with locked(out, shared=part is not None):
        _refuse_foreign(out, [one.name for one in own], predictors[0].model.config.targets)
        key = _key(subjects, predictors, images, of_set, settings)
        place = out / WORK / digest(key)[:16]
        if part is None and not (out / "metrics.json").exists():
            write_json(out / "metrics.json", {"format": FORMAT, "finished": False})
        with display.logged(out / LOG) as logging, _kept(place, for_others=part is not None):
            outcomes = _measure_all(own, predictors, images, place, settings, logging)
            paths = {one.name: [*one.paths, Path(data), out] for one in own}
            shareable = {one.name: names_only(one.failed, paths[one.name]) for one in outcomes if one.failed}
            if part is not None:
                write_part(out, part, key, [replace(one, failed=shareable.get(one.name, "")) for one in outcomes])
                if all_outcomes := read_parts(out, part.of, key):
                    outcomes = all_outcomes
                    shareable = {one.name: one.failed for one in outcomes if one.failed}
                for other, names in unlike_parts(out, part.of, key).items():
                    logging.say(f"Part {other} in {out} is of other {', '.join(names)}: it is not joined with {part}.")
            complete = len(outcomes) == len(subjects)
            measured = Measurements.of(outcomes)
            if not measured.scores and complete:
                raise StudyError(f"No study of {data} could be measured: {next(iter(measured.failed.values()))}")
            measured = measured.by_patient()
            evaluation = summarise_all(measured, predictors, of_set, [one.name for one in images])
            evaluation["finished"] = complete
            if complete:
                _publish(out, place, measured.rows(), {**evaluation, "failed": shareable})
                if part is not None:
                    remove_parts(out, part.of)
                    _remove_work(place)
    return evaluation


@contextmanager
def _kept(place: Path, *, for_others: bool) -> Iterator[None]:
    """The folder of the pictures until all is measured; it stays for the other parts alone."""
    try:
        yield
    finally:
        if not for_others:
            _remove_work(place)


def _remove_work(place: Path) -> None:
    remove(place)
    with suppress(OSError):  # parts of an evaluation may wait beside it
        place.parent.rmdir()


def _publish(out: Path, place: Path, rows: Mapping[str, Sequence[Row]], body: Evaluation) -> None:
    """Put an evaluation in the place of an earlier one, of which nothing stays; metrics.json comes last.

    Nothing is done where another part that ended at the same time has done it, and has taken the pictures.
    """
    path = out / "metrics.json"
    if not place.exists() and path.exists() and digest(read_json(path, OutputError)) == digest(body):
        return
    write_json(path, {"format": FORMAT, "finished": False})
    remove(out / REPORT)
    for name in TABLES:
        if name in rows:
            write_csv(out / f"{name}.csv", rows[name])
        else:
            remove(out / f"{name}.csv")
    shown = [out / one["file"] for one in body["pictures"]]
    for picture in set((out / "pictures").glob("*.webp")) - set(shown):
        if not picture.is_symlink() and is_picture(picture):
            remove(picture)
    for picture in shown:
        picture.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another part that ended now has moved it
            (place / picture.relative_to(out)).replace(picture)
    write_json(path, body)


def _key(
    subjects: Sequence[FoundSubject],
    predictors: Sequence[Predictor],
    images: Sequence[OtherImages],
    of_set: tuple[str, str] | None,
    settings: EvaluationSettings,
) -> dict[str, str]:
    """What all parts of one evaluation have in common, by name: studies, models, patients and settings, as hashes.

    Of files the sizes stand for what they hold: for hashes each part would have to read the studies of all.
    """
    studies = {one.name: [(path.name, _size(path)) for path in one.paths if of_set is None] for one in subjects}
    table = {} if settings.patients is None else read_patients(settings.patients)
    common: dict[str, Any] = {
        "studies": studies,
        "set or --split": of_set,
        "models": [(one.name, one.model.record.get("sha256")) for one in predictors],
        "patients (--patients)": {case: entry.patient for case, entry in sorted(table.items())},
        "--map": sorted((settings.mapping or {}).items()),
        "--every-subset": settings.every_subset,
        "guidance modes": settings.guidances,
        "version of crossmr": version("crossmr"),
        "--images": [(one.name, case, m, path.name, _size(path)) for one in images for case, m, path in one],
    }
    inference = replace(settings.inference, device=predictors[0].model.device.type)  # any of its kind
    common |= {f"--{name.replace('_', '-')}": repr(value) for name, value in vars(inference).items()}
    return {name: digest({name: value}) for name, value in common.items()}


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it cannot be asked for, which is said when its study's turn comes."""
    with suppress(OSError):
        return path.stat().st_size
    return None


def _measure_all(
    subjects: Sequence[FoundSubject],
    predictors: Sequence[Predictor],
    images: Sequence[OtherImages],
    place: Path,
    settings: EvaluationSettings,
    display: Display,
) -> list[Outcome]:
    """What became of each study; its pictures lie in `place`."""

    def measure_one(found: FoundSubject) -> Measurements:
        warn_of_memory(found, predictors, display, every_subset=settings.every_subset)
        subject = say_notes(found.read(), display)
        made, doubts = read_images(images, subject)
        for line in doubts:
            display.say(f"warning: {line}")
        measured = measure_subject(subject, predictors, place, made, every_subset=settings.every_subset)
        measured.notes.extend(doubts)
        return measured

    return [Outcome(name, measured, failed) for name, measured, failed in each_study(subjects, measure_one, display)]


def say_notes(subject: Subject, display: Display) -> Subject:
    """A study, of which is said what is to be known of how its files were read."""
    for note in subject.notes:
        display.say(f"{subject.name}: {note}")
    return subject


def warn_of_memory(
    found: FoundSubject, predictors: Sequence[Predictor], display: Display, *, every_subset: bool = False
) -> None:
    """Say where a study takes much of the memory.

    Raises:
        StudyError: it cannot fit.
    """
    if warning := check_memory(found.name, memory_needed(found, predictors, every_subset=every_subset)):
        display.say(warning)


def refuse_others(out: Path, protocol: str) -> None:
    """Refuse to replace metrics.json where it is not crossmr's, or of an evaluation by another protocol.

    Raises:
        OutputError: it is.
    """
    path = out / "metrics.json"
    refuse_foreign(path, lambda path: is_record(path, FORMAT) or is_record(path, BY_PROTOCOL))
    if not path.exists():
        return
    earlier = read_json(path, OutputError)
    if (held := OURS if earlier["format"] == FORMAT else earlier.get("protocol")) != protocol:
        raise OutputError(
            f"{out} holds an evaluation with --protocol {held}, and this is --protocol {protocol}. Name another "
            "folder, or delete that one."
        )


def _refuse_foreign(out: Path, names: Sequence[str], targets: Sequence[str]) -> None:
    """Refuse an output folder where anything but an evaluation has the name of a file to be written."""
    refuse_others(out, OURS)
    refuse_foreign(out / REPORT, is_page)
    for name, kind in TABLES.items():
        refuse_foreign(out / f"{name}.csv", partial(is_table, kind=kind))
    for name, target in itertools.product(names, targets):
        refuse_foreign(out / f"pictures/{name}-{target}.webp", is_picture)


def measure_subject(
    subject: Subject,
    predictors: Sequence[Predictor],
    out: Path,
    others: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
    *,
    every_subset: bool = False,
) -> Measurements:
    """Measure every predictor on one study, and draw pictures of it: those from the largest subsets of sources.

    `others` are images of other programs, name → target → volume; they are held against what is made from these
    subsets, too.
    """
    measured = Measurements(patients={subject.name: subject.patient}, scans={subject.name: subject.scans})
    pictured: dict[tuple[str, ...], dict[str, list[Panel]]] = {}
    subsets = patterns(predictors[0].model.config, subject, every_subset=every_subset)
    for sources in subsets:
        largest = len(sources) == max(map(len, subsets))
        predictions = predict(subject, sources, predictors, others if largest else {})
        own = predictions.images[predictors[0].name]
        measured.scores.extend(measure(subject, sources, predictions.images))
        measured.contrasts.extend(measure_contrasts(subject, sources, predictions.images))
        measured.uncertainty.extend(measure_uncertainty(subject, sources, own, predictions.stds))
        measured.calibration.extend(measure_calibration(subject, sources, own, predictions.stds))
        pictured = {key: panels for key, panels in pictured.items() if len(key) == len(sources)}
        pictured[sources] = _panels(subject, sources, predictions)
    for sources, by_target in pictured.items():
        for target, panels in by_target.items():
            file = f"pictures/{subject.name}-{target}.webp"
            shown = save_panels(out / file, panels, subject.spacing_mm, DISPLAY_NAMES)
            measured.pictures.append(
                Picture(case=subject.name, sources=list(sources), target=target, file=file, panels=shown)
            )
    return measured


def _panels(subject: Subject, sources: Sequence[str], predictions: Predictions) -> dict[str, list[Panel]]:
    """Of each target the sources, the synthesis, the second model's, the truth, the error and its standard deviation.

    Cut where there is most tumour, or else in the middle.
    """
    at = where_most(subject.tumour) if subject.tumour.any() else middle(subject.head)
    beside = [name for name in predictions.images if name.startswith((AGAINST, PREFIX))]
    panels = {}
    for target, own in next(iter(predictions.images.values())).items():
        truth = subject.volumes[target]
        volumes: dict[Kind, Array] = {"synthetic": own}
        if second := next((name for name in beside if target in predictions.images[name]), None):
            volumes["other model"] = predictions.images[second][target]
        volumes |= {"truth": truth, "error": np.abs(own - truth)}
        if target in predictions.stds:
            volumes["standard deviation"] = predictions.stds[target]
        panels[target] = [Panel.of(m, "acquired", subject.volumes[m], at) for m in sources]
        like = window(subject.volumes[target])
        panels[target] += [Panel.of(target, kind, volume, at, like) for kind, volume in volumes.items()]
    return panels


def summarise_all(
    measured: Measurements,
    predictors: Sequence[Predictor],
    of_set: tuple[str, str] | None = None,
    images: Sequence[str] = (),
) -> Evaluation:
    """What metrics.json says of it all.

    `of_set` is the fingerprint and the split of the prepared dataset, if any; `images` are names of other images.
    """
    of_images = {(s.predictor, s.case) for s in measured.scores if s.predictor in images}
    own, second = predictors[0], next((p for p in predictors if p.name.startswith(AGAINST)), None)
    model = own.model
    return Evaluation(
        format=FORMAT,
        finished=True,
        protocol=PROTOCOL,
        summary=summarise(measured.scores),
        contrasts=summarise_contrasts(measured.contrasts),
        uncertainty=summarise_uncertainty(measured.uncertainty),
        uncertainty_by_target=summarise_uncertainty_by_target(measured.uncertainty),
        calibration=summarise_calibration(measured.calibration),
        own=own.name,
        against=None if second is None else describe(second, measured.patients, measured.scans, of_set),
        cases=sorted(measured.patients),
        pictures=measured.pictures,
        overlap=find_overlap(model, measured.patients, measured.scans, of_set),
        patients=dict(sorted(measured.patients.items())),
        failed=measured.failed,
        images=counted(images, of_images),
        notes=[*measured.notes, *say_images(images, of_images, sorted(measured.patients))],
        model_sha256=model.record.get("sha256"),
        settings=settings_of(own),
        versions=versions(),
    )


def settings_of(predictor: Predictor) -> dict[str, Any]:
    """How a model synthesised, as metrics.json says it."""
    model, settings = predictor.model, predictor.settings
    return {
        "seed": settings.seed,
        "planes": chosen_planes(model, settings),
        "ddim_steps": settings.ddim_steps,
        "samples": samples_drawn(model, settings),
        "device": model.device.type,
        "precision": str(choose_precision(settings.precision, model.device)).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    """Package → version, as metrics.json says them."""
    return {name: version(name) for name in ("crossmr", "torch")}


def describe(
    second: Predictor,
    patients: Mapping[str, str],
    scans: Mapping[str, Sequence[str]],
    of_set: tuple[str, str] | None,
) -> SecondModel:
    """The second model's identity and training record; see `find_overlap`."""
    return SecondModel(
        predictor=second.name,
        guidance=chosen_guidance(second.model, second.settings),
        sha256=second.model.record.get("sha256"),
        training=second.model.record.get("training", {}),
        overlap=find_overlap(second.model, patients, scans, of_set),
    )


def set_and_split(data: Path, settings: EvaluationSettings) -> tuple[str, str] | None:
    """Fingerprint and split of a prepared dataset; None of a folder of studies."""
    dataset = open_prepared(data)
    return None if dataset is None else (dataset.fingerprint, settings.split or SPLIT)


def warnings_of(evaluation: Evaluation) -> list[str]:
    """What the numbers do not say of new patients, and of other images, in sentences."""
    warnings = say_overlap("model", evaluation["overlap"], evaluation["patients"])
    if evaluation["against"] is not None:
        warnings += say_overlap("second model", evaluation["against"]["overlap"], evaluation["patients"])
    return warnings + evaluation.get("notes", [])  # which evaluations of earlier versions have not
