"""The process that the page's jobs run in: a line of JSON comes in, lines of its progress and one of its result go out.

It loads the model once, before there is a job. It ends when its input does, as it does when the server is gone, and
then deletes the folder of all pages.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from crossmr.completion.cohort import CohortSettings, CohortSummary, complete_cohort
from crossmr.completion.inputs import Inputs, PlannedCase, find_inputs, plan
from crossmr.completion.layout import FORMAT, Layout
from crossmr.completion.status import reasons_of
from crossmr.completion.unread import unread_series, why_passed_over
from crossmr.data.formats import ending_of, half, is_volume, parts
from crossmr.data.naming import DISPLAY_NAMES, MODALITIES, StudyFiles, display_name
from crossmr.dicom.folders import first_dicom
from crossmr.dicom.selection import choose
from crossmr.dicom.series import Series, own_series
from crossmr.display import Display, Task
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, names_only
from crossmr.files import read_json, write_json
from crossmr.main_memory import keep_memory
from crossmr.networks.inference import InferenceSettings, watching
from crossmr.networks.model import CrossConditionedModel
from crossmr.output.report import report_completion
from crossmr.output.viewer import write_linked
from crossmr.registry import load_model

UNKNOWN, UNUSED = "unknown", "unused"
"""What a file or series is that is no contrast: one that may be one, and one that is none."""
STATIC = "../../../../static"
"""The way from a page of the viewer to the files that all share; see `server`."""
MARK = "__"
"""Between the case and the contrast in the names of files that a user has sorted."""
Speak = Any
"""Called with what is told: text, done and total."""


class Progress(Display):
    """Tells what a job does as the job tells it; nothing is estimated."""

    def __init__(self, tell: Speak):
        super().__init__(quiet=True, keep=True)
        self.tell = tell
        self.said: list[str] = []
        self.study = ""

    def say(self, text: str) -> None:
        """Keep a line for the page, and in the log."""
        self.said.append(text)
        super().say(text)

    @contextmanager
    def task(self, name: str, total: int | None, done: int = 0) -> Iterator[Task]:
        """Tell of each step of a job."""
        step = _Step(self, name, total, done)
        step.told()
        yield step

    def slices(self, done: int, total: int) -> None:
        """Tell of slices that were synthesised."""
        if done < total:
            self.tell({"text": f"Predicting the slices{self.study}", "done": done, "total": total, "unit": "slices"})
        else:
            self.tell({"text": f"Checking and writing{self.study}"})


WORDS = {"complete": "Reading the scans", "convert": "Converting the DICOM", "compare T1": "Comparing the T1"}
"""Name of a task → what the page says."""


class _Step(Task):
    """A task whose steps the page sees."""

    def __init__(self, progress: Progress, name: str, total: int | None, done: int):
        super().__init__(progress, name, total, done, None)
        self.progress, self.name, self.count = progress, name, done

    def told(self) -> None:
        """Tell where it stands."""
        several = self.total is not None and self.total > 1
        where = f", study {min(self.count + 1, self.total or 1)} of {self.total}" if several else ""
        if self.name == "complete":
            self.progress.study = where
        if self.total is None or self.count < self.total:
            self.progress.tell({"text": f"{WORDS.get(self.name, self.name)}{where}"})

    def advance(self, note: str = "") -> None:
        """Count a step."""
        self.count += 1
        self.told()


def recognise(model: CrossConditionedModel, job: Mapping[str, Any], tell: Speak) -> dict[str, Any]:
    """What each file or series was recognised as, what may be chosen instead, and what would be synthesised.

    A job has `scans`, a folder; `choices`, key of a row → contrast, 'unknown' or 'unused'; `together`, whether all
    files are of one study; and `sorted`, a folder for links to what was chosen. `batches` of the answer is what
    `complete` wants: folders, each with a mapping.
    """
    scans, choices = Path(job["scans"]), dict(job.get("choices") or {})
    if wrong := {*choices.values()} - {*MODALITIES, *model.config.modalities, UNKNOWN, UNUSED}:
        raise ConfigError(f"{min(wrong)!r} is no contrast. Choose one from the list.")
    if not any(is_volume(path.name) for path in scans.rglob("*")) and first_dicom(scans) is None:
        raise NamingError("None of these files is a volume or a DICOM image. Give NIfTI, or a folder or zip of DICOM.")
    progress = Progress(tell)
    tell({"text": "Reading names and tags"})
    inputs = find_inputs([scans], display=progress)
    cases = [_rows(case, inputs) for case in (inputs.series or {})]
    cases += [_rows_of_files(files, inputs, scans) for files in inputs.studies]
    if together := bool(job.get("together")) and inputs.series is None:
        cases = [{"case": cases[0]["case"], "rows": [row for case in cases for row in case["rows"]]}]
    for row in (row for case in cases for row in case["rows"]):
        if row["key"] in choices:
            row |= {"contrast": choices[row["key"]], "why": "chosen by you"}
    batches: list[tuple[Path, dict[str, str]]] = [(scans, {})]
    twice = {case["case"]: said for case in cases if (said := _said_twice(case))}
    if choices or together:
        batches = _sort([case for case in cases if case["case"] not in twice], inputs, scans, Path(job["sorted"]))
        planned = [case for folder, mapping in batches for case in _plan(folder, mapping, model, progress)]
    else:
        planned = plan(inputs, Layout(scans.with_name("none")), model, InferenceSettings())
    told = {one.case: _outcome(one) for one in planned}
    nothing = {"failed": "nothing of it is used", "synthesise": [], "not_synthesised": {}, "acquired": []}
    told |= {case: nothing | {"failed": why} for case, why in twice.items()}
    return {
        "cases": [case | told.get(case["case"], nothing) for case in cases],
        "said": [names_only(line, [scans]) for line in progress.said],
        "contrasts": {m: DISPLAY_NAMES[m] for m in MODALITIES if m in DISPLAY_NAMES},
        "dicom": inputs.series is not None,
        "together": together,
        "batches": [[str(folder), mapping] for folder, mapping in batches],
    }


def _plan(
    folder: Path, mapping: Mapping[str, str], model: CrossConditionedModel, progress: Progress
) -> list[PlannedCase]:
    inputs = find_inputs([folder], mapping, display=progress)
    return plan(inputs, Layout(folder.with_name("none")), model, InferenceSettings())


def _outcome(planned: PlannedCase) -> dict[str, Any]:
    return {
        "acquired": [*planned.acquired],
        "synthesise": [*planned.synthesise],
        "not_synthesised": {m: _as_given(why, planned.case) for m, why in planned.not_synthesised.items()},
        "failed": _as_given(planned.failed, planned.case),
    }


def _as_given(text: str, case: str) -> str:
    """A text with the names of files as they were given, not as `_link_files` links them."""
    return text.replace(f"{case}{MARK}", "")


def _rows_of_files(files: StudyFiles, inputs: Inputs, scans: Path) -> dict[str, Any]:
    """What the files of a study were recognised as."""
    rows = []
    for modality, paths in files.candidates.items():
        rows += [_row(path, scans, modality, "by its name") for path in paths]
    rows += [_row(path, scans, UNKNOWN, "its name says no contrast") for path in files.unrecognised]
    rows += [_row(path, scans, UNUSED, "a mask") for path in files.labels]
    rows += [_row(path, scans, UNUSED, why_passed_over(path)) for path in files.passed_over]
    for path in inputs.beside.get(files.case, ()):
        rows.append(_row(path, scans, UNKNOWN, "of a kind that is not read") | {"readable": False})
    return {"case": files.case, "rows": rows}


def _row(path: Path, scans: Path, contrast: str, why: str) -> dict[str, Any]:
    key = path.relative_to(os.path.abspath(scans)).as_posix()
    return {"key": key, "name": path.name, "contrast": contrast, "why": why, "readable": True}


def _rows(case: str, inputs: Inputs) -> dict[str, Any]:
    """What the series of a study of DICOM were recognised as."""
    rows = []
    all_series = (inputs.series or {})[case]
    chosen, _, _ = choose(all_series)
    taken = {id(series): modality for modality, series in chosen.items()}
    doubtful = {one.name for one in unread_series(all_series)}
    all_series = own_series(all_series)
    keys: Counter[str] = Counter()
    for series in all_series:
        key = _key(case, series)
        keys[key] += 1
        number = "Series" if series.number is None else f"Series {series.number}"
        rows.append(
            {
                "key": key if keys[key] == 1 else f"{key}/{keys[key]}",
                "name": f"{number} · {series.acquisition.description or 'without a description'}",
                "contrast": taken.get(id(series), UNKNOWN if series.name in doubtful else UNUSED),
                "why": series.why if id(series) in taken or series.modality is None else "another one is preferred",
                "readable": True,
                "images": len(series.images),
            }
        )
    first = all_series[0]  # for the page of this computer alone, which has the scans
    whose = " · ".join(filter(None, (first.patient, first.date, first.images[0].path.parent.name)))
    return {"case": case, "rows": rows, "whose": whose}


def _key(case: str, series: Series) -> str:
    """What a series is known by, whichever others arrive."""
    acquisition = series.acquisition
    told = series.uid, series.number, acquisition.te_ms, sorted(acquisition.kinds), acquisition.description
    return f"{case}/{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"


def _said_twice(case: Mapping[str, Any]) -> str:
    """What to say of files that a user, or their names, call one contrast; '' where each is another."""
    for modality in MODALITIES:
        same = [row["name"] for row in case["rows"] if row["contrast"] == modality]
        if len(same) > 1:
            return f"{' and '.join(same)} are both {display_name(modality)}. Choose one of them."
    return ""


def _sort(
    cases: Sequence[Mapping[str, Any]], inputs: Inputs, scans: Path, folder: Path
) -> list[tuple[Path, dict[str, str]]]:
    """Link what was chosen into folders, one for each study; the mapping of each says what is what."""
    batches = []
    for number, case in enumerate(cases):
        place = folder / f"{number:03d}" / case["case"]
        place.mkdir(parents=True)
        if inputs.series is None:
            mapping = _link_files(case, scans, place)
        else:
            mapping = _link_series(case, own_series(inputs.series[case["case"]]), place)
        if any(place.iterdir()):
            batches.append((place.parent, mapping))
    return batches


def _link_files(case: Mapping[str, Any], scans: Path, place: Path) -> dict[str, str]:
    """Link the files of a study under names that say what they are."""
    mapping = {}
    for row in case["rows"]:
        path = scans / row["key"]
        if row["contrast"] == UNUSED:
            continue
        if row["contrast"] == UNKNOWN:
            _link(path, place / f"{case['case']}{MARK}{path.name}")
            continue
        mapping[row["contrast"]] = f"*{MARK}{row['contrast']}.*"
        for part in parts(path):
            ending = ending_of(part.name) or part.name[part.name.lower().find(".img") :]
            own = part == path or bool(half(part.name))  # else it is named in the header
            name = f"{case['case']}{MARK}{row['contrast']}{ending}" if own else part.name
            _link(part, place / name)
    return mapping


def _link_series(case: Mapping[str, Any], all_series: Sequence[Series], place: Path) -> dict[str, str]:
    """Link the series of a study; the mapping says what was chosen, and the rest is recognised as before."""
    mapping = {}
    for index, (row, series) in enumerate(zip(case["rows"], all_series, strict=True)):
        own, chosen = place / f"{index:03d}", row["why"] == "chosen by you"
        if chosen and row["contrast"] == UNUSED:
            continue
        if chosen and row["contrast"] != UNKNOWN:
            mapping[row["contrast"]] = f"{glob.escape(Path(os.path.abspath(own)).as_posix()).replace('|', '[|]')}/*"
        own.mkdir()
        for number, path in enumerate([*(image.path for image in series.images), *series.unreadable]):
            _link(path, own / f"{number:05d}.dcm")
    return mapping


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # of a file system without links
        shutil.copyfile(path, place)


def complete(model: CrossConditionedModel, job: Mapping[str, Any], tell: Speak) -> dict[str, Any]:
    """Complete what `recognise` found, and write all that the page shows and sends.

    A job has `batches`, folders with their mappings; `out`, a new folder; and perhaps `targets`, to be synthesised even
    if that was refused.
    """
    out, progress = Path(job["out"]), Progress(tell)
    summary, settings = CohortSummary(), InferenceSettings(targets=job.get("targets"))
    for folder, mapping in job["batches"]:
        options = CohortSettings(mapping or None)
        with watching(progress.slices):
            made = complete_cohort(Path(folder), out / "result", model, settings, options, display=progress)
        summary.fail(made.failed)
    tell({"text": "Preparing the view"})
    report_completion(out / "result")
    manifests = [read_json(path, OutputError) for path in sorted((out / "result").glob("*/manifest.json"))]
    cases = [_result(manifest) for manifest in manifests if manifest.get("format") == FORMAT]
    for case in cases:
        try:
            case["notes"] += write_linked(out / "result", case["case"], out / "view" / case["case"], STATIC)
            case["view"] = True
        except OutputError:  # there is nothing to show
            case["view"] = False
    tell({"text": "Preparing the downloads"})
    write_bids(out / "result", out / "bids", [m for m in manifests if m.get("synthetic")])
    folders = [Path(folder) for folder, _ in job["batches"]]
    failed = {case: _as_given(names_only(why, folders), case) for case, why in summary.failed.items()}
    dicom = any(entry.get("dicom") for manifest in manifests for entry in manifest["synthetic"].values())
    return {"cases": cases, "failed": failed, "dicom": dicom}


def _result(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of a completed study."""
    synthetic, case = manifest["synthetic"], manifest["case"]
    return {
        "case": case,
        "verdict": manifest.get("verdict", "look"),
        "reasons": [_as_given(reason["text"], case) for reason in reasons_of(manifest)],
        "notes": [_as_given(note, case) for note in manifest["notes"]],
        "acquired": list(manifest["acquired"]),
        "synthetic": {m: {"from": entry["from"], "verdict": entry["verdict"]} for m, entry in synthetic.items()},
        "warnings": list(dict.fromkeys(text for entry in synthetic.values() for text in entry["warnings"])),
        "not_filled": {m: _as_given(why, case) for m, why in manifest["not_filled"].items()},
        "refused": list(manifest.get("refused", ())),
        "seconds": manifest["seconds"],
    }


def write_bids(out: Path, bids: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
    """Lay the synthetic volumes of a labelled output out as a BIDS derivative, by links.

    Studies that BIDS would call alike are left out.
    """
    labelled, layout = Layout(out), Layout(bids, "bids")
    clashes = layout.clashes([manifest["case"] for manifest in manifests])
    layout.start(out)
    for manifest in manifests:
        case, record = manifest["case"], json.loads(json.dumps(manifest))
        if case in clashes:
            continue
        for modality, entry in record["synthetic"].items():
            for key, place in (("file", layout.image(case, modality)), ("std", layout.std(case, modality))):
                if entry[key] is None or place is None:
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(labelled.folder(case) / entry[key], place)
                entry[key] = os.path.relpath(place, layout.folder(case)).replace(os.sep, "/")
            entry.pop("dicom", None)
        record.pop("picture", None)
        layout.finish(case, record, out, [])
        write_json(layout.folder(case) / "manifest.json", record)


VERBS = {"recognise": recognise, "complete": complete}


def answer(model: CrossConditionedModel, line: str, tell: Speak) -> None:
    """Do the job of a line; tell its result, or why there is none."""
    job = json.loads(line)
    try:
        tell({"result": VERBS[job["verb"]](model, job, tell)})
    except CrossmrError as error:
        folders = [Path(job[key]) for key in ("scans", "sorted", "out") if key in job]
        tell({"error": names_only(str(error), folders)})
    except Exception as error:  # nobody foresaw it: the page says so, and the next job goes on
        tell({"error": f"{type(error).__name__}: {error}"})


def main(name: str, device: str, root: str) -> None:
    """Load the model, then do one job after the other until the input ends."""
    out, lines = os.fdopen(os.dup(1), "w", buffering=1), SimpleQueue[str]()
    os.dup2(2, 1)  # what libraries print is not for the server

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        shutil.rmtree(root, ignore_errors=True)
        os._exit(0)  # in the middle of a job as well

    def tell(told: Mapping[str, Any]) -> None:
        out.write(json.dumps(told) + "\n")

    threading.Thread(target=listen, daemon=True).start()
    try:
        model = load_model(name, device)
    except CrossmrError as error:
        while lines.get():
            tell({"error": str(error)})
    while True:
        answer(model, lines.get(), tell)


if __name__ == "__main__":
    keep_memory()
    main(*sys.argv[1:])
