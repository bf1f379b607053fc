"""What the paths that a user names must be: checks that import nothing, so that a wrong one is refused at once."""

import os
from pathlib import Path

from crossmr.errors import ModelError, NamingError, OutputError, SetError

PATIENTS = "patients.json"
"""Name of the list, in a model's folder, of whom it was trained on."""


def check_studies(folder: Path) -> None:
    """Refuse a folder of studies that is not there.

    Raises:
        NamingError: it does not exist, or is a file.
    """
    if os.path.isdir(folder):  # unlike Path.is_dir, of a name that is too long as well
        return
    fault = "is a file, not a folder: give the folder that holds it" if os.path.exists(folder) else "does not exist"
    raise NamingError(f"{folder}: {fault}. Expected a folder with .nii or .nii.gz files, of one study or of many.")


def check_model(folder: Path) -> None:
    """Refuse a folder that is not a model.

    Raises:
        ModelError: it has no config.json.
    """
    if os.path.exists(folder / "config.json"):
        return
    nested = folder / "model" / "config.json"
    hint = f"Did you mean {nested.parent}?" if os.path.exists(nested) else "Train one with: crossmr train SET -o RUN"
    if folder.suffix == ".zip":
        hint = f"If it is an exported one: crossmr models import {folder}"
    raise ModelError(f"{folder} is not a model: it has no config.json. {hint}")


def check_prepared(folder: Path) -> None:
    """Refuse a folder that is not a prepared dataset.

    Raises:
        SetError: it has no manifest.json.
    """
    if not os.path.exists(folder / "manifest.json"):
        raise SetError(
            f"{folder} is not a prepared dataset: it has no manifest.json. Make one with: crossmr prepare COHORT -o SET"
        )


def check_completed(out: Path) -> None:
    """Refuse a folder that `complete` did not write, in any profile.

    Raises:
        OutputError: neither it nor its records hold a case.
    """
    places = (out, out.with_name(f"{out.name}_records") if out.name else out, out / "crossmr")
    if not any(next(place.glob("*/manifest.json"), None) for place in places if os.path.isdir(place)):
        fault = "holds no completed case" if os.path.exists(out) else "does not exist"
        raise OutputError(f"{out} {fault}. Name a folder that 'crossmr complete' wrote.")


def check_output(out: Path) -> None:
    """Refuse an output folder that a file is in the way of.

    Raises:
        OutputError: it, or what it is to lie in, is a file.
    """
    for place in (out, *out.parents):
        if os.path.lexists(place):
            if not os.path.isdir(place):
                raise OutputError(f"{out} could not be written: {place} is a file. Name another folder.")
            return
