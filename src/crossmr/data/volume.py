"""Volumes in, NIfTI out: the one place where orientation exists.

Inside crossmr an image is float32 (Z, Y, X): the closest RAS+ axes, slowest first. So `data[z]` is an axial
slice (inferior -> superior), its rows run posterior -> anterior and its columns left -> right. Files are read
into that frame by flips and transpositions, never resampled, and written back on their own grid. `nifti` reads and
writes the files.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.optimize import linear_sum_assignment

from crossmr.data.formats import header_of
from crossmr.data.nifti import (
    affine_of,
    check_header,
    image_of_pair,
    read_header,
    read_stored,
    says_synthetic,
    stored_image,
    times,
    with_header,
)
from crossmr.errors import VolumeError

_GRID_TOLERANCE = 0.01
"""Voxels: two grids of one shape, all of whose voxels lie closer than this, are one; text and quaternions round so."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D image in canonical orientation, and what is needed to write another on its grid."""

    data: np.ndarray
    """float32 (Z, Y, X), contiguous, RAS+ with the slowest axis first; values scaled as the file says."""
    spacing_mm: tuple[float, float, float]
    """Voxel size (Z, Y, X)."""
    affine: np.ndarray
    """(4, 4) float64 of the canonical image: (x, y, z, 1) indices -> mm. For comparing grids."""
    image: nib.Nifti1Image
    """The original grid and header (shape, orientation, sform, qform, units), with all voxels zero."""
    name: str
    """For messages: the file's name."""
    synthetic: bool
    """Whether its header says that it was synthesised: `descrip` starts with SYNTHETIC."""
    remark: str = ""
    """What a reader should know of how the file was read."""


def read_volume(source: Path | str | nib.Nifti1Image | tuple[Any, Any], *, name: str | None = None) -> Volume:
    """Read a NIfTI-1 or -2 file (plain or gzipped, of any name and byte order), an in-memory image, or an array.

    Pairs of `.hdr` and `.img` and the other formats of `foreign` are read by their names; what is written on their
    grids is NIfTI. An array comes with its affine, as a pair: real numbers (x, y, z), and (4, 4) from voxel indices to
    mm in RAS+.

    Scaling (scl_slope, scl_inter) is applied. Trailing axes of length one are dropped, so that every image is 3D. The
    affine is the sform, else the qform, else the one that nibabel derives from the spacing; units other than mm are
    taken for mm, as nibabel does. Values may be NaN, infinite or constant.

    Raises:
        VolumeError: missing, unreadable, truncated, of no format that is read, not 3D, empty, complex or RGB, or with a
            spacing or an affine that makes no sense.
    """
    if isinstance(source, (str, Path)):
        name = name or Path(source).name
        header, stored, scaling, remark = read_stored(header_of(Path(source)), name)
    else:
        name = name or Path(getattr(source, "get_filename", str)() or "in-memory image").name
        image = image_of_pair(*source, name) if isinstance(source, tuple) and len(source) == 2 else source
        header, stored = stored_image(image, name)
        scaling, remark = None, ""

    empty = _without_voxels(header, stored.shape, name)
    canonical = apply_orientation(stored, _orientation(empty.image.affine)).T  # a view, (Z, Y, X)
    return replace(empty, data=_scaled(canonical, scaling), remark=remark)


def read_grid(path: Path, *, name: str | None = None) -> Volume | None:
    """A volume as its header announces it, every voxel 0, in no time and memory; None where no header can be read.

    Raises:
        VolumeError: as `read_volume`, of what the header says.
    """
    name = name or path.name
    if (header := read_header(path)) is None:
        return None
    check_header(header, name)
    return _without_voxels(header, header.get_data_shape()[:3], name)


def _without_voxels(header: Any, shape: tuple[int, ...], name: str) -> Volume:
    """A volume of a header and of so many voxels (x, y, z) as stored, all of them 0."""
    affine = affine_of(header, name)
    orientation = _orientation(affine)
    zeros = np.broadcast_to(np.float32(0), shape)
    affine_ras = affine @ inv_ornt_aff(orientation, shape)
    x, y, z = map(float, voxel_sizes(affine_ras))
    return Volume(
        data=apply_orientation(zeros, orientation).T,
        spacing_mm=(z, y, x),
        affine=affine_ras,
        image=with_header(zeros, affine, header),
        name=name,
        synthetic=says_synthetic(header),
    )


def read_labels(source: Path | str | nib.Nifti1Image, like: Volume) -> np.ndarray:
    """Read a segmentation on the grid of `like`: uint8 (Z, Y, X).

    Raises:
        VolumeError: as `read_volume`; on another grid; or values other than whole numbers from 0 to 255.
    """
    labels = read_volume(source)
    if not same_grid(labels, like):
        raise VolumeError(
            f"{labels.name}: is {describe_grid(labels)}, but {like.name} is {describe_grid(like)}"
            f"{said_displacement(labels, like)}. Resample the segmentation onto the image's grid first."
        )
    valid = np.isfinite(labels.data) & (labels.data == np.rint(labels.data))
    valid &= (labels.data >= 0) & (labels.data <= 255)
    if not valid.all():
        raise VolumeError(
            f"{labels.name}: is not a segmentation: {np.count_nonzero(~valid)} voxels are not whole numbers "
            f"from 0 to 255 (one is {labels.data[~valid][0]:g}). Threshold a probability map first."
        )
    return labels.data.astype(np.uint8)


def on_grid(
    array: np.ndarray,
    reference: Volume,
    *,
    description: str,
    display_range: tuple[float, float] | None = None,
    dtype: npt.DTypeLike = np.float32,
    copy: bool = True,
) -> nib.Nifti1Image:
    """An image of a canonical (Z, Y, X) array on the reference's grid, byte order and NIfTI version.

    Shape, orientation, sform and qform with their codes, pixdim and units are the reference's, bit for bit;
    the voxels are of `dtype` with slope 1 and intercept 0; without `copy` in the array's own memory, if they can be.
    Extensions, intent and texts of the reference are dropped, since they may identify the patient; `descrip` is the
    description, cal_min and cal_max the `display_range`.

    Raises:
        ValueError: the array has another shape, or the description is not ASCII of at most 79 characters.
    """
    if array.shape != reference.data.shape:
        raise ValueError(f"array is {array.shape}, but {reference.name} is {reference.data.shape}: expected the same")
    if not description.isascii() or len(description) > 79:
        raise ValueError(f"description must be ASCII of at most 79 characters, got {description!r}")
    header = reference.image.header.copy()
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = 0  # nibabel chooses it
    header["cal_min"], header["cal_max"] = display_range or (0, 0)
    header["descrip"] = description.encode("ascii")
    header["aux_file"] = b""
    for relic in {"db_name", "data_type"} & set(header.keys()):  # NIfTI-1 only
        header[relic] = b""
    header.set_intent("none")
    header.extensions.clear()
    voxels = np.array(array, dtype=dtype) if copy else np.asarray(array, dtype=dtype)
    return with_header(_as_stored(voxels, reference), reference.image.affine, header)


class DicomSlices(NamedTuple):
    """A volume as DICOM slices along the file's third axis, in LPS coordinates (left, posterior, superior)."""

    pixels: np.ndarray
    """(K, rows, columns), from the first slice along the normal to the last."""
    positions: np.ndarray
    """(K, 3) mm: the centre of each slice's first voxel."""
    orientation: np.ndarray
    """(2, 3) directions: along a row, and from row to row."""
    spacing_mm: tuple[float, float, float]
    """From slice to slice, row to row, column to column."""


def as_dicom_slices(array: np.ndarray, reference: Volume) -> DicomSlices:
    """A canonical (Z, Y, X) array on the reference's grid, as DICOM slices; dcm2niix undone: it reverses the rows."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(reference.image.affine, dtype=np.float64)
    voxels = _as_stored(array, reference)[:, ::-1]  # NIfTI's second axis runs against DICOM's rows
    across, down, through = affine[:3, 0], -affine[:3, 1], affine[:3, 2]
    first = affine[:3, 3] - down * (voxels.shape[1] - 1)
    positions = first + np.arange(voxels.shape[2])[:, None] * through
    order = slice(None, None, -1 if np.cross(across, down) @ through < 0 else 1)
    sizes = [float(np.linalg.norm(step)) for step in (through, down, across)]
    return DicomSlices(
        pixels=np.ascontiguousarray(voxels.T[order]),
        positions=positions[order],
        orientation=np.stack([across / sizes[2], down / sizes[1]]),
        spacing_mm=(sizes[0], sizes[1], sizes[2]),
    )


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether voxels correspond: equal shapes, and no voxel lies a hundredth of a voxel or more from its like."""
    if a.data.shape != b.data.shape:
        return False
    steps = np.linalg.solve(a.affine[:3, :3], _between_corners(a, b))  # in voxels of a, along its axes
    return bool(np.abs(steps).max() < _GRID_TOLERANCE)


def displacement_mm(a: Volume, b: Volume) -> float:
    """The largest distance between like voxels of two volumes of one shape."""
    return float(np.linalg.norm(_between_corners(a, b), axis=0).max())


def _between_corners(a: Volume, b: Volume) -> np.ndarray:
    """(3, 8) mm from a's corner voxels to b's: of an affine map, no other voxel moves farther."""
    ends = [[0, n - 1] for n in reversed(a.data.shape)]
    corners = np.array(np.meshgrid(*ends, [1])).reshape(4, -1)
    difference: np.ndarray = ((b.affine - a.affine) @ corners)[:3]
    return difference


def describe_grid(volume: Volume) -> str:
    """Size and spacing in the order of the file's axes, e.g. `240×240×155 at 1×1×1 mm`."""
    spacing = voxel_sizes(volume.image.affine)
    return f"{times(volume.image.shape)} at {times(np.round(spacing, 3))} mm"


def voxels_sha256(volume: Volume) -> str:
    """SHA-256, in hex, of a volume's shape and intensities: the same whatever its file's name, header or packing."""
    content = hashlib.sha256(repr(volume.data.shape).encode())
    content.update(np.ascontiguousarray(volume.data, dtype="<f4").data)
    return content.hexdigest()


def _scaled(stored: np.ndarray, scaling: tuple[float, float] | None) -> np.ndarray:
    """A copy of voxels (Z, Y, X), times slope plus intercept, as float32.

    The product is float64, and made slice by slice: of the whole volume it would be four times the stored voxels.
    """
    data = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite
        for made, plane in zip(data, stored, strict=True):
            made[:] = plane if scaling is None else plane * np.float64(scaling[0]) + np.float64(scaling[1])
    return data


def _orientation(affine: np.ndarray) -> np.ndarray:
    """The closest RAS+ axis of each of the file's axes and the direction along it, (3, 2), as nibabel has them.

    The pairing maximises the sum of cosines. nibabel's `io_orientation` pairs one axis after the other, so that for a
    scan some 45° from the RAS+ axes the result would depend on the order in which its axes are stored.
    """
    scaled = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(scaled)
    rotation = left @ right  # without shears
    world, file = linear_sum_assignment(-np.abs(rotation))
    order = np.argsort(file)
    axes = world[order]
    return np.stack([axes, np.where(rotation[axes, np.arange(3)] < 0, -1, 1)], axis=1).astype(float)


def _as_stored(array: np.ndarray, reference: Volume) -> np.ndarray:
    """A canonical (Z, Y, X) array along the axes of the reference's file (x, y, z)."""
    to_original = ornt_transform(axcodes2ornt("RAS"), _orientation(reference.image.affine))
    voxels: np.ndarray = apply_orientation(array.T, to_original)
    return voxels


def said_displacement(a: Volume, b: Volume) -> str:
    """That two volumes of one shape lie apart, for a message; '' of others."""
    return f" and lies up to {displacement_mm(a, b):.3g} mm elsewhere" if a.data.shape == b.data.shape else ""
