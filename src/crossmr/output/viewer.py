"""A page to view a completed study: one HTML file with NiiVue and all volumes, without network or server."""

import base64
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crossmr.completion.layout import records_of
from crossmr.completion.ownership import other_scans
from crossmr.completion.private import read_paths
from crossmr.completion.status import is_case, reasons_of
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT
from crossmr.data.naming import display_name, find_studies
from crossmr.data.nifti import compact
from crossmr.data.study import Study, load_study
from crossmr.data.volume import Volume, on_grid, read_volume
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import is_page, read_json, refuse_foreign, write_atomically
from crossmr.picture import BRIGHTEST, MAPS, Array, Kind, window

PAGES = Path(__file__).parent / "pages"
ASSETS = ("niivue.umd.js", "view.js", "view.css")
"""Files of `PAGES` that a page which is not self-contained asks for."""


def view_case(
    out: Path, case: str | None = None, *, scans: Path | None = None, mapping: Mapping[str, str] | None = None
) -> tuple[Path, list[str]]:
    """Write OUT/view/CASE.html; returns its path, and notes for the user.

    It shows the acquired volumes, and the synthetic ones with their standard deviations, on the model's [0, 1] scale.

    Args:
        out: what `complete` wrote.
        case: one of its cases; by default the first that was completed.
        scans: folder of the acquired scans, if they have been moved, or if it also holds the scans that were
            synthesised: these are then shown as the truth.
        mapping: see `find_studies`.

    Raises:
        OutputError: OUT holds no such case, or nothing can be written.
        NamingError, StudyError, VolumeError: of `scans`.
    """
    out = records_of(out)
    case, manifest = _choose(out, case)
    target = out / "view" / f"{case}.html"
    refuse_foreign(target, is_page)
    volumes, notes = _volumes(out, manifest, scans, mapping)
    for volume in volumes:
        volume["data"] = base64.b64encode(volume.pop("content")).decode()
    page = _page(
        manifest,
        volumes,
        linked=None,
        niivue=(PAGES / "niivue.umd.js").read_text().replace("</script", "<\\/script"),
        css=(PAGES / "view.css").read_text(),
        js=(PAGES / "view.js").read_text(),
    )
    write_atomically(target, page)
    return target, notes


def write_linked(out: Path, case: str, folder: Path, linked: str) -> list[str]:
    """Write the same page for a server: FOLDER/index.html, and its volumes beside it; returns notes for the user.

    It says no verdict; the server's own page does.

    Args:
        out: what `complete` wrote.
        case: one of its cases.
        folder: a new folder.
        linked: the way from the page to what `ASSETS` names.

    Raises:
        OutputError: see `view_case`.
    """
    out = records_of(out)
    _, manifest = _choose(out, case)
    volumes, notes = _volumes(out, manifest, None, None)
    for number, volume in enumerate(volumes):
        volume["url"] = f"{number}.nii.gz"
        write_atomically(folder / volume["url"], volume.pop("content"))
    write_atomically(folder / "index.html", _page(manifest, volumes, linked=linked))
    return notes


def _page(manifest: Mapping[str, Any], volumes: Sequence[dict[str, Any]], **how: Any) -> bytes:
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("view.html.j2").render(
        case=manifest["case"],
        volumes=_in_one_window(volumes),
        look_at=manifest.get("look_at", {}).get("mm"),
        verdict=manifest.get("verdict", "look"),
        reasons=[reason["text"] for reason in reasons_of(manifest)],
        warnings=[
            DISCLAIMER if manifest["synthetic"] else "Nothing was synthesised: these are the acquired scans.",
            *([ENHANCEMENT] if "t1c" in manifest["synthetic"] else []),
        ],
        licence=(PAGES / "niivue.LICENSE").read_text(),
        version=version("crossmr"),
        brightest=BRIGHTEST,
        **how,
    )
    return page.encode(errors="replace")


def _volumes(
    out: Path, manifest: Mapping[str, Any], scans: Path | None, mapping: Mapping[str, str] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """What a page shows, and notes for the user."""
    case = manifest["case"]
    study, notes = _acquired(out, manifest, scans, mapping)
    volumes = [*([] if study is None else _study_entries(study, manifest)), *_synthetic_entries(out / case, manifest)]
    if not volumes:
        raise OutputError(f"{case} of {out} has nothing to show: nothing was synthesised, and its scans are gone.")
    return volumes, notes


def _choose(out: Path, case: str | None) -> tuple[str, dict[str, Any]]:
    """A case, by default the first with a synthetic volume, and its manifest."""
    manifests = {path.parent.name: path for path in sorted(out.glob("*/manifest.json"))}
    records = ((name, read_json(path, OutputError)) for name, path in manifests.items())
    case = case or next((name for name, record in records if record.get("synthetic")), None)
    if case not in manifests:
        listed = ", ".join([*manifests][:8]) + (", …" if len(manifests) > 8 else "")
        raise OutputError(f"{out} holds no completed case{f' {case!r}' if case else ''}; it has {listed or 'none'}.")
    manifest = read_json(manifests[case], OutputError)
    if not is_case(manifest, case):
        raise OutputError(f"{manifests[case]} is not crossmr's. Name a folder that 'crossmr complete' wrote.")
    return case, manifest


def _acquired(
    out: Path, manifest: Mapping[str, Any], scans: Path | None, mapping: Mapping[str, str] | None
) -> tuple[Study | None, list[str]]:
    """The scans that a case was completed from; None, and a note, if they cannot be read any more."""
    case, register = manifest["case"], manifest.get("settings", {}).get("register", "never")
    if scans is not None:
        studies = {files.case: files for files in find_studies(scans, mapping)}
        if case not in studies:
            raise OutputError(f"{scans} holds no study {case}; it has {', '.join([*studies][:8])}.")
        given = {m: path for m, path in studies[case].images().items() if m in manifest["acquired"]}
        listed = ", ".join(other_scans(manifest, given))
        said = f"{listed} of {scans} is not what {case} was completed from, and may be another patient's"
        return load_study(studies[case], register=register, labels=False), [said] if listed else []
    try:
        paths = read_paths(out, case)
        if others := other_scans(manifest, paths):
            raise OutputError(f"{', '.join(others)} where they lay is another scan now")
        return load_study(paths, case, register=register), []
    except CrossmrError as error:
        return None, [f"the acquired scans are not shown ({error}); name their folder with --scans"]


def _study_entries(study: Study, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The volumes of a study: the truth where the modality was synthesised, else acquired."""
    return [
        _entry(m, "truth" if m in manifest["synthetic"] else "acquired", study.normalised(m), study.reference)
        for m in study.volumes
    ]


def _synthetic_entries(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The synthetic volumes of a case, each followed by its standard deviation, where there is one."""
    entries = []
    for modality, record in manifest["synthetic"].items():
        names: dict[Kind, str | None] = {"synthetic": record["file"], "standard deviation": record["std"]}
        for kind, name in names.items():
            if name is not None:
                volume = read_volume(folder / name)
                data = _on_unit_scale(volume.data, kind, record.get("scale"))
                entries.append(_entry(modality, kind, data, volume))
    return entries


def _in_one_window(volumes: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The volumes with one window per contrast: that of the real one, where there is one, else of the synthetic one."""
    windows = {v["modality"]: (v["black"], v["white"]) for v in reversed(volumes) if v["kind"] not in MAPS}
    for volume in volumes:
        if volume["kind"] not in MAPS:
            volume["black"], volume["white"] = windows[volume["modality"]]
    return volumes


def _on_unit_scale(data: Array, kind: Kind, scale: Mapping[str, Any] | None) -> Array:
    """A synthetic volume, or its standard deviation, on the [0, 1] scale; `scale` is the manifest's map to another."""
    if scale is None:
        return data
    offset = np.float32(0 if kind in MAPS else scale["intercept"])
    return np.where(data != 0, (data - offset) / np.float32(scale["slope"]), np.float32(0))


def _entry(modality: str, kind: Kind, data: Array, grid: Volume) -> dict[str, Any]:
    """A volume as a page holds it, with its file of NIfTI as 'content'."""
    content = compact(on_grid(data, grid, description=modality))
    black, white = (0.0, BRIGHTEST) if kind in MAPS else window(data)
    return {
        "modality": modality,
        "kind": kind,
        "name": f"{display_name(modality)} {kind}",
        "black": round(black, 4),
        "white": round(white, 4),
        "content": content,
    }
