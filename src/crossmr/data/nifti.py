"""NIfTI as it lies in files: headers checked and repaired, voxels as stored, files written whole.

Nothing here turns an axis; `volume` does. `foreign` reads what is no NIfTI.
"""

import gzip
import io
import logging
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from crossmr.data.foreign import Stored, as_nifti, read_foreign, read_foreign_header
from crossmr.data.formats import fault_of, first_bytes, header_of, is_nifti, is_volume, parts, unreadable
from crossmr.errors import OutputError, VolumeError
from crossmr.files import write_atomically

_GZIP_LEVEL = 1
"""A smooth 240×240×155 float32 brain (36 MB) becomes 5.4 MB in 0.17 s; level 6 saves 4 % in 1.6× the time."""
_SILENT = logging.Logger("crossmr.nifti")  # not shown: what nibabel repairs in a header is checked here
_SILENT.addHandler(logging.NullHandler())


def is_synthetic(path: Path) -> bool:
    """Whether a file is a volume whose header says that it was synthesised; the rest of it is not read."""
    header = read_header(path)
    return header is not None and says_synthetic(header)


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


def says_synthetic(header: Any) -> bool:
    return bytes(header["descrip"].item()).startswith(b"SYNTHETIC")


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
    coarse = with_header(voxels, image.affine, header)
    coarse.header.set_slope_inter(1 / 255, 0)
    return gzip.compress(coarse.to_bytes(), _GZIP_LEVEL, mtime=0)


def _is_foreign(path: Path) -> bool:
    """Whether a file is of another format than NIfTI by its name; a pair's header by its content."""
    if not is_volume(path.name) or is_nifti(path.name):
        return False
    start = first_bytes(path)
    return start[344:348] != b"ni1\0" and start[4:8] != b"ni2\0"


def read_stored(path: Path, name: str) -> Stored:
    """The header of a file, and its voxels (x, y, z) as stored."""
    if _is_foreign(path):
        if (header := read_foreign_header(path)) is not None:
            check_header(header, name)  # before the voxels are read
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
            check_header(header, name)  # before the rest is unpacked: a functional series may be huge
            content = gzip.decompress(content)
        else:
            header = _parse_header(first_bytes(path) if of_pair else content[:1024], name, of_pair=of_pair)
            check_header(header, name)
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


def stored_image(image: Any, name: str) -> tuple[Any, np.ndarray]:
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
    check_header(header, name)
    try:
        stored = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise VolumeError(f"{name}: its voxels cannot be read ({_reason(error)}). Copy the file again.") from error
    return header, stored.reshape(stored.shape[:3])


def image_of_pair(array: Any, affine: Any, name: str) -> nib.Nifti1Image:
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
        raise VolumeError(f"{name}: its affine is {times(matrix.shape)}, expected 4×4, from voxel indices to mm.")
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
        raise VolumeError(f"{name}: spacing is {times(spacing)} mm, expected positive numbers. Correct its header.")
    if fixed["qform_code"] == 0:  # qfac means nothing then: keep its bits
        fixed["pixdim"][0] = header["pixdim"][0]
    return fixed


def check_header(header: Any, name: str) -> None:
    """Refuse images that are not 3D or not of real numbers."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) > 3 and any(size > 1 for size in shape[3:]):
        raise VolumeError(
            f"{name}: is {times(shape)}: {math.prod(shape[3:])} volumes, expected one. "
            "Split it (fslsplit, mrconvert) into one file per volume."
        )
    if len(shape) < 3:
        raise VolumeError(f"{name}: is {len(shape)}D ({times(shape)}), expected a 3D volume. Stack its slices first.")
    if min(shape) < 1:
        raise VolumeError(f"{name}: is {times(shape)}: it has no voxels. Export it again.")
    if dtype.kind not in "iuf":
        raise VolumeError(
            f"{name}: voxels are {'complex' if dtype.kind == 'c' else 'RGB'}, expected one real number each. "
            "Give the magnitude or a grey-scale image."
        )


def affine_of(header: Any, name: str) -> np.ndarray:
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


def with_header(voxels: np.ndarray, affine: np.ndarray, header: Any) -> nib.Nifti1Image:
    """An image with this very header: nibabel rewrites sform and qform only where the affine differs."""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(voxels, affine, header)
    image.header["pixdim"][0] = header["pixdim"][0]  # which nibabel has changed
    return image


def times(numbers: Any) -> str:
    return "×".join(f"{number:g}" for number in numbers)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
