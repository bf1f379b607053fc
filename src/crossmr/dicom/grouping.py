"""Which images of DICOM are of one study, and of one series: what UIDs say, and where they do not, what they show."""

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.contrast_agent import is_placeholder
from crossmr.dicom.contrast import means
from crossmr.dicom.headers import (
    File,
    announced_slices,
    dates_of,
    description_of,
    geometry_of,
    is_enhanced,
    number_of,
    place_of,
    text_of,
    texts_of,
    time_of,
)

SAME_ECHO = 1.01
"""Echo times of one series that differ by less than this factor are one."""

_MADE_UP = re.compile(
    r"(ANON(YM(OUS|IZED|ISED|E)?)?|DE?IDENTIFIED|REMOVED|REDACTED|UNKNOWN|NONE|NULL|NA|NOID|NONAME|PATIENT(ID)?|"
    r"PSEUDONYM(IZED|ISED)?|TEST|X+|0+|9{3,}|1|12345\d*)"
)
"""An ID that is everybody's, without what lies between its letters; others are placeholders in some language."""
OTHER_ID = (
    "of another patient ID under this study's UID. Export it with the right one, or name it in the table of series"
)
"""Why a series that may be of a study is not."""
OTHER_FRAME = (
    "in the same folder, but of another frame of reference, and taken for another examination, as no study's UID says "
    "more. Export it with that UID, or name it in the table of series"
)
"""The same of one without the UID of a study."""
LONGEST_STUDY, NOON = 180000, "120000"
"""HHMMSS. Times of one day that differ by more than the first, as numbers, have midnight between them."""


def studies_of(files: Sequence[File]) -> dict[str, list[File]]:
    """Study → its files: by its UID; by patient, date and so on where there is none; never of two patients."""
    studies: dict[str, list[File]] = defaultdict(list)
    without: list[File] = []
    for path, header in files:
        if uid := text_of(header, "StudyInstanceUID"):
            studies[uid].append((path, header))
        else:
            without.append((path, header))
    studies |= _without_uid(without)
    for study, of_study in list(studies.items()):
        patients = _patients([header for _, header in of_study])
        if len({patient for patient in patients if patient}) > 1:  # one UID of several patients' studies
            del studies[study]
            for file, patient in zip(of_study, patients, strict=True):
                studies[f"{study} {patient}"].append(file)
    return studies


def _without_uid(files: Sequence[File]) -> dict[str, list[File]]:
    """Studies of images that have no UID of it: of one patient and date, and of one frame of reference or folder.

    Where the patient and the date are somebody's own, they suffice unless two folders hold a series of one number and
    description, of two frames of reference. Folders that hold one series each, all of other numbers or descriptions,
    are of one study where they lie in one folder, unless frames of reference tell more and patient and date do not.
    """
    alike: dict[tuple[str, ...], list[File]] = defaultdict(list)
    for path, header in files:
        alike[_person_and_date(header)].append((path, header))
    studies: dict[str, list[File]] = {}
    for key, of_key in alike.items():
        known = not any(_is_made_up(header) for _, header in of_key)
        frames = {text_of(header, "FrameOfReferenceUID") for _, header in of_key}
        if known and len(frames) == 1:
            studies[str(key)] = of_key
            continue
        above, marks = _folders_of_series(of_key), []
        for path, header in of_key:
            frame, folder = text_of(header, "FrameOfReferenceUID"), path.parent
            place = above.get(folder, folder) if known or not frame else folder
            marks.append([f"folder {place}", *([frame] if frame else [])])
        lots = _joined(of_key, marks)
        if known and not _repeat(lots.values()):
            lots = {"": of_key}
        for mark, of_mark in lots.items():
            studies[str((*key, mark) if mark else key)] = of_mark
    return studies


def _repeat(lots: Iterable[Sequence[File]]) -> bool:
    """Whether several lots of images have a series of one number and description."""
    series = [{(text_of(header, "SeriesNumber"), description_of(header)) for _, header in lot} for lot in lots]
    return sum(map(len, series)) > len(set[tuple[str, str]]().union(*series))


def _folders_of_series(files: Sequence[File]) -> dict[Path, Path]:
    """Folders that seem to hold one series of a study each → the folder that they lie in."""
    held: dict[Path, set[tuple[str, ...]]] = defaultdict(set)
    for path, header in files:
        held[path.parent].add((text_of(header, "SeriesNumber"), description_of(header)))
    beside: dict[Path, list[tuple[str, ...]]] = defaultdict(list)
    for folder, series in held.items():
        beside[folder.parent] += series
    return {
        folder: folder.parent
        for folder, series in held.items()
        if len(series) == 1 and len(set(beside[folder.parent])) == len(beside[folder.parent])
    }


def _joined(files: Sequence[File], marks: Sequence[Sequence[str]]) -> dict[str, list[File]]:
    """The files that share marks, directly or by way of others: the least mark of each lot → its files."""
    root = {mark: mark for of_file in marks for mark in of_file}

    def find(mark: str) -> str:
        while root[mark] != mark:
            mark = root[mark]
        return mark

    for of_file in marks:
        least = min(map(find, of_file))
        for mark in of_file:
            root[find(mark)] = least
    joined: dict[str, list[File]] = defaultdict(list)
    for file, of_file in zip(files, marks, strict=True):
        joined[find(of_file[0])].append(file)
    return joined


def is_unnamed(files: Sequence[File]) -> bool:
    """Whether neither a study's UID nor patient and date say that its images belong together."""
    return any(not text_of(header, "StudyInstanceUID") and _is_made_up(header) for _, header in files)


def kin_of(studies: Mapping[str, Sequence[File]]) -> dict[str, dict[str, str]]:
    """Study → others whose series may be of it, too → why they are not.

    That is another patient ID of one name and date of birth under one UID, unless frames of reference contradict;
    without a UID another frame of reference in one folder, where no ID and date of their own tell.
    """
    alike: dict[tuple[object, ...], set[str]] = defaultdict(set)
    above = _folders_of_series([file for of_study in studies.values() for file in of_study])
    for study, of_study in studies.items():
        for path, header in of_study:
            if uid := text_of(header, "StudyInstanceUID"):
                if not _is_everybodys(_upper(header, "PatientName")):
                    alike[uid, *_name_and_birth(header)].add(study)
            else:
                alike[*_person_and_date(header), above.get(path.parent, path.parent)].add(study)
    kin: dict[str, dict[str, str]] = defaultdict(dict)
    several = set[str]().union(*(of_key for of_key in alike.values() if len(of_key) > 1))
    frames = {s: {text_of(header, "FrameOfReferenceUID") for _, header in studies[s]} - {""} for s in several}
    for of_key in alike.values():
        for study, other in itertools.permutations(sorted(of_key), 2):
            if text_of(studies[study][0][1], "StudyInstanceUID"):
                if not (frames[study] and frames[other] and frames[study].isdisjoint(frames[other])):
                    kin[study][other] = OTHER_ID
            elif not _repeat((studies[study], studies[other])):
                kin[study][other] = OTHER_FRAME
    return kin


def _name_and_birth(header: Any) -> tuple[str, str]:
    return _upper(header, "PatientName"), _upper(header, "PatientBirthDate")


def _person_and_date(header: Any) -> tuple[str, ...]:
    """What images without the UID of a study share: patient and date, and a name of their own where the ID is not."""
    known, name, date = (_upper(header, keyword) for keyword in ("PatientID", "PatientName", "StudyDate"))
    own = known and _is_everybodys(known) and not _is_everybodys(name)
    return (known or name, date, name) if own else (known or name, date)


def _is_made_up(header: Any) -> bool:
    """Whether patient's ID or study's date is missing, or one that de-identification puts in place of everybody's."""
    date = text_of(header, "StudyDate")
    real_date = re.fullmatch(r"(19[89]|2\d\d)\d{5}", date) and not date.endswith("0101")
    return _is_everybodys(_upper(header, "PatientID")) or not real_date


def _is_everybodys(known: str) -> bool:
    """Whether an ID or a name is missing, or one that de-identification puts in place of everybody's."""
    bare = re.sub(r"[^A-Z0-9]", "", known)
    return not bare or bool(_MADE_UP.fullmatch(bare)) or (is_placeholder(known) and not re.search(r"\d", known))


def _patients(headers: Sequence[Any]) -> list[str]:
    """What tells patients apart within a study, for each image: the ID, or the name where there is none.

    An image without ID is of the one who alone has its name. IDs that zeros before them alone tell apart are one where
    name and date of birth agree.
    """
    ids, names, born = (
        [_upper(header, keyword) for header in headers] for keyword in ("PatientID", "PatientName", "PatientBirthDate")
    )
    of_name: dict[str, set[str]] = defaultdict(set)
    first: dict[tuple[str, ...], str] = {}
    for k, (known, name) in enumerate(zip(ids, names, strict=True)):
        if known and name and born[k]:
            ids[k] = first.setdefault((known.lstrip("0"), name, born[k]), known)
        of_name[name] |= {ids[k]} - {""}
    return [
        known or (next(iter(of_name[name])) if name and len(of_name[name]) == 1 else name)
        for known, name in zip(ids, names, strict=True)
    ]


def patient_of(header: Any) -> str:
    """What tells patients apart: the ID, or the name where there is none."""
    return _upper(header, "PatientID") or _upper(header, "PatientName")


def _upper(header: Any, keyword: str) -> str:
    """A text without what says nothing: how it is spaced, small letters, the empty parts of a name at its end."""
    return " ".join(text_of(header, keyword).upper().split()).rstrip("^ ")


def moments_of(headers: Sequence[Any]) -> list[str]:
    """When each series of a study was acquired, as text that sorts: its day and HHMMSS; '' where no time is told.

    The day is the date of the acquisition, else that of the series, else that of the study. Where these are all the
    same, as after de-identification, and the times span more than `LONGEST_STUDY`, midnight lies between them.
    """
    times = [time_of(header) for header in headers]
    known = [k for k, time in enumerate(times) if time]
    dates = [(*dates_of(header), text_of(header, "StudyDate")) for header in headers]
    one = next((n for n in (0, 1) if all(dates[k][n] for k in known)), None)  # dates of one kind, if each has it
    days = [next(filter(None, date), "") if one is None else date[one] for date in dates]
    if known and len({days[k] for k in known}) == 1:
        first, last = min(times[k] for k in known), max(times[k] for k in known)
        over_midnight = int(last) - int(first) > LONGEST_STUDY
        days = ["next" if over_midnight and time < NOON else "" for time in times]
    return [f"{day} {time}".strip() if time else "" for day, time in zip(days, times, strict=True)]


def announced_of(groups: Sequence[Sequence[File]]) -> list[tuple[int, int]]:
    """For each series of a study how many images are there of its acquisition, and how many are announced; or (0, 0).

    An acquisition may have several series, such as echoes, of which some may have been left behind on purpose: a number
    that is a multiple of what is there announces these. Derived images may have the number of what they are made of.
    """
    numbers, keys = [], []
    for files in groups:
        told = {number_of(header, "ImagesInAcquisition") for _, header in files}
        numbers.append(int(next(iter(told)) or 0) if len(told) == 1 else 0)
        uid = text_of(files[0][1], "SeriesInstanceUID")
        begun = min(time_of(header) for _, header in files), text_of(files[0][1], "AcquisitionNumber"), str(numbers[-1])
        keys.append({(uid,), begun} if uid else {begun})
    there = Counter({key: 0 for of_group in keys for key in of_group})
    for files, of_group in zip(groups, keys, strict=True):
        there.update({key: len(files) for key in of_group})
    found = []
    for files, number, of_group in zip(groups, numbers, keys, strict=True):
        images, header = max(there[key] for key in of_group), files[0][1]
        slices, of_scanner = len({place_of(header) for _, header in files}), announced_slices(header)
        if is_enhanced(header) or "DERIVED" in texts_of(header, "ImageType"):
            found.append((0, 0))
        elif images < number and number % images:
            found.append((images, number))
        elif of_scanner and slices < of_scanner and images < of_scanner:
            found.append((slices, of_scanner))
        else:
            found.append((0, 0))
    return found


def groups_of(files: Sequence[File]) -> Iterator[tuple[list[File], int]]:
    """The series among the files of one study, and the number of echo times of the scanner's series."""
    uids = Counter(text_of(header, "SeriesInstanceUID") for _, header in files)
    single = [
        header for _, header in files if uids[text_of(header, "SeriesInstanceUID")] == 1 and not is_enhanced(header)
    ]
    numbers: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for header in single:
        numbers[_looks(header)].append(text_of(header, "SeriesNumber"))
    # a UID for each slice says nothing, nor does a number for each
    alone = {looks for looks, of_looks in numbers.items() if len(of_looks) > 1}
    unnumbered = {looks for looks in alone if len(set(numbers[looks])) == len(numbers[looks])}
    groups: dict[tuple[Any, ...], list[File]] = defaultdict(list)
    for path, header in files:
        uid, number, looks = text_of(header, "SeriesInstanceUID"), text_of(header, "SeriesNumber"), ()
        if not is_enhanced(header) and uids[uid] == 1 and _looks(header) in alone:
            uid, looks = "", _looks(header)
            number = "" if looks in unnumbered else number
        place = "" if uid or number or looks else str(path.parent)
        groups[(uid, number, *_sequence(header), looks, place)].append((path, header))
    for group in groups.values():
        if is_enhanced(group[0][1]):
            yield group, 1
            continue
        echoes = _by_echo(group)
        for echo in echoes:
            for part in _by_type(echo):
                yield part, len(echoes)


def _by_echo(files: Sequence[File]) -> list[list[File]]:
    """The files by echo time; times within a hundredth are one."""
    parts: list[list[File]] = []
    latest: float | None = None
    for time, file in sorted(((number_of(f[1], "EchoTime"), f) for f in files), key=lambda item: item[0] or 0.0):
        if not parts or (time or 0.0) > SAME_ECHO * (latest or 0.0) or (time is None) != (latest is None):
            parts.append([])
        parts[-1].append(file)
        latest = time
    order = {path: k for k, (path, _) in enumerate(files)}
    return [sorted(part, key=lambda file: order[file[0]]) for part in parts]


def _by_type(files: Sequence[File]) -> list[list[File]]:
    """The files by Image Type; types that mean the same are one where their slices lie at different places."""
    types: dict[tuple[str, ...], list[File]] = defaultdict(list)
    for path, header in files:
        types[tuple(texts_of(header, "ImageType"))].append((path, header))
    parts: dict[tuple[Any, ...], list[list[File]]] = defaultdict(list)
    for kinds, part in types.items():
        places = {place_of(header) for _, header in part}
        same = parts[(means(kinds), _looks(part[0][1]))]
        for other in same:
            if places.isdisjoint(place_of(header) for _, header in other) and "" not in places:
                other += part
                break
        else:
            same.append(list(part))
    return [part for same in parts.values() for part in same]


def _sequence(header: Any) -> tuple[str, ...]:
    """What all images of a series share: description and scanning sequence."""
    return description_of(header), *texts_of(header, "ScanningSequence")


def _looks(header: Any) -> tuple[Any, ...]:
    """Description, sequence and geometry, for images whose UIDs do not say of which series they are."""
    _, orientation, spacing = geometry_of(header)
    shape = header.get("Rows"), header.get("Columns")
    return (*_sequence(header), *shape, *(float(v) + 0.0 for v in np.round([*orientation.ravel(), *spacing], 2)))


def without_copies(pydicom: Any, files: Sequence[File]) -> list[File]:
    """The files without those that show the same pixels at the same place, as a study that was sent twice holds."""
    places = Counter(place_of(header) for _, header in files)
    if is_enhanced(files[0][1]) or max(places.values()) == 1 or "" in places:
        return list(files)
    kept: list[File] = []
    seen: set[tuple[str, bytes]] = set()
    for path, header in files:
        if places[place := place_of(header)] > 1:
            pixels = pydicom.dcmread(path, force=True, specific_tags=["PixelData"]).get("PixelData") or b""
            key = place, hashlib.sha256(pixels).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append((path, header))
    return kept
