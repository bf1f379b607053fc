"""Folders of DICOM, as a scanner or an archive leaves them: sorted by pydicom, converted to NIfTI by dcm2niix.

An extra (`pip install crossmr[dicom]`). dcm2niix is what the field converts with: it knows the vendors' habits,
enhanced multi-frame images and every transfer syntax, and its wheel carries the program. Which series is which contrast
is told from its tags (contrast.py). Patients are renamed, unless their names are to be kept.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crossmr.data.naming import in_usual_order
from crossmr.data.series import Series, find_series, import_pydicom
from crossmr.data.volume import on_grid, read_volume, write_volume
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, StudyError
from crossmr.files import digest, read_json, remove, sole_writer, write_json

FORMAT = "crossmr-scans"
ALIKE = 1.2
"""Two series whose voxels differ by less than this factor are equally fine: then the later one is taken."""


@dataclass(frozen=True, eq=False)
class Scans:
    """One study that was converted."""

    case: str
    series: Mapping[str, Series]
    """Modality → the series that it was made of."""
    left_out: Mapping[str, str]
    """Series → why."""
    refused: str = ""
    """Why there is nothing of it."""
    notes: Sequence[str] = field(default_factory=tuple)


@sole_writer("out")
def convert(
    folder: Path,
    out: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    keep_names: bool = False,
    apart: Path | None = None,
    display: Display = SILENT,
) -> list[Scans]:
    """Convert every study of a folder of DICOM into OUT/CASE/CASE-MODALITY.nii.gz, on the series' own grids.

    A case is called after the hashes of its study's UIDs, `sub-1f0c…_ses-77ab…`, or, with `keep_names`, after patient
    ID and date. `mapping` is modality → glob on the series' description, for what tags cannot tell; `apart` a folder
    that is passed over. What was taken and
    left out, and why, stands in OUT/CASE/series.json, which is written last; a case that has it is not done again.

    Raises:
        ConfigError: pydicom or dcm2niix is not installed. NamingError: no MR image. OutputError: OUT cannot be written.
    """
    converter = _converter()
    found = find_series(folder, mapping, apart or out)
    if not found:
        raise NamingError(f"{folder}: no MR image in it or below. Give the folder of the studies' DICOM files.")
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in found:
        studies[series.study].append(series)
    cases = _cases(found, keep_names)
    done = []
    with display.task("convert", len(studies)) as task:
        for study in sorted(studies, key=cases.__getitem__):
            scans = _convert_study(cases[study], studies[study], out, converter, keep_names)
            done.append(scans)
            task.advance(scans.case)
    return done


def _choose(found: Sequence[Series]) -> tuple[dict[str, Series], dict[str, str], list[str]]:
    """One series a modality, why each other was left out, and what a reader should know."""
    chosen: dict[str, Series] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []

    def name(series: Series) -> str:
        plain, k = series.name, 1
        while (unique := plain if k == 1 else f"{plain} ({k})") in left_out:
            k += 1
        return unique

    for series in found:
        if series.modality is None:
            left_out[name(series)] = series.why
    for modality in in_usual_order({s.modality for s in found if s.modality}):
        rivals = [s for s in found if s.modality == modality]
        told_apart = modality != "t1n" or len(rivals) == 1 or any(s.modality == "t1c" for s in found)
        best = rivals[0]
        for rival in rivals[1:]:
            better = (rival.original, _coarser(best, rival))
            worse = (best.original, _coarser(rival, best))
            preferred = rival.time >= best.time
            if not told_apart:  # the agent comes later
                plain = rival.acquisition.agent is False, best.acquisition.agent is False
                preferred = plain[0] if plain[0] != plain[1] else rival.time < best.time
            best = rival if better > worse or (better == worse and preferred) else best
        chosen[modality] = best
        for rival in rivals:
            if rival is not best:
                reason = (
                    f"{'coarser' if _coarser(rival, best) else 'earlier' if rival.time <= best.time else 'later'} than"
                )
                if rival.original < best.original:
                    reason = "derived, unlike"
                left_out[name(rival)] = f"another {modality}, {reason} {best.name}"
        if not told_apart:
            listed = ", ".join(s.name for s in rivals)
            notes.append(
                f"{listed} are T1, and no tag says which was acquired with contrast agent; {best.name} was taken for "
                "the one without. Name it with --map t1c='DESCRIPTION' if that is wrong."
            )
    return chosen, left_out, notes


def _coarser(a: Series, b: Series) -> bool:
    """Whether the longest side of a voxel is, or, where these are alike, its volume."""
    longest = max(a.voxel_mm), max(b.voxel_mm)
    if max(longest) > ALIKE * min(longest):
        return longest[0] > longest[1]
    return math.prod(a.voxel_mm) > ALIKE * math.prod(b.voxel_mm)


def _convert_study(case: str, found: Sequence[Series], out: Path, converter: str, keep_names: bool) -> Scans:
    """Convert one study; what goes wrong with it is returned, not raised."""
    chosen, left_out, notes = _choose(found)
    folder = out / case
    record_path = folder / "series.json"
    if not chosen:
        _clear(folder, case, ())
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        return Scans(
            *(case, {}, left_out),
            f"{case}: no T1, T1ce, T2, FLAIR or PD among its {len(found)} series ({reasons}). "
            "Export the series that are missing, or name one with --map t1n='DESCRIPTION'.",
        )
    record = {
        "format": FORMAT,
        "case": case,
        "of": digest("\n".join(p.sop_instance for series in chosen.values() for p in series.planes)),
        "taken": {m: _described(s, keep_names) for m, s in chosen.items()},
        "left_out": left_out,
        "notes": notes,
    }
    scans = Scans(case, chosen, left_out, notes=notes)
    images = {m: folder / f"{case}-{m}.nii.gz" for m in chosen}
    if record_path.exists():
        before = read_json(record_path, OutputError)
        if before.get("format") != FORMAT:
            raise OutputError(f"{record_path} is not crossmr's, so it is not replaced. Name another folder.")
        if before == record and all(path.exists() for path in images.values()):
            return scans
    try:
        record_path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{record_path} could not be written: {error.strerror}. Name another folder.") from error
    _clear(folder, case, images.values())
    refused = {}
    for modality, series in chosen.items():
        try:
            _convert_series(case, series, images[modality], converter)
        except OutputError:
            raise
        except CrossmrError as error:
            refused[modality] = str(error)
    if refused:  # a study with a hole where a scan is would be filled with a guess
        for path in images.values():
            path.unlink(missing_ok=True)
        return replace(scans, series={}, refused="; ".join(refused.values()))
    write_json(record_path, record)
    return scans


def _clear(folder: Path, case: str, keep: Collection[Path]) -> None:
    """Remove what an earlier conversion took for a contrast, and this one does not."""
    for path in sorted(folder.glob(f"{case}-*.nii.gz")):
        if path not in keep and path.name != f"{case}-seg.nii.gz":
            remove(path)


def _described(series: Series, keep_names: bool) -> dict[str, Any]:
    said = {"series": series.number, "why": series.why, "images": len(series.planes)}
    return {**said, "description": series.acquisition.description} if keep_names else said


def _convert_series(case: str, series: Series, path: Path, converter: str) -> None:
    """One series as one NIfTI file, without the texts that dcm2niix leaves in its header."""
    with tempfile.TemporaryDirectory(prefix="crossmr-") as temporary:
        inside = Path(temporary, "in")
        inside.mkdir()
        links = [inside / f"{index:05d}.dcm" for index in range(len(series.planes))]
        for plane, link in zip(series.planes, links, strict=True):
            _link(plane.path, link)
        volumes, said = _run(converter, inside, Path(temporary, "out"))
        if not volumes:  # deflated, say: pydicom unpacks what dcm2niix does not
            for plane, link in zip(series.planes, links, strict=True):
                link.unlink()
                _unpack(case, series, plane.path, link)
            volumes, said = _run(converter, inside, Path(temporary, "out"))
        if len(volumes) != 1:
            hint = f" (dcm2niix: {said.replace(temporary, '')})" if said else ""
            raise StudyError(
                f"{case}: {series.name} became {len(volumes) or 'no'} volumes, wanted one{hint}. "
                "Export it again, or leave it out of the folder."
            )
        volume = read_volume(volumes[0], name=f"{case}: {series.name}")
        write_volume(on_grid(volume.data, volume, description="acquired"), path)


def _run(converter: str, inside: Path, made: Path) -> tuple[list[Path], str]:
    """Run dcm2niix on a folder that holds one series; returns the volumes and the first thing it complained of."""
    made.mkdir(exist_ok=True)
    # nothing is rotated, cropped, or read from a user's defaults; display scaling, and one volume a series
    options = ["-g", "i", "-b", "n", "-z", "n", "-x", "i", "-p", "n", "-m", "y", "-w", "1", "-d", "0", "-f", "volume"]
    result = subprocess.run([converter, *options, "-o", made, inside], capture_output=True, text=True, errors="replace")
    complaint = re.search(r"(?:Error|Warning|Unsupported)[^\n]*", result.stdout + result.stderr)
    return sorted(made.glob("*.nii")), complaint[0] if complaint else ""


def _unpack(case: str, series: Series, path: Path, unpacked: Path) -> None:
    """Write an image without compression.

    Raises:
        StudyError: pydicom cannot either.
    """
    pydicom = import_pydicom()
    try:
        image = pydicom.dcmread(path, force=True)
        if image.file_meta.TransferSyntaxUID.is_compressed and not image.file_meta.TransferSyntaxUID.is_deflated:
            image.decompress()
        else:
            image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.save_as(unpacked, enforce_file_format=True)
    except Exception as error:  # pydicom raises whatever its parsing runs into
        reason = " ".join(str(error).split())
        raise StudyError(
            f"{case}: {series.name} cannot be read by dcm2niix, nor by pydicom ({reason}). "
            "Export it again without compression, or leave it out of the folder."
        ) from error


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # no links on this file system
        shutil.copyfile(path, link)


def _cases(found: Sequence[Series], keep_names: bool) -> dict[str, str]:
    """Study UID → what its case is called; studies of one patient share the `sub-`."""
    first: dict[str, str] = {}
    for series in sorted(found, key=lambda s: (s.date, s.study)):
        first.setdefault(series.patient or series.study, series.study)
    cases: dict[str, str] = {}
    for series in found:
        subject, session = digest(first[series.patient or series.study])[:10], digest(series.study)[:8]
        if keep_names:
            subject = re.sub("[^A-Za-z0-9]", "", series.patient) or subject
            session = re.sub("[^A-Za-z0-9]", "", series.date) or session
        cases[series.study] = f"sub-{subject}_ses-{session}"
    names = list(cases.values())
    return {
        study: case if names.count(case) == 1 else f"{case}x{digest(study)[:6]}"  # two examinations in one day
        for study, case in cases.items()
    }


def _converter() -> str:
    """The program: that of the wheel, which is not imported, since its releases without one download it then."""
    import_pydicom()
    wheel = importlib.util.find_spec("dcm2niix")
    places = [] if wheel is None or wheel.origin is None else [str(Path(wheel.origin).parent)]
    found = shutil.which("dcm2niix", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise ConfigError("DICOM needs dcm2niix. Install it with: pip install 'crossmr[dicom]'")
    return found
