"""A mercure module: a folder of DICOM in, derived series and result.json out; the command `crossmr-mercure`.

mercure (github.com/mercure-imaging/mercure) is a DICOM router of hospitals. It starts the container of a module once
for each series or study and says in the environment where it finds what. Its convention, as its documentation
(docs/modules.rst, docs/usage/modules.rst) and its processor (app/process/process_series.py, app/common/notification.py)
have it:

MERCURE_IN_DIR   images of one series, or of a study, flat, named SERIES_UID#IMAGE_UID.dcm; and task.json, in which
                 process.settings are the settings of the module, with those of the rule over them
MERCURE_OUT_DIR  images to be sent on, flat, named alike; and result.json, an object that mercure keeps and shows
result.json      "__mercure_notification" in it is {"text", "requested"}: the text goes into the rule's messages, and
                 `requested` sends one where the rule notifies only on request. "__mercure_routing" {"discard": true}
                 tells a rule with dynamic routing that nothing is to be sent on; to any other, an empty folder is an
                 error, since dcmsend finds no image in it (app/dispatch/target_types/builtin.py)
exit code        0: what is in MERCURE_OUT_DIR is sent on. Any other: nothing is, the folder moves to mercure's errors

Messages leave the hospital by e-mail and web hooks, and what a module prints is stored: neither names a patient, nor a
UID.
"""

import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn

from crossmr.config import from_dict
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, StudyError, names_only
from crossmr.files import read_json, temporary_folder, write_json
from crossmr.main_memory import keep_memory

IN, OUT = "MERCURE_IN_DIR", "MERCURE_OUT_DIR"
TASK, RESULT = "task.json", "result.json"
NOTIFICATION, ROUTING = "__mercure_notification", "__mercure_routing"
LABEL = "Series whose description begins with SYNTHETIC were not acquired. Research use only; not a medical device."
_UID = re.compile(r"\b\d+(\.\d+){4,}\b")
"""A UID, or the better part of one."""


@dataclass(frozen=True)
class ModuleSettings:
    """What `process.settings` of the task file may hold."""

    targets: tuple[str, ...] | None = None
    """Contrasts to synthesise, in any usual spelling; by default every one that is missing."""
    model: str | None = None
    """Name of a registered model, or its folder in the container; by default the shipped one."""
    std: bool = True
    """Whether the standard deviation of each synthetic contrast is sent, as a series of its own."""
    send: Literal["use", "look", "refuse"] = "look"
    """The worst verdict whose series are sent; by default those of a study that was refused are not."""
    map: dict[str, str] = field(default_factory=dict)
    """Contrast → pattern of series descriptions, for what tags do not tell."""
    scale: Literal["unit", "input"] = "unit"
    """Intensities: 'unit' for [0, 1], 'input' for a scale like that of the study's other series."""
    device: str = "auto"
    """Where to compute: 'auto', 'cpu' or 'cuda'."""


def read_settings(path: Path) -> ModuleSettings:
    """The module's settings in a task file.

    A rule's settings are given to all of its modules: where they hold an object 'crossmr', only this is read.

    Raises:
        ConfigError: the file is missing or damaged, or a setting is unknown or impossible.
    """
    process = read_json(path, ConfigError).get("process") or {}
    settings = (process.get("settings") or {}) if isinstance(process, Mapping) else process
    if isinstance(settings, Mapping) and "crossmr" in settings:
        settings = settings["crossmr"]
    return from_dict(ModuleSettings, settings, f"{TASK}: process.settings")


def run(incoming: Path, outgoing: Path) -> dict[str, Any]:
    """Complete what lies in MERCURE_IN_DIR into MERCURE_OUT_DIR; returns what result.json is to say.

    Raises:
        CrossmrError: a wrong task file, no images, or a study that cannot be read, completed or written; then no series
            is to be sent on.
    """
    settings = read_settings(incoming / TASK)
    from crossmr.completion.cohort import CohortSettings, complete_cohort
    from crossmr.completion.layout import Layout
    from crossmr.networks.inference import InferenceSettings

    wanted = InferenceSettings(targets=settings.targets, scale=settings.scale, device=settings.device)
    with temporary_folder("the study") as place:
        link_images(incoming, place / "in")
        layout = Layout(place / "out")
        summary = complete_cohort(
            place / "in", layout.out, settings.model, wanted, CohortSettings(mapping=settings.map or None)
        )
        if summary.failed:
            raise StudyError(impersonal(" ".join(summary.failed.values()), [place]))
        studies = [_study(layout, case, settings, outgoing) for case in summary.verdicts]
    routing = {} if any(study["series"] for study in studies) else {ROUTING: {"discard": True}}
    return {"status": _worst_status(studies), "studies": studies, **_program(), **_notification(studies), **routing}


def link_images(incoming: Path, place: Path) -> None:
    """Link the images of each series into a folder of its own, under numbers: no message can name a patient or a UID.

    A file that cannot be read still lies beside the images of its series, which is then known to lack one.

    Raises:
        NamingError: there is none. OutputError: they cannot be linked.
    """
    images = sorted(path for path in incoming.iterdir() if path.is_file() and path.suffix.lower() == ".dcm")
    if not images:
        raise NamingError(f"{IN} holds no image: expected files SERIES_UID#IMAGE_UID.dcm beside {TASK}.")
    of_series: dict[str, list[Path]] = {}
    for path in images:
        series, _, image = path.name.partition("#")
        of_series.setdefault(series if image else "", []).append(path)
    try:
        for number, paths in enumerate(of_series.values(), 1):
            folder = place / f"{number:03d}"
            folder.mkdir(parents=True)
            for index, path in enumerate(paths, 1):
                (folder / f"{index:05d}.dcm").symlink_to(path.resolve())
    except OSError as error:
        raise OutputError(f"The temporary folder could not be written: {error.strerror or error}.") from error


def _study(layout: Any, case: str, settings: ModuleSettings, outgoing: Path) -> dict[str, Any]:
    """Send what was made of a study, if its verdict allows it; returns what result.json says of it."""
    from crossmr.completion.verdict import VERDICTS

    manifest = read_json(layout.folder(case) / "manifest.json", OutputError)
    made = [(modality, kind) for modality in manifest["synthetic"] for kind in (("", "std") if settings.std else ("",))]
    folders = [folder for one in made if (folder := layout.dicom(case, *one)).is_dir()]
    allowed = VERDICTS.index(manifest["verdict"]) <= VERDICTS.index(settings.send)
    sent = [_send(folder, outgoing) for folder in folders] if allowed else []
    if manifest["synthetic"]:
        status = "sent" if sent else "held back"
    else:
        status = "not synthesised" if manifest["not_filled"] else "complete"
    return {
        "status": status,
        "verdict": manifest["verdict"],
        "reasons": [_reason(reason) for reason in manifest["reasons"]],
        "acquired": list(manifest["acquired"]),
        "synthetic": list(manifest["synthetic"]),
        "taken": {m: _series(one) for m, one in manifest["series"]["taken"].items()},
        "left_out": {name: impersonal(why) for name, why in manifest["series"]["left_out"].items()},
        "not_synthesised": {m: impersonal(why) for m, why in manifest["not_filled"].items()},
        "warnings": sorted({text for entry in manifest["synthetic"].values() for text in entry["warnings"]}),
        "notes": [impersonal(note) for note in manifest["notes"]],
        "series": sent,
        "model_sha256": manifest["settings"]["model_sha256"],
    }


def _series(entry: Mapping[str, Any]) -> str:
    """Which series was taken for a contrast, and why."""
    number = "without a number" if entry["series"] is None else entry["series"]
    return impersonal(f"series {number}: {entry['why']}")


def _reason(reason: Mapping[str, Any]) -> str:
    """Why a verdict is not 'use', and of which contrasts."""
    from crossmr.data.naming import display_name

    contrasts = ", ".join(display_name(m) for m in reason["contrasts"])
    return impersonal(f"{contrasts}: {reason['text']}" if contrasts else reason["text"])


def _send(folder: Path, outgoing: Path) -> dict[str, Any]:
    """Copy a derived series to where mercure sends it on; returns its description, UID and number of images."""
    from pydicom import dcmread

    paths = sorted(folder.glob("*.dcm"))
    try:
        for path in paths:
            image = dcmread(path, stop_before_pixels=True)
            shutil.copyfile(path, outgoing / f"{image.SeriesInstanceUID}#{image.SOPInstanceUID}.dcm")
    except OSError as error:
        raise OutputError(f"{OUT} could not be written: {error.strerror or error}. Check free space.") from error
    uid, title = str(image.SeriesInstanceUID), str(image.SeriesDescription)
    return {"description": title, "series_uid": uid, "images": len(paths)}


def impersonal(text: str, paths: Sequence[Path] = ()) -> str:
    """A message in one line, without folders and UIDs."""
    return _UID.sub("(UID)", " ".join(names_only(text, paths).split()))


def _worst_status(studies: Sequence[Mapping[str, Any]]) -> str:
    """One word for all studies: the one that most needs a look."""
    order = ("complete", "sent", "not synthesised", "held back")
    return max((str(study["status"]) for study in studies), key=order.index)


def _notification(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What mercure's messages say; one is requested where anybody should look."""
    said = []
    for study in studies:
        names = ", ".join(series["description"] for series in study["series"])
        what = {
            "sent": f"Sent: {names}; verdict {study['verdict']}.",
            "held back": f"Nothing sent: the verdict is {study['verdict']}, and the setting 'send' excludes it.",
            "not synthesised": f"Nothing sent: nothing was synthesised; verdict {study['verdict']}.",
            "complete": "Nothing sent: there is nothing to synthesise.",
        }[study["status"]]
        reasons = study["reasons"] or ([] if study["synthetic"] else study["not_synthesised"].values())
        said.append(" ".join([what, *dict.fromkeys(reasons)]))
    fine = all(study["status"] in ("sent", "complete") and study["verdict"] == "use" for study in studies)
    return {NOTIFICATION: {"text": " ".join([*said, LABEL]), "requested": not fine}}


def _program() -> dict[str, Any]:
    return {"program": f"crossmr {version('crossmr')}", "label": LABEL}


def _failure(text: str) -> dict[str, Any]:
    """What result.json says where nothing is sent on; mercure shows it with the task."""
    message = {"text": f"crossmr failed, and nothing was sent: {text}", "requested": True}
    return {"status": "failed", "error": text, "studies": [], **_program(), NOTIFICATION: message}


def _folder(variable: str) -> Path:
    """The folder that a variable of the environment names.

    Raises:
        ConfigError: it is not set, or no folder.
    """
    folder = Path(os.environ.get(variable) or "")
    if not os.environ.get(variable) or not folder.is_dir():
        raise ConfigError(
            f"{variable} is '{os.environ.get(variable, '')}', not a folder. mercure sets it for a module."
        )
    return folder


def main() -> NoReturn:
    """Run as a module of mercure; the last line says what was done, and the exit code is 1 after a failure."""
    keep_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as in `cli`
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a container that is stopped leaves no images behind
    warnings.simplefilter("ignore")  # libraries quote values of tags
    outgoing = None
    try:
        outgoing = _folder(OUT)
        result = run(_folder(IN), outgoing)
        write_json(outgoing / RESULT, result)
    except Exception as error:
        known = isinstance(error, CrossmrError)
        result = _failure(impersonal(str(error) if known else f"unforeseen {type(error).__name__}"))
        if outgoing is not None:
            write_json(outgoing / RESULT, result)
        if not known:
            traceback.print_tb(error.__traceback__)  # without its message, which may quote a tag
        print(f"crossmr-mercure: {result['error']}", file=sys.stderr)
        sys.exit(1)
    print(result[NOTIFICATION]["text"])
    sys.exit(0)
