"""What of a study was not read, and which contrasts it may be: none of these is replaced by a synthetic one.

Files are judged by their names, by their headers, and where these leave it open by their voxels; series of DICOM by
their tags. What can be no contrast that crossmr makes, such as a mask or a diffusion image, is passed over.
"""

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossmr.data.bids import EXCLUDED as BIDS_EXCLUDED
from crossmr.data.bids import ROOT as BIDS_ROOT
from crossmr.data.bids import dataset_of
from crossmr.data.formats import is_volume, without_images_of_pairs
from crossmr.data.naming import (
    MODALITIES,
    StudyFiles,
    display_name,
)
from crossmr.data.nifti import is_synthetic, read_header
from crossmr.data.volume import read_volume
from crossmr.data.words import possible_contrasts
from crossmr.dicom.agents import COUNTERPART, are_first, may_be_other, undecided
from crossmr.dicom.contrast import recognise_contrast
from crossmr.dicom.folders import first_dicom, is_own
from crossmr.dicom.selection import choose
from crossmr.dicom.series import FEWEST_SLICES, Series, find_series
from crossmr.dicom.series_table import is_of_person
from crossmr.errors import ConfigError, VolumeError
from crossmr.files import walk

FEW_VALUES = 32
"""A volume of so few values, all of them whole, is a segmentation."""
_UNFINISHED = r"\.(part|partial|crdownload|download|filepart|tmp|aria2|opdownload)"
_PACKED = r"\.(zip|tar|tgz|tar\.gz|tar\.bz2|tar\.xz|7z|rar)"
_COMPRESSED = r"\.nii(\.gz)?\.(zip|bz2|xz|zst|lzma|7z|gpg)|\.nii\.z"
_FORMATS = r"\.(mnc|par|brik|brik\.gz|mif|mif\.gz|gipl|gipl\.gz)"
_POINTER = r"\.(dvc|lnk|url|webloc)"
_HALF = r"\.img(\.gz)?"
_LONGER = r"\.(nii(\.gz)?|mgz|mha|nrrd)(\?.*|~|\.(\d+|bak|old|orig))|\.nii\.gz\.gz"
_KINDS = {
    re.compile(rf".*{_UNFINISHED}", re.I): "is a download that did not end; download it again",
    re.compile(rf".*({_COMPRESSED})", re.I): "is not read as it is packed; unpack it to .nii or .nii.gz",
    re.compile(rf".*{_PACKED}", re.I): "is an archive, which is not opened; unpack it",
    re.compile(rf".*{_FORMATS}", re.I): "is of a format that is not read; convert it to .nii.gz",
    re.compile(rf".*{_POINTER}", re.I): "points to a file elsewhere; fetch that, such as by dvc pull",
    re.compile(rf".*{_HALF}", re.I): "is half of a pair without the .hdr beside it; copy both",
    re.compile(rf".*({_LONGER})", re.I): "has more after its format's ending; rename it to end in that",
}
_ENDING = re.compile(
    rf"(\.nii(\.gz)?|\.mgz|\.mha|\.nrrd)?({_UNFINISHED}|{_COMPRESSED}|{_PACKED}|{_FORMATS}|{_POINTER}|{_HALF}|{_LONGER})$",
    re.I,
)


@dataclass(frozen=True)
class Unread:
    """A file or a series of a study that was not used, and may be a contrast that the study seems to lack."""

    name: str
    may_be: frozenset[str]
    """Modalities."""
    why: str
    """Why it was not used, and what to do but to name it."""
    called: str = ""
    """What --map may name it by, as a user types it; '' where that does not help."""

    def reason(self, modality: str) -> str:
        """Why it was not used, and what to do where this contrast is missing."""
        return f"{self.why}; name it, such as --map {modality}={self.called}" if self.called else self.why


def unread_files(files: StudyFiles, others: Iterable[Path], lacking: Iterable[str]) -> list[Unread]:
    """Of a study's files that are no known contrast, and of `others`, those that may be a modality that it lacks."""
    wanted, found = frozenset(lacking), []
    for path in (*files.unrecognised, *files.passed_over, *others):
        may_be = wanted & _possible(path, files)
        if may_be and not (is_volume(path.name) and _is_no_scan(path)):
            why, called = why_unread(path), ""
            if not why:
                why, called = "has a name that says no contrast for sure", f"'*{path.name.removeprefix(files.case)}'"
            found.append(Unread(path.name, may_be, why, called))
    return found


def _possible(path: Path, files: StudyFiles) -> frozenset[str]:
    """Which contrasts a file may be by its name without the case's; of an archive by what it holds."""
    if path.suffix.lower() == ".zip" and not re.search(r"\.nii(\.gz)?\.zip$", path.name, re.I):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.rsplit("/", 1)[-1] for name in archive.namelist() if not name.endswith("/")}
        except (OSError, zipfile.BadZipFile):
            members = {path.name}
        members -= {known.name for known in files.paths()}
        return frozenset(m for name in members if _is_image(name) for m in possible_contrasts(_own(name, files.case)))
    found = possible_contrasts(_own(path.name, files.case))
    of_freesurfer = path.suffix.lower() == ".mgz" and path.parent.name in ("mri", "orig")
    return frozenset({"t1n"}) if of_freesurfer and found == {*MODALITIES} else found


def _own(name: str, case: str) -> str:
    """What a file's name says beside its study's and its format."""
    own = name[len(case) :] if name.lower().startswith(case.lower()) else name
    return re.sub(r"\.nii(\.gz)?$", "", _ENDING.sub("", own), flags=re.I)


def _is_image(name: str) -> bool:
    return is_volume(name) or name.lower().endswith((".dcm", ".ima")) or any(kind.fullmatch(name) for kind in _KINDS)


def _is_no_scan(path: Path) -> bool:
    """Whether a volume is synthetic, of several images or colours, or a segmentation."""
    header = read_header(path)
    if header is None:
        return False
    if is_synthetic(path) or np.prod(header.get_data_shape()[3:], dtype=int) > 1 or header.get_data_dtype().names:
        return True
    try:
        values = np.unique(read_volume(path).data)
    except VolumeError:
        return False
    return len(values) <= FEW_VALUES and bool((values == np.round(values)).all())


def files_beside(
    root: Path, studies: Sequence[StudyFiles], exclude: Path | None = None, *, nifti: bool = False
) -> dict[str, list[Path]]:
    """Case → files under `root` of formats that are not read, archives and unfinished downloads, which lie by its own.

    A file is the case's that its name begins with, else that of the only study in its folder, or in the next above;
    where there are several, it is nobody's: ''.
    `nifti` is for studies of DICOM, whose NIfTI is not read; crossmr's own does not count.
    """
    cases = {study.case for study in studies}
    owners = _owners(root, studies)
    out = None if exclude is None else os.path.abspath(exclude)
    found: dict[str, list[Path]] = defaultdict(list)
    for place, folders, names in walk(Path(os.path.abspath(root))):
        left_out = BIDS_EXCLUDED if BIDS_ROOT in names else set[str]()
        folders[:] = [name for name in folders if name not in left_out and os.path.join(place, name) != out]
        for name in without_images_of_pairs(names):
            path, unread = Path(place, name), any(kind.fullmatch(name) for kind in _KINDS)
            if not unread and not (nifti and is_volume(name) and not is_own(path)):
                continue
            found[_begins(name, cases) or _only(_owners_of(path, owners))].append(path)
    return found


def _begins(name: str, cases: Collection[str]) -> str:
    """The longest case that a name begins with, '' if there is none."""
    ends = (end for end in range(len(name), 0, -1) if not re.match("[A-Za-z0-9]", name[end:]))
    return next((name[:end] for end in ends if name[:end] in cases), "")


def _only(owners: Collection[str]) -> str:
    """The one study, '' if there are none or several."""
    return next(iter(owners)) if len(owners) == 1 else ""


def why_unread(path: Path) -> str:
    """Why a file of `files_beside` is not read, and what to do."""
    return next((why for kind, why in _KINDS.items() if kind.fullmatch(path.name)), "")


def why_passed_over(path: Path) -> str:
    """Why a file of `StudyFiles.passed_over` is not used."""
    return "crossmr synthesised it" if is_synthetic(path) else "a plainer file of its kind is used"


def _owners(root: Path, studies: Sequence[StudyFiles]) -> dict[Path, set[str]]:
    """Folder, from `root` down, → the studies that have files in it or below."""
    top = Path(os.path.abspath(root))
    owners: dict[Path, set[str]] = defaultdict(set)
    for study in studies:
        for path in study.paths():
            within = [*path.parents]
            for folder in within[: within.index(top) + 1 if top in within else 0]:
                owners[folder].add(study.case)
    return owners


def _owners_of(path: Path, owners: Mapping[Path, set[str]]) -> Collection[str]:
    """The studies of the first folder above a file that has any."""
    return next((owners[folder] for folder in path.absolute().parents if folder in owners), ())


def unread_series(all_series: Sequence[Series]) -> list[Unread]:
    """Of a study's series, those that were left out for a doubt, and what they may be."""
    found = [_left_out(series) for series in all_series if series.modality is None]
    alike = undecided(all_series)
    if alike and not (alike[0].modality == "t1n" and are_first(alike, all_series)):
        modality = str(alike[0].modality)
        best, other = choose(all_series)[0][modality], COUNTERPART[modality]
        for series in alike:
            if series is not best and may_be_other(series):
                volumes = ", nor do their volumes" if series.compared else ""
                why = (
                    f"is a second T1 beside {best.name}, and nothing says which of them was acquired with contrast "
                    f"agent{volumes}; name it with --map {other}='DESCRIPTION', or, where none is "
                    f"{display_name(other)}, name the one to use with --map {modality}='{best.name}'"
                )
                found.append(Unread(series.name, frozenset({other}), why))
    return [unread for unread in found if unread.may_be]


def _left_out(series: Series) -> Unread:
    """A series that was left out, and what it may be: nothing, unless it is a faulty, an unclear or a denied one."""
    images = len(series.images)
    verdict = recognise_contrast(series.acquisition)
    description, may_be = series.acquisition.description, frozenset[str]()
    decided = series.reason == "decided"
    if verdict.modality is not None and not decided:
        few = series.reason == "few slices" and images < FEWEST_SLICES
        if not (few or series.reason == "directions") or (images > 3 and verdict.modality in _said(description)):
            may_be = frozenset({verdict.modality})
        if series.reason == "one place":  # perhaps echoes; the tags are those of the first
            may_be |= _said(description) | ({"t2w"} if verdict.modality == "pdw" else set())
    elif verdict.reason == "unclear" and not decided:
        may_be = possible_contrasts(description)
    elif verdict.reason == "denied" and series.reason not in ("decided", "directions", "few slices"):
        may_be = verdict.may_be
    if series.mapped and not decided and images > 3:  # a pattern may match localisers, too
        may_be = frozenset(series.mapped)
    why, called = f"was left out: {series.why}", ""
    if is_of_person(series.why):
        why += "; name it in the table, or mark it unused"
    elif "Export" in series.why or len(series.mapped) > 1:
        pass
    elif series.unreadable or (series.barred and verdict.modality is not None):
        why += "; export it again"
    else:
        called = "'DESCRIPTION'" if description else f"'{series.name}'"
    return Unread(series.name, may_be, why, called)


def _said(description: str) -> frozenset[str]:
    """The contrasts that a description names, none where it names none."""
    found = possible_contrasts(description)
    return frozenset() if found == {*MODALITIES} else found


def dicom_beside(
    folder: Path, studies: Sequence[StudyFiles], mapping: Mapping[str, str] | None = None, exclude: Path | None = None
) -> dict[str, list[Unread]]:
    """Case → DICOM of a folder that is read as NIfTI; series go to the study that lies nearest, or to all."""
    dataset = dataset_of(Path(os.path.abspath(folder)))
    if (dataset / BIDS_ROOT).exists() or (first := first_dicom(folder, exclude)) is None:
        return {}
    found: dict[str, list[Unread]] = defaultdict(list)
    owners, why = (
        _owners(folder, studies),
        "is DICOM in a folder that is read as NIfTI; convert it with: crossmr convert",
    )
    try:
        all_series = find_series(folder, mapping, exclude)
    except ConfigError:  # without pydicom nobody can say what it is
        for case in sorted(_owners_of(first, owners)):
            found[case].append(Unread(f"DICOM ({first.name})", frozenset(MODALITIES), why))
        return found
    for series in all_series:
        may_be = _left_out(series).may_be if series.modality is None else frozenset({series.modality})
        for case in sorted(_owners_of(series.images[0].path, owners)) if may_be else ():
            found[case].append(Unread(series.name, may_be, why))
    return found


def reasons(unread: Sequence[Unread], lacking: Iterable[str]) -> dict[str, str]:
    """Modality → why it is not to be synthesised: what may be it was not used."""
    found = {}
    for modality in lacking:
        by_why: dict[str, list[str]] = defaultdict(list)
        for one in unread:
            if modality in one.may_be:
                by_why[one.reason(modality)].append(one.name)
        if by_why:
            told = "; ".join(f"{', '.join(dict.fromkeys(names))} may be it and {why}" for why, names in by_why.items())
            shown = display_name(modality)
            found[modality] = f"{told}. To synthesise {shown} all the same, pass --targets {modality}."
    return found
