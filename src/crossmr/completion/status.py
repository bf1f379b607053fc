"""status.csv: one line for each case of an output, with what may be used, why, and what was filled from what."""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from crossmr.completion.layout import FORMAT
from crossmr.data.naming import display_name
from crossmr.errors import OutputError
from crossmr.files import read_json, write_atomically

NAME = "status.csv"
COLUMNS = ("case", "verdict", "contrasts", "reasons", "filled", "seconds")
"""The verdict is the worst of the case; 'contrasts' has that of each one: 'T1 use; FLAIR look; T2 refuse'."""
Line = tuple[str, ...]
"""What a line says, in the order of COLUMNS."""
_HEADS = tuple(",".join(columns).encode() + b"\r\n" for columns in (COLUMNS, (*COLUMNS[:2], *COLUMNS[3:])))
"""The first line, and that of earlier versions."""


def is_status(path: Path) -> bool:
    """Whether a file is a table of this kind, by its first line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(len(_HEADS[0])) in _HEADS


def write_status(records: Path, failed: Mapping[str, str]) -> None:
    """Write the table anew, from the manifests of all cases that were ever finished here, and those that failed now.

    Args:
        records: the folder of the manifests.
        failed: case → why it failed, in words that may be shared.

    Raises:
        OutputError: it cannot be written.
    """
    write_lines(records, {path.parent.name: line_of(manifest) for path, manifest in read_manifests(records)}, failed)


def finished_cases(records: Path) -> list[str]:
    """The folders with a manifest, sorted; it may be another's, see `read_manifests`."""
    with os.scandir(records) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [name for name in names if (records / name / "manifest.json").is_file()]


def is_case(manifest: Mapping[str, Any], name: str) -> bool:
    """Whether this is the manifest of a case of this name; another output in this one has a manifest, too."""
    return manifest.get("format") == FORMAT and manifest.get("case") == name


def read_manifests(records: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every manifest of a case that was finished here, by case."""
    for name in finished_cases(records):
        path = records / name / "manifest.json"
        with suppress(OutputError):
            if is_case(manifest := read_json(path, OutputError), name):
                yield path, manifest


def write_lines(records: Path, lines: Mapping[str, Line], failed: Mapping[str, str]) -> None:
    """Write the table: a line for each case that was finished, and for each that failed."""
    lines = {**lines, **{case: (case, "refuse", "", reason, "", "") for case, reason in failed.items()}}
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    writer.writerows(lines[case] for case in sorted(lines))
    write_atomically(records / NAME, table.getvalue().encode(errors="replace"))


def line_of(manifest: Mapping[str, Any]) -> Line:
    """A finished case's line."""
    filled = [f"{_shown([target])} from {_shown(entry['from'])}" for target, entry in manifest["synthetic"].items()]
    reasons = (f"{_shown(r['contrasts'])}: {r['text']}" if r["contrasts"] else r["text"] for r in reasons_of(manifest))
    verdicts = {m: entry.get("verdict", "look") for m, entry in manifest["synthetic"].items()}
    verdicts |= dict.fromkeys(manifest.get("refused", ()), "refuse")
    contrasts = "; ".join(f"{_shown([m])} {verdict}" for m, verdict in verdicts.items())
    words = (manifest["case"], manifest.get("verdict", "look"), contrasts, " | ".join(reasons), "; ".join(filled))
    return (*words, str(manifest["seconds"]))


def reasons_of(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Why a case got its verdict; a manifest of an earlier version has none."""
    earlier = {
        "verdict": "look",
        "kind": "unknown",
        "contrasts": [],
        "text": "It was completed before there were verdicts.",
    }
    return list(manifest["reasons"] if "verdict" in manifest else [earlier])


def _shown(modalities: Any) -> str:
    return " + ".join(display_name(m) for m in modalities)
