"""The studies of a run as a file, so that many processes need not list the same folders: a line for each study.

It names files and folders: like private_paths.json it is not for sharing, and is deleted when the run has finished.
"""

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from crossmr.completion.inputs import Inputs
from crossmr.completion.unread import Unread
from crossmr.data.naming import StudyFiles
from crossmr.errors import OutputError
from crossmr.files import write_atomically
from crossmr.parts import Part

NOTE = "NOT FOR SHARING: which files each study has. It is deleted when the run has finished."


def write_listing(path: Path, inputs: Inputs) -> None:
    """Write the studies, of NIfTI with what lies beside them, of DICOM the names only.

    Where each line begins is in a second file, so that a process reads the lines of its part and no others.

    Raises:
        OutputError: it cannot be written.
    """
    starts = array("Q")

    def write(file: Any) -> None:
        head = {"note": NOTE, "root": str(inputs.root), "studies": len(inputs.cases)}
        studies = (_to_line(files, inputs) for files in inputs.studies)
        place = 0
        for line in itertools.chain((head,), studies, ({"case": case} for case in inputs.series or ())):
            starts.append(place)
            place += file.write(json.dumps(line).encode() + b"\n")  # ASCII: a file's name need not be valid Unicode

    write_atomically(path, write)
    write_atomically(_starts_of(path), starts.tobytes())


def _starts_of(path: Path) -> Path:
    """Where the lines of a listing begin: numbers of eight bytes."""
    return path.with_suffix(".starts")


def read_listing(path: Path, part: Part) -> Inputs:
    """The studies of one part.

    Raises:
        OutputError: it cannot be read, or is damaged.
    """
    try:
        starts = array("Q", _starts_of(path).read_bytes())
        with path.open("rb") as file:
            root = Path(json.loads(next(file))["root"])
            lines = []
            for start in part.take(starts[1:]):
                file.seek(start)
                lines.append(json.loads(file.readline()))
            studies = [_from_line(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise OutputError(f"{path} cannot be read ({error}). Delete it to have the studies listed again.") from error
    beside = {line["case"]: [Path(file) for file in line["beside"]] for line in lines if line["beside"]}
    dicom = {line["case"]: [_unread(one) for one in line["dicom"]] for line in lines if line["dicom"]}
    faults = {line["case"]: line["fault"] for line in lines if line["fault"]}
    return Inputs(root, studies, beside=beside, dicom=dicom, faults=faults)


def read_cases(path: Path) -> Iterator[str]:
    """The names of the studies."""
    with path.open("rb") as file:
        for line in islice(file, 1, None):
            yield json.loads(line)["case"]


def _to_line(files: StudyFiles, inputs: Inputs) -> dict[str, Any]:
    return {
        "case": files.case,
        "patient": files.patient,
        "candidates": {modality: [*map(str, paths)] for modality, paths in files.candidates.items()},
        **{name: [*map(str, getattr(files, name))] for name in ("labels", "unrecognised", "passed_over")},
        "notes": list(files.notes),
        "fault": inputs.faults.get(files.case, ""),
        "beside": [str(path) for path in inputs.beside.get(files.case, ())],
        "dicom": [
            {"name": one.name, "may_be": sorted(one.may_be), "why": one.why} for one in inputs.dicom.get(files.case, ())
        ],
    }


def _from_line(line: Mapping[str, Any]) -> StudyFiles:
    labels, unrecognised, passed_over = (
        tuple(map(Path, line[name])) for name in ("labels", "unrecognised", "passed_over")
    )
    return StudyFiles(
        line["case"],
        line["patient"],
        {modality: tuple(map(Path, paths)) for modality, paths in line["candidates"].items()},
        labels,
        unrecognised,
        passed_over,
        notes=tuple(line["notes"]),
    )


def _unread(entry: Mapping[str, Any]) -> Unread:
    return Unread(entry["name"], frozenset(entry["may_be"]), entry["why"])
