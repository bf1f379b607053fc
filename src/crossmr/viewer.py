"""A completed study as a page to look at: NiiVue, the volumes and all else in one file, no network, no server."""

import base64
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crossmr.completion import DISCLAIMER, ENHANCEMENT, FORMAT
from crossmr.data.naming import SPOKEN, find_studies
from crossmr.data.study import Study, load_study
from crossmr.data.volume import compact, on_grid, read_volume
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import read_json, write_atomically
from crossmr.picture import BRIGHTEST, WHITE
from crossmr.profiles import records_of

PAGES = Path(__file__).parent / "pages"


def view_case(
    out: Path, case: str | None = None, *, scans: Path | None = None, mapping: Mapping[str, str] | None = None
) -> tuple[Path, list[str]]:
    """Write OUT/view/CASE.html, and return it with what a person should know.

    It holds the acquired scans and the synthetic ones, with their deviations, all on the model's [0, 1] scale.

    Args:
        out: what `complete` wrote.
        case: one of its cases; by default the first that was completed.
        scans: folder of the acquired scans, where they are no longer where they were, or where what was synthesised
            was acquired too: then it stands beside as the truth.
        mapping: see `find_studies`.

    Raises:
        OutputError: OUT holds no such case, or nothing can be written.
        NamingError, StudyError, VolumeError: of `scans`.
    """
    out = records_of(out)
    cases = sorted(path.parent.name for path in out.glob("*/manifest.json"))
    case = case or next((one for one in cases if _manifest(out, one).get("synthetic")), None)
    if case not in cases:
        listed = ", ".join(cases[:8]) + (", …" if len(cases) > 8 else "")
        raise OutputError(f"{out} holds no completed case{f' {case!r}' if case else ''}; it has {listed or 'none'}.")
    manifest = _manifest(out, case)
    if manifest.get("format") != FORMAT:
        raise OutputError(f"{out / case}/manifest.json is not crossmr's. Name a folder that 'crossmr complete' wrote.")
    notes: list[str] = []
    study = _acquired(out / case, manifest, scans, mapping, notes)
    volumes = []
    if study is not None:
        for modality in study.volumes:
            kind = "truth" if modality in manifest["synthetic"] else "acquired"
            image = on_grid(study.normalised(modality), study.reference, description=modality)
            volumes.append(_entry(modality, kind, compact(image)))
    for modality, made in manifest["synthetic"].items():
        for kind, name in (("synthetic", made["file"]), ("deviation", made["deviation"])):
            if name:
                volume = read_volume(out / case / name)
                volumes.append(_entry(modality, kind, compact(on_grid(volume.data, volume, description=modality))))
    if not volumes:
        raise OutputError(f"{case} of {out} has nothing to show: nothing was synthesised, and its scans are gone.")
    pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("view.html.j2").render(
        case=case,
        volumes=volumes,
        warnings=[DISCLAIMER, *([ENHANCEMENT] if "t1c" in manifest["synthetic"] else [])],
        niivue=(PAGES / "niivue.umd.js").read_text().replace("</script", "<\\/script"),
        licence=(PAGES / "niivue.LICENSE").read_text(),
        white=WHITE,
        brightest=BRIGHTEST,
        version=version("crossmr"),
    )
    target = out / "view" / f"{case}.html"
    write_atomically(target, page.encode(errors="replace"))
    return target, notes


def _manifest(out: Path, case: str) -> dict[str, Any]:
    return read_json(out / case / "manifest.json", OutputError)


def _acquired(
    folder: Path,
    manifest: Mapping[str, Any],
    scans: Path | None,
    mapping: Mapping[str, str] | None,
    notes: list[str],
) -> Study | None:
    """The scans that a case was completed from; None, with a note, where they are gone."""
    case = manifest["case"]
    if scans is not None:
        found = {files.case: files for files in find_studies(scans, mapping)}
        if case not in found:
            raise OutputError(f"{scans} holds no study {case}; it has {', '.join(list(found)[:8])}.")
        return load_study(found[case])
    try:
        files = {modality: folder / path for modality, path in manifest["paths"].items()}
        return load_study(files, case, registered=manifest.get("settings", {}).get("registered", False))
    except (CrossmrError, KeyError) as error:
        notes.append(f"the acquired scans are not shown ({error}); name their folder with --scans")
        return None


def _entry(modality: str, kind: str, content: bytes) -> dict[str, str]:
    name = f"{SPOKEN.get(modality, modality)} {kind}"
    return {"modality": modality, "kind": kind, "name": name, "data": base64.b64encode(content).decode()}
