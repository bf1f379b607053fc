"""Small NIfTI files for tests, whose every voxel has another value."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

GEOMETRY = (
    *("dim", "pixdim", "xyzt_units"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
SHAPE = (4, 5, 6)
ORIENTATIONS = [
    np.array(np.eye(3)[list(axes)] * signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def affine_of(rotation: np.ndarray, spacing: tuple[float, ...] = (1, 2, 3)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = (-10.5, 20.25, 3)
    return affine


def scan(affine: np.ndarray, *, sform: int = 1, qform: int = 1, kind: type = nib.Nifti1Image) -> nib.Nifti1Image:
    """An image whose every voxel has another value."""
    header = kind.header_class()
    header.set_data_dtype(np.int16)
    header.set_xyzt_units("mm", "sec")
    image = kind(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), None, header)
    image.header.set_zooms(voxel_sizes(affine))
    if qform:
        image.header.set_qform(affine, code=qform)
    if sform:
        image.header.set_sform(affine, code=sform)
    return kind(image.dataobj, image.header.get_best_affine(), image.header)


def geometry(path: Path) -> dict[str, bytes]:
    """The raw header fields of a file, without any of nibabel's repairs."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    kind = nib.Nifti1Header if nib.Nifti1Header.may_contain_header(content[:348]) else nib.Nifti2Header
    header = kind(content[: kind.template_dtype.itemsize], check=False)
    return {field: header[field].tobytes() for field in GEOMETRY}


def save(image: nib.Nifti1Image, path: Path) -> Path:
    nib.save(image, path)
    return path


def patched(path: Path, **fields: object) -> Path:
    """Overwrite raw header fields of an uncompressed NIfTI-1 file."""
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + content[348:])
    return path
