"""The series in a folder of DICOM, read by pydicom: positions, acquisition and contrast of their images.

pydicom is an extra (`pip install crossmr[dicom]`). contrast.py recognises the contrast from the tags.
"""

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.contrast_agent import is_unclear, names_agent
from crossmr.data.mapping import alternatives, mapping_key
from crossmr.data.words import possible_contrasts
from crossmr.dicom.contrast import (
    Acquisition,
    Reason,
    Recognition,
    covers,
    no_anatomy,
    recognise_contrast,
    resolve_agents,
)
from crossmr.dicom.grouping import (
    OTHER_FRAME,
    OTHER_ID,
    announced_of,
    groups_of,
    is_unnamed,
    kin_of,
    moments_of,
    patient_of,
    studies_of,
    without_copies,
)
from crossmr.dicom.headers import (
    MR,
    UIDS,
    File,
    Floats,
    description_of,
    files_in,
    find,
    geometry_of,
    import_pydicom,
    may_be_scan,
    names_crossmr,
    number_of,
    read_header,
    text_of,
    texts_of,
    time_of,
    why_not_read,
)
from crossmr.display import SILENT, Display

FEWEST_SLICES = 8
MOST_CAPTURES = 3
"""So many images that are not read as scans are captures of a screen, whatever they are called."""
UNEVEN = 0.05
"""Fraction of the slice distance by which single distances may differ from it."""
TELLING = ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "EchoTime", "ImageType")
"""Tags that differ between series, and should not differ within one."""
BY_USER = "named so by --map"
UNNAMED = (
    "its images name no study, nor a patient and date that are nobody else's: frame of reference and folder say which "
    "belong together. Look whether all are of one patient and one examination."
)
"""Of a study whose UID is missing."""
PARTED = (
    "its study's UID has images of another patient ID, too, which are another study here: look whether both are of one "
    "patient."
)
HALF_A_DAY = 120000
"""As the difference of two times of DICOM, HHMMSS; those that differ by more have midnight between them."""
SHIFTED_MM = 1.0
"""So far from a line along the normal may slices lie."""
_ENDINGS = (".dcm", ".ima", ".dicom")
_WORDS = "im|img|image|slice|mr|i|e|s|se|ser|series|dcm|ima|dicom"
_SYNTHETIC = re.compile(r"(?<![a-z])synthetic(?![a-z])", re.I)
_IMPERSONAL = re.compile(rf"([-_. ]|\d|(?<![a-z])({_WORDS})(?![a-z]))+", re.I)
"""A name of numbers and words of this kind alone."""


@dataclass(frozen=True)
class DicomImage:
    """One file: its UIDs and its position."""

    path: Path
    sop_class: str
    sop_instance: str
    position: Floats
    """(3,) of its first voxel's centre, LPS, mm; of an enhanced image (F, 3)."""


@dataclass(frozen=True, eq=False)
class Series:
    """One series of MR images: of a known contrast, or left out for a reason."""

    patient: str
    study: str
    """UID of the study."""
    date: str
    number: int | None
    time: str
    """When it was acquired, as text that sorts; '' where that is not told."""
    uid: str
    """Of the series; empty where it is missing. Two echoes may share one."""
    images: tuple[DicomImage, ...]
    orientation: Floats
    """(2, 3) directions of rows and columns, LPS; empty where unknown."""
    voxel_mm: tuple[float, ...]
    acquisition: Acquisition
    original: bool
    """Image Type says ORIGINAL."""
    modality: str | None
    extent_mm: tuple[float, ...]
    """Of its box, along columns, rows and slices."""
    places: Floats | None
    """(N, 3) even positions of its images where theirs are rounded; None where theirs are good."""
    mixed: bool
    """Whether the tags that tell series apart differ between its images."""
    why: str
    """The tags by which its contrast was recognised, or why it was left out; for people."""
    reason: Reason = ""
    """Why it was left out, where more depends on that."""
    unreadable: tuple[Path, ...] = ()
    """Files that lie by its images, may be some of them, and cannot be read."""
    compared: bool = False
    """Whether its voxels were compared with another T1's, as nothing else says which was acquired with agent."""
    told: str = ""
    """What they told, and how sure that is."""
    mapped: tuple[str, ...] = ()
    """The modalities that --map says it is, also where a fault leaves it out."""
    notes: tuple[str, ...] = ()
    """What to look at where it is taken."""
    padding: float | None = None
    """The value of voxels that were not acquired, which stand for 0; None where it is 0 or there are none."""
    barred: Recognition | None = None
    """Why it is no volume of any contrast, whatever a person says; None where it may be one."""

    @cached_property
    def name(self) -> str:
        """For messages."""
        return _name(self.number)


def find_series(
    folder: Path,
    mapping: Mapping[str, str] | None = None,
    exclude: Path | None = None,
    display: Display = SILENT,
) -> list[Series]:
    """Every series of MR images under a folder, with its contrast, or the reason for leaving it out; sorted.

    Images of other kinds are series that are left out, too, where they are of such a study, or may be scans; of another
    study of a patient who has MR images, `display` says so alone. `mapping` and `exclude` as in `convert`.
    """
    pydicom = import_pydicom()
    mapping = {mapping_key(key): glob for key, glob in mapping.items()} if mapping else None
    files: list[File] = []
    others: list[File] = []
    unreadable: list[Path] = []
    instances: set[tuple[str, ...]] = set()
    with pydicom.config.disable_value_validation():
        for path in files_in(folder, exclude):
            header = read_header(pydicom, path)
            if header is None or (header.SOPClassUID in MR and "Rows" not in header):  # cut off within the tags
                unreadable.append(path)
                continue
            if why_not_read(header) and "Rows" not in header:  # a report, a presentation state, a plan
                continue
            image = patient_of(header), *(text_of(header, uid) for uid in UIDS)  # some number the images of each series
            if image in instances:  # twice in one export
                continue
            instances.add(image)
            (others if why_not_read(header) else files).append((path, header))
        studies = studies_of(files)
        series = [one for study, of_study in studies.items() for one in _of_study(pydicom, study, of_study, mapping)]
        left = _not_read(others, _owners(studies), series, mapping, display)
        kin = kin_of(studies)
    series = [*_with_kin(_without_lost(series, unreadable), kin), *left]
    return sorted(series, key=lambda s: (s.patient, s.date, s.study, s.number or 0, s.time, str(s.images[0].path)))


def _of_study(pydicom: Any, study: str, files: Sequence[File], mapping: Mapping[str, str] | None) -> list[Series]:
    """The series of the images of one study."""
    groups = [(without_copies(pydicom, group), echoes) for group, echoes in groups_of(files)]
    short = announced_of([files for files, _ in groups])
    parted = text_of(files[0][1], "StudyInstanceUID") not in ("", study)
    notes = [*([UNNAMED] if is_unnamed(files) else []), *([PARTED] if parted else [])]
    begun = moments_of([group[0][1] for group, _ in groups])
    order = sorted(range(len(groups)), key=lambda k: (begun[k], number_of(groups[k][0][0][1], "SeriesNumber") or 0))
    acquisitions = resolve_agents([replace(_acquisition(groups[k][0][0][1]), echoes=groups[k][1]) for k in order])
    own = [
        replace(
            _series(study, groups[k][0], a, mapping), time=begun[k], notes=(*notes, *_short(groups[k][0], *short[k]))
        )
        for k, a in zip(order, acquisitions, strict=True)
    ]
    patient = Counter(one.patient for one in own if one.patient).most_common(1)
    return [replace(one, patient=patient[0][0] if patient else "") for one in _beside_mapped(own)]


def _owners(studies: Mapping[str, Sequence[File]]) -> dict[tuple[str, str], set[str]]:
    """UID of a study and patient, and the UID alone → its studies."""
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for study, of_study in studies.items():
        for _, header in of_study:
            for whose in (patient_of(header), ""):
                owners[text_of(header, "StudyInstanceUID"), whose].add(study)
    return owners


def _with_kin(all_series: Sequence[Series], kin: Mapping[str, Mapping[str, str]]) -> list[Series]:
    """The series, and in each study those of others that may be of it, left out in doubt: `kin_of`; it says so."""
    of_study: dict[str, list[Series]] = defaultdict(list)
    for series in all_series:
        of_study[series.study].append(series)
    for study, others in kin.items():
        own = list(of_study[study])
        for other, why in others.items():
            theirs = [one for one in all_series if one.study == other and (one.modality or one.reason == "denied")]
            said = f"{', '.join(one.name for one in theirs)} may be of this study: {why}."
            own = [replace(one, notes=(*one.notes, said)) if theirs else one for one in own]
            of_study[study] += [_stand_in(one, own[0], why) for one in theirs]
        of_study[study][: len(own)] = own
    return [series for of_one in of_study.values() for series in of_one]


def _stand_in(series: Series, beside: Series, why: str) -> Series:
    """A series of another study as one that is left out of this study."""
    series = replace(series, study=beside.study, patient=beside.patient, date=beside.date)
    reason: Reason = "denied" if series.reason == "denied" else ""
    return replace(series, modality=None, why=why, reason=reason, mapped=(), notes=())


def own_series(all_series: Sequence[Series]) -> list[Series]:
    """The series of a study without those of others that may be of it."""
    return [series for series in all_series if series.why not in (OTHER_ID, OTHER_FRAME)]


def _short(files: Sequence[File], there: int, announced: int) -> list[str]:
    """What to say of a series of which fewer images are there than its tags announce; nothing where it is whole."""
    name = _name(number_of(files[0][1], "SeriesNumber"))
    why = f"its tags announce {announced} images, of which {there} are there: a part of the head may be missing"
    return [f"{name}: {why}. Export the whole series."] if announced else []


def _not_read(
    files: Sequence[File],
    owners: Mapping[tuple[str, str], Collection[str]],
    all_series: Sequence[Series],
    mapping: Mapping[str, str] | None,
    display: Display,
) -> list[Series]:
    """Images of other kinds than MR as series that are left out: of the studies of MR images, or that may be scans.

    `owners` are the studies of MR images, by their UID and patient, and by their UID alone. Images without a UID are of
    the study that lies nearest.
    """
    groups: dict[tuple[str, ...], list[File]] = defaultdict(list)
    alone: list[File] = []
    for path, header in files:
        uid = text_of(header, "StudyInstanceUID")
        whose = (owners.get((uid, patient_of(header)), ()) or owners.get((uid, ""), ())) if uid else ()
        if not uid:
            whose = {series.study for series in _nearest(path.parent, all_series)}
        if len(whose) == 1:
            groups[_other_series(next(iter(whose)), path, header)].append((path, header))
        else:
            alone.append((path, header))
    for study, of_study in studies_of(alone).items():
        for path, header in of_study:
            groups[_other_series(study, path, header)].append((path, header))
    patients = {series.study: series.patient for series in all_series}
    found = []
    for (study, *_), group in groups.items():
        series = _unread_kind(study, group, mapping)
        if study in patients:
            found.append(replace(series, patient=patients[study]))
        elif series.reason != "decided" and series.patient not in patients.values():
            found.append(series)
        elif series.reason != "decided":
            where, images = series.images[0].path.parent, len(series.images)
            display.say(f"{where}: a study of its own without MR images, left out: {images} images {series.why}.")
    return found


def _other_series(study: str, path: Path, header: Any) -> tuple[str, ...]:
    """What images share that are not read, and of one series."""
    uid = text_of(header, "SeriesInstanceUID") or str(path.parent)
    return study, uid, why_not_read(header), description_of(header)


def _unread_kind(study: str, files: Sequence[File], mapping: Mapping[str, str] | None) -> Series:
    """A series of images of another kind than MR; it may be a scan by its timing, or by what its description names."""
    first, acquisition = files[0][1], _acquisition(files[0][1])
    verdict, said = recognise_contrast(acquisition), possible_contrasts(acquisition.description)
    named = verdict.modality is not None or (verdict.reason == "unclear" and said != possible_contrasts(""))
    frames = sum(number_of(header, "NumberOfFrames") or 1 for _, header in files)
    in_colour = (number_of(first, "SamplesPerPixel") or 1) != 1
    may_be = named and frames > MOST_CAPTURES and not in_colour and all(may_be_scan(header) for _, header in files)
    why = f"{why_not_read(first)}{'. Export it as MR images' if may_be else ''}"
    reason: Reason = "" if may_be else "decided"
    return Series(
        patient=text_of(first, "PatientID"),
        study=study,
        date=text_of(first, "StudyDate"),
        number=None if (number := number_of(first, "SeriesNumber")) is None else int(number),
        time=time_of(first),
        uid=text_of(first, "SeriesInstanceUID"),
        images=tuple(DicomImage(path, str(h.SOPClassUID), str(h.SOPInstanceUID), np.zeros(0)) for path, h in files),
        orientation=np.zeros(0),
        voxel_mm=(),
        acquisition=acquisition,
        original=False,
        modality=None,
        extent_mm=(),
        places=None,
        mixed=False,
        why=why,
        reason=reason,
        mapped=_mapped(files[0], acquisition, mapping),
        barred=Recognition(None, why, reason),
    )


def _beside_mapped(all_series: Sequence[Series]) -> list[Series]:
    """The series of a study without those that are passed over because --map names another one of their contrast.

    Of several that it names alike, such as a Dixon's, these are the ones of no anatomy.
    """
    mapped = {m for series in all_series for m in series.mapped}
    anatomy = {s.modality for s in all_series if s.mapped and not no_anatomy(s.acquisition.kinds)}
    beside = []
    for series in all_series:
        what = no_anatomy(series.acquisition.kinds)
        if series.mapped and series.modality in anatomy and what:
            series = replace(series, modality=None, why=f"{what}, and --map names another one alike")
        elif not series.mapped and series.modality in mapped:
            why = f"not the {series.modality} that --map names"
            series = replace(series, modality=None, why=why, reason="decided")
        beside.append(series)
    return beside


def unmatched_by(all_series: Sequence[Series], mapping: Mapping[str, str] | None) -> list[str]:
    """What to say of each pattern of a mapping that matches no series."""
    return [
        f"--map {modality}='{glob}' matches no series; they go by their tags and descriptions."
        for modality, globs in (mapping or {}).items()
        for glob in alternatives(globs)
        if not any(_matches(glob, s.name, s.acquisition.description, s.images[0].path) for s in all_series)
    ]


def _matches(glob: str, name: str, description: str, path: Path) -> bool:
    """Whether a pattern is a series' name, or matches its description, both in any case, or, with a slash, its path."""
    if glob.casefold() == name or fnmatch.fnmatchcase(description.casefold(), glob.casefold()):
        return True
    return "/" in glob and fnmatch.fnmatchcase(path.as_posix(), glob)


def _without_lost(all_series: Sequence[Series], unreadable: Sequence[Path]) -> list[Series]:
    """The series, of which those are left out whose images may be among the files that cannot be read.

    A file may be an image by its ending, or if but for digits it is called like one beside it. It is of the series in
    its folder; of several, of those that lack a slice, or else of its neighbours in the order of names. Where a folder
    holds no readable image, its files are a series of their own of the study that lies nearest.
    """
    of_folder: dict[Path, list[tuple[Path, int]]] = defaultdict(list)
    for index, series in enumerate(all_series):
        for image in series.images:
            of_folder[image.path.parent].append((image.path, index))
    kinds = {folder: {_without_digits(path) for path, _ in of} for folder, of in of_folder.items()}
    lost: dict[int, list[Path]] = defaultdict(list)
    alone: dict[Path, list[Path]] = defaultdict(list)
    for path in unreadable:
        beside = of_folder.get(path.parent, [])
        alike = path.suffix.lower() in _ENDINGS or _without_digits(path) in kinds.get(path.parent, ())
        if not alike or path.name.upper().startswith("DICOMDIR"):
            continue
        if not beside:
            alone[path.parent].append(path)
        for index in _may_lack(path, beside, all_series):
            lost[index].append(path)
    whole = [_left_out(series, lost[k]) if k in lost else series for k, series in enumerate(all_series)]
    return [*whole, *(unread for folder, paths in alone.items() if (unread := _unread(folder, paths, all_series)))]


def _may_lack(path: Path, beside: Sequence[tuple[Path, int]], all_series: Sequence[Series]) -> set[int]:
    """Which of the series in a folder a file may belong to."""
    found = {index for _, index in beside}
    if gaps := {index for index in found if all_series[index].reason == "slices missing"}:
        return gaps
    names = sorted(beside, key=lambda item: _natural(item[0].name))
    before = [index for other, index in names if _natural(other.name) < _natural(path.name)]
    after = [index for other, index in names if _natural(other.name) > _natural(path.name)]
    return {*before[-1:], *after[:1]}


def _without_digits(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which names are sorted, numbers in them by their value."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _left_out(series: Series, lost: Sequence[Path]) -> Series:
    """A series that may lack images; one that was left out before keeps its reason."""
    count = "a file" if len(lost) == 1 else f"{len(lost)} files"
    what = f"{count} beside its images cannot be read and may be of them{listed(lost)}"
    if series.modality is None:
        why = series.why.replace("some are missing", f"some are missing, and {what}")
    else:
        why = f"{what}. Export the whole series"
    barred = Recognition(None, f"{what}. Export the whole series")
    return replace(series, modality=None, why=why, unreadable=tuple(lost), barred=barred)


def _unread(folder: Path, lost: Sequence[Path], all_series: Sequence[Series]) -> Series | None:
    """A series of which no image can be read, of the one study that lies nearest; None where there are several."""
    near = _nearest(folder.parent, all_series)
    if len({series.study for series in near}) != 1:
        return None
    count = f"its {len(lost)} files" if len(lost) > 1 else "its file"
    why = f"none of {count} can be read as DICOM{listed(lost)}. Export the series again, or delete it"
    return replace(
        near[0],
        number=None,
        images=tuple(DicomImage(path, "", "", np.zeros(0)) for path in lost),
        acquisition=Acquisition(description=folder.name),
        modality=None,
        places=None,
        mixed=False,
        why=why,
        unreadable=tuple(lost),
        mapped=(),
        barred=Recognition(None, why),
    )


def _nearest(folder: Path, all_series: Sequence[Series]) -> list[Series]:
    """The series in a folder or below it; where there are none, those of the first folder above that has any."""
    for place in (folder, *folder.parents):
        if near := [series for series in all_series if place in series.images[0].path.parents]:
            return near
    return []


def listed(lost: Sequence[Path]) -> str:
    """Up to three names, if they cannot be a person's, in brackets; the terminal has all."""
    names = [path.name for path in lost[:3]]
    if not all(_IMPERSONAL.fullmatch(name) for name in names):
        return " (the terminal has their names, which may be the patient's)"
    return f" ({', '.join(names)}{', …' if len(lost) > 3 else ''})"


def _series(study: str, files: Sequence[File], acquisition: Acquisition, mapping: Mapping[str, str] | None) -> Series:
    """One series from the paths and tags of its files."""
    first = files[0][1]
    images, orientations, spacings = [], [], []
    for path, header in files:
        position, orientation, spacing = geometry_of(header)
        images.append(DicomImage(path, str(header.SOPClassUID), str(header.SOPInstanceUID), position))
        orientations.append(orientation)
        spacings.append(spacing)
    places = _evened(images, orientations)
    even = images if places is None else [replace(i, position=p) for i, p in zip(images, places, strict=True)]
    reason, fault, slice_distance = _fault(even, orientations)
    mapped = _mapped(files[0], acquisition, mapping)
    no_scan = _no_scan(first, acquisition.description)
    barred = no_scan or (Recognition(None, fault, reason) if fault else None)
    recognised = no_scan or _recognised(acquisition, mapped)
    if (recognised.modality is not None or recognised.reason == "denied") and barred:
        recognised = barred
    voxel_mm = tuple(float(side) for side in (*spacings[0], slice_distance))
    counts = (
        int(first.get("Rows") or 0),
        int(first.get("Columns") or 0),
        sum(len(np.atleast_2d(i.position)) for i in images),
    )
    return Series(
        patient=str(first.get("PatientID", "")),
        study=study,
        date=str(first.get("StudyDate", "")),
        number=None if (number := number_of(first, "SeriesNumber")) is None else int(number),
        time=time_of(first),
        uid=text_of(first, "SeriesInstanceUID"),
        images=tuple(images),
        orientation=orientations[0],
        voxel_mm=voxel_mm,
        acquisition=acquisition,
        original="DERIVED" not in acquisition.kinds,
        modality=recognised.modality,
        extent_mm=tuple(n * side for n, side in zip(counts, voxel_mm, strict=False)),
        places=places,
        mixed=len({tuple(str(header.get(keyword)) for keyword in TELLING) for _, header in files}) > 1,
        why=recognised.why,
        reason=recognised.reason,
        mapped=mapped,
        padding=_padding(first),
        barred=barred,
    )


def _padding(header: Any) -> float | None:
    """Pixel Padding Value on the scale of the voxels, None where it is 0 or missing."""
    value, slope, offset = (number_of(header, f) for f in ("PixelPaddingValue", "RescaleSlope", "RescaleIntercept"))
    return float(np.float32(value * (1.0 if slope is None else slope) + (offset or 0.0))) if value else None


def _no_scan(header: Any, description: str) -> Recognition | None:
    """Why the images of a series are no scan of one brightness, or none that was acquired; None where they may be."""
    shades = text_of(header, "PhotometricInterpretation")
    if (number_of(header, "SamplesPerPixel") or 1) != 1 or shades == "PALETTE COLOR":
        return Recognition(None, "in colour", "decided")
    if shades == "MONOCHROME1":
        return Recognition(None, "stored with white for the lowest value (MONOCHROME1). Export it as MONOCHROME2")
    if description.upper().startswith("SYNTHETIC") or names_crossmr(header):
        return Recognition(None, "itself synthetic", "decided")
    return None


def _recognised(acquisition: Acquisition, mapped: Sequence[str]) -> Recognition:
    """The contrast of a series: by its tags, or what `mapped` says, the modalities that --map gives it."""
    if not mapped and _SYNTHETIC.search(acquisition.description):
        return Recognition(None, "called synthetic, by whatever program. Export what was acquired, or name it by --map")
    recognised = recognise_contrast(acquisition)
    denied = recognised.reason == "denied"
    if (recognised.modality is not None or denied) and covers(acquisition.part, acquisition.description) == 0:
        recognised = Recognition(None, "of another part of the body than the head", "decided" if denied else "")
    if len(mapped) > 1:
        return Recognition(None, f"named {' and '.join(mapped)} by --map; name it once")
    return Recognition(mapped[0], BY_USER) if mapped else recognised


def _mapped(file: File, acquisition: Acquisition, mapping: Mapping[str, str] | None) -> tuple[str, ...]:
    """The modalities that a mapping says a series is."""
    path, name = file[0], _name(number_of(file[1], "SeriesNumber"))
    return tuple(
        modality
        for modality, globs in (mapping or {}).items()
        if any(_matches(glob, name, acquisition.description, path) for glob in alternatives(globs))
    )


def _name(number: float | None) -> str:
    return "series without a number" if number is None else f"series {int(number)}"


def _evened(images: Sequence[DicomImage], orientations: Sequence[Floats]) -> Floats | None:
    """(N, 3) positions at even distances where those of the images are these, rounded coarsely; else None."""
    if len(images) < FEWEST_SLICES or any(
        o.shape != (2, 3) or not np.allclose(o, orientations[0], atol=1e-3) for o in orientations
    ):
        return None
    positions = (
        np.stack([image.position for image in images]) if all(i.position.shape == (3,) for i in images) else None
    )
    if positions is None:
        return None
    normal = np.cross(*orientations[0])
    order = np.argsort(positions @ normal)
    digits = next((d for d in (1.0, 0.5, 0.1) if np.allclose(positions, np.round(positions / d) * d, atol=1e-6)), None)
    index = np.empty(len(images))
    index[order] = np.arange(len(images))
    slope, offset = np.polyfit(index, positions, 1)
    step = float(slope @ normal)
    even = offset + index[:, None] * (step * normal)
    even += (positions - even).mean(axis=0)
    steps = np.diff((positions @ normal)[order])
    if digits is None or step < 4 * digits or np.abs(steps - step).max() <= UNEVEN * step:
        return None
    return even if np.abs(positions - even).max() <= 0.8 * digits else None


def _fault(images: Sequence[DicomImage], orientations: Sequence[Floats]) -> tuple[Reason, str, float]:
    """Why these images are no volume, also for people, '' if they are one, and the distance of the slices in mm."""
    first = orientations[0]
    if unplaced := sum(o.shape != (2, 3) for o in orientations):
        lost = [image.path for image, o in zip(images, orientations, strict=True) if o.shape != (2, 3)]
        if unplaced == len(images):
            return "", "its images do not say where they lie", 0.0
        why = f"{unplaced} of its {len(images)} images do not say where they lie, and may be damaged{listed(lost)}"
        return "", f"{why}. Export the whole series", 0.0
    if any(not np.allclose(o, first, atol=1e-3) for o in orientations):
        return "directions", "its slices lie in several directions, as a localiser's", 0.0
    normal = np.cross(*first)
    along = np.sort(np.concatenate([np.atleast_2d(image.position) @ normal for image in images]))
    steps = np.diff(along)
    if len(along) < FEWEST_SLICES:
        return "few slices", f"{len(along)} slices only", 0.0
    step = float(np.median(steps))
    if (steps < 0.01).any():
        why = "several images lie at one place: echoes, times or directions that its tags do not tell apart"
        return "one place", why, step
    if (np.abs(steps - step) > max(UNEVEN * step, 0.02)).any():
        k = int(np.argmax(np.abs(steps - step)))
        why = f"its slices are {step:.2f} mm apart, but {steps[k]:.2f} mm between the {k + 1}th and the next of "
        return "slices missing", f"{why}{len(along)}: some are missing. Export the whole series", step
    places = np.concatenate([np.atleast_2d(image.position) for image in images])
    aside = places - np.outer(places @ normal, normal)
    if (shift := float(np.abs(aside - np.median(aside, axis=0)).max())) > SHIFTED_MM:
        return "", f"its slices are shifted against each other by up to {shift:.1f} mm within their planes", step
    return "", "", step


def _acquisition(header: Any) -> Acquisition:
    """The tags that tell contrasts apart."""
    pulse = {"SPIN": {"SE"}, "GRADIENT": {"GR"}, "BOTH": {"SE", "GR"}}.get(
        str(find(header, "EchoPulseSequence")), set()
    )
    told = {"InversionRecovery": "IR", "EchoPlanarPulseSequence": "EP"}
    also = {family for keyword, family in told.items() if find(header, keyword) == "YES"}
    families = {*texts_of(header, "ScanningSequence"), *pulse, *also}
    b_value = number_of(header, "DiffusionBValue")
    text = str(header.get("ContrastBolusAgent") or "")
    agent = names_agent(text)
    unclear = agent is None and is_unclear(text)
    injected = (number_of(header, "ContrastBolusVolume") or 0) > 0
    if header.get("ContrastBolusAgentSequence") or (agent is None and injected):
        agent = find(header, "ContrastBolusAgentAdministered") != "NO"
    start, begun = number_of(header, "ContrastBolusStartTime"), number_of(header, "AcquisitionTime")
    if agent and start and begun and 0 < start - begun < HALF_A_DAY:  # injected after it was acquired
        agent = False
    return Acquisition(
        families=frozenset(families),
        variants=frozenset(texts_of(header, "SequenceVariant")),
        tr_ms=number_of(header, "RepetitionTime"),
        te_ms=_first(number_of(header, "EffectiveEchoTime"), number_of(header, "EchoTime")),
        ti_ms=_first(number_of(header, "InversionTime"), number_of(header, "InversionTimes")),
        agent=agent,
        unclear=unclear and agent is None,
        acquired=str(find(header, "AcquisitionContrast") or ""),
        kinds=frozenset({*texts_of(header, "ImageType"), *texts_of(header, "FrameType")}),
        angiography=header.get("AngioFlag") == "Y"
        or "YES" in (find(header, "PhaseContrast"), find(header, "TimeOfFlightContrast")),
        times=int(number_of(header, "NumberOfTemporalPositions") or 1),
        flip_degrees=number_of(header, "FlipAngle"),
        part=text_of(header, "BodyPartExamined"),
        diffusion=b_value is not None and b_value > 0,
        description=description_of(header),
    )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
