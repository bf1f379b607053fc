"""Completing a cohort: every study of a folder, one after the other, written, labelled and recorded in OUT.

Several processes may share the studies and OUT; `work` says how.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crossmr.completion import private, status
from crossmr.completion.case import CohortSettings as CohortSettings
from crossmr.completion.case import Run, complete_case, finished_before
from crossmr.completion.choice import as_chosen, write_choice
from crossmr.completion.inputs import Inputs, PlannedCase, find_inputs, plan, what_to_fill, with_files_beside
from crossmr.completion.layout import FORMAT, Layout
from crossmr.completion.ownership import check_case, check_output_is_ours, check_profile
from crossmr.completion.private import SCANS, write_paths
from crossmr.completion.status import Line, line_of, read_manifests, reasons_of, write_lines, write_status
from crossmr.completion.study import read_reference, registering
from crossmr.completion.turns import Turns, read_ahead
from crossmr.completion.work import FINISH, PATHS, Work
from crossmr.data.mapping import mapping_key
from crossmr.device import ends_the_run
from crossmr.dicom.convert import cases_of_part, check_scans
from crossmr.dicom.folders import begins_with_dicom, folders_of_part
from crossmr.dicom.selection import taken
from crossmr.dicom.series import Series
from crossmr.dicom.series_table import SeriesTable, read_series_table
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError
from crossmr.files import REPORT, digest, write_json
from crossmr.networks.inference import InferenceSettings, check_settings
from crossmr.networks.model import CrossConditionedModel
from crossmr.parts import ClaimLost
from crossmr.registry import load_model

RECORDS = {"manifest.json", LOG, REPORT, status.NAME, private.NAME}
"""Files of a cohort; no case can have a folder of such a name."""


@dataclass
class CohortSummary:
    """What became of the cases of a cohort; OUT/manifest.json says the same, but for the paths in reasons."""

    completed: dict[str, list[str]] = field(default_factory=dict)
    """Case → modalities synthesised now."""
    complete: list[str] = field(default_factory=list)
    """Cases that lack nothing of what was asked for."""
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

    def merge(self, other: "CohortSummary") -> None:
        """Count the cases of another one as well."""
        for name, found in vars(other).items():
            own = getattr(self, name)
            own.extend(found) if isinstance(own, list) else own.update(found)

    @property
    def counts(self) -> dict[str, int]:
        """What became of the cases → how many; every case counts once, and failures come first."""
        return {
            "failed": len(self.failed),
            "not synthesised": len(self.not_filled.keys() - self.completed.keys() - set(self.skipped)),
            "synthesised": len(self.completed),
            "nothing to synthesise": len(self.complete),
            "finished before": len(self.skipped),
        }


@dataclass(frozen=True)
class Job:
    """A cohort and what it is completed with, as one process tells it to another."""

    cohort: Path | str | Sequence[Path | str]
    out: Path
    model: CrossConditionedModel | Path | str | None
    settings: InferenceSettings
    options: CohortSettings

    @property
    def layout(self) -> Layout:
        """How the output is laid out."""
        return Layout(self.out, self.options.profile)

    def work(self) -> Work:
        """What is left of it, for this process."""
        return Work(self.layout, self.options.part, overwrite=self.options.overwrite)


def complete_cohort(
    cohort: Path | str | Sequence[Path | str],
    out: Path | str,
    model: CrossConditionedModel | Path | str | None = None,
    settings: InferenceSettings | None = None,
    options: CohortSettings | None = None,
    *,
    display: Display = SILENT,
) -> CohortSummary:
    """Complete every study of a folder, or of several, into OUT/CASE/; several files are one study.

    A study that fails is listed under 'failed' with its reason; the others are finished, unless the device or the
    memory failed: then they are listed there as not tried. A finished case, which is one with a manifest.json and
    all files that it names, is skipped unless `options.overwrite`.

    A folder of DICOM is converted into OUT/scans, its series are registered where their grids differ, and what is
    synthesised is written as NIfTI and as a derived DICOM series.

    With `options.part` any number of processes, on any number of machines, complete one cohort into one OUT; what is
    returned is of this part. The last one to finish writes OUT/manifest.json and status.csv of all.

    Raises:
        NamingError: no study at all. ModelError: no usable model. OutputError: OUT cannot be written.
    """
    job = Job(cohort, Path(out), model, settings or InferenceSettings(), options or CohortSettings())
    layout, options = job.layout, job.options
    shared = options.part is not None or options.share
    with layout.locked(shared=shared), closing(job.work()) as work:
        run = with_studies(open_run(job, work, display), cohort)
        if options.share:
            work.share(run.inputs)
            claim = work.claims.wait_for(PATHS)  # which all calls add to
            note_paths(run)
            work.claims.give_back(claim)
        elif not shared:
            work.begin(run.inputs)
            note_paths(run)
        summary = CohortSummary()
        try:
            with display.logged(layout.records / LOG) as logging:
                run = replace(run, display=logging)
                complete = _complete_all(run, summary)
        finally:
            if not shared:
                write_status(layout.records, _shareable(run, summary))
        if not shared:
            write_paths(layout.records, [one for one in run.inputs.studies if one.case not in summary.failed])
            _write_manifest(run, summary)
            work.end()
        elif options.share:
            _sum_up(run, summary)
        elif complete and work.is_last():
            finish_cohort(layout)
    return summary


def note_paths(run: Run) -> None:
    """Note where the scans lie, except of what is finished: the result may be of other scans; see `finished_before`."""
    layout = run.layout
    write_paths(layout.records, run.inputs.studies, keep=lambda case: (layout.folder(case) / "manifest.json").exists())


def _sum_up(run: Run, summary: CohortSummary) -> None:
    """Sum up OUT after the last of the calls that share it; one that others took for over begins again."""
    if run.work.is_over():
        run.work.share(run.inputs)
        for case, why in summary.failed.items():
            run.work.record_failure(case, run.without_folders(case, why))
    if not run.work.others():
        finish_cohort(run.layout)


def open_run(job: Job, work: Work, display: Display) -> Run:
    """What all studies of a job share; the studies are still to come.

    Raises:
        ModelError: no usable model. ConfigError: the settings do not fit it.
    """
    model = load_model(job.model, job.settings.device)
    check_settings(model, job.settings)
    reference = read_reference(job.settings, model, job.options.mapping)
    return Run(Inputs(job.out), job.layout, work, model, job.settings, job.options, reference, display)


def with_studies(run: Run, cohort: Path | str | Sequence[Path | str]) -> Run:
    """The run with the studies that are this process's, after a check that none would replace what is not crossmr's.

    Raises:
        NamingError: no study at all. OutputError: it would; or others write there.
    """
    check_profile(run.layout)
    return _checked(run, _inputs(run, cohort) if run.options.part is None else _joined(run, cohort))


def _checked(run: Run, inputs: Inputs) -> Run:
    """The run with these studies, after a check that none would replace what is not crossmr's."""
    run = replace(run, inputs=inputs, settings=run.settings if inputs.series is None else registering(run.settings))
    _check_all(run)
    return run


def _write_manifest(run: Run, summary: CohortSummary) -> None:
    body = {"format": FORMAT, "finished": True, "profile": run.layout.profile, **asdict(summary)}
    body["failed"] = _shareable(run, summary)
    write_json(run.layout.records / "manifest.json", {**body, "settings": run.record})


def _shareable(run: Run, summary: CohortSummary) -> dict[str, str]:
    """Why cases failed, without the folders of their files."""
    return {case: run.without_folders(case, why) for case, why in summary.failed.items()}


def plan_cohort(
    cohort: Path | str | Sequence[Path | str],
    out: Path | str,
    model: CrossConditionedModel | Path | str | None = None,
    settings: InferenceSettings | None = None,
    options: CohortSettings | None = None,
    *,
    display: Display = SILENT,
) -> list[PlannedCase]:
    """What `complete_cohort` would do with these arguments; nothing is written but `options.series_table`.

    Where there is no such table it is made, where there is one it decides, and is given the series that it lacks.

    Raises:
        CrossmrError: as `complete_cohort`, but for what only writing tells.
    """
    job = Job(cohort, Path(out), model, settings or InferenceSettings(), options or CohortSettings())
    if (path := job.options.series_table) is not None and not os.path.lexists(path):
        job = replace(job, options=replace(job.options, series_table=None))
    run = open_run(job, job.work(), display)
    check_profile(run.layout)
    run = _checked(run, _inputs(run, cohort) if job.options.part is None else _inputs_of_part(run, cohort))
    planned = plan(run.inputs, run.layout, run.model, run.settings, overwrite=job.options.overwrite)
    if path is not None:
        write_choice(Path(path), run.inputs, run.model, _own_modalities(run), display)
    return planned


def paths_of(cohort: Path | str | Sequence[Path | str]) -> list[Path]:
    """The folders, or the files, of a cohort."""
    return [Path(path) for path in ([cohort] if isinstance(cohort, (str, Path)) else cohort)]


def _inputs(run: Run, cohort: Path | str | Sequence[Path | str]) -> Inputs:
    """The studies of a cohort, with those that the layout has no place for."""
    given: Any = {"keep_names": run.options.keep_names, "exclude": run.layout.out, "display": run.display}
    table = _series_table(run)
    inputs = find_inputs(paths_of(cohort), run.options.mapping, **given)
    inputs = inputs if table is None else as_chosen(inputs, table, run.display)
    taken = {case: f"{case}: crossmr writes a file of this name into OUT. Rename the study." for case in RECORDS}
    faults = {case: taken[case] for case in inputs.cases if case in taken}
    return replace(inputs, faults=run.layout.clashes(inputs.cases) | faults)


def _series_table(run: Run) -> SeriesTable | None:
    """The table in which a person has chosen series, if one is given."""
    path = run.options.series_table
    return None if path is None else read_series_table(Path(path), _own_modalities(run))


def _own_modalities(run: Run) -> set[str]:
    """Those of the model, and those that --map names."""
    return {*run.model.config.modalities, *map(mapping_key, run.options.mapping or {})}


def _key(run: Run, paths: Sequence[Path]) -> str:
    """What all parts of a run have in common: whatever decides studies and voxels, but not the device of each."""
    options = run.options
    what = {"cohort": [*map(str, paths)], "mapping": dict(options.mapping or {}), "keep_names": options.keep_names}
    what |= {"profile": options.profile, "overwrite": options.overwrite}
    if (table := _series_table(run)) is not None:
        what["series_table"] = table.digest
    return digest({**what, **run.record, "device": None, "precision": run.settings.precision})


def _inputs_of_part(run: Run, cohort: Path | str | Sequence[Path | str]) -> Inputs:
    """The studies of one part, as `_joined` has them, without joining the run."""
    paths = [path.absolute() for path in paths_of(cohort)]
    if _hold_dicom(run, paths):
        return _dicom_of_part(run, paths, note=False)
    if (listed := run.work.listed(_key(run, paths))) is not None:
        return listed
    inputs = _inputs_for_parts(run, cohort)
    return replace(inputs, studies=run.work.part.take(inputs.studies))


def _joined(run: Run, cohort: Path | str | Sequence[Path | str]) -> Inputs:
    """The studies of one part."""
    paths = [path.absolute() for path in paths_of(cohort)]
    if _hold_dicom(run, paths):
        check_output_is_ours(run.layout, paths[0])
        run.work.join_alone(_key(run, paths), paths[0])
        inputs = _dicom_of_part(run, paths, note=True)
        run.work.add(inputs)
        return inputs

    def find() -> Inputs:
        inputs = _inputs_for_parts(run, cohort)
        check_output_is_ours(run.layout, inputs.root)
        note_paths(replace(run, inputs=inputs))
        return inputs

    return run.work.join(_key(run, paths), find)


def _hold_dicom(run: Run, paths: Sequence[Path]) -> bool:
    """Whether the studies are of DICOM, of which each part lists its own."""
    return any(begins_with_dicom(path, run.layout.out) for path in paths if path.is_dir())


def _inputs_for_parts(run: Run, cohort: Path | str | Sequence[Path | str]) -> Inputs:
    """The studies of all parts.

    Raises:
        ConfigError: they are of DICOM.
    """
    inputs = _inputs(run, cohort)
    if inputs.series is not None:
        raise ConfigError(f"{paths_of(cohort)[0]} holds DICOM among many other files. Complete it without --part.")
    return inputs


def _dicom_of_part(run: Run, paths: Sequence[Path], *, note: bool) -> Inputs:
    """The studies of DICOM of one part; `note` as in `cases_of_part`."""
    part, layout, options, display = run.work.part, run.layout, run.options, run.display
    given: Any = {"keep_names": options.keep_names, "exclude": layout.out, "note": note, "display": display}
    cases: dict[str, Sequence[Series]] = {}
    faults: dict[str, str] = {}
    table = _series_table(run)
    for path in paths:
        found, refused = cases_of_part(path, layout.records, part, options.mapping, **given)
        faults |= {one.case: one.refused for one in refused}
        cases |= found | {one.case: () for one in refused}
    own = [folder for path in paths for folder in folders_of_part(path, part, layout.out)]
    inputs = with_files_beside(Inputs(paths[0], series=cases, faults=faults), own, layout.out, display)
    return inputs if table is None else as_chosen(inputs, table, display, whole=part.of == 1)


def _check_all(run: Run) -> None:
    """Refuse to start if a case would replace what is not crossmr's."""
    check_output_is_ours(run.layout, run.inputs.root)
    if run.inputs.series is not None:
        check_scans(run.inputs.series, run.layout.records / SCANS)
        for case, series in run.inputs.series.items():
            if case not in run.inputs.faults:
                _check_case(run, case, taken(series))
    for files in run.inputs.studies:
        if files.case not in run.inputs.faults:
            with suppress(NamingError):  # which is said when the case's turn comes
                _check_case(run, files.case, list(files.images()))


def _check_case(run: Run, case: str, acquired: Sequence[str]) -> None:
    requested, _ = what_to_fill(acquired, run.model, run.settings)
    check_case(run.layout, case, run.model.config.targets, requested, overwrite=run.options.overwrite)


def _complete_all(run: Run, summary: CohortSummary) -> bool:
    with run.display.task("complete", len(run.inputs.cases)) as task:
        return complete_studies(run, summary, task.advance)


def complete_studies(run: Run, summary: CohortSummary, done: Callable[[str], None]) -> bool:
    """Complete one study after the other; what goes wrong with one is in the summary. Calls `done` with each case.

    After an error of the device or of memory, which every further study would fail by as well, these are not tried,
    and False is returned.
    """

    def fail(case: str, why: str) -> None:
        summary.fail({case: why})
        run.work.record_failure(case, run.without_folders(case, why))

    turns, unwritten = Turns(run, fail), 0
    for turn, study in read_ahead(turns):  # no enumerate, which would keep the study before
        case = turn.files.case
        try:
            if turn.finished:
                manifest, skipped = finished_before(run, turn.files), True
            else:
                manifest, skipped = complete_case(run, turn.files, study, turn.scans, turn.claim)
            summary.add(case, manifest, skipped=skipped)
            run.work.forget_failure(case)
        except ClaimLost as error:
            run.display.say(str(error))
            turns.left.append(case)
            continue
        except Exception as error:  # the other patients go on all the same, also where nobody foresaw it
            known = isinstance(error, CrossmrError)
            fail(case, str(error) if known else f"{case}: {run.display.unforeseen(error)}")
            unwritten = unwritten + 1 if _has_no_room(error) else 0
            full = "nothing can be written; make room, and run the same command again"
            if reason := full if unwritten > 1 else ends_the_run(error):  # one may be larger than the others
                left = [other for other in run.inputs.cases if other not in summary.verdicts]
                summary.fail({other: f"{other}: not tried, because {reason}" for other in left})
                return False
        else:
            unwritten = 0
        finally:
            if turn.claim is not None:
                run.work.claims.give_back(turn.claim)
        done(case)
        del study  # before the next one is read
    return True


def _has_no_room(error: Exception) -> bool:
    """Whether a case could not be written as a disk, or what a user may have of it, is full."""
    reason = error.__cause__ if isinstance(error, OutputError) else None
    return isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def finish_cohort(layout: Layout) -> None:
    """Write manifest.json and status.csv of a run that processes share, from what they have written so far.

    If nothing is left, the run has finished. Does nothing where another process does this now, or has done it.

    Raises:
        OutputError: they cannot be written.
    """
    with closing(Work(layout)) as work:
        claim = work.claims.take(FINISH)
        if claim is None or work.is_over():
            return
        cases, failed, shared = work.cases(), work.failures(), work.is_shared
        failed |= work.failed_before() if shared else {}
        summary, lines, settings = CohortSummary(), dict[str, Line](), dict[str, Any]()
        for path, manifest in read_manifests(layout.records):
            case = str(manifest["case"])
            lines[case] = line_of(manifest)
            now = work.is_of_this_run(path)
            again = case in cases and not now and layout.gone(case, manifest)
            if (case in cases or shared) and case not in failed and not again:
                summary.add(case, manifest, skipped=not now)
                settings = manifest["settings"] if now or not settings else settings
        summary.fail(failed)
        write_lines(layout.records, lines, failed)
        left = len(cases - summary.verdicts.keys())
        body = {"format": FORMAT, "finished": not left, "profile": layout.profile, **asdict(summary)}
        write_json(layout.records / "manifest.json", {**body, "settings": settings, **({"left": left} if left else {})})
        if not left and not work.others():
            work.end()
