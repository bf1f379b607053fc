"""Volumes of other formats than NIfTI, each as a NIfTI header and its voxels.

.mgz .mgh             FreeSurfer, with nibabel's header
.hdr and .img         Analyze and SPM, by nibabel; a pair of NIfTI is read as NIfTI (`volume`)
.mha .mhd .nrrd .nhdr MetaImage and NRRD, by SimpleITK, an extra (`pip install crossmr[formats]`)

No voxel is moved here: they stay along their file's axes, and the header's affine says where these lie in RAS+.
"""

import contextlib
import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError

from crossmr.data.formats import ending_of, fault_of, first_bytes, half, parts, unreadable
from crossmr.errors import VolumeError

_ITK = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
_AXES = (b"2", b"3", b"4")
_PER_AXIS = (b"DimSize", b"ElementSpacing", b"ElementSize", b"Offset", b"Position", b"Origin", b"CenterOfRotation")
_PER_MATRIX = (b"TransformMatrix", b"Rotation", b"Orientation")
_BEST_PACKED = 1100
"""No deflated file is of more bytes than so many times its own."""
_MGH_HEADER, _MGH_OFFSET = 90, 284
_MGH_PIXELS = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
_PIXELS = {
    **{f"sitkUInt{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"sitkInt{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"sitkFloat{bits}": f"f{bits // 8}" for bits in (32, 64)},
}
_FAULTS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError, zlib.error),
    *(ImageFileError, HeaderDataError, MGHError, np.linalg.LinAlgError),
)
"""What nibabel raises of a damaged file."""


class Stored(NamedTuple):
    """A volume as its file has it."""

    header: nib.Nifti1Header
    """With shape, dtype and affine (sform)."""
    voxels: np.ndarray
    """(x, y, z), or with more axes."""
    scaling: tuple[float, float] | None
    """Slope and intercept, where there are any."""
    remark: str = ""
    """What a reader should know of it."""


def read_foreign(path: Path, name: str) -> Stored:
    """Read a file of another format than NIfTI.

    Raises:
        VolumeError: it is damaged, is not what its name says, or SimpleITK is needed and not installed.
    """
    for part in parts(path):
        try:
            part.open("rb").close()
        except OSError as error:
            raise unreadable(part, error) from error
    if fault := fault_of(first_bytes(path), path):
        raise VolumeError(f"{name}: {fault}.")
    if path.suffix.lower() in _ITK:
        return _by_itk(path, name, voxels=True)
    if not half(path.name):
        return _of_freesurfer(path, name, voxels=True)
    try:
        image = _load(path)
        _check_size(_of_nibabel(image, np.zeros(0), name).header, path, name)
        stored = image.dataobj.get_unscaled()
    except _FAULTS as error:
        raise _damaged(path, name, error) from error
    return _of_nibabel(image, stored, name)


def read_foreign_header(path: Path) -> nib.Nifti1Header | None:
    """The header of a file of another format, without its voxels; None where it cannot be read."""
    try:
        if path.suffix.lower() in _ITK:
            return _by_itk(path, path.name, voxels=False).header
        if not half(path.name):
            return _of_freesurfer(path, path.name, voxels=False).header
        return _of_nibabel(_load(path), np.zeros(0), path.name).header
    except VolumeError:
        return None
    except _FAULTS:
        return None


def as_nifti(image: Any, name: str) -> nib.Nifti1Image:
    """An image of nibabel's in another format, in memory or on the disk, as NIfTI.

    Raises:
        VolumeError: as `read_foreign`.
    """
    try:
        found = _of_nibabel(image, np.asanyarray(image.dataobj), name)
    except _FAULTS as error:
        raise VolumeError(f"{name}: its voxels cannot be read ({_reason(error)}). Copy the file again.") from error
    return nib.Nifti1Image(found.voxels, None, found.header)


def _load(path: Path) -> Any:
    """An image of nibabel's, which says nothing of what it repairs."""
    with np.errstate(all="ignore"), LoggingOutputSuppressor():
        return nib.load(path)


def _check_size(header: nib.Nifti1Header, path: Path, name: str) -> None:
    """Refuse, before there is memory for it, a volume that its files cannot hold, however well they are packed."""
    announced = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    held = sum(part.stat().st_size for part in parts(path))
    if announced > _BEST_PACKED * held:
        raise VolumeError(f"{name}: is truncated: {held} bytes, but its header announces {announced}. Copy it again.")


def _of_freesurfer(path: Path, name: str, *, voxels: bool) -> Stored:
    """A `.mgz` or `.mgh`; with `voxels` False its header alone, of 284 bytes; the voxels follow, big-endian."""
    start = first_bytes(path)
    try:
        if len(start) < _MGH_OFFSET:
            raise EOFError("it ends within the header")
        mgh = MGHHeader(start[:_MGH_HEADER], check=False)
        if mgh["version"] != 1:
            raise TypeError("its version is not 1")
        if (kind := int(mgh["type"])) not in _MGH_PIXELS:
            raise TypeError(f"voxels of type {kind}")
        with np.errstate(all="ignore"):  # the affine is judged later
            affine = mgh.get_affine()
        header = _header(mgh.get_data_shape(), np.dtype(_MGH_PIXELS[kind]), affine, name)
        if not voxels:
            return Stored(header, np.zeros(0), None)
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        shape = header.get_data_shape()
        if len(content) < _MGH_OFFSET + math.prod(shape) * header.get_data_dtype().itemsize:
            raise EOFError("it ends within the voxels")
        stored = np.frombuffer(content, _MGH_PIXELS[kind], math.prod(shape), _MGH_OFFSET).reshape(shape, order="F")
    except _FAULTS as error:
        raise _damaged(path, name, error) from error
    return Stored(header, stored, None)


def _of_nibabel(image: Any, voxels: np.ndarray, name: str) -> Stored:
    """What nibabel made of a file; `voxels` as stored, without slope and intercept."""
    header, remark = image.header, ""
    if "orient" in header and not isinstance(image, nib.Nifti1Pair):
        remark = _handedness(image, name)
    slope, inter = (float(getattr(image.dataobj, key, neutral)) for key, neutral in (("slope", 1), ("inter", 0)))
    made = _header(image.shape, header.get_data_dtype(), image.affine, name)
    if "descrip" in header:
        made["descrip"] = bytes(header["descrip"].item())[:79]
    return Stored(made, voxels, None if (slope, inter) == (1, 0) else (slope, inter), remark)


def _handedness(image: Any, name: str) -> str:
    """What an Analyze header leaves open: which side is left.

    Raises:
        VolumeError: it says that its slices are not axial, which programs understand in different ways.
    """
    orient = bytes(image.header["orient"].item())[:1]
    if orient in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        planes = ("axial", "coronal", "sagittal")
        raise VolumeError(
            f"{name}: is Analyze of {planes[orient[0] % 3]} slices{', flipped' * (orient[0] > 2)}, which programs "
            "place differently. Convert it to .nii.gz by the program that wrote it."
        )
    map_of_files = getattr(image, "file_map", {})
    placed = "mat" in map_of_files and os.path.isfile(map_of_files["mat"].filename or "")
    if placed:
        return ""
    return "is Analyze, whose header does not say which side is left: its first axis was taken to run to the left."


def _by_itk(path: Path, name: str, *, voxels: bool) -> Stored:
    """A file that SimpleITK reads; with `voxels` False its header alone."""
    itk = _simpleitk(path, name)
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(path, name)
    reader = itk.ImageFileReader()
    shown = itk.ProcessObject.GetGlobalWarningDisplay()
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.SetFileName(str(path))
        reader.SetImageIO(_ITK[path.suffix.lower()])
        reader.ReadImageInformation()
        kinds = {getattr(itk, pixel): code for pixel, code in _PIXELS.items()}
        if reader.GetPixelID() not in kinds:
            what = itk.GetPixelIDValueAsString(reader.GetPixelID())
            raise VolumeError(
                f"{name}: voxels are {what}, expected one real number each. Give one component, or a magnitude image."
            )
        dtype = np.dtype(kinds[reader.GetPixelID()])
        header = _header(reader.GetSize(), dtype, _affine_of(reader), name)
        if voxels:
            _check_size(header, path, name)
        stored = itk.GetArrayFromImage(reader.Execute()).T if voxels else np.zeros(0, dtype)
    except RuntimeError as error:
        raise _damaged(path, name, error) from error
    finally:
        itk.ProcessObject.SetGlobalWarningDisplay(shown)
    notes = [reader.GetMetaData(key) for key in ("descrip", "ITK_FileNotes") if reader.HasMetaDataKey(key)]
    if notes:  # so that a synthetic volume stays marked
        header["descrip"] = notes[0].encode("ascii", "replace")[:79]
    return Stored(header, stored, None)


def _check_metaimage(path: Path, name: str) -> None:
    """Refuse a header in which numbers are missing or too many: ITK would write beyond its memory."""
    start = first_bytes(path).split(b"ElementDataFile", 1)[0]
    said = dict(re.findall(rb"^(\w+)[ \t]*=[ \t]*([^\r\n]*)", start, re.M))
    axes = said.get(b"NDims", b"").strip()
    wanted = (
        {key: int(axes) for key in _PER_AXIS} | {key: int(axes) ** 2 for key in _PER_MATRIX} if axes in _AXES else {}
    )
    faulty = [key.decode() for key, count in wanted.items() if key in said and not _are_numbers(said[key], count)]
    if not wanted or faulty or not start.isascii():
        raise VolumeError(
            f"{name}: cannot be read as {ending_of(path.name)}: {', '.join(faulty) or 'NDims'} in its header makes no "
            "sense. Copy the file again, or convert it to .nii.gz."
        )


def _are_numbers(text: bytes, count: int) -> bool:
    try:
        return len([float(word) for word in text.split()]) == count
    except ValueError:
        return False


def _affine_of(reader: Any) -> np.ndarray:
    """(4, 4) from voxel indices to mm in RAS+ of an image of SimpleITK, which has LPS."""
    axes = len(reader.GetSize())
    direction = np.array(reader.GetDirection()).reshape(axes, axes)
    steps, origin, used = np.eye(3), np.zeros(3), min(axes, 3)
    steps[:used, :used] = (direction * reader.GetSpacing())[:used, :used]
    origin[:used] = reader.GetOrigin()[:used]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, origin
    turned: np.ndarray = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return turned


def _header(shape: Any, dtype: np.dtype[Any], affine: Any, name: str) -> nib.Nifti1Header:
    """A NIfTI header of this shape, dtype and affine, in mm."""
    header = nib.Nifti1Header()
    try:
        with np.errstate(all="ignore"):  # the affine is judged later
            header.set_data_dtype(dtype)
            header.set_data_shape([int(side) for side in shape])
            header.set_sform(np.asarray(affine, np.float64), 1)
            header.set_xyzt_units("mm")
            with contextlib.suppress(HeaderDataError):  # sheared
                header.set_qform(np.asarray(affine, np.float64), 1, strip_shears=False)
    except _FAULTS as error:
        raise VolumeError(f"{name}: has a broken header ({_reason(error)}). Export it again.") from error
    return header


def _damaged(path: Path, name: str, error: BaseException) -> VolumeError:
    return VolumeError(
        f"{name}: cannot be read as {ending_of(path.name) or 'a volume'}: it is truncated, damaged or of "
        f"another format ({_reason(error)}). Copy the file again, or convert it to .nii.gz."
    )


def _simpleitk(path: Path, name: str) -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise VolumeError(
            f"{name}: {path.suffix.lower()} needs SimpleITK. Install it with: pip install 'crossmr[formats]'; or "
            "convert the file to .nii.gz."
        ) from error
    return SimpleITK


def _reason(error: BaseException) -> str:
    """The end of what a library says, in one line and without the folders of its sources."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    last = [line for line in text.splitlines() if line.strip()][-1]
    return " ".join(re.sub(r"\S*[/\\]\S*", "…", last).split())[:160]
