"""Completing a cohort: every study of a folder, one after the other, written, labelled and recorded in OUT."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crossmr.completion import (
    EXPECTED,
    FORMAT,
    Completed,
    Reference,
    Settings,
    check_settings,
    complete_study,
    hashes,
    read_reference,
    recorded,
)
from crossmr.data.dicom import Scans, convert
from crossmr.data.naming import SPOKEN, StudyFiles, find_studies
from crossmr.data.series import holds_dicom
from crossmr.data.study import Study, load_study
from crossmr.data.volume import read_volume, write_volume
from crossmr.device import choose_device
from crossmr.display import SILENT, Display
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import read_json, remove, sole_writer, write_json
from crossmr.model import CrossConditionedModel, load_model
from crossmr.picture import save_columns
from crossmr.profiles import Layout, Profile
from crossmr.store import find_model

PICTURES = "pictures"
"""The folder of an output that holds a picture a case."""
SCANS = "scans"
"""The folder of an output that holds what DICOM was converted to."""


@sole_writer("out")
def complete_cohort(
    cohort: Path | str,
    out: Path | str,
    model: CrossConditionedModel | Path | str | None = None,
    *,
    settings: Settings | None = None,
    device: str = "auto",
    mapping: Mapping[str, str] | None = None,
    overwrite: bool = False,
    profile: Profile = "labelled",
    keep_names: bool = False,
    display: Display = SILENT,
) -> dict[str, Any]:
    """Complete every study of a folder into OUT/CASE/, and return what OUT/manifest.json says.

    A study that fails is listed under 'failed' with its reason; the others are finished. A finished case, which is
    one with a manifest.json, is skipped unless `overwrite`. Another `profile` lays OUT out otherwise (profiles.py).

    A folder of DICOM is converted into OUT/scans first (`keep_names`, `mapping`: see `dicom.convert`), its series are
    registered where their grids differ, and what is synthesised is written as NIfTI and as a derived DICOM series.

    Raises:
        NamingError: no study at all. ModelError: no usable model. OutputError: OUT cannot be written.
    """
    layout, settings = Layout(Path(out), profile), settings or Settings()
    out = layout.records
    if not isinstance(model, CrossConditionedModel):
        model = load_model(find_model(model), choose_device(device))
    check_settings(model, settings)
    reference = read_reference(settings.reference, model, mapping, registered=settings.registered)
    scanned = holds_dicom(Path(cohort), mapping, apart=layout.out, display=display)
    summary: dict[str, Any] = {
        **{"completed": {}, "whole": [], "skipped": [], "failed": {}, "not_filled": {}, "notes": {}}
    }
    if scanned:
        settings = replace(settings, registered=settings.registered or None)
    else:
        found = find_studies(Path(cohort), mapping)
        summary["failed"] = layout.clashes([files.case for files in found])
        found = [files for files in found if files.case not in summary["failed"]]
    if os.path.exists(out / "manifest.json") and read_json(out / "manifest.json", OutputError).get("format") != FORMAT:
        raise OutputError(f"{out} holds a manifest.json that is not of a completed cohort; name another folder.")
    write_json(out / "manifest.json", {"format": FORMAT, "finished": False})
    layout.start(Path(cohort))
    scans: dict[str, Scans] = {}
    if scanned:
        studies = convert(
            *(Path(cohort), out / SCANS),
            mapping=mapping,
            keep_names=keep_names,
            apart=layout.out,
            display=display,
        )
        summary["failed"] = {one.case: one.refused for one in studies if one.refused}
        scans = {one.case: one for one in studies if not one.refused}
        found = [files for files in find_studies(out / SCANS) if files.case in scans] if scans else []

    def load(files: StudyFiles) -> Study | None:
        finished = (layout.folder(files.case) / "manifest.json").exists() and not overwrite
        return None if finished else load_study(files, registered=settings.registered)

    with display.task("complete", len(found)) as task:
        for files, loaded in _ahead(found, load):
            one = scans.get(files.case)
            try:
                manifest, skipped = _complete_case(
                    files, loaded, Path(cohort), layout, model, settings, reference, overwrite, one, display
                )
                if skipped:
                    summary["skipped"].append(files.case)
                elif manifest["synthetic"]:
                    summary["completed"][files.case] = list(manifest["synthetic"])
                elif not manifest["not_filled"]:
                    summary["whole"].append(files.case)
                if manifest["notes"]:
                    summary["notes"][files.case] = manifest["notes"]
                if manifest["not_filled"]:
                    summary["not_filled"][files.case] = manifest["not_filled"]
            except CrossmrError as error:
                summary["failed"][files.case] = str(error)
            except Exception as error:  # nobody foresaw it: the other patients go on all the same
                summary["failed"][files.case] = f"{files.case}: {type(error).__name__}: {error}"
            task.advance(files.case)
    body = {
        "format": FORMAT,
        "finished": True,
        "profile": profile,
        **summary,
        "settings": recorded(model, settings, reference),
    }
    write_json(out / "manifest.json", body)
    return body


def _ahead(
    found: Sequence[StudyFiles], load: Callable[[StudyFiles], Study | None]
) -> Iterator[tuple[StudyFiles, Future[Study | None]]]:
    """Every study's files with its volumes, which are read while the study before it is completed."""
    with ThreadPoolExecutor(1) as reader:
        following: Future[Study | None] | None = None
        for number, files in enumerate(found):
            loaded = following or reader.submit(load, files)
            wait([loaded])  # one study ahead, not more: memory
            following = reader.submit(load, found[number + 1]) if number + 1 < len(found) else None
            yield files, loaded


def _complete_case(
    files: StudyFiles,
    loaded: Future[Study | None],
    cohort: Path,
    layout: Layout,
    model: CrossConditionedModel,
    settings: Settings,
    reference: Reference | None,
    overwrite: bool,
    scans: Scans | None,
    display: Display,
) -> tuple[Mapping[str, Any], bool]:
    """Complete one case of a cohort and write it, its manifest last; returns that, and if it was finished before.

    `scans` are the DICOM series that it was converted from, if it was.
    """
    folder = layout.folder(files.case)
    done = folder / "manifest.json"
    if done.exists() and not overwrite:
        manifest = read_json(done, OutputError)
        if manifest.get("format") != FORMAT:
            raise OutputError(f"{done} is not crossmr's, so it is not replaced. Name another folder with -o.")
        changed = [
            what
            for what, now in (("settings", recorded(model, settings, reference)), ("given", hashes(files.images())))
            if manifest.get(what) != now
        ]
        if changed:
            what = " and ".join("other settings" if c == "settings" else "other input files" for c in changed)
            display.say(f"{files.case}: finished before with {what}, and kept; --overwrite does it again")
        return manifest, True
    start, given = time.perf_counter(), hashes(files.images())
    study = loaded.result() or load_study(files, registered=settings.registered)
    layout.check(study)
    result = complete_study(study, model, settings, given, reference)
    earlier = _earlier(layout, files.case, model, result)
    picture = layout.records / PICTURES / f"{files.case}.webp"
    written: list[Path] = []
    try:
        for path in (done, picture, *earlier):
            remove(path)
        manifest = {**result.manifest, "given": given, "paths": _seen_from(folder, files.images())}
        for modality, image in result.images.items():
            places = [(layout.image(files.case, modality), image)]
            if modality in result.deviations and (place := layout.deviation(files.case, modality)) is not None:
                places.append((place, result.deviations[modality]))
            for path, volume in places:
                write_volume(volume, path)
                written.append(path)
            names = [*_seen_from(folder, {str(i): path for i, (path, _) in enumerate(places)}).values(), None]
            manifest["synthetic"][modality] = {
                "file": names[0],
                "deviation": names[1],
                **manifest["synthetic"][modality],
            }
        if scans is not None:
            manifest["notes"] = [*scans.notes, *manifest["notes"]]
            manifest["series"] = {
                "taken": {m: {"series": series.number, "why": series.why} for m, series in scans.series.items()},
                "left_out": dict(scans.left_out),
            }
            _write_dicom(layout, study, scans, result, manifest, written)
        inputs = [path for modality, path in files.images().items() if modality in manifest["acquired"]]
        written += layout.finish(files.case, manifest, cohort, inputs)
        if result.columns:
            shown = save_columns(picture, result.columns, result.spacing_mm)
            manifest["picture"] = {"file": f"{PICTURES}/{picture.name}", "columns": shown}
            written.append(picture)
        manifest["seconds"] = round(time.perf_counter() - start, 3)
        write_json(done, manifest)
    except BaseException as error:
        for path in written:
            remove(path)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written: {error.strerror or error}.") from error
        raise
    return manifest, False


def _write_dicom(
    layout: Layout, study: Study, scans: Scans, result: Completed, manifest: dict[str, Any], written: list[Path]
) -> None:
    """Write each synthetic volume, and its deviation, as a derived series; name them in manifest and `written`."""
    from crossmr.data.derived import write_derived

    like = scans.series[next(iter(study.volumes))]
    settings = " ".join(str(manifest["settings"][key]) for key in ("model_sha256", "guidance", "samples", "seed"))
    for modality, made in manifest["synthetic"].items():
        for kind, image in (("", result.images[modality]), ("std", result.deviations.get(modality))):
            if image is None:
                continue
            what = f"{'Standard deviation of the error of s' if kind else 'S'}ynthetic {SPOKEN.get(modality, modality)}"
            sources = ", ".join(SPOKEN.get(m, m) for m in made["from"])
            path = write_derived(
                layout.dicom(study.case, modality, kind),
                read_volume(image).data,
                study.reference,
                like,
                {m: scans.series[m] for m in made["from"]},
                modality=modality,
                kind=kind,
                description=f"{what} by crossmr {version('crossmr')} from {sources}. {' '.join(made['warnings'])}",
                made=datetime.fromisoformat(manifest["created"]),
                settings=settings,
            )
            written.append(path)
        made["dicom"] = layout.dicom(study.case, modality).name


def _earlier(layout: Layout, case: str, model: CrossConditionedModel, result: Completed) -> list[Path]:
    """What was synthesised here before, which must not outlive its manifest.

    Raises:
        OutputError: an acquired scan lies where a synthetic one would be written.
    """
    modalities = dict.fromkeys((*EXPECTED, *model.config.targets))
    earlier = [layout.dicom(case, modality, kind) for modality in modalities for kind in ("", "std")]
    for modality, place in itertools.product(modalities, (layout.image, layout.deviation)):
        path = place(case, modality)
        if path is None or not path.exists():
            continue
        if read_volume(path).synthetic:
            earlier.append(path)
        elif modality in result.images:
            raise OutputError(f"{path} is an acquired scan and is not replaced. Name another folder with -o.")
    return earlier


def _seen_from(folder: Path, paths: Mapping[str, Path]) -> dict[str, str]:
    """Where files lie, as seen from a folder."""
    return {name: os.path.relpath(path, folder).replace(os.sep, "/") for name, path in paths.items()}
