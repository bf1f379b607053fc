"""Completing a cohort: every study of a folder, one after the other, written, labelled and recorded in OUT."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.completion.inputs import Inputs, PlannedCase, find_inputs, plan
from crossmr.completion.layout import FORMAT, PICTURES, Layout, Profile
from crossmr.completion.ownership import check_case, check_output, earlier_files
from crossmr.completion.private import write_paths
from crossmr.completion.status import reasons_of, write_status
from crossmr.completion.study import (
    Completed,
    Reference,
    check_memory,
    complete_study,
    hashes,
    memory_needed,
    read_reference,
    settings_record,
    what_to_fill,
)
from crossmr.completion.verdict import with_doubts
from crossmr.completion.writing import whole_or_absent, write_volumes
from crossmr.data.naming import DISPLAY_NAMES, StudyFiles, find_studies
from crossmr.data.study import Study, load_study
from crossmr.data.volume import read_volume
from crossmr.device import ends_the_run
from crossmr.dicom.convert import Scans, check_scans, convert_cases, taken
from crossmr.dicom.series import Series
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import CrossmrError, NamingError, OutputError, names_only
from crossmr.files import read_json, remove, write_json
from crossmr.main_memory import available_memory, reusable_memory
from crossmr.networks.inference import Settings, check_settings
from crossmr.networks.model import CrossConditionedModel
from crossmr.picture import Array, Kind, Panel, middle, save_panels
from crossmr.registry import load_model

SCANS = "scans"
"""The folder of an output that holds what DICOM was converted to."""


@dataclass(frozen=True)
class CohortSettings:
    """What is read of a folder of studies, and how the output is laid out."""

    mapping: Mapping[str, str] | None = None
    """Modality → pattern of file names, or, of DICOM, of series descriptions."""
    overwrite: bool = False
    """Whether finished cases are completed again."""
    profile: Profile = "labelled"
    """How OUT is laid out; see layout.py."""
    keep_names: bool = False
    """Whether cases of DICOM are called by patient ID and date, rather than by hashes."""


@dataclass
class CohortSummary:
    """What became of the cases of a cohort; OUT/manifest.json says the same, but for the paths in reasons."""

    completed: dict[str, list[str]] = field(default_factory=dict)
    """Case → modalities synthesised now."""
    complete: list[str] = field(default_factory=list)
    """Cases that lack nothing."""
    skipped: list[str] = field(default_factory=list)
    """Cases that were finished before."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case → why it could not be read, completed or written."""
    not_filled: dict[str, dict[str, str]] = field(default_factory=dict)
    """Case → modality → why the gap was left."""
    unread: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Case → modality that is not filled → files or series that may be it and were not used."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """Case → 'use', 'look' or 'refuse'; see verdict.py. A case that failed is refused."""
    reasons: dict[str, list[str]] = field(default_factory=dict)
    """Case → why it is not 'use'."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Case → what a reader of the results should know about the input."""

    def add(self, case: str, manifest: Mapping[str, Any], *, skipped: bool) -> None:
        """Count a case by its manifest."""
        if skipped:
            self.skipped.append(case)
        elif manifest["synthetic"]:
            self.completed[case] = list(manifest["synthetic"])
        elif not manifest["not_filled"]:
            self.complete.append(case)
        if manifest["notes"]:
            self.notes[case] = manifest["notes"]
        if manifest["not_filled"]:
            self.not_filled[case] = manifest["not_filled"]
        if manifest.get("unread"):
            self.unread[case] = manifest["unread"]
        self.verdicts[case] = manifest.get("verdict", "look")
        if reasons := [reason["text"] for reason in reasons_of(manifest)]:
            self.reasons[case] = reasons

    def fail(self, reasons: Mapping[str, str]) -> None:
        """Count cases that could not be completed, each with its reason."""
        self.failed |= reasons
        self.verdicts |= dict.fromkeys(reasons, "refuse")

    @property
    def counts(self) -> dict[str, int]:
        """What became of the cases → how many; every case counts once, and failures come first."""
        return {
            "failed": len(self.failed),
            "not synthesised": len(self.not_filled.keys() - self.completed.keys() - set(self.skipped)),
            "synthesised": len(self.completed),
            "already complete": len(self.complete),
            "finished before": len(self.skipped),
        }


@dataclass(frozen=True, eq=False)
class _Run:
    """What all cases of one call share."""

    inputs: Inputs
    layout: Layout
    model: CrossConditionedModel
    settings: Settings
    options: CohortSettings
    reference: Reference | None
    display: Display

    @property
    def record(self) -> dict[str, Any]:
        """Everything that decides the voxels, for the manifests."""
        return settings_record(self.model, self.settings, self.reference)


def complete_cohort(
    cohort: Path | str | Sequence[Path | str],
    out: Path | str,
    model: CrossConditionedModel | Path | str | None = None,
    settings: Settings | None = None,
    options: CohortSettings | None = None,
    *,
    display: Display = SILENT,
) -> CohortSummary:
    """Complete every study of a folder, or of several, into OUT/CASE/; several files are one study.

    A study that fails is listed under 'failed' with its reason; the others are finished, unless the device or the
    memory failed: then they are listed there as not tried. A finished case, which is one with a manifest.json, is
    skipped unless `options.overwrite`.

    A folder of DICOM is converted into OUT/scans first, its series are registered where their grids differ, and what
    is synthesised is written as NIfTI and as a derived DICOM series.

    Raises:
        NamingError: no study at all. ModelError: no usable model. OutputError: OUT cannot be written.
    """
    settings, options = settings or Settings(), options or CohortSettings()
    layout = Layout(Path(out), options.profile)
    with layout.locked():
        model = load_model(model, settings.device)
        check_settings(model, settings)
        reference = read_reference(settings, model, options.mapping)
        inputs = _inputs(cohort, layout, options, display)
        if inputs.series is not None and settings.register == "never":
            settings = replace(settings, register="if needed")
        run = _Run(inputs, layout, model, settings, options, reference, display)
        summary = CohortSummary()
        studies, scans = _find(run, summary)
        try:
            with display.logged(layout.records / LOG) as logging:
                run = replace(run, display=logging)
                _complete_all(run, studies, scans, summary)
        finally:
            write_status(layout.records, _shareable(run, summary, studies))
        body = {"format": FORMAT, "finished": True, "profile": options.profile, **asdict(summary)}
        body["failed"] = _shareable(run, summary, studies)
        write_json(layout.records / "manifest.json", {**body, "settings": run.record})
    return summary


def _shareable(run: _Run, summary: CohortSummary, studies: Sequence[StudyFiles]) -> dict[str, str]:
    """Why cases failed, without the folders of their files."""
    paths = {files.case: files.paths() for files in studies}
    common = [run.inputs.root, run.layout.out, run.layout.records]
    return {case: names_only(why, [*paths.get(case, ()), *common]) for case, why in summary.failed.items()}


def plan_cohort(
    cohort: Path | str | Sequence[Path | str],
    out: Path | str,
    model: CrossConditionedModel | Path | str | None = None,
    settings: Settings | None = None,
    options: CohortSettings | None = None,
    *,
    display: Display = SILENT,
) -> list[PlannedCase]:
    """What `complete_cohort` would do with these arguments; nothing is written."""
    settings, options = settings or Settings(), options or CohortSettings()
    layout = Layout(Path(out), options.profile)
    model = load_model(model, settings.device)
    check_settings(model, settings)
    inputs = _inputs(cohort, layout, options, display)
    return plan(inputs, layout, model, settings, overwrite=options.overwrite)


def _inputs(
    cohort: Path | str | Sequence[Path | str], layout: Layout, options: CohortSettings, display: Display
) -> Inputs:
    paths = [Path(path) for path in ([cohort] if isinstance(cohort, (str, Path)) else cohort)]
    keep_names = options.keep_names
    return find_inputs(paths, options.mapping, keep_names=keep_names, exclude=layout.out, display=display)


def _complete_all(run: _Run, studies: Sequence[StudyFiles], scans: Mapping[str, Scans], summary: CohortSummary) -> None:
    """Complete one study after the other; what goes wrong with one is in the summary.

    After an error of the device or of memory, which every further study would fail by as well, these are not tried.
    """
    with run.display.task("complete", len(studies)) as task:
        for files, study in _read_ahead(studies, run):  # no enumerate, which would keep the study before
            try:
                manifest, skipped = _complete_case(run, files, study, scans.get(files.case))
                summary.add(files.case, manifest, skipped=skipped)
            except CrossmrError as error:
                summary.fail({files.case: str(error)})
            except Exception as error:  # nobody foresaw it: the other patients go on all the same
                summary.fail({files.case: f"{files.case}: {run.display.unforeseen(error)}"})
                if reason := ends_the_run(error):
                    left = [other.case for other in studies[studies.index(files) + 1 :]]
                    summary.fail({case: f"{case}: not tried, because {reason}" for case in left})
                    return
            task.advance(files.case)
            del study  # before the next one is read


def _find(run: _Run, summary: CohortSummary) -> tuple[list[StudyFiles], dict[str, Scans]]:
    """The studies of the cohort, and of DICOM the series that each was converted from; OUT is begun."""
    check_output(run.layout, run.inputs.root)
    if run.inputs.series is not None:
        return _find_dicom(run, run.inputs.series, summary)
    studies = list(run.inputs.studies)
    summary.fail(run.layout.clashes([files.case for files in studies]))
    studies = [files for files in studies if files.case not in summary.failed]
    for files in studies:
        with suppress(NamingError):  # which is said when the case's turn comes
            _check_case(run, files.case, list(files.images()))
    _start(run)
    write_paths(run.layout.records, studies)
    return studies, {}


def _find_dicom(
    run: _Run, cases: Mapping[str, Sequence[Series]], summary: CohortSummary
) -> tuple[list[StudyFiles], dict[str, Scans]]:
    """The studies that DICOM was converted to, and what each was converted from; OUT is begun."""
    options, place = run.options, run.layout.records / SCANS
    check_scans(cases, place)
    for case, series in cases.items():
        _check_case(run, case, taken(series))
    _start(run)
    converted = convert_cases(cases, place, keep_names=options.keep_names, display=run.display)
    for line in (line for one in converted for line in one.lines()):
        run.display.say(line)
    summary.fail({one.case: one.refused for one in converted if one.refused})
    scans = {one.case: one for one in converted if not one.refused}
    found = find_studies(place) if scans else []
    found = [files for files in found if files.case in scans]
    write_paths(run.layout.records, found)
    return found, scans


def _check_case(run: _Run, case: str, acquired: Sequence[str]) -> None:
    """Refuse to start if a case would replace what is not crossmr's."""
    requested, _ = what_to_fill(acquired, run.model, run.settings)
    check_case(run.layout, case, run.model.config.targets, requested, overwrite=run.options.overwrite)


def _start(run: _Run) -> None:
    write_json(run.layout.records / "manifest.json", {"format": FORMAT, "finished": False})
    run.layout.start(run.inputs.root)


def _read_ahead(studies: Sequence[StudyFiles], run: _Run) -> Iterator[tuple[StudyFiles, Future[Study | None]]]:
    """Every study's files with its volumes.

    A study is read while the one before it is completed, if there is memory for both; a study that takes more memory
    than there is fails with StudyError.
    """
    known: dict[str, bool] = {}

    def finished(files: StudyFiles) -> bool:
        if files.case not in known:
            try:
                known[files.case] = _is_finished(run, files) and not _arrived(run, files)
            except CrossmrError:  # which is said when the case's turn comes
                known[files.case] = True
        return known[files.case]

    def load(files: StudyFiles) -> Study | None:
        return None if finished(files) else load_study(files, register=run.settings.register, labels=False)

    def load_alone(files: StudyFiles) -> Study | None:
        if not finished(files) and (warning := check_memory(files.case, _images(files), run.model, run.settings)):
            run.display.say(warning)
        return load(files)

    def needed(files: StudyFiles) -> int:
        return 0 if finished(files) else memory_needed(_images(files), run.model, run.settings)

    with ThreadPoolExecutor(1) as reader:
        following: Future[Study | None] | None = None
        for files, after in itertools.zip_longest(studies, studies[1:]):
            study = following or reader.submit(load_alone, files)
            wait([study])  # one study ahead, not more: memory
            following = None
            if after is not None and needed(files) + needed(after) <= available_memory() + reusable_memory():
                following = reader.submit(load, after)
            yield files, study
            del study  # before the next one is read


def _images(files: StudyFiles) -> Mapping[str, Any]:
    """The study's images; none where two have one modality, which is said when they are read."""
    try:
        return files.images()
    except NamingError:
        return {}


def _complete_case(
    run: _Run, files: StudyFiles, study: Future[Study | None], scans: Scans | None
) -> tuple[Mapping[str, Any], bool]:
    """Complete one case of a cohort and write it; returns its manifest, and whether it was finished before."""
    path = run.layout.folder(files.case) / "manifest.json"
    images = files.images()
    files_now = hashes(images)
    if _is_finished(run, files):
        if not (arrived := _arrived(run, files)):
            return _finished_before(run, files.case, files_now), True
        run.display.say(f"{files.case}: finished before, and done again: {arrived}")
    start = time.perf_counter()
    loaded = study.result() or load_study(files, register=run.settings.register, labels=False)
    run.layout.check(loaded)
    unread = run.inputs.unread(files, tuple(loaded.volumes), run.model)
    result = complete_study(loaded, run.model, run.settings, files_now, run.reference, unread)
    manifest = dict(result.manifest)
    if files.passed_over:
        manifest["passed_over"] = sorted(path.name for path in files.passed_over)
    check_case(run.layout, files.case, run.model.config.targets, list(result.images), overwrite=True)
    earlier, picture = earlier_files(run.layout, files.case, run.model.config.targets), run.layout.picture(files.case)
    with whole_or_absent(path.parent) as written:
        for old in (path, picture, *earlier):
            remove(old)
        write_volumes(run.layout, result.images, result.stds, manifest, written)
        if scans is not None:
            _write_dicom(run, loaded, scans, result, manifest, written)
        inputs = [image for modality, image in images.items() if modality in manifest["acquired"]]
        written += run.layout.finish(files.case, manifest, run.inputs.root, inputs)
        if shown := _panels(loaded, result):
            panels = save_panels(picture, shown, loaded.reference.spacing_mm)
            manifest["picture"] = {"file": f"{PICTURES}/{picture.name}", "panels": panels}
            written.append(picture)
        manifest["seconds"] = round(time.perf_counter() - start, 3)
        write_json(path, manifest)
    return manifest, False


def _is_finished(run: _Run, files: StudyFiles) -> bool:
    """Whether a case was finished before, and is not to be overwritten."""
    return (run.layout.folder(files.case) / "manifest.json").exists() and not run.options.overwrite


def _arrived(run: _Run, files: StudyFiles) -> str:
    """Why a case that was finished before is not any more: a scan of what was synthesised has come, or may have come.

    Or what was not filled, because of a file that may be it, is no longer in doubt. Empty where it stays as it is.
    """
    manifest = read_json(run.layout.folder(files.case) / "manifest.json", OutputError)
    given, images, synthetic = manifest.get("given", {}), files.images(), manifest.get("synthetic", {})
    acquired = hashes({m: image for m, image in images.items() if m in synthetic})
    come = {m: entry["file"] for m, entry in acquired.items() if entry != given.get(m)}
    known = [m for m in images if m in manifest.get("acquired", ()) or m in come]
    unread = [] if run.settings.targets is not None else run.inputs.unread(files, known, run.model)
    come |= {m: one.name for one in unread for m in sorted(one.may_be) if m in synthetic}
    if come:
        listed = ", ".join(f"{m} ({name})" for m, name in come.items())
        return f"{listed} was synthesised and has arrived since, so the synthetic one goes"
    if why := _tried_again(run, manifest, images):
        return why
    doubted = [m for m in manifest.get("unread", {}) if not any(m in one.may_be for one in unread)]
    wanted = [m for m in doubted if run.settings.targets is None or m in run.settings.targets]
    return f"{', '.join(wanted)} is no longer in doubt" if wanted else ""


def _tried_again(run: _Run, manifest: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    """Why what was refused before may be synthesised now; empty where nothing has changed."""
    if not (refused := manifest.get("refused", ())):
        return ""
    before, now = manifest.get("settings", {}), run.record
    changed = [
        name for name, key in (("model", "model_sha256"), ("--register", "register")) if before.get(key) != now[key]
    ]
    changed += ["scans"] if manifest.get("given") != hashes(images) else []
    asked = [m for m in refused if m in (run.settings.targets or ())]
    changed += [f"--targets {','.join(asked)}"] if asked else []
    return f"{', '.join(refused)} was refused, with other {' and '.join(changed)}" if changed else ""


def _finished_before(run: _Run, case: str, files_now: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest of a case that is kept as it is, after saying what has changed since."""
    path = run.layout.folder(case) / "manifest.json"
    manifest = read_json(path, OutputError)
    if manifest.pop("paths", None) is not None:  # earlier versions said where the scans lie
        write_json(path, manifest)
    names = {"other settings": ("settings", run.record), "other input files": ("given", files_now)}
    changed = [name for name, (key, now) in names.items() if manifest.get(key) != now]
    if changed:
        run.display.say(f"{case}: finished before with {' and '.join(changed)}, and kept; --overwrite does it again")
    return manifest


def _write_dicom(
    run: _Run, study: Study, scans: Scans, result: Completed, manifest: dict[str, Any], written: list[Path]
) -> None:
    """Write each synthetic volume, and its standard deviation, as a derived series; name them like `_write_volumes`."""
    from crossmr.dicom.write import DerivedSeries, choose_steps, write_derived

    manifest["notes"] = [*scans.notes, *manifest["notes"]]
    manifest |= with_doubts(manifest, scans.notes)
    manifest["series"] = {
        "taken": {m: {"series": series.number, "why": series.why} for m, series in scans.series.items()},
        "left_out": dict(scans.left_out),
    }
    settings = " ".join(str(manifest["settings"][key]) for key in ("model_sha256", "guidance", "samples", "seed"))
    for modality, entry in manifest["synthetic"].items():
        sources = ", ".join(DISPLAY_NAMES.get(m, m) for m in entry["from"])
        for kind, image in (("", result.images[modality]), ("std", result.stds.get(modality))):
            if image is None:
                continue
            what = f"{'Standard deviation of the error of s' if kind else 'S'}ynthetic "
            what += f"{DISPLAY_NAMES.get(modality, modality)} by crossmr {version('crossmr')} from {sources}."
            series = DerivedSeries(
                modality=modality,
                like=scans.series[next(iter(study.volumes))],
                sources={m: scans.series[m] for m in entry["from"]},
                description=f"{what} {' '.join(entry['warnings'])}",
                settings=settings,
                created=datetime.fromisoformat(manifest["created"]),
                kind=kind,
                steps=None if entry["scale"] is None else choose_steps(read_volume(result.images[modality]).data),
            )
            folder = run.layout.dicom(study.case, modality, kind)
            written.append(write_derived(folder, read_volume(image).data, study.reference, series))
        entry["dicom"] = run.layout.dicom(study.case, modality).name


def _panels(study: Study, result: Completed) -> list[Panel]:
    """The acquired and the synthetic volumes, cut in three where there is most to see."""
    head, synthesis = result.head, result.synthesis
    if head is None or synthesis is None:
        return []
    mask = study.mask[study.box()]
    at = result.look_at or middle(mask)
    volumes: list[tuple[str, Kind, Array]] = [(m, "acquired", volume) for m, volume in head.volumes.items()]
    for index, modality in enumerate(synthesis.targets):
        volumes.append((modality, "synthetic", synthesis.images[index].numpy()))
        if synthesis.stds is not None:
            volumes.append((modality, "standard deviation", synthesis.stds[index].numpy()))
    return [Panel.of(modality, kind, np.where(mask, volume, np.float32(0)), at) for modality, kind, volume in volumes]
