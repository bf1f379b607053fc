"""All that was measured of some studies, and of the parts of an evaluation that several processes share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from crossmr.data.patients import merge
from crossmr.errors import OutputError
from crossmr.evaluation.measures import CalibrationPoint, ContrastScore, Row, Score, UncertaintyScore
from crossmr.files import remove, write_atomically
from crossmr.parts import WORK, Part

TABLES: dict[str, type[Row]] = {
    "metrics": Score,
    "contrasts": ContrastScore,
    "uncertainty": UncertaintyScore,
    "calibration": CalibrationPoint,
}
"""Table → what its rows are."""
R = TypeVar("R", Score, ContrastScore, UncertaintyScore, CalibrationPoint)


class Picture(TypedDict):
    """A picture of one target, and what its panels show."""

    case: str
    sources: list[str]
    target: str
    file: str
    panels: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Measurements:
    """All that was measured."""

    scores: list[Score] = field(default_factory=list)
    contrasts: list[ContrastScore] = field(default_factory=list)
    uncertainty: list[UncertaintyScore] = field(default_factory=list)
    calibration: list[CalibrationPoint] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    patients: dict[str, str] = field(default_factory=dict)
    """Case → patient."""
    scans: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Case → SHA-256 of the voxels of each volume."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case → reason."""
    notes: list[str] = field(default_factory=list)
    """Of images of other programs: those that were not measured, and those in doubt."""

    @classmethod
    def of(cls, outcomes: "Sequence[Outcome]") -> "Measurements":
        """What was measured of several studies, and why others failed."""
        together = cls(failed={one.name: one.failed for one in outcomes if one.failed})
        for one in outcomes:
            if one.measured is not None:
                together.add(one.measured)
        return together

    def rows(self) -> dict[str, Sequence[Row]]:
        """File → its rows, of those files that have any."""
        measured: tuple[Sequence[Row], ...] = (self.scores, self.contrasts, self.uncertainty, self.calibration)
        return {name: rows for name, rows in zip(TABLES, measured, strict=True) if rows}

    def add(self, other: "Measurements") -> None:
        """Append what was measured of another study."""
        self.scores.extend(other.scores)
        self.contrasts.extend(other.contrasts)
        self.uncertainty.extend(other.uncertainty)
        self.calibration.extend(other.calibration)
        self.pictures.extend(other.pictures)
        self.patients.update(other.patients)
        self.scans.update(other.scans)
        self.notes.extend(other.notes)

    def by_patient(self) -> "Measurements":
        """The same, where cases that share a scan are of one patient."""
        patients, shared = merge(self.patients, self.scans)
        if not shared:
            return self

        def renamed(rows: Sequence[R]) -> list[R]:
            return [replace(row, patient=patients[row.case]) for row in rows]

        return replace(
            self,
            patients=patients,
            scores=renamed(self.scores),
            contrasts=renamed(self.contrasts),
            uncertainty=renamed(self.uncertainty),
            calibration=renamed(self.calibration),
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one study."""

    name: str
    measured: Measurements | None = None
    failed: str = ""


def write_part(out: Path, part: Part, key: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Keep what one part measured; `key` says of which studies, and how, each by a name.

    Raises:
        OutputError: it cannot be written.
    """
    body = {"key": dict(key), "outcomes": [asdict(outcome) for outcome in outcomes]}
    text = json.dumps(body, default=float)  # of NumPy's numbers; and NaN, which JSON has not, is read here alone
    write_atomically(_path(out, part), text.encode(errors="surrogatepass"))


def read_parts(out: Path, of: int, key: Mapping[str, str]) -> list[Outcome]:
    """What all parts measured, in the order of the studies; [] where not all have, or one has of other studies.

    Raises:
        OutputError: one cannot be read.
    """
    parts = []
    for number in range(1, of + 1):
        path = _path(out, Part(number, of))
        if not path.exists():
            return []
        try:
            body = json.loads(path.read_bytes())
            parts.append([_outcome(entry) for entry in body["outcomes"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is damaged ({error}). Delete it, and run this part again.") from error
        if body["key"] != key:
            return []
    longest = max(map(len, parts))
    return [part[k] for k in range(longest) for part in parts if k < len(part)]


def unlike_parts(out: Path, of: int, key: Mapping[str, str]) -> dict[str, list[str]]:
    """The parts that cannot be joined with those of this key → the names of what is another in it."""
    unlike = {}
    for part in (Part(number, of) for number in range(1, of + 1)):
        try:
            theirs = json.loads(_path(out, part).read_bytes())["key"]
        except (OSError, ValueError, KeyError, TypeError):  # it is not there yet, or `read_parts` names it
            continue
        if not isinstance(theirs, dict):
            unlike[str(part)] = ["version of crossmr"]
        elif theirs != key:
            unlike[str(part)] = sorted(name for name in {*theirs, *key} if theirs.get(name) != key.get(name))
    return unlike


def measured_parts(out: Path) -> list[str]:
    """The parts that are kept, such as '2/3'; none of a completion, which calls its own alike."""
    names = [path.stem.replace("-of-", "/") for path in (out / WORK).glob("*-of-*.json") if path.stat().st_size > 2]
    return sorted(names)


def remove_parts(out: Path, of: int) -> None:
    """Delete what so many parts kept; those of another number of parts may wait for theirs."""
    for number in range(1, of + 1):
        remove(_path(out, Part(number, of)))


def _path(out: Path, part: Part) -> Path:
    return out / WORK / f"{part.number}-of-{part.of}.json"


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    given = entry["measured"]
    if given is None:
        return Outcome(entry["name"], failed=entry["failed"])
    rows: dict[str, type[Row]] = {"scores": Score, **{name: TABLES[name] for name in TABLES if name != "metrics"}}
    values = {**given, **{name: [kind(**row) for row in given[name]] for name, kind in rows.items()}}
    values["scans"] = {case: tuple(scans) for case, scans in given["scans"].items()}
    return Outcome(entry["name"], Measurements(**values))
