"""Folders of DICOM, as a scanner or an archive leaves them: sorted by pydicom, converted to NIfTI by dcm2niix.

An extra (`pip install crossmr[dicom]`). dcm2niix is what the field converts with: it knows the vendors' habits,
enhanced multi-frame images and every transfer syntax, and its wheel carries the program. Which series is which contrast
is told from its tags (contrast.py). Patients are renamed, unless their names are to be kept.
"""

import fnmatch
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossmr.data.contrast import Acquisition, Verdict, names_agent, recognise_contrast
from crossmr.data.naming import BIDS_ROOT, in_usual_order, is_nifti, mapping_key, recognise
from crossmr.data.volume import on_grid, read_volume, write_volume
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, StudyError
from crossmr.files import digest, read_json, remove, sole_writer, walk, write_json

FORMAT = "crossmr-scans"
FEWEST_SLICES = 8
UNEVEN = 0.05
"""Of the slice distance: what one distance may differ from the others."""
ALIKE = 1.2
"""Two series whose voxels differ by less than this factor are equally fine: then the later one is taken."""

_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "StudyDate"),
    *("Modality", "ImageType", "SeriesNumber", "SeriesDescription", "ProtocolName", "AcquisitionTime", "SeriesTime"),
    *("ScanningSequence", "SequenceVariant", "RepetitionTime", "EchoTime", "InversionTime", "AngioFlag"),
    *("ContrastBolusAgent", "ContrastBolusAgentSequence", "ContrastBolusVolume", "AcquisitionContrast"),
    *("DiffusionBValue", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns"),
    *("NumberOfFrames", "EchoPulseSequence", "InversionRecovery", "SamplesPerPixel", "ManufacturerModelName"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_MR = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.4",  # MR
        "1.2.840.10008.5.1.4.1.1.4.1",  # enhanced MR
        "1.2.840.10008.5.1.4.1.1.4.4",  # legacy converted enhanced MR
    }
)
_ENHANCED = _MR - {"1.2.840.10008.5.1.4.1.1.4"}
_DICOM_ROOT = "1.2.840.10008"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """One image: where it lies, and what it is called."""

    path: Path
    sop_class: str
    sop_instance: str
    position: Floats
    """(3,) of its first voxel's centre, LPS, mm; of an enhanced image (F, 3)."""


@dataclass(frozen=True, eq=False)
class Series:
    """One series of one contrast, or what else a folder holds."""

    patient: str
    study: str
    """Its UID."""
    date: str
    number: int | None
    time: str
    planes: tuple[Plane, ...]
    orientation: Floats
    """(2, 3) directions of rows and columns, LPS; empty where unknown."""
    voxel_mm: tuple[float, ...]
    acquisition: Acquisition
    original: bool
    """Image Type says ORIGINAL."""
    modality: str | None
    why: str
    """Which tags told its contrast, or why it was left out."""

    @cached_property
    def name(self) -> str:
        """For messages."""
        return "series without a number" if self.number is None else f"series {self.number}"


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


def holds_dicom(
    folder: Path,
    mapping: Mapping[str, str] | None = None,
    *,
    apart: Path | None = None,
    display: Display = SILENT,
) -> bool:
    """Whether a folder is to be read as DICOM: it holds some, and no NIfTI whose name says which contrast it is.

    Where it holds both, that is said, and the NIfTI counts. `apart` is a folder in it that does not count, `mapping` as
    in `find_studies`.
    """
    nifti: list[Path] = []
    others: list[Path] = []
    for path in _files(folder, apart):
        (nifti if is_nifti(path.name) else others).append(path)
    found = next((path for path in others if path.name.upper() == "DICOMDIR" or _is_dicom(path)), None)
    named = [study.case for study in recognise(nifti, mapping) if study.candidates]
    if found is not None and named and not (folder / BIDS_ROOT).exists():
        display.say(
            f"{folder} holds NIfTI ({', '.join(named[:3])}{', …' if len(named) > 3 else ''}) and DICOM ({found.name}): "
            "the DICOM is passed over. Give the folder of the DICOM alone to complete that."
        )
    return found is not None and not named


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


def find_series(folder: Path, mapping: Mapping[str, str] | None = None, apart: Path | None = None) -> list[Series]:
    """Every series of MR images under a folder, with what it is, or why it is none of ours; sorted.

    `mapping` and `apart` as in `convert`.
    """
    pydicom = _pydicom()
    mapping = {mapping_key(key): glob for key, glob in mapping.items()} if mapping else None
    groups: dict[tuple[Any, ...], list[tuple[Path, Any]]] = defaultdict(list)
    seen: set[str] = set()
    with pydicom.config.disable_value_validation():
        for path in _files(folder, apart):
            header = _header(pydicom, path)
            if header is None or str(header.get("Modality", "MR")) != "MR" or header.SOPClassUID not in _MR:
                continue
            if header.SOPInstanceUID in seen:  # the same image twice in one export
                continue
            seen.add(str(header.SOPInstanceUID))
            key = (
                _study(header, path),
                str(header.get("SeriesInstanceUID", header.get("SeriesNumber", path.parent))),
                "" if header.SOPClassUID in _ENHANCED else str(_number(header, "EchoTime")),
                "" if header.SOPClassUID in _ENHANCED else "\\".join(_texts(header, "ImageType")),
            )
            groups[key].append((path, header))
        made = [_series(images, mapping) for images in groups.values()]
    return sorted(made, key=lambda s: (s.patient, s.date, s.study, s.number or 0, s.time, str(s.planes[0].path)))


def _series(images: Sequence[tuple[Path, Any]], mapping: Mapping[str, str] | None) -> Series:
    header = images[0][1]
    planes, orientations, spacings = [], [], []
    for path, image in images:
        position, orientation, spacing = _geometry(image)
        planes.append(Plane(path, str(image.SOPClassUID), str(image.SOPInstanceUID), position))
        orientations.append(orientation)
        spacings.append(spacing)
    acquisition = _acquisition(header)
    verdict = recognise_contrast(acquisition)
    description = acquisition.description
    if mapping:
        named = [m for m, glob in mapping.items() if fnmatch.fnmatchcase(description, glob)]
        if named:
            verdict = Verdict(named[0], "named so by --map", True)
        elif verdict.modality in mapping:
            verdict = Verdict(None, f"not the {verdict.modality} that --map names", True)
    if description.upper().startswith("SYNTHETIC") or header.get("ManufacturerModelName") == "crossmr":
        verdict = Verdict(None, "itself synthetic", True)
    if int(header.get("SamplesPerPixel", 1) or 1) != 1:
        verdict = Verdict(None, "in colour", True)
    wrong, between = _fault(planes, orientations)
    if verdict.modality is not None and wrong:
        verdict = Verdict(None, wrong, True)
    return Series(
        patient=str(header.get("PatientID", "")),
        study=_study(header, images[0][0]),
        date=str(header.get("StudyDate", "")),
        number=None if (number := _number(header, "SeriesNumber")) is None else int(number),
        time=str(header.get("AcquisitionTime", "") or header.get("SeriesTime", "")),
        planes=tuple(planes),
        orientation=orientations[0],
        voxel_mm=tuple(float(side) for side in (*spacings[0], between)),
        acquisition=acquisition,
        original="DERIVED" not in acquisition.kinds,
        modality=verdict.modality,
        why=verdict.why,
    )


def _study(header: Any, path: Path) -> str:
    """The study's UID; where it was removed, what else tells studies apart."""
    return str(header.get("StudyInstanceUID") or (header.get("PatientID"), header.get("StudyDate"), path.parent))


def _fault(planes: Sequence[Plane], orientations: Sequence[Floats]) -> tuple[str, float]:
    """What forbids making a volume of these images, empty if nothing does, and the distance of the slices in mm."""
    first = orientations[0]
    if any(o.shape != (2, 3) for o in orientations):
        return "its images do not say where they lie", 0.0
    if any(not np.allclose(o, first, atol=1e-3) for o in orientations):
        return "its slices lie in several directions, as a localiser's", 0.0
    normal = np.cross(*first)
    along = np.sort(np.concatenate([np.atleast_2d(plane.position) @ normal for plane in planes]))
    steps = np.diff(along)
    if len(along) < FEWEST_SLICES:
        return f"{len(along)} slices only", 0.0
    step = float(np.median(steps))
    if (steps < 0.01).any():
        return "several images lie at one place: echoes, times or directions that its tags do not tell apart", step
    if (np.abs(steps - step) > max(UNEVEN * step, 0.02)).any():
        k = int(np.argmax(np.abs(steps - step)))
        return (
            f"its slices are {step:.2f} mm apart, but {steps[k]:.2f} mm between the {k + 1}th and the next of "
            f"{len(along)}: some are missing. Export the whole series"
        ), step
    return "", step


def _geometry(image: Any) -> tuple[Floats, Floats, Floats]:
    """Position (3,), or (F, 3) of an enhanced image, orientation (2, 3) and pixel spacing (2,); empty where missing."""
    nothing = np.zeros(0)
    orientation = _numbers(_find(image, "ImageOrientationPatient"))
    spacing = _numbers(_find(image, "PixelSpacing"))
    frames = image.get("PerFrameFunctionalGroupsSequence") or [image]
    positions = [_numbers(_find(frame, "ImagePositionPatient")) for frame in frames]
    if len(orientation) != 6 or len(spacing) != 2 or any(len(p) != 3 for p in positions):
        return nothing, nothing, nothing
    position = np.stack(positions) if image.SOPClassUID in _ENHANCED else positions[0]
    return position, orientation.reshape(2, 3), spacing


def _acquisition(header: Any) -> Acquisition:
    pulse = {"SPIN": {"SE"}, "GRADIENT": {"GR"}, "BOTH": {"SE", "GR"}}.get(
        str(_find(header, "EchoPulseSequence")), set()
    )
    families = {*_texts(header, "ScanningSequence"), *pulse} | (
        {"IR"} if _find(header, "InversionRecovery") == "YES" else set()
    )
    b_value = _number(header, "DiffusionBValue")
    agent = names_agent(str(header.get("ContrastBolusAgent") or ""))
    injected = (_number(header, "ContrastBolusVolume") or 0) > 0
    if header.get("ContrastBolusAgentSequence") or (agent is None and injected):
        agent = True
    return Acquisition(
        families=frozenset(families),
        variants=frozenset(_texts(header, "SequenceVariant")),
        tr_ms=_number(header, "RepetitionTime"),
        te_ms=_first(_number(header, "EffectiveEchoTime"), _number(header, "EchoTime")),
        ti_ms=_first(_number(header, "InversionTime"), _number(header, "InversionTimes")),
        agent=agent,
        acquired=str(_find(header, "AcquisitionContrast") or ""),
        kinds=frozenset({*_texts(header, "ImageType"), *_texts(header, "FrameType")}),
        angiography=header.get("AngioFlag") == "Y",
        diffusion=b_value is not None and b_value > 0,
        description=str(header.get("SeriesDescription") or header.get("ProtocolName") or ""),
    )


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
    pydicom = _pydicom()
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


def _files(folder: Path, apart: Path | None = None) -> Iterator[Path]:
    """Every file below, links followed, without hidden ones and those of one folder; sorted."""
    root = Path(os.path.abspath(folder))
    if os.path.isfile(root):
        raise NamingError(f"{folder}: is a file, not a folder: give the folder that holds it.")
    for place, folders, files in walk(root):
        folders[:] = [name for name in folders if apart is None or os.path.join(place, name) != os.path.abspath(apart)]
        yield from (Path(place, name) for name in files)


def _is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM does; those without a preamble start with a group 0002 or 0008."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:132] == b"DICM" or (
        len(start) > 8 and start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x02\x00\x00\x00")
    )


def _header(pydicom: Any, path: Path) -> Any:
    """A file's tags, or None where it is no DICOM image."""
    if path.name.upper() == "DICOMDIR" or not _is_dicom(path):
        return None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
        _drop_broken(header)
        return header if header.get("SOPClassUID") and header.get("SOPInstanceUID") else None
    except Exception:  # pydicom raises whatever its parsing runs into
        return None


def _drop_broken(item: Any) -> None:
    """Treat elements whose values make no sense as missing; pydicom finds out when they are asked for."""
    for tag in list(item.keys()):
        try:
            element = item[tag]
            if element.VR == "SQ":
                for nested in element.value:
                    _drop_broken(nested)
        except Exception:  # whatever pydicom's parsing runs into
            del item[tag]


def _find(item: Any, keyword: str) -> Any:
    """The value of a tag: of the image, or of its shared or first frame's functional groups."""
    if keyword in item and item.get(keyword) not in (None, ""):
        return item.get(keyword)
    for element in item:
        if element.VR == "SQ" and element.value and element.keyword != "ReferencedImageSequence":
            value = _find(element.value[0], keyword)
            if value is not None:
                return value
    return None


def _number(item: Any, keyword: str) -> float | None:
    try:
        value = _find(item, keyword)
        number = float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if np.isfinite(number) else None


def _numbers(value: Any) -> Floats:
    try:
        return np.atleast_1d(np.array(value, dtype=np.float64)) if value is not None else np.zeros(0)
    except (TypeError, ValueError):
        return np.zeros(0)


def _texts(item: Any, keyword: str) -> list[str]:
    value = _find(item, keyword)
    if value is None:
        return []
    return [str(value).strip()] if isinstance(value, str) else [str(part).strip() for part in value]


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.config
    except ImportError as error:
        raise ConfigError(
            "DICOM needs pydicom and dcm2niix. Install them with: pip install 'crossmr[dicom]'"
        ) from error
    return pydicom


def _converter() -> str:
    """The program: that of the wheel, which is not imported, since its releases without one download it then."""
    _pydicom()
    wheel = importlib.util.find_spec("dcm2niix")
    places = [] if wheel is None or wheel.origin is None else [str(Path(wheel.origin).parent)]
    found = shutil.which("dcm2niix", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise ConfigError("DICOM needs dcm2niix. Install it with: pip install 'crossmr[dicom]'")
    return found
