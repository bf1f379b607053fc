"""Whose each study is, by the names of its files and folders: `visits` reads one, `patients` knows more than names."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from crossmr.data.tree import BARE, File, NamesInTree, folder_names, is_mask, parts
from crossmr.data.visits import (
    CONFIDENCES,
    LARGEST_FAMILY,
    Confidence,
    after_first,
    after_time_point,
    is_dated,
    is_visit,
    look_alike,
    looks_like_patient,
    may_repeat,
    names_scan,
    parse_patient,
    says_nothing,
)


class Patient(NamedTuple):
    """Whose a study is, by the names of its files and folders."""

    name: str
    confidence: Confidence = "sure"
    alike: tuple[str, ...] = ()
    folder: Path | None = None
    """The patient's folder, where a folder named them."""


def patients_by_name(studies: Mapping[str, list[File]], names: NamesInTree, root: Path | None) -> dict[str, Patient]:
    """Case → patient.

    Time points by which three or more studies, and no others, would all be of one patient are none, unless they are
    sure: `EORTC-26101-001` and so on may be the patients of one trial.
    """
    folders = {case: folder for folder, case in names.names.items()}
    patients: dict[str, Patient] = {}
    sites: dict[str, str] = {}
    for case, files in studies.items():
        images = (file for file in files if file[1].meaning and not is_mask(file[1]))
        path, reading = next(images, next((file for file in files if file[1].meaning), files[0]))
        own = folders.get(case)
        named = case == "_".join(filter(None, (reading.head, reading.visit))) and parse_patient(reading.head).patient
        if named and not names.is_placed(path):  # RHUH-0001_0 of RHUH-0001/0
            own = None
        elif (own is None and not reading.head and reading.visit) or (
            case != reading.head and not parse_patient(reading.head).patient
        ):
            own = names.folder(path)
        site = names.site(path, reading.head) if own is None else ""
        sites[case] = site if reading.head.startswith(site) and case.startswith(site) else ""
        patients[case] = _patient(case, own, names.folder(path), root, sites[case])
    if len(patients) > 2 and len({(p.name, p.folder) for p in patients.values()}) == 1:
        patients = {case: p if p.confidence == "sure" else Patient(case) for case, p in patients.items()}
    called = folder_names({patient.folder for patient in patients.values() if patient.folder is not None}, root)
    for folder, name in called.items():  # 1 of another cohort is another patient: Meier/1, Huber/1
        if BARE.fullmatch(name) and len(words := parts(folder, root)) > 1:
            called[folder] = f"{words[-2]}_{name}"
    patients = {
        case: patient if patient.folder is None else patient._replace(name=called[patient.folder])
        for case, patient in patients.items()
    }
    return _at_several_sites(_no_large_families(_same_ends(patients, root)), sites)


def _no_large_families(patients: Mapping[str, Patient]) -> dict[str, Patient]:
    """The patients, but all studies, or too many, that only a time point before a common name makes one patient's.

    That name is rather a scanner's, or a disease: 20190301_GE3T and 20190402_GE3T.
    """
    of: dict[str, list[str]] = defaultdict(list)
    for case, patient in patients.items():
        of[patient.name].append(case)
    found = dict(patients)
    for cases in of.values():
        rests = {after_time_point(case) for case in cases}
        surely = all(looks_like_patient(rest, after_date=True) == "sure" for rest in rests)
        many = len(cases) > LARGEST_FAMILY and not surely
        if len(cases) > 1 and all(rests) and (len(cases) == len(patients) or many):
            found |= {case: Patient(case, "weak", (f"*{min(rests)}",)) for case in cases}
    return found


def _at_several_sites(patients: Mapping[str, Patient], sites: Mapping[str, str]) -> dict[str, Patient]:
    """The patients, with `alike` of those who are told apart by nothing but the site before their names."""
    of: dict[str, set[str]] = defaultdict(set)
    bare = {case: patient.name.removeprefix(sites[case]) for case, patient in patients.items() if sites[case]}
    for case, name in bare.items():
        of[name].add(sites[case])
    found = dict(patients)
    for case, name in bare.items():
        if len(of[name]) > 1:
            found[case] = found[case]._replace(alike=(f"*{name}",))
    return found


def _same_ends(patients: dict[str, Patient], root: Path | None) -> dict[str, Patient]:
    """The patients, with `alike` of those whose names end alike, so that they may be one: site1/P01 and site2/P01.

    So are those of names that end alike after a time point: BASE-01-007 and BASE-02-007. But a case in which nothing
    but a time point was found has a patient, weakly, if its first word surely is a visit's, and the others, which are
    no hour, are in another case, too: 20190101_0001 and 20200101_0001; baseline_003 and followup_003, of two words.
    """
    ends: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # end → beginning → cases
    visits: dict[str, list[str]] = defaultdict(list)
    for case, patient in patients.items():
        if (rest := after_time_point(patient.name)) and parse_patient(rest).patient:
            visits[rest].append(case)
        above = () if patient.folder is None else parts(patient.folder, root)[:-1]
        whole = patient.name if patient.folder is None else patient.folder.name
        ends[whole][above[-1] if above else ""].add(case)
        if not above:
            first, rest = after_first(patient.name)
            ends[rest][first].add(case)
    found = dict(patients)
    for rest, those in visits.items():
        alone = [case for case in those if _is_visit_of(case, rest, patients[case].name)]
        words = {re.sub(r"\d", "", after_first(case)[0].lower()) for case in alone}
        dated = any(is_dated(after_first(case)[0]) for case in alone)
        if len(alone) > 1 and (looks_like_patient(rest, after_date=dated) or (len(words) > 1 and not dated)):
            found |= {case: Patient(rest, "weak") for case in alone}
        elif len({patients[case].name for case in those}) > 1:
            found |= {case: found[case]._replace(alike=(*found[case].alike, f"*{rest}")) for case in those}
    repeated = {
        end: of for end, of in ends.items() if len({found[case].name for some in of.values() for case in some}) > 1
    }
    for end, of in repeated.items():
        said = [may_repeat(first, end) for first in of if first]
        if said and all(one or (one is None and len(repeated) >= len(of)) for one in said):
            found |= {case: found[case]._replace(alike=(f"*{end}",)) for cases in of.values() for case in cases}
    return found


def _is_visit_of(case: str, rest: str, patient: str) -> bool:
    """Whether nothing but a time point was found in a case, and its first word is one of what follows."""
    first, others = after_first(case)
    return patient == case and others == rest and is_visit(case) and is_visit(first)


def _patient(case: str, folder: Path | None, place_of_files: Path, root: Path | None, site: str = "") -> Patient:
    """The patient that the case names, after its site's name, or else the folder that it is called after, or above."""

    def below(place: Path) -> bool:
        return bool(place.name) and (root is None or root in place.parents)

    if folder is None:
        reading = parse_patient(case.removeprefix(site))
        if reading.patient:
            begins = look_alike(case.removeprefix(site))
            return Patient(f"{site}{reading.patient}", reading.confidence, _said(begins and f"{site}{begins}"))
        confidence, folder = reading.confidence, place_of_files
    elif below(folder):
        confidence = "sure"
    else:
        return Patient(case)
    for place in (folder, *folder.parents):
        if not below(place):
            break
        reading = parse_patient(place.name)
        confidence = max(confidence, reading.confidence, key=CONFIDENCES.index)
        if reading.patient:
            if place != folder and confidence == "weak" and not re.search(r"\d", reading.patient):
                break
            known = is_visit(place.parent.name) or may_repeat(place.parent.name, "P1")
            bare = BARE.fullmatch(place.name) and not is_visit(place.parent.name)
            rest = after_time_point(place.name)
            dated_first = bool(rest) and is_dated(place.name.removesuffix(rest))  # W1/01-23-1999-BRAIN-12345
            numbered = re.search(r"\d", place.parent.name)
            named = bare or (numbered and (dated_first or not known))  # V1/P01 is no visit of V1
            own, higher = place.with_name(reading.patient), place.parent
            visits = [above for above in own.parents if below(above) and is_visit(above.name)]
            dated = any(is_dated(above.name) for above in visits)
            if visits and says_nothing(own.name):  # P01/2019-03-01/Brain_3T
                continue
            surely = looks_like_patient(own.name, after_date=dated)
            if visits and not surely and (dated or not BARE.fullmatch(own.name)):  # 2019-03-01/0915 is an hour
                higher, named, visits = visits[-1].parent, True, []
            elif visits and (not surely or names_scan(own.name) or (dated and own.name.isdecimal())):
                confidence = "weak"
            above = str(higher) if below(higher) and named else ""
            whole = place.name.endswith(reading.patient) and place == folder
            alike = _said((dated_first and above) or look_alike(place.name) or above) if whole else ()
            for visit in visits:  # baseline/P1, from the nearest up
                own = visit.parent / own.relative_to(visit)
            while own.parent.name == own.name and below(own.parent):  # P1/P1_baseline
                own = own.parent
            return Patient("", confidence, alike, own)
    return Patient(case, alike=_said(str(folder.parent)) if below(folder) else ())


def _said(alike: str) -> tuple[str, ...]:
    return (alike,) if alike else ()
