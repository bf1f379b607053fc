"""The one file of an output that is not for sharing: where the acquired scans lie.

Everything else in an output names files, never folders: their names may be patients'.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from crossmr.data.naming import StudyFiles
from crossmr.dicom.folders import CONVERTED
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import read_json, write_json

NAME = "private_paths.json"
FORMAT = "crossmr-paths"
SCANS = "scans"
"""The folder of an output that holds what DICOM was converted to."""
NOTE = "NOT FOR SHARING: where the scans of each case lie, seen from this folder. Only 'crossmr view' reads this file."


def write_paths(records: Path, studies: Sequence[StudyFiles], *, keep: Callable[[str], bool] = lambda _: False) -> None:
    """Write where the scans of each study lie; what the file says of other studies stays, and of those to `keep`.

    Raises:
        OutputError: it cannot be written.
    """
    path = records / NAME
    if not studies:
        return
    cases = read_json(path, OutputError).get("cases", {}) if os.path.exists(path) else {}
    for files in studies:
        if files.case in cases and keep(files.case):
            continue
        try:
            images = files.images()
        except CrossmrError:  # is reported where the study is completed
            continue
        cases[files.case] = {m: _seen_from(records, image) for m, image in images.items()}
    write_json(path, {"note": NOTE, "format": FORMAT, "cases": cases})


def _seen_from(folder: Path, path: Path) -> str:
    """The way to a file; all of it where it lies on another drive."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:
        return path.absolute().as_posix()


def read_paths(records: Path, case: str) -> dict[str, Path]:
    """Modality → the scan of a case.

    Raises:
        OutputError: nobody knows where they lie.
    """
    if os.path.exists(converted := records / SCANS / case / CONVERTED):
        taken = read_json(converted, OutputError).get("taken", {})
        return {modality: converted.with_name(f"{case}-{modality}.nii.gz") for modality in taken}
    cases = read_json(records / NAME, OutputError).get("cases")
    if not isinstance(cases, dict) or not isinstance(cases.get(case), dict):
        raise OutputError(f"{records / NAME} does not say where the scans of {case} lie.")
    return {modality: records / str(place) for modality, place in cases[case].items()}
