"""One completed study on the disk: synthetic volumes, their standard deviations and the manifest, whole or absent."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crossmr.completion.layout import Layout
from crossmr.completion.ownership import check_case, earlier_files, is_manifest
from crossmr.data.nifti import write_volume
from crossmr.errors import OutputError
from crossmr.files import read_json, refuse_foreign, remove, write_json

Images = Mapping[str, Any]
"""Modality → nibabel image."""


def save_study(layout: Layout, images: Images, stds: Images, manifest: Mapping[str, Any], *, overwrite: bool) -> Path:
    """Write a completed study and return the folder of its manifest.

    Raises:
        OutputError: a finished study lies there and is not to be overwritten; what would be replaced is a scan, or not
            crossmr's; the study's name is none for a folder; or nothing can be written.
    """
    case, record, modalities = manifest["case"], copy.deepcopy(dict(manifest)), list(images)
    if not case or case != Path(case).name or case.startswith("."):
        raise OutputError(f"'{case}' is not a name for a study's folder. Name it with: complete(…, case=NAME)")
    path = layout.folder(case) / "manifest.json"
    refuse_foreign(path, is_manifest)
    if path.exists():
        if not overwrite:
            raise OutputError(
                f"{path.parent} holds a finished study. Name this one with complete(…, case=NAME), or save it with "
                "overwrite=True."
            )
        modalities += read_json(path, OutputError).get("synthetic", {})
    check_case(layout, case, modalities, list(images), overwrite=True)
    old = earlier_files(layout, case, modalities)
    with whole_or_absent(path.parent) as written:
        for one in (path, layout.picture(case), *old):
            remove(one)
        write_volumes(layout, images, stds, record, written)
        write_json(path, record)
    return path.parent


@contextlib.contextmanager
def whole_or_absent(folder: Path) -> Iterator[list[Path]]:
    """Write a study within this, and list each file that was written: if anything fails, all of them are deleted.

    Raises:
        OutputError: in place of whatever the system says when a file cannot be written.
    """
    written: list[Path] = []
    try:
        yield written
    except BaseException as error:
        for path in written:
            remove(path)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written: {error.strerror or error}.") from error
        raise


def write_volumes(layout: Layout, images: Images, stds: Images, manifest: dict[str, Any], written: list[Path]) -> None:
    """Write the synthetic volumes and their standard deviations; name them in manifest and `written`."""
    case = manifest["case"]
    folder = layout.folder(case)
    for modality, image in images.items():
        volumes = {"file": (layout.image(case, modality), image)}
        if modality in stds and (place := layout.std(case, modality)) is not None:
            volumes["std"] = (place, stds[modality])
        for path, volume in volumes.values():
            write_volume(volume, path)
            written.append(path)
        names = relative_to(folder, {key: path for key, (path, _) in volumes.items()})
        manifest["synthetic"][modality] = {"std": None, **names, **manifest["synthetic"][modality]}


def relative_to(folder: Path, paths: Mapping[str, Path]) -> dict[str, str]:
    """Where files lie, as seen from a folder."""
    return {name: os.path.relpath(path, folder).replace(os.sep, "/") for name, path in paths.items()}
