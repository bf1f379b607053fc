"""A table of the series of all studies, in which a person sees which is taken for which contrast, and corrects it.

A CSV file, one line for each series. Studies and series are known by their UIDs, in the columns `study` and `series`,
and by `which` where several series share one. `contrast` says what a series is taken for; empty, it is not used.
`recognised` says what crossmr took it for when the line was written. Only lines in which the two differ, that say
'unused', or that are marked in `checked` are a person's word. It holds descriptions, which may name the patient.
"""

import contextlib
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.naming import modality_name
from crossmr.dicom.contrast import Recognition
from crossmr.dicom.headers import import_pydicom, number_of, read_header, text_of, texts_of
from crossmr.dicom.selection import choose
from crossmr.dicom.series import Series
from crossmr.errors import ConfigError, OutputError
from crossmr.files import digest, write_atomically
from crossmr.parts import Claims

COLUMNS = (
    *("case", "acquired", "number", "description", "contrast", "recognised", "checked", "why", "doubt", "plane"),
    *("slices", "voxel_mm", "image_type", "tr_ms", "te_ms", "ti_ms", "agent", "study", "series", "which"),
)
"""`acquired` is when, `why` why it is taken or not, `agent` what the tags say of the contrast agent."""
REQUIRED = ("study", "series", "contrast")
"""Columns without which a file is no such table; others may be added."""
BY_PERSON, NOT_USED = "chosen by a person", "not used, chosen by a person"
_BESIDE = "a person chose"
"""How the reason ends of a series that is left out for what a person chose of others."""
UNUSED = "unused"
"""What a cell says that is surely no contrast to be used; an empty one leaves open why."""
_SPELLINGS = (UNUSED, "not used", "none", "-")
_UNCHECKED = ("", "no", "false", "0", "nein", "falsch", "non", "faux")
"""What a cell of `checked` says that is not checked; spreadsheets write FALSE for an empty box."""
_OBLIQUE = float(np.cos(np.radians(30)))
"""A series whose normal is further from every axis is oblique."""
_PLANES = ("sagittal", "coronal", "axial")
SHOWN = 5
"""So many studies or series of a kind are named."""
_REMEDY = re.compile(r"(?:^|[;.] )(?:(?![;.] ).)*--map.*$")
"""What a note says of --map, which has no place in a table."""

Key = tuple[str, str, str]
"""UIDs of study and series, and what tells those apart that share them."""


@dataclass(frozen=True)
class Row:
    """What a table says of one series."""

    contrast: str
    """A modality, UNUSED, or '' where it is not used."""
    recognised: str | None
    """What it was taken for when the line was written; None where the table does not tell."""
    checked: bool
    """Whether a person says that it is right."""
    line: int
    name: str
    """The series and its study, for messages."""

    @property
    def by_person(self) -> bool:
        """Whether it is surely a person's word; without `recognised`, what is recognised now tells, see `decide`."""
        return self.checked or self.contrast == UNUSED or self.recognised not in (None, self.contrast)


@dataclass(frozen=True)
class SeriesTable:
    """A table that was read."""

    path: Path
    columns: Sequence[str]
    delimiter: str
    lines: Sequence[Sequence[str]]
    """As they are in the file, without the first."""
    rows: Mapping[Key, Row] = field(repr=False)

    @cached_property
    def studies(self) -> Collection[str]:
        """The UIDs of the studies of which it has a line."""
        return {study for study, *_ in self.rows}

    @cached_property
    def digest(self) -> str:
        """A hash of what it decides, however its lines are sorted."""
        return digest(repr(sorted((key, row.contrast, row.recognised, row.checked) for key, row in self.rows.items())))

    def of(self, all_series: Sequence[Series]) -> list[Row | None]:
        """What it says of each series of a study; None where it has no line of it."""
        return [self.rows.get(key) for key in self.keys_of(all_series)]

    def keys_of(self, all_series: Sequence[Series]) -> list[Key]:
        """What each series of a study is known by here: without `which` if its line has none, and its UID is its own.

        Raises:
            ConfigError: a person's line without `which` is of a UID that several series share.
        """
        keys = keys_of(all_series)
        shared = Counter(key[:2] for key in keys)
        found = []
        for key in keys:
            row = self.rows.get(bare := (*key[:2], ""))
            if row and (count := shared[key[:2]]) > 1 and (row.by_person or row.recognised is None):
                raise ConfigError(
                    f"--series-table {self.path}, line {row.line}, column which: empty, and {count} series of the "
                    "study have this UID. Delete the line, and --dry-run adds one for each."
                )
            found.append(bare if row and shared[key[:2]] == 1 and key not in self.rows else key)
        return found


def keys_of(all_series: Sequence[Series]) -> list[Key]:
    """What each series of a study is known by, whatever others there are."""
    uids = [
        (" ".join(series.study.split()), series.uid if series.images[0].sop_instance else "")  # of what is no image
        for series in all_series
    ]
    seen, keys = Counter[Key](), list[Key]()
    for series, (study, uid) in zip(all_series, uids, strict=True):
        key = study, uid, _which(series)
        seen[key] += 1
        keys.append(key if seen[key] == 1 else (*key[:2], f"{key[2]}-{seen[key]}"))
    return keys


def _which(series: Series) -> str:
    """What tells a series apart from others of its UID; a word, as spreadsheets change numbers."""
    acquisition = series.acquisition
    told = series.number, acquisition.te_ms, sorted(acquisition.kinds), acquisition.description
    return f"w{digest(repr(told))[:8]}"


def read_series_table(path: Path, extra: Collection[str] = ()) -> SeriesTable:
    """Read a table, as it was written or as a spreadsheet saved it; `extra` are modalities of a user's own.

    Raises:
        ConfigError: with line and column, what is wrong with it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--series-table {path} cannot be read: {error.strerror}. --dry-run writes it.") from error
    text = _decoded(content)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip() for name in next(reader, [])]
        if missing := [name for name in REQUIRED if columns.count(name) != 1]:
            raise ConfigError(
                f"--series-table {path}, line 1: its columns are {', '.join(columns)[:200] or 'none'}; "
                f"expected {', '.join(REQUIRED)}, each once ({missing[0]} is not). --dry-run writes such a table."
            )
        lines, rows = list[list[str]](), dict[Key, Row]()
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"--series-table {path}, line {reader.line_num}"
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise ConfigError(f"{where}: it has {len(cells)} columns; expected {len(columns)}, as in line 1.")
            lines.append([*cells, *[""] * len(columns)][: len(columns)])
            values = {name: cell.strip() for name, cell in zip(columns, lines[-1], strict=True)}
            _add(rows, values, reader.line_num, where, extra)
    except csv.Error as error:
        raise ConfigError(f"--series-table {path}, line {reader.line_num}: it is no CSV file ({error}).") from error
    return SeriesTable(path, columns, delimiter, lines, rows)


def _decoded(content: bytes) -> str:
    """The text of a file as spreadsheets write it: UTF-8, UTF-16 or, of old, the code page of the West."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _add(rows: dict[Key, Row], values: Mapping[str, str], line: int, where: str, extra: Collection[str]) -> None:
    """Add a line to those before; refuse it where it says no contrast, or what another one contradicts."""
    key = values["study"], values["series"], values.get("which", "")
    if not key[0]:
        raise ConfigError(f"{where}, column study: it is empty. Copy the study's UID, or delete the line.")
    if key in rows:
        raise ConfigError(f"{where}: its series is on line {rows[key].line} already. Delete one.")
    said = values["contrast"]
    try:
        unused = said.casefold() in _SPELLINGS
        contrast = UNUSED if unused else modality_name(said, extra) if said else ""
    except ConfigError as error:
        raise ConfigError(f"{where}, column contrast: {error} Empty or 'unused', it is not used.") from error
    number = values.get("number", "")
    name = " ".join(filter(None, (values.get("case", ""), f"series {number}" if number else "")))
    checked = values.get("checked", "").casefold() not in _UNCHECKED
    new = Row(contrast, _recognised(values.get("recognised"), extra), checked, line, name)
    for other, row in rows.items():
        settled = not row.by_person and not new.by_person and new.recognised is not None
        if other[0] == key[0] and row.contrast == contrast and contrast not in ("", UNUSED) and not settled:
            raise ConfigError(
                f"{where}, column contrast: {contrast} of this study is on line {row.line} already. Name one of them."
            )
    rows[key] = new


def _recognised(said: str | None, extra: Collection[str]) -> str | None:
    """What a line says that was recognised; what is no contrast here is as it stands there."""
    try:
        return modality_name(said, extra) if said else said
    except ConfigError:
        return said


def decide(all_series: Sequence[Series], table: SeriesTable) -> list[Series]:
    """The series of a study, with the contrasts that a person has chosen in a table.

    A line that nobody changed decides nothing, but that what a person chose of other series changes nothing of this
    one: none takes the place of what is not used, but may be what is missing then. A table without `recognised` does
    not tell what a person changed: there a series is of a person's choice wherever another one would be taken than the
    table says.

    What a file or its geometry makes unfit stays left out, with the reason.

    Raises:
        ConfigError: it does not say which series a person's line is of.
    """
    rows = table.of(all_series)
    recognised = _contrasts(all_series)
    by_person, kept = {k for k, row in enumerate(rows) if row and row.by_person}, set[int]()
    while True:
        decided = _with(all_series, rows, by_person, kept)
        changed = {
            k: row
            for k, (row, now) in enumerate(zip(rows, _contrasts(decided), strict=True))
            if row and k not in by_person | kept and row.contrast != now
        }
        unknown = {k for k, row in changed.items() if row.recognised is None}
        beside = {k for k, row in changed.items() if k not in unknown and row.contrast == recognised[k]}
        if not unknown | beside:
            return decided
        by_person, kept = by_person | unknown, kept | beside


def is_of_person(why: str) -> bool:
    """Whether a series is taken, or left out, for this reason by what a person has chosen."""
    return why in (BY_PERSON, NOT_USED) or why.endswith(_BESIDE)


def _contrasts(all_series: Sequence[Series]) -> list[str]:
    """The contrast that each series of a study is taken for, '' for none."""
    taken = {id(series): modality for modality, series in choose(all_series)[0].items()}
    return [taken.get(id(series), "") for series in all_series]


def _with(
    all_series: Sequence[Series], rows: Sequence[Row | None], by_person: Collection[int], kept: Collection[int]
) -> list[Series]:
    """The series, of which those `by_person` are what their rows say, and no other one is of their contrasts.

    Those `kept` stay what they are recognised as, if their rows say that, and are left out in doubt, if these say that.
    """
    said = {k: row.contrast.replace(UNUSED, "") for k, row in enumerate(rows) if row and k in {*by_person, *kept}}
    named = {*said.values()} - {""}
    decided = []
    for k, series in enumerate(all_series):
        modality = said.get(k)
        if k in kept and modality:
            pass
        elif modality:
            found = series.barred or Recognition(modality, BY_PERSON)
            series = replace(series, mapped=(modality,), told="", compared=False)
            series = replace(series, modality=found.modality, why=found.why, reason=found.reason)
        elif k in by_person:
            series = replace(series, modality=None, why=NOT_USED, reason="decided", mapped=())
        elif series.modality in named:
            why = f"not the {series.modality} that {_BESIDE}"
            series = replace(series, modality=None, why=why, reason="decided", mapped=())
        elif k in kept and series.modality:
            why = f"no {series.modality}, as {_BESIDE}"
            series = replace(series, modality=None, why=why, reason="", mapped=(series.modality,))
        decided.append(series)
    return decided


def reasons_of(all_series: Sequence[Series]) -> dict[Series, tuple[str, str]]:
    """Each series of a study → the contrast it is taken for, '' for none, and why or why not."""
    chosen, left_out, _ = choose(all_series)
    taken = {id(series): modality for modality, series in chosen.items()}
    names = Counter(series.name for series in all_series)
    told: dict[Series, tuple[str, str]] = {}
    for series in all_series:
        why = series.why
        if id(series) not in taken and series.modality is not None:
            one = names[series.name] == 1
            why = left_out[series.name] if one else f"another {series.modality} is preferred"
        told[series] = taken.get(id(series), ""), why
    return told


def without_remedy(text: str) -> str:
    """A note without what it says of --map."""
    return _REMEDY.sub("", text)


def write_series_table(
    path: Path, cases: Mapping[str, Sequence[Series]], doubts: Mapping[Series, str], extra: Collection[str] = ()
) -> tuple[int, bool]:
    """Write a table of these cases in their order, or add to the one that is there what it lacks.

    Whatever the table has already stays as it is; one that lacks nothing is not written. Others may write it at the
    same time. `extra` are modalities of a user's own.

    Returns:
        How many lines were written, and whether there was a table.

    Raises:
        OutputError: it cannot be written. ConfigError: what is there is no such table; or pydicom is not installed.
    """
    pydicom = import_pydicom()
    cells: dict[Series, dict[str, str]] = {}

    def lacking() -> tuple[SeriesTable | None, list[dict[str, str]]]:
        table = read_series_table(path, extra) if os.path.lexists(path) else None
        lines = []
        for case, all_series in cases.items():
            told = reasons_of(decide(all_series, table) if table else all_series)
            keys = table.keys_of(all_series) if table else keys_of(all_series)
            for series, key, (contrast, why) in zip(all_series, keys, told.values(), strict=True):
                if table is None or key not in table.rows:
                    if series not in cells:  # the files are read while nobody waits
                        cells[series] = _cells(case, series, pydicom)
                    now = {"contrast": contrast, "recognised": contrast, "why": why, "doubt": doubts.get(series, "")}
                    now |= dict(zip(("study", "series", "which"), key, strict=True))
                    lines.append(cells[series] | now)
        return table, lines

    with pydicom.config.disable_value_validation():
        table, lines = lacking()
        if table and not lines:
            return 0, True
        with _alone(path):
            table, lines = lacking()
            if lines or table is None:
                _write(path, table, lines)
    return len(lines), table is not None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within this no other process writes the table; waits for one that does.

    Raises:
        OutputError: its folder cannot be written.
    """
    with contextlib.closing(Claims(path.with_name(f".{path.name}.crossmr"))) as claims:
        for attempt in range(3):
            try:
                claims.wait_for("table")
                break
            except OutputError:  # or who had it before has just deleted the folder
                if attempt == 2:
                    raise
        yield


def _write(path: Path, table: SeriesTable | None, new: Sequence[Mapping[str, str]]) -> None:
    """Write a table with these lines at its end."""
    columns: tuple[str, ...] = COLUMNS
    delimiter, lines = ",", list[Sequence[str]]()
    if table is not None:
        columns, delimiter, lines = (*table.columns,), table.delimiter, [*table.lines]
        uids = Counter((*key[:2],) for key in table.rows) + Counter((line["study"], line["series"]) for line in new)
        if "which" not in columns and max(uids.values(), default=0) > 1:
            columns, lines = (*columns, "which"), [[*line, ""] for line in lines]
    lines += [[_as_text(line.get(name, "")) for name in columns] for line in new]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows((columns, *lines))
    write_atomically(path, text.getvalue().encode("utf-8-sig", errors="replace"))


def _cells(case: str, series: Series, pydicom: Any) -> dict[str, str]:
    """What is told of a series by its tags."""
    acquisition = series.acquisition
    header = read_header(pydicom, series.images[0].path)
    agent = {True: "given", False: "not given", None: ""}[acquisition.agent]
    kinds = sorted(acquisition.kinds)
    if header is not None:
        volume = number_of(header, "ContrastBolusVolume")
        named = text_of(header, "ContrastBolusAgent")
        agent = " ".join(filter(None, (named or agent, f"{volume:g} ml" if volume else "")))
        kinds = texts_of(header, "ImageType") or kinds
    times = {"tr_ms": acquisition.tr_ms, "te_ms": acquisition.te_ms, "ti_ms": acquisition.ti_ms}
    return {
        "case": case,
        "acquired": _acquired(series),
        "number": "" if series.number is None else str(series.number),
        "description": acquisition.description,
        "plane": _plane(series),
        "slices": str(sum(len(np.atleast_2d(image.position)) for image in series.images)),
        "voxel_mm": " x ".join(f"{side:.3g}" for side in series.voxel_mm),
        "image_type": "\\".join(kinds),
        "agent": agent,
        **{name: "" if value is None else f"{value:g}" for name, value in times.items()},
    }


def _acquired(series: Series) -> str:
    """Day and time of a series; the day is the study's where its time names none, see `moments_of`."""
    day, _, time = series.time.rpartition(" ")
    date = series.date if day in ("", "next") else day
    if day == "next":
        try:
            date = f"{datetime.strptime(date, '%Y%m%d') + timedelta(1):%Y%m%d}"
        except ValueError:
            date = f"{date} next day"
    return f"{_spaced(date, '-', 4)} {_spaced(time, ':', 2)}".strip()


def _spaced(digits: str, by: str, first: int) -> str:
    """Date or time of DICOM as people write it: 2024-01-31, 10:15:00; as it is where it is none."""
    if not re.fullmatch(rf"\d{{{first}}}(\d\d){{1,2}}", digits):
        return digits
    return by.join((digits[:first], *re.findall("..", digits[first:])))


def _plane(series: Series) -> str:
    """Axial, sagittal, coronal or oblique; '' where the images do not say."""
    if series.orientation.shape != (2, 3):
        return ""
    normal = np.abs(np.cross(*series.orientation))
    return _PLANES[int(normal.argmax())] if normal.max() >= _OBLIQUE else "oblique"


def _as_text(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula, and of one line."""
    cell = " ".join(cell.split())
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def about(table: SeriesTable, cases: Mapping[str, Sequence[Series]], *, whole: bool = True) -> list[str]:
    """What to say of a table beside the studies that there are: what of the one is not in the other.

    `whole` says whether all studies are there of which it could have lines.
    """
    name, without, partly, known = table.path.name, list[str](), list[str](), set[Key]()
    for case, all_series in cases.items():
        keys = table.keys_of(all_series)
        known.update(keys)
        if keys and not any(study in table.studies for study, *_ in keys):
            without.append(case)
            continue
        new = [series.name for series, key in zip(all_series, keys, strict=True) if key not in table.rows]
        partly += [f"{case} ({_listed(new)})"] if new else []
    said = []
    if without:
        how_many = f"{len(without)} {'study, which goes' if len(without) == 1 else 'studies, which go'}"
        said.append(f"{name} has no line of {how_many} as recognised: {_listed(without)}")
    if partly:
        said.append(f"{name} lacks series, which go as recognised: {_listed(partly)}")
    if lost := [row for key, row in table.rows.items() if key not in known] if whole else []:
        rows = [f"line {row.line}{f' ({row.name})' if row.name else ''}" for row in lost]
        said.append(f"{name} has {len(lost)} series that no study has, and which change nothing: {_listed(rows)}")
    return [f"warning: {line}" for line in said]


def _listed(names: Sequence[str]) -> str:
    """Some of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
