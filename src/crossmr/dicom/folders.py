"""What a folder is: one of DICOM, one that crossmr converted or derived, one part of several.

Files are looked at no further than that needs.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from crossmr.data.bids import ROOT as BIDS_ROOT
from crossmr.data.formats import is_nifti, is_volume
from crossmr.data.naming import recognise
from crossmr.data.nifti import is_synthetic
from crossmr.dicom.headers import (
    files_in,
    is_dicom,
)
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError
from crossmr.files import is_folder
from crossmr.parts import Part

CONVERTED = "series.json"
"""Lies in the folder of a study that was converted, and says from which series."""
FIRST_FILES = 1000
"""So many files tell whether a folder is one of DICOM, where nobody wants to look at all."""


def holds_dicom(
    folder: Path,
    mapping: Mapping[str, str] | None = None,
    *,
    exclude: Path | None = None,
    display: Display = SILENT,
) -> bool:
    """Whether a folder is to be read as DICOM: it holds DICOM, and no NIfTI whose name says a contrast.

    NIfTI that crossmr converted or synthesised does not count. Where it holds both, `display` says that the DICOM is
    passed over. `exclude` is a folder in it that is not searched, `mapping` as in `find_studies`.
    """
    nifti: list[Path] = []
    others: list[Path] = []
    for path in files_in(folder, exclude):
        (nifti if is_nifti(path.name) else others).append(path)
    if (folder / BIDS_ROOT).exists() and _named(nifti, mapping):
        return False  # any DICOM in it is its source data: not worth a search, nor a message
    dicom = next((path for path in others if path.name.upper() == "DICOMDIR" or is_dicom(path)), None)
    if dicom is None:
        return False
    if named := _named((path for path in nifti if not is_own(path)), mapping):
        display.say(
            f"{folder} holds NIfTI ({', '.join(named[:3])}{', …' if len(named) > 3 else ''}) and DICOM ({dicom.name}): "
            "the DICOM is passed over. Give the folder of the DICOM alone to complete that."
        )
    return not named


def _named(nifti: Iterable[Path], mapping: Mapping[str, str] | None) -> list[str]:
    """The studies that the names of files make, of those that say a contrast."""
    return [study.case for study in recognise(nifti, mapping) if study.candidates]


def is_own(volume: Path) -> bool:
    """Whether crossmr converted or synthesised a volume."""
    return (volume.parent / CONVERTED).exists() or is_synthetic(volume)


def begins_with_dicom(folder: Path, exclude: Path | None = None) -> bool:
    """Whether the first files of a folder, in the order of their names, hold DICOM and no volume of another format."""
    for path in itertools.islice(files_in(folder, exclude), FIRST_FILES):
        if is_volume(path.name):
            return False
        if is_dicom(path):
            return True
    return False


def folders_of_part(folder: Path, part: Part, exclude: Path | None = None) -> list[Path]:
    """The folders of DICOM that are one part's, of those directly in a folder, or in the only one that it holds.

    Raises:
        ConfigError: DICOM lies beside these folders, which no part would read.
    """
    place, out = Path(os.path.abspath(folder)), None if exclude is None else os.path.abspath(exclude)
    while True:
        with os.scandir(place) as entries:
            found = sorted((entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        folders = [place / name for name, is_folder in found if is_folder and str(place / name) != out]
        loose = [place / name for name, is_folder in found if not is_folder and name.upper() != "DICOMDIR"]
        if first := next(filter(is_dicom, loose), None):
            raise ConfigError(
                f"{first} lies beside the folders that --part shares out. Put each patient into a folder of its own."
            )
        if len(folders) != 1:
            return part.take(folders)
        place = folders[0]


def first_dicom(folder: Path, exclude: Path | None = None) -> Path | None:
    """A file of DICOM in a folder or below, outside `exclude`; None where there is none."""
    files = (path for path in files_in(folder, exclude) if not is_volume(path.name))
    return next((path for path in files if is_dicom(path)), None)


def is_derived(folder: Path) -> bool:
    """Whether a folder holds nothing but images that crossmr derived, as `write_derived` does."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return bool(paths) and all(path.suffix == ".dcm" and _says_crossmr(path) for path in paths)


def _says_crossmr(path: Path) -> bool:
    """Whether a file is DICOM whose meta information names crossmr as the implementation that wrote it."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(1024)
    return start[128:132] == b"DICM" and b"CROSSMR " in start[132:]
