"""A cohort of studies into a prepared dataset: every study a case, the patients split, all said in one manifest.

SET/
├── manifest.json          summary, split, every case, every refused study
└── cases/CASE/            see `prepared_case`
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from crossmr.config import read_text, read_whole
from crossmr.data.formats import stem_of
from crossmr.data.naming import StudyFiles, find_all, recognise, unmatched
from crossmr.data.nifti import read_header
from crossmr.data.patients import SPLITS, Entry, assign, grouping, merge, read_patients, several_studies
from crossmr.data.prepared_case import (
    FORMAT_VERSION,
    NORMALISATION,
    Prepared,
    Unread,
    delete_case,
    is_case,
    prepare_case,
    read_prepared,
)
from crossmr.data.registration import RegistrationMode, registration_mode
from crossmr.data.split import Split, assign_splits
from crossmr.data.study import study_memory
from crossmr.display import LOG, SILENT, Display, is_log
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, SetError, names_only
from crossmr.files import digest, is_record, locked, read_json, refuse_foreign, write_json
from crossmr.main_memory import available_memory, gigabytes, reusable_memory

FORMAT = "crossmr-set"
GUARD = (
    "Processes begin by importing the script that started them, which would call prepare again. Put what it does under "
    'if __name__ == "__main__": or prepare with workers=1.'
)
"""What to do where a script has no guard."""
NOTES = 8
"""So many different notes on studies are said; all are kept."""
PROCESS_BYTES = 120 * 10**6
"""Bytes that a process takes before it reads anything: Python and the libraries."""


@dataclass(frozen=True)
class PrepareSettings:
    """How a cohort is prepared."""

    mapping: Mapping[str, str] | None = None
    """Modality → glob on file names, see `recognise`."""
    split: Split = field(default_factory=Split)
    """Which share of the patients goes where, with the seed of the order; '70/10/20' is understood."""
    register: RegistrationMode = "never"
    """Which volumes are registered to the first of their study."""
    workers: int = 1
    """Processes that prepare studies in parallel; the result does not depend on it."""
    prune: bool = False
    """Delete prepared cases that are not in the cohorts any more; without it they are an error."""
    patients: Path | None = None
    """Table of whose each study is, and perhaps of the splits, see `patients`; None goes by names."""

    def __post_init__(self) -> None:
        read_text(self, "split", Split, Split.parse, "70/10/20", "crossmr.Split(0.7, 0.1, 0.2)")
        read_text(self, "patients", Path | None, Path, "patients.csv")
        object.__setattr__(self, "register", registration_mode(self.register))
        read_whole(self, "workers")


def prepare(
    cohorts: Path | str | Sequence[Path | str],
    out: Path | str,
    settings: PrepareSettings = PrepareSettings(),
    *,
    display: Display = SILENT,
) -> dict[str, Any]:
    """Check, normalise and crop every study of the cohorts into the dataset `out`, and return its manifest.

    A study that is refused is listed under 'refused' with the reason, and the others go on; returned reasons hold the
    paths of files, written ones their names only. A second run keeps the cases whose files have not changed, and, with
    a word, those whose files can only not be read now. It deletes those that are refused now, and, if
    `settings.prune`, those that are no longer in the cohorts. By the same split, patients of the set keep their part.

    Raises:
        NamingError: a cohort without any study. ConfigError: two studies of one name, a table of patients that is
            wrong, or several workers of a script without `if __name__ == "__main__":`. SetError: every study was
            refused. OutputError: cannot write, or `out` holds something else, or, without `settings.prune`, cases that
            are not in the cohorts.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a process that imports its script
        raise SystemExit(f"crossmr: {GUARD}")
    out, folders = Path(out), [Path(c) for c in ([cohorts] if isinstance(cohorts, (str, Path)) else cohorts)]
    with locked(out):
        found = [find_all(folder, settings.mapping) for folder in folders]
        studies = [study for cohort in found for study in cohort.studies]
        names = [study.case for study in studies]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"The cohorts share study names ({', '.join(repeated[:3])}); rename them{_remedy(folders, studies)}."
            )
        unused = [path for cohort in found for path in cohort.unused]
        unknown = (path for study in studies if not study.candidates for path in study.unrecognised)
        series = [path.name for path in unknown if unused and _is_series(path)]
        unused = [path for path in unused if path.name not in series]
        for text in (*unmatched(studies, settings.mapping), *_unused_labels(unused, folders), *_to_split(series)):
            display.say(f"warning: {text}")
        entries = {} if settings.patients is None else read_patients(settings.patients)
        if settings.patients is not None:
            studies = assign(studies, entries, settings.patients)
        _check_out(out, names)
        before = _read_before(out)
        gone = _gone(out, names, prune=settings.prune)
        with display.logged(out / LOG) as logging:
            cases, refused = _prepare_all(studies, out, settings, logging)
            for line in _notes(cases):
                logging.say(line)
        if not cases:
            reasons = "; ".join(list(refused.values())[:3])
            raise SetError(f"None of the {len(studies)} studies could be prepared: {reasons}")
        patients = _patients(studies, cases, entries, before if before and before.split == settings.split else None)
        for stale in (*gone, *refused):
            delete_case(out / "cases" / stale)
        for line in grouping(studies, patients.of, patients.shared):
            display.say(line)
        manifest = _manifest(cases, refused, settings.split, patients)
        if before and (moved := _moved(before, manifest)):
            display.say(f"warning: {moved}")
        stored = {**manifest, "refused": _shareable(manifest["refused"], studies, [*folders, out])}
        write_json(out / "manifest.json", {**stored, "sha256": digest(stored)})
        return manifest


def _remedy(folders: Sequence[Path], studies: Sequence[StudyFiles]) -> str:
    """How cohorts that share names of studies can be one set; '' where names would merge some of their studies."""
    whole = [Path(os.path.abspath(folder)) for folder in folders]
    above = Path(os.path.commonpath(whole))
    if above in whole or any(folder.parent != above for folder in whole):
        return ", or move the cohorts into one folder, each into one called after its site, and give that"
    if len(recognise([path for study in studies for path in study.paths()], root=above)) < len(studies):
        return ""
    return (
        f", or give {above}, the folder above all of them, alone: studies are then called after their cohort, too, "
        f"such as {whole[0].name}_NAME"
    )


def _unused_labels(unused: Sequence[Path], folders: Sequence[Path]) -> list[str]:
    """What to say of volumes that seem to be lesion labels, and are used for no study."""
    if not unused:
        return []
    roots = [Path(os.path.abspath(folder)) for folder in folders]
    names = [next(str(path.relative_to(root)) for root in roots if root in path.parents) for path in unused[:3]]
    count = "1 volume that may be lesion labels is" if len(unused) == 1 else ""
    count = count or f"{len(unused)} volumes that may be lesion labels are"
    return [
        f"{count} used for no study: {', '.join(names)}{', …' if len(unused) > 3 else ''}. Call each after its study "
        "(P1_seg.nii.gz, labels/P1.nii.gz), or name them with --map seg='*_NAME.nii.gz'."
    ]


def _is_series(path: Path) -> bool:
    """Whether a volume is several in one file: 4D."""
    header = read_header(path)
    return header is not None and len(header.get_data_shape()) > 3 and header.get_data_shape()[3] > 1


def _to_split(names: Sequence[str]) -> list[str]:
    """What to say of files that hold all contrasts of a study, as the Medical Segmentation Decathlon's."""
    if not names:
        return []
    stem = stem_of(names[0])
    count = f"{names[0]} is a 4D image" if len(names) == 1 else f"{len(names)} files are 4D images ({names[0]} …)"
    return [
        f"{count}, of which no study is read. Split each into one file for each contrast, called after it "
        f"({stem}_t1n.nii.gz), for instance with fslsplit."
    ]


def _notes(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be known of how studies were read, each with the studies it is of; those of most studies first."""
    of: dict[str, list[str]] = {}
    for case in sorted(cases):
        for note in cases[case]["notes"]:
            of.setdefault(note, []).append(case)
    lines = [
        f"note on {', '.join(which[:3])}{f' and {len(which) - 3} more' if len(which) > 3 else ''}: {note}"
        for note, which in sorted(of.items(), key=lambda item: -len(item[1]))
    ]
    more = [f"{len(lines) - NOTES} more notes are in the case.json of their studies"] if len(lines) > NOTES else []
    return lines[:NOTES] + more


class _Before(NamedTuple):
    """How the set was split when it was prepared before."""

    split: Split
    cases: Mapping[str, str]
    """Case → part."""
    patients: Mapping[str, str]
    """Patient → part."""


def _read_before(out: Path) -> _Before | None:
    """How an earlier set at `out` is split; None where there is none, or a damaged one."""
    try:
        manifest = read_json(out / "manifest.json", SetError)
        train, val, test = manifest["split"]["shares"]
        split = Split(train, val, test, manifest["split"]["seed"])
        cases = {case: of["part"] for case, of in manifest["cases"].items()}
        patients = {patient: part for part in SPLITS for patient in manifest["split"][part]}
        return _Before(split, cases, patients) if {*cases.values()} <= {*SPLITS} else None
    except (SetError, ConfigError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _moved(before: _Before, manifest: Mapping[str, Any]) -> str:
    """What to say where studies change the part that they had before, or ''."""
    parts, now = before.cases, {case: of["part"] for case, of in manifest["cases"].items()}
    moved = [f"{case} from {parts[case]} to {part}" for case, part in now.items() if parts.get(case, part) != part]
    if not moved:
        return ""
    how = f"--split {'/'.join(f'{100 * share:g}' for share in before.split.shares)} --seed {before.split.seed}"
    listed = f"{', '.join(moved[:3])}{f' and {len(moved) - 3} more' if len(moved) > 3 else ''}"
    return (
        f"studies change their part ({listed}), so a model that was trained on this set has seen patients of other "
        f"parts. To keep the parts, give what the set was prepared with: {how}, and --patients if there was one."
    )


@dataclass(frozen=True)
class _Patients:
    """Whose the prepared studies are."""

    of: Mapping[str, str]
    """Case → patient, sorted."""
    shared: Sequence[Sequence[str]]
    """Groups of cases that share a scan."""
    fixed: Mapping[str, str]
    """Patient → split, of those whom the table or the earlier set gives one."""
    named: Mapping[str, str]
    """Case → patient by name or table, of those whom a shared scan makes another one's."""


def _manifest(
    cases: Mapping[str, Mapping[str, Any]], refused: Mapping[str, str], split: Split, patients: _Patients
) -> dict[str, Any]:
    """What manifest.json says, but for its own hash."""
    splits = assign_splits(list(patients.of.values()), split, patients.fixed)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(cases, patients.of),
        "normalisation": NORMALISATION,
        "split": {
            "seed": split.seed,
            "shares": [*split.shares],
            "sha256": digest(splits),
            **{name: sorted(p for p in splits if splits[p] == name) for name in SPLITS},
        },
        "patients": {"several_studies": several_studies(patients.of), "share_a_scan": patients.shared},
        "refused": [{"case": case, "reason": refused[case]} for case in sorted(refused)],
        "cases": {
            case: {
                "part": splits[who],
                "patient": who,
                **({"named": patients.named[case]} if case in patients.named else {}),
                **cases[case],
            }
            for case, who in patients.of.items()
        },
    }


def _patients(
    studies: Sequence[StudyFiles], cases: Mapping[str, Any], entries: Mapping[str, Entry], before: _Before | None
) -> _Patients:
    """Group the prepared studies by patient: as table or names say, and by the scans that they share.

    A patient keeps the part of `before`, unless the table says another; of several, as where two turn out to be one,
    the first of train, val and test: what a model has learnt from is no test.

    Raises:
        ConfigError: studies that share a scan are to go to different splits.
    """
    stated = {study.case: study.patient for study in studies if study.case in cases}
    of, shared = merge(stated, {case: cases[case]["scans"].values() for case in stated})
    parts: dict[str, dict[str, str]] = {}
    for case, entry in entries.items():
        if case in of and entry.part:
            parts.setdefault(of[case], {})[entry.part] = case
    for patient, by_part in parts.items():
        if len(by_part) > 1:
            raise ConfigError(
                f"--patients puts {' and '.join(f'{case} into {part}' for part, case in sorted(by_part.items()))}, but "
                f"they share a scan, directly or through others, and so are one patient ({patient}). Choose one part."
            )
    fixed = {who: next(iter(by_part)) for who, by_part in parts.items()}
    if before:
        had = {(who, part) for case, who in of.items() for part in (before.cases.get(case), before.patients.get(who))}
        fixed = {who: part for part in reversed(SPLITS) for who in of.values() if (who, part) in had} | fixed
    return _Patients(dict(sorted(of.items())), shared, fixed, {c: who for c, who in stated.items() if who != of[c]})


def _shareable(
    refused: Sequence[Mapping[str, str]], studies: Sequence[StudyFiles], common: Sequence[Path]
) -> list[dict[str, str]]:
    """Why studies were refused, without the folders of their files."""
    paths = {study.case: study.paths() for study in studies}
    return [{**one, "reason": names_only(one["reason"], [*paths[one["case"]], *common])} for one in refused]


def _check_out(out: Path, cases: Sequence[str]) -> None:
    """Refuse a folder that holds anything but a prepared dataset, or in which something else has a case's name."""
    manifest = out / "manifest.json"
    try:
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".") and not _is_our_log(path)}
        if visible - {"cases"}:
            refuse_foreign(manifest, partial(is_record, kind=FORMAT))
        listed = set(read_json(manifest, OutputError).get("cases", {})) if manifest.exists() else set()
        if not manifest.exists() and (visible - {"cases"} or not all(is_case(path, ()) for path in _folders(out))):
            raise OutputError(f"{out} exists and is not a prepared dataset; name another folder.")
        for case in cases:
            refuse_foreign(out / "cases" / case, partial(is_case, listed=listed))
    except OSError as error:
        raise OutputError(f"{out} cannot be used: {error.strerror or error}. Name another folder.") from error


def _is_our_log(path: Path) -> bool:
    return path.name == LOG and is_log(path)


def _folders(out: Path) -> list[Path]:
    """What lies among the cases of a dataset, if there are any."""
    cases = out / "cases"
    return [path for path in cases.iterdir() if not path.name.startswith(".")] if cases.exists() else []


def _kept(folder: Path, reason: Unread, display: Display) -> dict[str, Any] | str:
    """The record of a case whose files cannot be read now, but which was prepared before; else the reason."""
    earlier = read_prepared(folder)
    if not earlier or earlier.get("format_version") != FORMAT_VERSION:
        return reason
    display.say(f"{reason} It was prepared before, and is kept.")
    return earlier


def _gone(out: Path, cases: Collection[str], *, prune: bool) -> list[str]:
    """Prepared cases that are not among these.

    Raises:
        OutputError: there are any, and `prune` is not set.
    """
    gone = sorted(path.name for path in _folders(out) if path.name not in cases and read_prepared(path))
    if gone and not prune:
        raise OutputError(
            f"{out} holds {len(gone)} prepared {'case' if len(gone) == 1 else 'cases'} that the cohorts, of "
            f"{len(cases)} {'study' if len(cases) == 1 else 'studies'}, do not have: {', '.join(gone[:8])}"
            f"{', …' if len(gone) > 8 else ''}. Name all cohorts of the set, or another folder, or delete these cases "
            "with --prune."
        )
    return gone


def _prepare_all(
    studies: list[StudyFiles], out: Path, settings: PrepareSettings, display: Display
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Prepare each study; returns case → record, and case → why it was refused.

    Raises:
        OutputError: nothing can be written, or a process was killed. MemoryError.
    """
    cases: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    settings = replace(settings, workers=_processes(studies, out, settings, display))
    prepared = contextlib.closing(_each(studies, out, settings))  # at once, when Ctrl-C stops what goes through it
    with prepared as outcomes, display.task("prepare", len(studies)) as task:
        for study, outcome in outcomes:
            try:
                result = outcome()
            except (CrossmrError, MemoryError):
                raise
            except BrokenProcessPool as error:
                raise _ended((), out) from error
            except Exception as error:  # nobody foresaw it: the other patients go on all the same
                result = f"{study.case}: {display.unforeseen(error)}"
            if isinstance(result, Unread):
                result = _kept(out / "cases" / study.case, result, display)
            if isinstance(result, str):
                refused[study.case] = result
            else:
                cases[study.case] = result
            task.advance(study.case)
    return cases, refused


def _processes(studies: Sequence[StudyFiles], out: Path, settings: PrepareSettings, display: Display) -> int:
    """How many studies are prepared at once: as many as are asked for, as far as the largest of these fit.

    One that is alone too large does not count, since it is refused; nor does one that was begun or prepared before.
    """
    new = [study for study in studies if not (out / "cases" / study.case / "case.json").exists()]
    available = available_memory() + reusable_memory()
    needed = {study.case: _memory(study, settings.register) for study in new}
    needed = {case: number for case, number in needed.items() if number <= available}
    if not needed:
        return settings.workers
    case = max(needed, key=lambda case: needed[case])
    fitting = max(1, available // (needed[case] + PROCESS_BYTES))
    if fitting < settings.workers or needed[case] > available / 2:
        number = min(settings.workers, fitting)
        display.say(
            f"{case}: needs about {gigabytes(needed[case])} of memory, {gigabytes(available)} are available: "
            f"{number} {'study is' if number == 1 else 'studies are'} prepared at once"
        )
    return min(settings.workers, fitting)


def _memory(files: StudyFiles, register: RegistrationMode) -> int:
    """About how many bytes it takes to prepare a study; 0 where that is said when its turn comes."""
    try:
        return study_memory(files.images(), register).bytes()
    except NamingError:
        return 0


def _each(
    studies: list[StudyFiles], out: Path, settings: PrepareSettings
) -> Generator[tuple[StudyFiles, Callable[[], Prepared]]]:
    """Each study with what prepares it, or waits for the process that does, in the order in which they finish.

    Raises:
        ConfigError, OutputError: a process ended; so do what waits for one.
    """
    if settings.workers <= 1:
        yield from ((study, partial(prepare_case, study, out, settings.register)) for study in studies)
        return
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(
        min(settings.workers, len(studies)), mp_context=get_context("spawn"), initializer=_let_finish
    ) as pool:
        futures: dict[Future[Prepared], StudyFiles] = {}
        started: set[BaseProcess] = set()
        try:
            with _interrupts_held():
                for study in studies:
                    futures[pool.submit(prepare_case, study, out, settings.register)] = study
                    started |= {*multiprocessing.active_children()} - others
            for future in as_completed(futures):
                yield futures[future], partial(_result, future, started, out)
        except BrokenProcessPool as error:
            raise _ended(started, out) from error
        except BaseException:
            for future in futures:  # shutdown(cancel_futures=True) forgets that when the pool is left, now and then
                future.cancel()
            raise


def _result(future: Future[Prepared], started: Collection[BaseProcess], out: Path) -> Prepared:
    """What a process made of a study."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _ended(started, out) from error


def _ended(started: Collection[BaseProcess], out: Path) -> CrossmrError:
    """Why a process ended: it was killed, or could not import the script that started it."""
    for process in started:
        process.join(5)
    if any((process.exitcode or 0) > 0 for process in started):
        return ConfigError(f"prepare: a process ended while it began. {GUARD}")
    return OutputError(
        f"{out}: a process was killed, as happens where memory runs out. Run the same command again with --workers 1; "
        "what is prepared is kept."
    )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back: a process that starts meanwhile inherits this, and ends no import of its own by it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_finish() -> None:
    """Let the study in progress finish on Ctrl-C, which reaches all processes; the parent process ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fingerprint(cases: Mapping[str, Mapping[str, Any]], patients: Mapping[str, str]) -> dict[str, Any]:
    """A summary of the cohort in a few readable numbers."""
    modalities = sorted({m for case in cases.values() for m in case["modalities"]})
    patterns: dict[str, int] = {}
    for case in cases.values():
        key = "+".join(case["modalities"])
        patterns[key] = patterns.get(key, 0) + 1
    shapes = [case["shape"] for case in cases.values()]
    spacings = [case["spacing_mm"] for case in cases.values()]
    statistic = {
        m: {
            key: round(statistics.fmean(c["statistics"][m][key] for c in cases.values() if m in c["statistics"]), 6)
            for key in ("mean", "std")
        }
        for m in modalities
    }
    return {
        "studies": len(cases),
        "patients": len(set(patients.values())),
        "modalities": {m: sum(m in case["modalities"] for case in cases.values()) for m in modalities},
        "patterns": dict(sorted(patterns.items())),
        "shape_zyx": {
            "min": [min(s) for s in zip(*shapes, strict=True)],
            "max": [max(s) for s in zip(*shapes, strict=True)],
        },
        "spacing_mm_zyx": {
            "min": [min(s) for s in zip(*spacings, strict=True)],
            "median": [statistics.median(s) for s in zip(*spacings, strict=True)],
            "max": [max(s) for s in zip(*spacings, strict=True)],
        },
        "masked_background": sum(case["masked_background"] for case in cases.values()),
        "labelled": sum(case["labelled"] for case in cases.values()),
        **_lesions([case for case in cases.values() if case["labelled"]]),
        "intensity": statistic,
    }


def _lesions(labelled: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the labels of these cases are: their values in the files, and which share of the head they cover."""
    shares = [sum(case["lesion_voxels"]) / sum(case["head_voxels"]) for case in labelled]
    values = {value for case in labelled for value in case.get("label_values", ())}
    return {"label_values": sorted(values), "lesion_share": round(statistics.median(shares), 6) if shares else 0.0}


def lesions_in_words(fingerprint: Mapping[str, Any]) -> str:
    """How many studies have lesion labels, and what these are, by a set's fingerprint."""
    if not fingerprint["labelled"]:
        return "of no study"
    values = ", ".join(map(str, fingerprint["label_values"]))  # records of earlier versions have none
    return (
        f"of {fingerprint['labelled']} of {fingerprint['studies']} studies, {f'values {values}, ' if values else ''}"
        f"median {fingerprint['lesion_share']:.2%} of the head"
    )


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
