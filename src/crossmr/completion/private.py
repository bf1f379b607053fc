"""The one file of an output that is not for sharing: where the acquired scans lie.

Everything else in an output names files, never folders: their names may be patients'.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from crossmr.data.naming import StudyFiles
from crossmr.errors import CrossmrError, OutputError
from crossmr.files import read_json, write_json

NAME = "private_paths.json"
FORMAT = "crossmr-paths"
SCANS = "scans"
"""The folder of an output that holds what DICOM was converted to."""
NOTE = "NOT FOR SHARING: where the scans of each case lie, seen from this folder. Only 'crossmr view' reads this file."


def write_paths(records: Path, studies: Sequence[StudyFiles]) -> None:
    """Write where the scans of each study lie; what the file says of other studies stays.

    Raises:
        OutputError: it cannot be written.
    """
    path = records / NAME
    if not studies:
        return
    cases = read_json(path, OutputError).get("cases", {}) if os.path.exists(path) else {}
    for files in studies:
        try:
            images = files.images()
        except CrossmrError:  # is reported where the study is completed
            continue
        cases[files.case] = {m: os.path.relpath(image, records).replace(os.sep, "/") for m, image in images.items()}
    write_json(path, {"note": NOTE, "format": FORMAT, "cases": cases})


def read_paths(records: Path, case: str) -> dict[str, Path]:
    """Modality → the scan of a case.

    Raises:
        OutputError: nobody knows where they lie.
    """
    if os.path.exists(converted := records / SCANS / case / "series.json"):
        taken = read_json(converted, OutputError).get("taken", {})
        return {modality: converted.with_name(f"{case}-{modality}.nii.gz") for modality in taken}
    cases = read_json(records / NAME, OutputError).get("cases")
    if not isinstance(cases, dict) or not isinstance(cases.get(case), dict):
        raise OutputError(f"{records / NAME} does not say where the scans of {case} lie.")
    return {modality: records / str(place) for modality, place in cases[case].items()}
