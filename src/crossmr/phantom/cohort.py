"""Patients: one from a seed, or a cohort of them as files in the layout of BraTS."""

import gzip
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from crossmr.errors import ConfigError
from crossmr.files import refuse_foreign, write_atomically
from crossmr.phantom.anatomy import BRATS_LABEL, Tissue, draw
from crossmr.phantom.scanner import MODALITIES, scan

FIELD_OF_VIEW_CENTRE_MM = (0.0, -11.0, 4.0)
SMALLEST_SIDE = 32
LESION_RATE = 0.85
DESCRIPTION = b"crossmr phantom"


@dataclass(frozen=True, eq=False)
class Phantom:
    """One synthetic patient on one grid."""

    images: dict[str, NDArray[np.float32]]
    """t1n, t1c, t2w, t2f: (X, Y, Z), RAS+ axis order, arbitrary MR units, >= 0."""
    labels: NDArray[np.uint8]
    """(X, Y, Z), BraTS >= 2023: 0 none, 1 necrotic core, 2 oedema, 3 enhancing tumour."""
    tissues: NDArray[np.uint8]
    """(X, Y, Z), the `anatomy.Tissue` that fills most of the voxel (AIR outside a stripped brain)."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index to RAS+ mm."""


def make_phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (96, 112, 80),
    spacing_mm: tuple[float, float, float] = (1.9, 1.9, 2.2),
    skull: bool = True,
    lesion: bool | None = None,
) -> Phantom:
    """One patient: anatomy, lesion and scanner from the seed, on a grid of `shape` voxels.

    The same seed is the same patient on any grid; a grid that is too small for a head (some
    180 x 210 x 175 mm) sees the middle of one.

    Args:
        seed: The patient.
        shape: Voxels along x, y, z; 32 or more each.
        spacing_mm: Voxel size along x, y, z.
        skull: False strips all but the brain and the CSF around it, the background being exactly 0.
        lesion: Whether there is a tumour; None leaves it to the seed. With one, the spots of age lie elsewhere.

    Raises:
        ConfigError: A seed, shape or spacing that makes no sense.
    """
    _check_seed(seed)
    if len(shape) != 3 or min(shape) < SMALLEST_SIDE:
        raise ConfigError(f"phantom shape: got {tuple(shape)}, expected three sides of >= {SMALLEST_SIDE} voxels.")
    if len(spacing_mm) != 3 or not all(0 < step <= 10 for step in spacing_mm):
        raise ConfigError(f"phantom spacing: got {tuple(spacing_mm)}, expected three steps of 0 to 10 mm.")
    axes = [
        np.asarray(centre + step * (np.arange(size) - (size - 1) / 2), np.float64)
        for size, step, centre in zip(shape, spacing_mm, FIELD_OF_VIEW_CENTRE_MM, strict=True)
    ]
    body, tumour, scanner, receiver = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    drawn = tumour.random() < LESION_RATE
    fractions, brain = draw(body, tumour, axes, drawn if lesion is None else lesion)
    tissues = fractions.argmax(0).astype(np.uint8)
    labels = np.array([BRATS_LABEL.get(tissue, 0) for tissue in Tissue], np.uint8)[tissues]
    images = scan(scanner, receiver, fractions, axes)
    if not skull:
        for volume in (*images.values(), labels, tissues):
            volume[~brain] = 0
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return Phantom(images, labels, tissues, affine)


def write_cohort(
    folder: Path | str,
    patients: int,
    *,
    seed: int = 0,
    missing: Mapping[int, Sequence[str]] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Write `patients` studies in the layout of BraTS >= 2023, and return their names.

    Each is PHANTOM-00003-000/PHANTOM-00003-000-{t1n,t1c,t2w,t2f,seg}.nii.gz, images as int16 and the
    segmentation as uint8. Patient i depends on (seed, i) alone, not on how many there are; the same call
    writes the same bytes.

    Args:
        folder: Made where it does not exist.
        patients: How many, 1 or more.
        seed: The cohort.
        missing: Modalities to leave out, by patient index.
        **kwargs: The options of `make_phantom`.

    Raises:
        ConfigError: Fewer than one patient, or a missing modality or patient that there is not.
        OutputError: A file cannot be written, or one that is no phantom has its name; nothing is written then.
    """
    missing = missing or {}
    _check_seed(seed)
    if patients < 1:
        raise ConfigError(f"phantom patients: got {patients}, expected 1 or more.")
    for index, modalities in missing.items():
        if unknown := sorted(set(modalities) - set(MODALITIES)):
            raise ConfigError(f"phantom missing: got {unknown} for patient {index}, expected some of {MODALITIES}.")
        if not 0 <= index < patients:
            raise ConfigError(f"phantom missing: got patient {index}, expected 0 to {patients - 1}.")
    names = [f"PHANTOM-{index:05d}-000" for index in range(patients)]
    for name, kind in itertools.product(names, ("seg", *MODALITIES)):
        refuse_foreign(Path(folder) / name / f"{name}-{kind}.nii.gz", is_phantom)
    for index, name in enumerate(names):
        own_seed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        phantom = make_phantom(int(own_seed), **kwargs)
        volumes: dict[str, NDArray[np.generic]] = {"seg": phantom.labels}
        for modality in MODALITIES:
            if modality in missing.get(index, ()):
                (Path(folder) / name / f"{name}-{modality}.nii.gz").unlink(missing_ok=True)  # of an earlier cohort
                continue
            volumes[modality] = np.rint(phantom.images[modality].clip(0, 32767)).astype(np.int16)
        for kind, volume in volumes.items():
            _write_volume(Path(folder) / name / f"{name}-{kind}.nii.gz", volume, phantom.affine)
    return names


def is_phantom(path: Path) -> bool:
    """Whether a file is a volume that `write_cohort` wrote: its header says so."""
    try:
        return bytes(nib.load(path).header["descrip"].item()) == DESCRIPTION
    except (OSError, EOFError, KeyError, ValueError, zlib.error, ImageFileError):
        return False  # whatever else it is


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"phantom seed: got {seed}, expected 0 or more.")


def _write_volume(path: Path, volume: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
