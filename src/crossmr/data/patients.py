"""Whose each study is: as a table says, or as names say; and studies that share a scan are of one patient.

The table is a CSV file with the columns `case`, `patient` and, if splits are to be fixed, `part` (train, val or test;
empty where a patient's split is left to chance). Studies that it does not list are grouped by their names.
"""

import csv
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crossmr.data.naming import StudyFiles
from crossmr.data.visits import LARGEST_FAMILY
from crossmr.errors import ConfigError

SPLITS = ("train", "val", "test")
COLUMNS = ("case", "patient", "part")
SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """What a table says of one study."""

    patient: str
    part: str
    """'train', 'val', 'test', or '' where it is left open."""
    line: int


def read_patients(path: Path) -> dict[str, Entry]:
    """Read a table of patients: case → its entry.

    Raises:
        ConfigError: with line and column, what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"--patients {path} cannot be read: {reason}.") from error
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter=";" if first.count(";") > first.count(",") else ",")
    columns = [name.strip() for name in next(reader, [])]
    if sorted(columns) not in (sorted(COLUMNS), sorted(COLUMNS[:2])):
        raise ConfigError(
            f"--patients {path}, line 1: its columns are {', '.join(columns) or 'none'}; "
            "expected case and patient, and part if it fixes the splits."
        )
    entries: dict[str, Entry] = {}
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        where = f"--patients {path}, line {reader.line_num}"
        if len(row) != len(columns):
            raise ConfigError(f"{where}: it has {len(row)} columns; expected {len(columns)}: {', '.join(columns)}.")
        values = dict(zip(columns, (cell.strip() for cell in row), strict=True))
        _check(values, entries, where)
        entries[values["case"]] = Entry(values["patient"], values.get("part", ""), reader.line_num)
    return entries


def _check(values: Mapping[str, str], entries: Mapping[str, Entry], where: str) -> None:
    """Refuse a line that says nothing, or what another line contradicts."""
    for column in COLUMNS[:2]:
        if not values[column]:
            raise ConfigError(f"{where}, column {column}: it is empty. Name one, or delete the line.")
    case, patient, part = values["case"], values["patient"], values.get("part", "")
    if part not in ("", *SPLITS):
        raise ConfigError(f"{where}, column part: '{part}' is not a part; expected {', '.join(SPLITS)}, or nothing.")
    if case in entries:
        raise ConfigError(f"{where}, column case: '{case}' is on line {entries[case].line} already. Delete one.")
    for earlier in entries.values():
        if earlier.patient == patient and part and earlier.part and earlier.part != part:
            raise ConfigError(
                f"{where}, column part: patient '{patient}' is in {part} here and in {earlier.part} on line "
                f"{earlier.line}. All studies of a patient go to one part."
            )


def assign(
    studies: Sequence[StudyFiles],
    entries: Mapping[str, Entry],
    path: Path,
    say: Callable[[str], object] | None = None,
) -> list[StudyFiles]:
    """The studies with the patients of a table.

    `say` is told of lines without a study, as where the table is of a whole cohort and these studies are a part of it.

    Raises:
        ConfigError: the table names a study that is not there, and `say` is not given, or it names none that is.
    """
    known = {study.case for study in studies}
    missing = [case for case in entries if case not in known]
    unlisted = sorted(known - {*entries})
    close = {case: near[0] for case in missing if (near := difflib.get_close_matches(case, unlisted, n=1))}
    if missing and (say is None or len(missing) == len(entries)):
        case = next(iter(close), missing[0])
        some = ", ".join(sorted(known)[:3])
        hint = f"Did you mean '{close[case]}'?" if case in close else f"The studies are {some}, …"
        raise ConfigError(
            f"--patients {path}, line {entries[case].line}, column case: there is no study '{case}'. {hint}"
        )
    if missing and say is not None:
        also = [f"did you mean '{near}' by '{case}'?" for case, near in [*close.items()][:SHOWN]]
        what = "line names a study that is" if len(missing) == 1 else "lines name studies that are"
        say("; ".join([f"warning: {len(missing)} {what} not there in --patients {path}: {listed(missing)}", *also]))
    return [
        replace(study, patient=entries[study.case].patient, confidence="sure", alike=())
        if study.case in entries
        else study
        for study in studies
    ]


def merge(patients: Mapping[str, str], scans: Mapping[str, Iterable[str]]) -> tuple[dict[str, str], list[list[str]]]:
    """Make one patient of those whose studies share a scan.

    Args:
        patients: case → patient.
        scans: case → hashes of its volumes.

    Returns:
        Case → patient, the first by name of those that became one; and the groups of cases that share scans.
    """
    first: dict[str, str] = {}
    leader: dict[str, str] = {patient: patient for patient in patients.values()}
    groups: dict[str, set[str]] = {}

    def leading(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    shared: list[tuple[str, str]] = []
    for case in sorted(patients):
        for scan in scans.get(case, ()):
            if (other := first.setdefault(scan, case)) != case:
                shared.append((other, case))
                low, high = sorted((leading(patients[other]), leading(patients[case])))
                leader[high] = low
    for pair in shared:
        groups.setdefault(leading(patients[pair[0]]), set()).update(pair)
    return {case: leading(patient) for case, patient in patients.items()}, [sorted(g) for g in groups.values()]


def several_studies(patients: Mapping[str, str]) -> dict[str, list[str]]:
    """Patient → cases, of patients who have several."""
    cases: dict[str, list[str]] = {}
    for case in sorted(patients):
        cases.setdefault(patients[case], []).append(case)
    return {patient: own for patient, own in sorted(cases.items()) if len(own) > 1}


def doubts(studies: Sequence[StudyFiles]) -> list[str]:
    """What names leave open: studies that a weak rule takes for one patient's, and such as may be one patient's."""
    weak = {study.patient for study in studies if study.confidence == "weak"}
    taken = several_studies({study.case: study.patient for study in studies if study.patient in weak})
    alike: dict[str, set[str]] = {}
    for study in studies:
        for name in study.alike:
            alike.setdefault(name, set()).add(study.case)
    patients = {study.case: study.patient for study in studies}
    for study in studies:  # P01 beside P01_A
        if study.patient in alike and not study.alike:
            alike[study.patient].add(study.case)
    open_ones = [
        sorted(cases)
        for name, cases in alike.items()
        if len({patients[case] for case in cases}) > 1
        and (
            name.startswith("*") or (len(cases) <= LARGEST_FAMILY and (len(cases) < len(studies) or len(studies) == 2))
        )
    ]
    found = [f"{listed(cases)} are taken for studies of one patient, {patient}" for patient, cases in taken.items()]
    return found + [f"{listed(cases)} are taken for studies of different patients" for cases in open_ones]


def grouping(studies: Sequence[StudyFiles], patients: Mapping[str, str], shared: Sequence[Sequence[str]]) -> list[str]:
    """What a person should know of who is whose, in lines; `patients` and `shared` as `merge` returns them."""
    several = several_studies(patients)
    lines = []
    if several:
        each = "; ".join(f"{patient}: {listed(cases)}" for patient, cases in [*several.items()][:SHOWN])
        lines.append(f"patients with several studies: {len(several)} ({each}{'; …' if len(several) > SHOWN else ''})")
    if shared:
        named = len({study.patient for study in studies})
        lines.append(f"{len(studies)} studies of {named} patients by their names; those that share a scan are joined")
    lines += [f"{listed(cases)} share a scan, so they are studies of one patient" for cases in shared]
    if unsure := doubts(studies):
        more = f"; and {len(unsure) - SHOWN} more such groups" if len(unsure) > SHOWN else ""
        lines.append(
            f"warning: names leave open who is whose: {'; '.join(unsure[:SHOWN])}{more}. "
            "If that is wrong, say whose each study is with --patients FILE.csv (columns case, patient)"
        )
    return lines


def listed(cases: Sequence[str]) -> str:
    """Some of them by name."""
    shown = ", ".join(cases[:SHOWN])
    return f"{shown}, …" if len(cases) > SHOWN else shown
