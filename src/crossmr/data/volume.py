"""Volumes in, NIfTI out: the one place where orientation exists.

Inside crossmr an image is float32 (Z, Y, X): the closest RAS+ axes, slowest first. So `data[z]` is an axial
slice (inferior -> superior), its rows run posterior -> anterior and its columns left -> right. Files are read
into that frame by flips and transpositions, never resampled, and written back on their own grid. `foreign` reads
what is no NIfTI.
"""

import gzip
import hashlib
import io
import logging
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from nibabel.spatialimages import HeaderDataError
from scipy.optimize import linear_sum_assignment

from crossmr.data.foreign import Stored, as_nifti, read_foreign, read_foreign_header
from crossmr.data.formats import fault_of, first_bytes, header_of, is_nifti, is_volume, parts, unreadable
from crossmr.errors import OutputError, VolumeError
from crossmr.files import write_atomically

_GRID_TOLERANCE = 0.01
"""Voxels: two grids of one shape, all of whose voxels lie closer than this, are one; text and quaternions round so."""

_GZIP_LEVEL = 1
"""A smooth 240×240×155 float32 brain (36 MB) becomes 5.4 MB in 0.17 s; level 6 saves 4 % in 1.6× the time."""

_SILENT = logging.Logger("crossmr.nifti")  # not shown: what nibabel repairs in a header is checked here
_SILENT.addHandler(logging.NullHandler())


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
        header, stored, scaling, remark = _read_file(header_of(Path(source)), name)
    else:
        name = name or Path(getattr(source, "get_filename", str)() or "in-memory image").name
        image = _image_of_pair(*source, name) if isinstance(source, tuple) and len(source) == 2 else source
        header, stored = _read_image(image, name)
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
    _check_header(header, name)
    return _without_voxels(header, header.get_data_shape()[:3], name)


def _without_voxels(header: Any, shape: tuple[int, ...], name: str) -> Volume:
    """A volume of a header and of so many voxels (x, y, z) as stored, all of them 0."""
    affine = _affine(header, name)
    orientation = _orientation(affine)
    zeros = np.broadcast_to(np.float32(0), shape)
    affine_ras = affine @ inv_ornt_aff(orientation, shape)
    x, y, z = map(float, voxel_sizes(affine_ras))
    return Volume(
        data=apply_orientation(zeros, orientation).T,
        spacing_mm=(z, y, x),
        affine=affine_ras,
        image=_with_header(zeros, affine, header),
        name=name,
        synthetic=_says_synthetic(header),
    )


def is_synthetic(path: Path) -> bool:
    """Whether a file is a volume whose header says that it was synthesised; the rest of it is not read."""
    header = read_header(path)
    return header is not None and _says_synthetic(header)


def read_header(source: Path | str | nib.Nifti1Image) -> Any | None:
    """The header of a volume, as nibabel has that of NIfTI, from the file's first bytes; None of anything else."""
    if isinstance(source, nib.Nifti1Image):
        return source.header
    if not isinstance(source, (str, Path)) or not os.path.isfile(source):  # where nobody may look, there is none
        return None
    path = header_of(Path(source))
    try:
        if _is_foreign(path):
            return read_foreign_header(path)
        return _parse_header(first_bytes(path), path.name, of_pair=is_volume(path.name) and not is_nifti(path.name))
    except VolumeError:
        return None


def _says_synthetic(header: Any) -> bool:
    return bytes(header["descrip"].item()).startswith(b"SYNTHETIC")


def read_labels(source: Path | str | nib.Nifti1Image, like: Volume) -> np.ndarray:
    """Read a segmentation on the grid of `like`: uint8 (Z, Y, X).

    Raises:
        VolumeError: as `read_volume`; on another grid; or values other than whole numbers from 0 to 255.
    """
    labels = read_volume(source)
    if not same_grid(labels, like):
        raise VolumeError(
            f"{labels.name}: is {describe_grid(labels)}, but {like.name} is {describe_grid(like)}"
            f"{_displacement(labels, like)}. Resample the segmentation onto the image's grid first."
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
    return _with_header(_as_stored(voxels, reference), reference.image.affine, header)


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


def write_volume(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image whole or not at all: `.nii`, or `.nii.gz` whose bytes depend on nothing but the image.

    Missing folders are made. Beside the image, memory holds one slice.

    Raises:
        OutputError: another suffix, or the disk is full, read-only and so on.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise OutputError(f"{path}: cannot be written as NIfTI. Give a name that ends in .nii or .nii.gz.")

    def write(file: BinaryIO) -> None:
        if path.suffix == ".gz":
            packer = _Packer(file)
            image.to_stream(packer)
            packer.finish()
        else:
            image.to_stream(file)

    write_atomically(path, write)


class _Packer(io.RawIOBase):
    """A file that packs what is written to it, slice by slice; the same bytes as `gzip.compress` of all at once."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file, self.place = file, 0
        self.packer = zlib.compressobj(_GZIP_LEVEL, wbits=31)  # without name or time

    def write(self, data: Any) -> int:
        self.file.write(self.packer.compress(data))
        self.place += len(data)
        return len(data)

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        """Go forward over zeros."""
        if whence or place < self.place:
            raise OSError("what is packed cannot be written twice")
        self.write(bytes(place - self.place))
        return self.place

    def finish(self) -> None:
        self.file.write(self.packer.flush())


def compact(image: nib.Nifti1Image) -> bytes:
    """An image within [0, 1] as `.nii.gz` of 256 grey values, a tenth of its size: for display in a page."""
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["scl_slope"], header["scl_inter"] = 1 / 255, 0
    header["vox_offset"] = 0
    voxels = np.rint(np.clip(np.asanyarray(image.dataobj), 0, 1) * 255).astype(np.uint8)
    coarse = _with_header(voxels, image.affine, header)
    coarse.header.set_slope_inter(1 / 255, 0)
    return gzip.compress(coarse.to_bytes(), _GZIP_LEVEL, mtime=0)


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
    return f"{_times(volume.image.shape)} at {_times(np.round(spacing, 3))} mm"


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


def _is_foreign(path: Path) -> bool:
    """Whether a file is of another format than NIfTI by its name; a pair's header by its content."""
    if not is_volume(path.name) or is_nifti(path.name):
        return False
    start = first_bytes(path)
    return start[344:348] != b"ni1\0" and start[4:8] != b"ni2\0"


def _read_file(path: Path, name: str) -> Stored:
    """The header of a file, and its voxels (x, y, z) as stored."""
    if _is_foreign(path):
        if (header := read_foreign_header(path)) is not None:
            _check_header(header, name)  # before the voxels are read
        found = read_foreign(path, name)
        return found._replace(voxels=found.voxels.reshape(found.voxels.shape[:3]))
    image = parts(path)[-1]
    of_pair = image != path
    try:
        content = image.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if fault := fault_of(content[:1024], image):
        raise VolumeError(f"{name}: {fault}.")
    try:
        if gzipped := content.startswith(b"\x1f\x8b"):
            stream = zlib.decompressobj(wbits=31)
            start = stream.decompress(content[:65536], 1024)
            if len(start) < 1024 and not stream.eof:
                raise EOFError("it ends within the header")
            header = _parse_header(first_bytes(path) if of_pair else start, name, of_pair=of_pair)
            _check_header(header, name)  # before the rest is unpacked: a functional series may be huge
            content = gzip.decompress(content)
        else:
            header = _parse_header(first_bytes(path) if of_pair else content[:1024], name, of_pair=of_pair)
            _check_header(header, name)
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeError(
            f"{name}: the gzip data is truncated or damaged ({_reason(error)}). Copy the file again."
        ) from error
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    count, offset = math.prod(shape), max(int(header["vox_offset"]), 0 if of_pair else header.single_vox_offset)
    length = offset + dtype.itemsize * count
    if len(content) < length:
        raise VolumeError(
            f"{name}: is truncated: {len(content)} bytes{' once unpacked' * gzipped}, but its header "
            f"announces {length}. Copy the file again."
        )
    stored = np.frombuffer(content, dtype, count, offset).reshape(shape[:3], order="F")
    slope, inter = header.get_slope_inter()
    scaling = None if slope is None or (slope, inter) == (1, 0) else (slope, inter)
    header["vox_offset"] = 0  # of this file only; the header is used for others
    if of_pair:
        kind = nib.Nifti2Header if isinstance(header, nib.Nifti2Header) else nib.Nifti1Header
        header = kind(header.binaryblock, header.endianness, check=False)
        header["magic"] = kind()["magic"]
    return Stored(header, stored, scaling)


def _read_image(image: Any, name: str) -> tuple[Any, np.ndarray]:
    """The header and the scaled voxels (x, y, z) of an in-memory image, as stored."""
    if isinstance(image, nib.spatialimages.SpatialImage) and not isinstance(image, nib.Nifti1Image):
        image = as_nifti(image, name)
    if not isinstance(image, nib.Nifti1Image):
        raise VolumeError(
            f"{name}: got {type(image).__name__}, expected a file, an image of nibabel, or (array, affine). "
            "Convert it first."
        )
    if image.affine is not None:  # it counts where the header has another one, as when nibabel writes
        _check_affine(image.affine, name)
        image = type(image)(image.dataobj, image.affine, image.header)
    header = image.header.copy()
    header.extensions.clear()
    header = _repaired(header, name)
    _check_header(header, name)
    try:
        stored = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise VolumeError(f"{name}: its voxels cannot be read ({_reason(error)}). Copy the file again.") from error
    return header, stored.reshape(stored.shape[:3])


def _image_of_pair(array: Any, affine: Any, name: str) -> nib.Nifti1Image:
    """An image, in mm, of an array (x, y, z) and its affine."""
    try:
        voxels, matrix = np.asarray(array), np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or one with gradients
        raise VolumeError(
            f"{name}: its array or affine is none of numbers ({_reason(error)}). Give NumPy arrays."
        ) from error
    if voxels.dtype.kind not in "iuf":
        raise VolumeError(f"{name}: voxels are {voxels.dtype}, expected one real number each. Give a magnitude image.")
    if matrix.shape != (4, 4):
        raise VolumeError(f"{name}: its affine is {_times(matrix.shape)}, expected 4×4, from voxel indices to mm.")
    _check_affine(matrix, name)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite, as in a file
        image = nib.Nifti1Image(voxels.astype(np.float32), matrix)
    image.header.set_xyzt_units("mm")
    return image


def _parse_header(start: bytes, name: str, *, of_pair: bool = False) -> Any:
    if len(start) >= 132 and start[128:132] == b"DICM":
        raise VolumeError(f"{name}: is DICOM, not NIfTI. Convert its folder with: crossmr convert FOLDER -o NIFTI.")
    for kind, half in (
        (nib.Nifti1Header, nib.nifti1.Nifti1PairHeader),
        (nib.Nifti2Header, nib.nifti2.Nifti2PairHeader),
    ):
        size = kind.template_dtype.itemsize
        if len(start) >= size and kind.may_contain_header(start):
            header = kind(start[:size], check=False)
            if bytes(header["magic"].item())[:3] in (b"n+1", b"n+2"):
                return _repaired(header, name)
            if of_pair:
                return _repaired(half(start[:size], check=False), name)
            raise VolumeError(f"{name}: is the header of a .hdr/.img pair. Name it .hdr, or convert it to .nii.gz.")
    raise VolumeError(f"{name}: is not a NIfTI file, whatever its name. Convert it to .nii.gz first.")


def _repaired(header: Any, name: str) -> Any:
    """A copy with what nibabel repairs on reading (a negative pixdim, an unknown code), or an error."""
    fixed = header.copy()
    try:
        fixed.check_fix(logger=_SILENT)
        dimensions = len(fixed.get_data_shape())
        fixed.get_data_dtype(), fixed.get_slope_inter(), int(fixed["vox_offset"])
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise VolumeError(f"{name}: has a broken NIfTI header ({_reason(error)}). Export it again.") from error
    spacing = header["pixdim"][1 : 1 + min(3, dimensions)]
    if not (np.isfinite(spacing).all() and spacing.all()):
        raise VolumeError(f"{name}: spacing is {_times(spacing)} mm, expected positive numbers. Correct its header.")
    if fixed["qform_code"] == 0:  # qfac means nothing then: keep its bits
        fixed["pixdim"][0] = header["pixdim"][0]
    return fixed


def _check_header(header: Any, name: str) -> None:
    """Refuse images that are not 3D or not of real numbers."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) > 3 and any(size > 1 for size in shape[3:]):
        raise VolumeError(
            f"{name}: is {_times(shape)}: {math.prod(shape[3:])} volumes, expected one. "
            "Split it (fslsplit, mrconvert) into one file per volume."
        )
    if len(shape) < 3:
        raise VolumeError(f"{name}: is {len(shape)}D ({_times(shape)}), expected a 3D volume. Stack its slices first.")
    if min(shape) < 1:
        raise VolumeError(f"{name}: is {_times(shape)}: it has no voxels. Export it again.")
    if dtype.kind not in "iuf":
        raise VolumeError(
            f"{name}: voxels are {'complex' if dtype.kind == 'c' else 'RGB'}, expected one real number each. "
            "Give the magnitude or a grey-scale image."
        )


def _affine(header: Any, name: str) -> np.ndarray:
    """The (4, 4) float64 affine in force, of the file's own axes."""
    try:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"{name}: its qform makes no sense ({_reason(error)}). Correct its header first.") from error
    _check_affine(affine, name)
    return affine


def _check_affine(affine: np.ndarray, name: str) -> None:
    """Refuse an affine (4, 4) that has no inverse."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0) if (np.abs(affine) < 1e9).all() else np.zeros(3)
    if sizes.min() < 1e-6 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        raise VolumeError(f"{name}: its affine has no inverse: {affine[:3].round(3).tolist()}. Correct its header.")


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


def _with_header(voxels: np.ndarray, affine: np.ndarray, header: Any) -> nib.Nifti1Image:
    """An image with this very header: nibabel rewrites sform and qform only where the affine differs."""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(voxels, affine, header)
    image.header["pixdim"][0] = header["pixdim"][0]  # which nibabel has changed
    return image


def _as_stored(array: np.ndarray, reference: Volume) -> np.ndarray:
    """A canonical (Z, Y, X) array along the axes of the reference's file (x, y, z)."""
    to_original = ornt_transform(axcodes2ornt("RAS"), _orientation(reference.image.affine))
    voxels: np.ndarray = apply_orientation(array.T, to_original)
    return voxels


def _displacement(a: Volume, b: Volume) -> str:
    return f" and lies up to {displacement_mm(a, b):.3g} mm elsewhere" if a.data.shape == b.data.shape else ""


def _times(numbers: Any) -> str:
    return "×".join(f"{number:g}" for number in numbers)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
