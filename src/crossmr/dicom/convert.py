"""Folders of DICOM from a scanner or an archive: sorted by pydicom, converted to NIfTI by dcm2niix.

An extra (`pip install crossmr[dicom]`). contrast.py recognises the contrast of a series from its tags. Cases get
pseudonyms unless names are to be kept.
"""

import contextlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from crossmr.data.mapping import mapping_key
from crossmr.dicom.agents import in_question, tell_apart
from crossmr.dicom.converter import convert_series, cut_off, find_converter, read_series
from crossmr.dicom.folders import CONVERTED, folders_of_part
from crossmr.dicom.selection import choose, taken
from crossmr.dicom.series import Series, find_series, unmatched_by
from crossmr.dicom.series_table import about, decide, read_series_table
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import CrossmrError, NamingError, OutputError
from crossmr.files import (
    digest,
    is_record,
    locked,
    read_json,
    refuse_foreign,
    remove,
    unfinished_path,
    write_json,
)
from crossmr.parts import WORK, Claims, Part, note_done

FORMAT = "crossmr-scans"


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
    series_table: Path | None = None,
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
        series_table: a table in which a person has said which series are which contrast; see series_table.py.
        display: where progress is shown.

    Raises:
        ConfigError: pydicom or dcm2niix is not installed, or the table is none. NamingError: no MR image. OutputError:
            OUT cannot be written, or something else has the name of what would be written.
    """
    table = None if series_table is None else read_series_table(series_table, [*map(mapping_key, mapping or {})])
    given: Any = {"keep_names": keep_names, "exclude": exclude or out, "display": display}
    with locked(out, shared=part is not None), contextlib.closing(Claims(out / WORK / "claims")) as claims:
        if part is None:
            cases, refused = find_cases(folder, mapping, **given), list[Scans]()
        else:
            cases, refused = cases_of_part(folder, out, part, mapping, **given)
        if table is not None:
            whole = part is None or part.of == 1
            for line in about(table, cases, whole=whole):
                display.say(line)
            cases = {case: decide(all_series, table) for case, all_series in cases.items()}
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
    note: bool = True,
    display: Display = SILENT,
) -> tuple[dict[str, list[Series]], list[Scans]]:
    """What `find_cases` finds in the folders of one part, and the studies that more than one part has.

    A study, and all studies of a patient, must lie in one of the folders directly in `folder`: they are named together.
    With `note` it is written into OUT whose each patient is, which the other parts see.

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
        if (other := _first_part(out / WORK / "patients" / whose, part, note=note)) != str(part):
            why = (
                f"{case}: its patient lies in several folders of {folder}, of part {other} and of {part}, so there "
                "would seem to be two. Put each patient into one folder, or leave --part out."
            )
            refused.append(Scans(case, {}, {}, refused=why))
            del cases[case]
    return cases, refused


def _first_part(path: Path, part: Part, *, note: bool) -> str:
    """The part that was the first to find a patient."""
    if not note and not path.exists():
        return str(part)
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
        for text in unmatched_by([series for all_series in cases.values() for series in all_series], mapping):
            display.say(text)
        return cases
    raise NamingError(f"{folder}: no MR image in it or below. Give the folder of the studies' DICOM files.")


def _cases_in(
    folder: Path, mapping: Mapping[str, str] | None, *, keep_names: bool, exclude: Path | None, display: Display
) -> dict[str, list[Series]]:
    """As `find_cases`, but none where there is no MR image."""
    all_series = find_series(folder, mapping, exclude, display)
    names = _cases(all_series, keep_names)
    cases: dict[str, list[Series]] = {name: [] for name in sorted(names.values())}
    for series in all_series:
        cases[names[series.study]].append(series)
    if doubtful := [case for case in cases if in_question(cases[case])]:
        with display.task("compare T1", len(doubtful)) as task:
            for case in doubtful:
                cases[case] = tell_apart(cases[case], partial(read_series, case))
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
    find_converter()
    with display.task("convert", len(cases)) as task:
        for case, all_series in cases.items():
            claim = claims and claims.wait_for(case)
            before = {entry.get("of") for entry in _taken_before(out / case).values()}
            if keep_names and before and before.isdisjoint(map(hash_of_images, choose(all_series)[0].values())):
                why = f"{case}: {out / case} was converted from other images. Delete it, or name another folder."
                converted.append(Scans(case, {}, {}, refused=why))
            else:
                converted.append(convert_case(case, all_series, out, keep_names=keep_names))
            if claims and claim:
                claims.give_back(claim)
            task.advance(case)
    return converted


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
            convert_series(case, series, paths[modality])
        except OutputError:
            raise
        except CrossmrError as error:
            faults.append(str(error))
            if cut := cut_off(series):
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
    entry = {"series": series.number, "why": series.why, "images": len(series.images), "of": hash_of_images(series)}
    return {**entry, "description": series.acquisition.description} if keep_names else entry


def hash_of_images(series: Series) -> str:
    """A hash of which images a series consists of."""
    return digest("\n".join(image.sop_instance for image in series.images))


def other_series(case: str, all_series: Sequence[Series], out: Path) -> list[str]:
    """The modalities for which an earlier conversion of a case took other images; all where it took none of these.

    [] where there was no earlier one.
    """
    before, now = _taken_before(out / case), choose(all_series)[0]
    both = [m for m in now if m in before]
    return [m for m in both if before[m].get("of") != hash_of_images(now[m])] if both or not before else [*now]


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
