"""Folders of DICOM from a scanner or an archive: sorted by pydicom, converted to NIfTI by dcm2niix.

An extra (`pip install crossmr[dicom]`). dcm2niix is the converter that most of the field uses: it handles the vendors'
peculiarities, enhanced multi-frame images and most transfer syntaxes, and its wheel contains the program. contrast.py
recognises the contrast of a series from its tags. Cases get pseudonyms unless names are to be kept.
"""

import contextlib
import errno
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.naming import in_usual_order
from crossmr.data.volume import Volume, on_grid, read_volume, write_volume
from crossmr.dicom.agents import several_acquisitions, tell_apart, undecided
from crossmr.dicom.contrast import covers, says_agent
from crossmr.dicom.headers import import_pydicom
from crossmr.dicom.series import CONVERTED, TELLING, Series, find_series, folders_of_part, listed
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, CrossmrError, NamingError, OutputError, StudyError
from crossmr.files import (
    digest,
    is_record,
    locked,
    read_json,
    refuse_foreign,
    remove,
    temporary_folder,
    unfinished_path,
    write_json,
)
from crossmr.parts import WORK, Claims, Part, note_done

FORMAT = "crossmr-scans"
ALIKE = 1.2
"""Two series whose voxels differ by less than this factor count as equally fine, and the later one is taken."""

MUCH = 2.0
"""Slices that are thinner by more than this factor count more than the plane that most of the study shares."""
HEAD_MM = 140.0
"""What a series covers beyond this length, along any axis, counts for nothing."""
PATIENCE, BYTES_PER_SECOND, FILES_PER_SECOND = 300.0, 1e6, 2.0
"""Seconds that dcm2niix may take for any series, and what it gets through at the least: a hundredth of the usual."""
COVERS, PARTLY = 0.8, 0.65
"""A series that covers less than the first fraction of what another does is not taken before it; one that covers less
than the second fraction of what another contrast does may lack a part."""


@dataclass(frozen=True, eq=False)
class Scans:
    """A study that was converted, or refused."""

    case: str
    series: Mapping[str, Series]
    """Modality → the series that was converted."""
    left_out: Mapping[str, str]
    """Name of a series → why it was not taken."""
    refused: str = ""
    """Why nothing of the study was converted; empty where it was."""
    notes: Sequence[str] = field(default_factory=tuple)
    unreadable: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    """Name of a series → files that may be of it and cannot be read; not for sharing."""

    def lines(self) -> list[str]:
        """What a user reads of it: which series was taken for which contrast, and why the others were not."""
        said = [f"{series.name} is {modality} ({series.why})" for modality, series in self.series.items()]
        said += [f"{name} excluded: {why}" for name, why in self.left_out.items()]
        lost = [(name, path) for name, paths in self.unreadable.items() for path in paths]
        said += [f"{path} cannot be read, or not to its end: {name} may lack it" for name, path in lost]
        return [f"{self.case}: {line}" for line in said]

    @property
    def record(self) -> dict[str, Any]:
        """Which series was taken for which contrast, and what was not taken, with the reasons."""
        taken = {m: {"series": series.name, "why": series.why} for m, series in self.series.items()}
        return {"taken": taken, "excluded": dict(self.left_out), "notes": list(self.notes)}


def convert(
    folder: Path,
    out: Path,
    *,
    mapping: Mapping[str, str] | None = None,
    keep_names: bool = False,
    exclude: Path | None = None,
    part: Part | None = None,
    display: Display = SILENT,
) -> list[Scans]:
    """Convert every study of a folder of DICOM into OUT/CASE/CASE-MODALITY.nii.gz, on the series' own grids.

    OUT/CASE/series.json says which series were taken and left out, and why. It is written first, as not finished, and
    last; a finished case is not converted again. No image is replaced or deleted that it does not list.

    Args:
        folder: searched at any depth.
        out: the folder to write to.
        mapping: modality → glob on the series' description, for what tags cannot tell.
        keep_names: name cases after patient ID and date, not after hashes of UIDs (`sub-1f0c…_ses-77ab…`).
        exclude: a folder that is not searched; by default `out`.
        part: which of the folders in `folder`, where several processes share them, and OUT; see `cases_of_part`.
        display: where progress is shown.

    Raises:
        ConfigError: pydicom or dcm2niix is not installed. NamingError: no MR image. OutputError: OUT cannot be written,
            or something else has the name of what would be written.
    """
    given: Any = {"keep_names": keep_names, "exclude": exclude or out, "display": display}
    with locked(out, shared=part is not None), contextlib.closing(Claims(out / WORK / "claims")) as claims:
        if part is None:
            cases, refused = find_cases(folder, mapping, **given), list[Scans]()
        else:
            cases, refused = cases_of_part(folder, out, part, mapping, **given)
        check_scans(cases, out)
        with display.logged(out / LOG) as logging:
            converted = convert_cases(
                cases, out, keep_names=keep_names, claims=claims if part else None, display=logging
            )
        if part is not None and note_done(out / WORK / "parts", part):
            remove(out / WORK)
        return [*converted, *refused]


def cases_of_part(
    folder: Path,
    out: Path,
    part: Part,
    mapping: Mapping[str, str] | None = None,
    *,
    keep_names: bool = False,
    exclude: Path | None = None,
    display: Display = SILENT,
) -> tuple[dict[str, list[Series]], list[Scans]]:
    """What `find_cases` finds in the folders of one part, and the studies that more than one part has.

    A study, and all studies of a patient, must lie in one of the folders directly in `folder`: they are named together.

    Raises:
        NamingError: a folder cannot be listed.
    """
    cases: dict[str, list[Series]] = {}
    for place in folders_of_part(folder, part, exclude):
        found = _cases_in(place, mapping, keep_names=keep_names, exclude=exclude, display=display)
        for case, series in found.items():
            cases.setdefault(case, []).extend(series)
    cases, refused = dict(sorted(cases.items())), []
    for case, all_series in list(cases.items()):
        whose = digest(all_series[0].patient or all_series[0].study)
        if (other := _first_part(out / WORK / "patients" / whose, part)) != str(part):
            why = (
                f"{case}: its patient lies in several folders of {folder}, of part {other} and of {part}, so there "
                "would seem to be two. Put each patient into one folder, or leave --part out."
            )
            refused.append(Scans(case, {}, {}, refused=why))
            del cases[case]
    return cases, refused


def _first_part(path: Path, part: Part) -> str:
    """The part that was the first to find a patient."""
    temporary = unfinished_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(str(part))
        try:
            os.link(temporary, path)  # by one process alone, and never half-written
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(str(part))
        return path.read_text()
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def find_cases(
    folder: Path,
    mapping: Mapping[str, str] | None = None,
    *,
    keep_names: bool = False,
    exclude: Path | None = None,
    display: Display = SILENT,
) -> dict[str, list[Series]]:
    """Case → the series of its study, its T1 told apart by their voxels where nothing else does; see `convert`."""
    if cases := _cases_in(folder, mapping, keep_names=keep_names, exclude=exclude, display=display):
        return cases
    raise NamingError(f"{folder}: no MR image in it or below. Give the folder of the studies' DICOM files.")


def _cases_in(
    folder: Path, mapping: Mapping[str, str] | None, *, keep_names: bool, exclude: Path | None, display: Display
) -> dict[str, list[Series]]:
    """As `find_cases`, but none where there is no MR image."""
    all_series = find_series(folder, mapping, exclude)
    names = _cases(all_series, keep_names)
    cases: dict[str, list[Series]] = {name: [] for name in sorted(names.values())}
    for series in all_series:
        cases[names[series.study]].append(series)
    if doubtful := [case for case in cases if undecided(cases[case])]:
        with display.task("compare T1", len(doubtful)) as task:
            for case in doubtful:
                cases[case] = tell_apart(cases[case], partial(_read_series, case))
                task.advance(case)
    return cases


def convert_cases(
    cases: Mapping[str, Sequence[Series]],
    out: Path,
    *,
    keep_names: bool = False,
    claims: Claims | None = None,
    display: Display = SILENT,
) -> list[Scans]:
    """Convert what `find_cases` found into a locked folder that `check_scans` has nothing against; see `convert`.

    With `claims`, a study that another process converts now is waited for.
    """
    converted: list[Scans] = []
    _converter()
    with display.task("convert", len(cases)) as task:
        for case, all_series in cases.items():
            claim = claims and claims.wait_for(case)
            before = {entry.get("of") for entry in _taken_before(out / case).values()}
            if keep_names and before and before.isdisjoint(map(_images_of, choose(all_series)[0].values())):
                why = f"{case}: {out / case} was converted from other images. Delete it, or name another folder."
                converted.append(Scans(case, {}, {}, refused=why))
            else:
                converted.append(convert_case(case, all_series, out, keep_names=keep_names))
            if claims and claim:
                claims.give_back(claim)
            task.advance(case)
    return converted


def taken(all_series: Sequence[Series]) -> list[str]:
    """The modalities that a conversion of a study has."""
    return list(choose(all_series)[0])


def choose(all_series: Sequence[Series]) -> tuple[dict[str, Series], dict[str, str], list[str]]:
    """Modality → its series, name of each other series → why it was left out, and notes for a reader."""
    chosen: dict[str, Series] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for series in all_series:
        if series.modality is None:
            left_out[_unique_name(series, left_out)] = series.why
    common = _common_planes(all_series)
    for modality in in_usual_order(known := {s.modality for s in all_series if s.modality}):
        candidates = [s for s in all_series if s.modality == modality]
        # Of several T1, none of which is known to be enhanced, one may be: the agent is given last.
        unsure = modality == "t1n" and several_acquisitions(candidates, all_series) and "t1c" not in known
        best = candidates[0]
        for candidate in candidates[1:]:
            if _preferred(candidate, best, common, earlier=unsure):
                best = candidate
        chosen[modality] = best
        for candidate in candidates:
            if candidate is not best:
                why = f"another {modality}, {_difference(candidate, best, common)} {best.name}"
                left_out[_unique_name(candidate, left_out)] = why
        if unsure:
            listed = ", ".join(s.name for s in candidates)
            notes.append(
                f"{listed} are T1, and no tag says which was acquired with contrast agent; {best.name} was taken for "
                "the one without. Name it with --map t1c='DESCRIPTION' if that is wrong."
            )
    if "t1c" in chosen and chosen["t1c"].told:
        taken_for, told = chosen["t1c"].name, chosen["t1c"].told
        notes.append(f"{taken_for} was taken for T1ce: {told}. Name it with --map if that is wrong.")
    if note := _agent_everywhere(all_series, chosen):
        notes.append(note)
    largest = max(chosen.values(), key=_covered, default=None)
    notes += [
        f"{series.name} ({modality}) covers {_covered(series) / _covered(largest):.0%} of what {largest.name} does: "
        "a part of it may be missing. Export the whole series."
        for modality, series in chosen.items()
        if largest and _covered(series) < PARTLY * _covered(largest)
    ]
    return chosen, left_out, notes


def _agent_everywhere(all_series: Sequence[Series], chosen: Mapping[str, Series]) -> str:
    """A note where every series names the agent and nothing tells which T1 was acquired without it; else ''."""
    known = [series for series in all_series if series.modality]
    if len(known) < 2 or "t1c" not in chosen or "t1n" in chosen or not all(s.acquisition.agent for s in known):
        return ""
    if says_agent(chosen["t1c"].acquisition.description):
        return ""
    return (
        "every series names a contrast agent, which may have been typed in for the whole examination; "
        f"{chosen['t1c'].name} was taken for T1ce. Name it with --map t1n='DESCRIPTION' if that is wrong."
    )


def _preferred(series: Series, other: Series, common: Collection[int], *, earlier: bool) -> bool:
    """Whether to take `series`: the first of `_ranks` in which they differ decides.

    `common` holds the axes along which most series of the study are sliced. Then the later counts, or, if asked, the
    earlier. Where the earlier is wanted, one whose tags say that no agent was given comes before both.
    """
    for _, ours, others in _ranks(series, other, common):
        if ours != others:
            return ours > others
    if not earlier:
        return series.time >= other.time
    plain, other_plain = series.acquisition.agent is False, other.acquisition.agent is False
    return plain if plain != other_plain else series.time < other.time


def _ranks(series: Series, other: Series, common: Collection[int]) -> Iterator[tuple[str, int, int]]:
    """In what an inferior series differs, and how both rank in it; the most important first."""
    yield "of a part of the head, unlike", _shows(series), _shows(other)
    yield "covers less than", not _covers_less(series, other), not _covers_less(other, series)
    yield "derived, unlike", series.original, other.original
    yield "coarser than", not _coarser(series, other, MUCH), not _coarser(other, series, MUCH)
    yield "in another plane than", _plane(series) in common, _plane(other) in common
    yield "coarser than", not _coarser(series, other), not _coarser(other, series)


def _shows(series: Series) -> int:
    return covers(series.acquisition.part, series.acquisition.description)


def _covers_less(series: Series, other: Series) -> bool:
    """Whether its box holds less of a head than another's."""
    return _covered(series) < COVERS * _covered(other)


def _covered(series: Series) -> float:
    """How much of a head its box holds, mm³."""
    return math.prod(min(side, HEAD_MM) for side in series.extent_mm)


def _plane(series: Series) -> int:
    """The axis along which it is sliced: 0 sagittal, 1 coronal, 2 axial."""
    return int(np.abs(np.cross(*series.orientation)).argmax())


def _common_planes(all_series: Sequence[Series]) -> set[int]:
    """The axes along which most series of known contrast are sliced."""
    counts = Counter(_plane(series) for series in all_series if series.modality)
    return {plane for plane, count in counts.items() if count == max(counts.values())}


def _difference(series: Series, best: Series, common: Collection[int]) -> str:
    """In what a series is inferior to the one that was chosen."""
    for inferior, ours, others in _ranks(series, best, common):
        if ours < others:
            return inferior
    if series.time == best.time:
        return "of the same time as"
    return "earlier than" if series.time < best.time else "later than"


def _unique_name(series: Series, names: Collection[str]) -> str:
    """The series' name, numbered where there is one of this name already."""
    numbered = (series.name if k == 1 else f"{series.name} ({k})" for k in itertools.count(1))
    return next(name for name in numbered if name not in names)


def _coarser(a: Series, b: Series, factor: float = ALIKE) -> bool:
    """Whether a's voxels are longer than b's by more than a factor, or, where they are about as long, larger."""
    longest = max(a.voxel_mm), max(b.voxel_mm)
    if max(longest) > factor * min(longest):
        return longest[0] > longest[1]
    return factor == ALIKE and math.prod(a.voxel_mm) > factor * math.prod(b.voxel_mm)


def convert_case(case: str, all_series: Sequence[Series], out: Path, *, keep_names: bool = False) -> Scans:
    """Convert one study into a folder that `check_scans` has nothing against; its faults are returned, not raised."""
    chosen, left_out, notes = choose(all_series)
    folder = out / case
    unreadable = {series.name: series.unreadable for series in all_series if series.unreadable}
    if not chosen:
        _clear(folder, case)
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        return Scans(
            case,
            {},
            left_out,
            unreadable=unreadable,
            refused=f"{case}: no T1, T1ce, T2, FLAIR or PD among its {len(all_series)} series ({reasons}). "
            "Export the series that are missing, or name one with --map t1n='DESCRIPTION'.",
        )
    record = {
        "format": FORMAT,
        "case": case,
        "taken": {m: _described(s, keep_names) for m, s in chosen.items()},
        "left_out": left_out,
        "notes": notes,
    }
    scans = Scans(case, chosen, left_out, notes=notes, unreadable=unreadable)
    paths = {m: folder / f"{case}-{m}.nii.gz" for m in chosen}
    if _is_done(folder / CONVERTED, record, paths.values()):
        return scans
    _clear(folder, case)
    write_json(folder / CONVERTED, {**record, "finished": False})
    faults = []
    for modality, series in chosen.items():
        try:
            _convert_series(case, series, paths[modality])
        except OutputError:
            raise
        except CrossmrError as error:
            faults.append(str(error))
            if cut := _cut_off(series):
                unreadable[series.name] = cut
    if faults:  # without one of its scans the study would look incomplete, and the scan would be synthesised
        _clear(folder, case)
        return replace(scans, series={}, refused="; ".join(faults), unreadable=unreadable)
    write_json(folder / CONVERTED, record)
    return scans


def _is_done(path: Path, record: Mapping[str, Any], images: Collection[Path]) -> bool:
    """Whether an earlier conversion wrote this very record and all its images."""
    return path.exists() and read_json(path, OutputError) == record and all(image.exists() for image in images)


def _images(folder: Path, case: str) -> list[Path]:
    """The images that an earlier conversion wrote, or began: those that its series.json lists."""
    return [folder / f"{case}-{modality}.nii.gz" for modality in _taken_before(folder)]


def _taken_before(folder: Path) -> Mapping[str, Any]:
    """Modality → what series.json says of the series that an earlier conversion took."""
    path = folder / CONVERTED
    return read_json(path, OutputError).get("taken", {}) if path.exists() else {}


def check_scans(cases: Mapping[str, Sequence[Series]], out: Path) -> None:
    """Refuse an output folder where something that no conversion wrote lies in a case's place.

    Raises:
        OutputError: the file, by name.
    """
    for case, all_series in cases.items():
        folder = out / case
        refuse_foreign(folder / CONVERTED, partial(is_record, kind=FORMAT))
        earlier = _images(folder, case)
        for path in (*earlier, *(folder / f"{case}-{modality}.nii.gz" for modality in taken(all_series))):
            refuse_foreign(path, partial(_is_among, paths=earlier))


def _is_among(path: Path, paths: Collection[Path]) -> bool:
    return path.is_file() and path in paths


def _clear(folder: Path, case: str) -> None:
    """Delete what an earlier conversion wrote, and nothing else."""
    for path in (*_images(folder, case), folder / CONVERTED):
        path.unlink(missing_ok=True)


def _described(series: Series, keep_names: bool) -> dict[str, Any]:
    """A series' entry in series.json; its description may name the patient."""
    entry = {"series": series.number, "why": series.why, "images": len(series.images), "of": _images_of(series)}
    return {**entry, "description": series.acquisition.description} if keep_names else entry


def _images_of(series: Series) -> str:
    """A hash of which images a series consists of."""
    return digest("\n".join(image.sop_instance for image in series.images))


def other_series(case: str, all_series: Sequence[Series], out: Path) -> list[str]:
    """The modalities for which an earlier conversion of a case took other images; all where it took none of these.

    [] where there was no earlier one.
    """
    before, now = _taken_before(out / case), choose(all_series)[0]
    both = [m for m in now if m in before]
    return [m for m in both if before[m].get("of") != _images_of(now[m])] if both or not before else [*now]


def _convert_series(case: str, series: Series, path: Path) -> None:
    """Convert one series to one NIfTI file, without the texts that dcm2niix writes into its header."""
    volume = _read_series(case, series)
    write_volume(on_grid(volume.data, volume, description="acquired"), path)


def _read_series(case: str, series: Series) -> Volume:
    """The volume that dcm2niix makes of a series."""
    converter = _converter()
    with temporary_folder(f"{case}: {series.name} is converted") as temporary:
        inside = temporary / "in"
        inside.mkdir()
        links = [inside / f"{index:05d}.dcm" for index in range(len(series.images))]
        for k, (image, link) in enumerate(zip(series.images, links, strict=True)):
            if series.places is None and not series.mixed:
                _link(image.path, link)
            else:
                _join(series, k, link)
        name = f"{case}: {series.name}"
        volumes, complaint = _run(converter, inside, temporary / "out", name)
        if not volumes:  # such as deflated images, which pydicom can read
            _refuse_damaged(name, series)
            for image, link in zip(series.images, links, strict=True):
                link.unlink()
                _unpack(case, series, image.path, link)
            volumes, complaint = _run(converter, inside, temporary / "out", name)
        try:
            return _read_converted(case, series, volumes, complaint.replace(str(temporary), ""))
        except CrossmrError:
            if shutil.disk_usage(temporary).free < sum(link.stat().st_size for link in links):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None  # dcm2niix does not say so
            raise


def _read_converted(case: str, series: Series, volumes: Sequence[Path], complaint: str) -> Volume:
    """The one volume that a series became; `complaint` is what dcm2niix said."""
    if len(volumes) != 1:
        hint = f" (dcm2niix: {complaint})" if complaint else ""
        raise StudyError(
            f"{case}: {series.name} became {len(volumes) or 'no'} volumes, expected one{hint}. "
            "Export it again, or leave it out of the folder."
        )
    volume = read_volume(volumes[0], name=f"{case}: {series.name}")
    images = sum(len(np.atleast_2d(image.position)) for image in series.images)
    if (slices := volume.image.shape[2]) != images:
        raise StudyError(
            f"{case}: {series.name} has {images} images, of which dcm2niix made {slices} slices. "
            "Export it again, or leave it out of the folder."
        )
    if series.padding is not None:
        volume.data[np.isclose(volume.data, series.padding, rtol=3e-6, atol=1e-6)] = 0
    return volume


def _refuse_damaged(name: str, series: Series) -> None:
    """Refuse a series with images whose voxels are cut off.

    Raises:
        StudyError: the names of the files, in one line.
    """
    if lost := _cut_off(series):
        raise StudyError(
            f"{name} has {len(series.images)} images, of which {len(lost)} {'is' if len(lost) == 1 else 'are'} cut off"
            f"{listed(lost)}. Export it again, or leave it out of the folder."
        )


def _cut_off(series: Series) -> tuple[Path, ...]:
    return tuple(image.path for image in series.images if _is_cut_off(image.path))


def _is_cut_off(path: Path) -> bool:
    """Whether a file's voxels are fewer than its tags announce; of compressed ones, whether there are any."""
    try:
        image = import_pydicom().dcmread(path, force=True)
        voxels = image.get("PixelData")
        if not voxels or getattr(image.file_meta, "TransferSyntaxUID", None) is None:
            return not voxels
        if image.file_meta.TransferSyntaxUID.is_encapsulated:
            return False
        frames, samples = int(image.get("NumberOfFrames") or 1), int(image.get("SamplesPerPixel") or 1)
        return len(voxels) < int(image.Rows) * int(image.Columns) * frames * samples * int(image.BitsAllocated) // 8
    except Exception:  # pydicom raises whatever its parsing runs into
        return True


def patience(paths: Sequence[Path]) -> float:
    """Seconds that dcm2niix may take for these files: many times what it does on a slow disk."""
    return PATIENCE + sum(path.stat().st_size for path in paths) / BYTES_PER_SECOND + len(paths) / FILES_PER_SECOND


def _run(converter: str, inside: Path, outside: Path, name: str) -> tuple[list[Path], str]:
    """Run dcm2niix on a folder that holds one series; returns the volumes and its first error or warning."""
    outside.mkdir(exist_ok=True)
    # no rotation, no cropping, no defaults of the user; scales that differ between slices are applied; one volume
    options = ["-g", "i", "-b", "n", "-z", "n", "-x", "i", "-p", "y", "-m", "y", "-w", "1", "-d", "0", "-f", "volume"]
    command: list[str | Path] = [converter, *options, "-o", outside, inside]
    try:
        seconds = patience(list(inside.iterdir()))
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise StudyError(
            f"{name} was not converted by dcm2niix within {seconds:.0f} s, and it was stopped. Copy the series to a "
            "local disk, export it again, or leave it out of the folder."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise StudyError(f"{converter} could not be run: {error.strerror or error}. Install dcm2niix again.") from error
    complaint = re.search(r"(?:Error|Warning|Unsupported)[^\n]*", result.stdout + result.stderr)
    return sorted(outside.glob("*.nii")), complaint[0] if complaint else ""


def _unpack(case: str, series: Series, path: Path, unpacked: Path) -> None:
    """Write an image without compression.

    Raises:
        StudyError: pydicom cannot read it.
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
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split())
        raise StudyError(
            f"{case}: {series.name} cannot be read by dcm2niix, nor by pydicom ({reason}). "
            "Export it again without compression, or leave it out of the folder."
        ) from error


def _join(series: Series, index: int, path: Path) -> None:
    """Write a copy of an image at its even place, and with those tags of the first that tell series apart."""
    pydicom = import_pydicom()
    image = pydicom.dcmread(series.images[index].path, force=True)
    first = pydicom.dcmread(series.images[0].path, force=True, specific_tags=list(TELLING))
    for keyword in TELLING:
        if keyword in first:
            image[keyword] = first[keyword]
    if series.places is not None:
        image.ImagePositionPatient = [f"{value:.6f}"[:16] for value in series.places[index]]
        image.pop("SliceLocation", None)
    image.save_as(path, enforce_file_format="TransferSyntaxUID" in image.file_meta)


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # no links on this file system
        shutil.copyfile(path, link)


def _cases(all_series: Sequence[Series], keep_names: bool) -> dict[str, str]:
    """Study UID → case; studies of one patient share the `sub-`."""
    first: dict[str, str] = {}
    for series in sorted(all_series, key=lambda s: (s.date, s.study)):
        first.setdefault(series.patient or series.study, series.study)
    cases: dict[str, str] = {}
    for series in all_series:
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
    """Path of dcm2niix: the wheel's, else that on PATH.

    The wheel is not imported: some of its releases contain no program and download it on import.
    """
    import_pydicom()
    wheel = importlib.util.find_spec("dcm2niix")
    places = [] if wheel is None or wheel.origin is None else [str(Path(wheel.origin).parent)]
    program = shutil.which("dcm2niix", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if program is None:
        raise ConfigError("DICOM needs dcm2niix. Install it with: pip install 'crossmr[dicom]'")
    return program
