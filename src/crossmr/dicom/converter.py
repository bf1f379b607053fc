"""One series as one volume, by dcm2niix.

dcm2niix is the converter that most of the field uses: it handles the vendors' peculiarities, enhanced multi-frame
images and most transfer syntaxes, and its wheel contains the program.
"""

import errno
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.data.nifti import write_volume
from crossmr.data.volume import Volume, as_dicom_slices, on_grid, read_volume
from crossmr.dicom.headers import import_pydicom
from crossmr.dicom.series import TELLING, DicomImage, Series, listed
from crossmr.errors import ConfigError, CrossmrError, StudyError
from crossmr.files import temporary_folder

PATIENCE, BYTES_PER_SECOND, FILES_PER_SECOND = 300.0, 1e6, 2.0
"""Seconds that dcm2niix may take for any series, and what it gets through at the least: a hundredth of the usual."""

SAME_SLICE, LESS_ALIKE = 0.98, 0.001
"""A frame is a slice with which it correlates so well, and by so much better than with the one at its position."""


def convert_series(case: str, series: Series, path: Path) -> None:
    """Convert one series to one NIfTI file, without the texts that dcm2niix writes into its header."""
    volume = read_series(case, series)
    write_volume(on_grid(volume.data, volume, description="acquired"), path)


def read_series(case: str, series: Series) -> Volume:
    """The volume that dcm2niix makes of a series."""
    converter = find_converter()
    with temporary_folder(f"{case}: {series.name} is converted") as temporary:
        inside = temporary / "in"
        inside.mkdir()
        links = [inside / f"{index:05d}.dcm" for index in range(len(series.images))]
        for k, (image, link) in enumerate(zip(series.images, links, strict=True)):
            if series.places is None and not series.mixed:
                _link(image.path, link)
            else:
                _join(series, k, link)
        name = f"{case}: {series.name}"
        volumes, complaint = _run(converter, inside, temporary / "out", name)
        if not volumes:  # such as deflated images, which pydicom can read
            _refuse_damaged(name, series)
            for image, link in zip(series.images, links, strict=True):
                link.unlink()
                _unpack(case, series, image.path, link)
            volumes, complaint = _run(converter, inside, temporary / "out", name)
        try:
            return _read_converted(case, series, volumes, complaint.replace(str(temporary), ""))
        except CrossmrError:
            if shutil.disk_usage(temporary).free < sum(link.stat().st_size for link in links):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None  # dcm2niix does not say so
            raise


def _read_converted(case: str, series: Series, volumes: Sequence[Path], complaint: str) -> Volume:
    """The one volume that a series became; `complaint` is what dcm2niix said."""
    if len(volumes) != 1:
        hint = f" (dcm2niix: {complaint})" if complaint else ""
        raise StudyError(
            f"{case}: {series.name} became {len(volumes) or 'no'} volumes, expected one{hint}. "
            "Export it again, or leave it out of the folder."
        )
    volume = read_volume(volumes[0], name=f"{case}: {series.name}")
    images = sum(len(np.atleast_2d(image.position)) for image in series.images)
    if (slices := volume.image.shape[2]) != images:
        raise StudyError(
            f"{case}: {series.name} has {images} images, of which dcm2niix made {slices} slices. "
            "Export it again, or leave it out of the folder."
        )
    if any(_is_misplaced(image, series, volume) for image in series.images if image.position.ndim == 2):
        raise StudyError(
            f"{case}: {series.name} numbers its frames in another order than they lie in, so that its slices would be "
            "mixed up. Export it as single images, or leave it out of the folder."
        )
    if series.padding is not None:
        volume.data[np.isclose(volume.data, series.padding, rtol=3e-6, atol=1e-6)] = 0
    return volume


def _is_misplaced(image: DicomImage, series: Series, volume: Volume) -> bool:
    """Whether one of a few frames is another slice of the volume than the one at its position.

    False where that cannot be told: pydicom cannot decode them, or they are alike.
    """
    slices = as_dicom_slices(volume.data, volume)
    if not np.allclose(slices.orientation, series.orientation, atol=1e-3):
        return False
    normal, last = np.cross(*series.orientation), len(image.position) - 1
    for k in sorted({0, min(1, last), last // 2, last}):
        try:
            frame = import_pydicom().pixels.pixel_array(image.path, index=k)
            alike = np.array([_correlation(frame, pixels) for pixels in slices.pixels])
        except Exception:  # whatever the decoders of pydicom run into
            return False
        at = int(np.abs((slices.positions - image.position[k]) @ normal).argmin())
        if alike.max() >= SAME_SLICE and alike[at] < alike.max() - LESS_ALIKE:
            return True
    return False


def _correlation(a: Any, b: Any) -> float:
    """Pearson's, 0 where one of two planes is constant."""
    one, other = (np.asarray(plane, np.float64).ravel() - np.mean(plane) for plane in (a, b))
    return float(one @ other / (np.sqrt((one @ one) * (other @ other)) or 1.0))


def _refuse_damaged(name: str, series: Series) -> None:
    """Refuse a series with images whose voxels are cut off.

    Raises:
        StudyError: the names of the files, in one line.
    """
    if lost := cut_off(series):
        raise StudyError(
            f"{name} has {len(series.images)} images, of which {len(lost)} {'is' if len(lost) == 1 else 'are'} cut off"
            f"{listed(lost)}. Export it again, or leave it out of the folder."
        )


def cut_off(series: Series) -> tuple[Path, ...]:
    return tuple(image.path for image in series.images if _is_cut_off(image.path))


def _is_cut_off(path: Path) -> bool:
    """Whether a file's voxels are fewer than its tags announce; of compressed ones, whether there are any."""
    try:
        image = import_pydicom().dcmread(path, force=True)
        voxels = image.get("PixelData")
        if not voxels or getattr(image.file_meta, "TransferSyntaxUID", None) is None:
            return not voxels
        if image.file_meta.TransferSyntaxUID.is_encapsulated:
            return False
        frames, samples = int(image.get("NumberOfFrames") or 1), int(image.get("SamplesPerPixel") or 1)
        return len(voxels) < int(image.Rows) * int(image.Columns) * frames * samples * int(image.BitsAllocated) // 8
    except Exception:  # pydicom raises whatever its parsing runs into
        return True


def patience(paths: Sequence[Path]) -> float:
    """Seconds that dcm2niix may take for these files: many times what it does on a slow disk."""
    return PATIENCE + sum(path.stat().st_size for path in paths) / BYTES_PER_SECOND + len(paths) / FILES_PER_SECOND


def _run(converter: str, inside: Path, outside: Path, name: str) -> tuple[list[Path], str]:
    """Run dcm2niix on a folder that holds one series; returns the volumes and its first error or warning."""
    outside.mkdir(exist_ok=True)
    # no rotation, no cropping, no defaults of the user; scales that differ between slices are applied; one volume
    options = ["-g", "i", "-b", "n", "-z", "n", "-x", "i", "-p", "y", "-m", "y", "-w", "1", "-d", "0", "-f", "volume"]
    command: list[str | Path] = [converter, *options, "-o", outside, inside]
    try:
        seconds = patience(list(inside.iterdir()))
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise StudyError(
            f"{name} was not converted by dcm2niix within {seconds:.0f} s, and it was stopped. Copy the series to a "
            "local disk, export it again, or leave it out of the folder."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise StudyError(f"{converter} could not be run: {error.strerror or error}. Install dcm2niix again.") from error
    complaint = re.search(r"(?:Error|Warning|Unsupported)[^\n]*", result.stdout + result.stderr)
    return sorted(outside.glob("*.nii")), complaint[0] if complaint else ""


def _unpack(case: str, series: Series, path: Path, unpacked: Path) -> None:
    """Write an image without compression.

    Raises:
        StudyError: pydicom cannot read it.
    """
    pydicom = import_pydicom()
    try:
        image = pydicom.dcmread(path, force=True)
        if image.file_meta.TransferSyntaxUID.is_compressed and not image.file_meta.TransferSyntaxUID.is_deflated:
            image.decompress()
        else:
            image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.save_as(unpacked, enforce_file_format=True)
    except Exception as error:  # pydicom raises whatever its parsing runs into
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split())
        raise StudyError(
            f"{case}: {series.name} cannot be read by dcm2niix, nor by pydicom ({reason}). "
            "Export it again without compression, or leave it out of the folder."
        ) from error


def _join(series: Series, index: int, path: Path) -> None:
    """Write a copy of an image at its even place, and with those tags of the first that tell series apart."""
    pydicom = import_pydicom()
    image = pydicom.dcmread(series.images[index].path, force=True)
    first = pydicom.dcmread(series.images[0].path, force=True, specific_tags=list(TELLING))
    for keyword in TELLING:
        if keyword in first:
            image[keyword] = first[keyword]
    if series.places is not None:
        image.ImagePositionPatient = [f"{value:.6f}"[:16] for value in series.places[index]]
        image.pop("SliceLocation", None)
    image.save_as(path, enforce_file_format="TransferSyntaxUID" in image.file_meta)


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # no links on this file system
        shutil.copyfile(path, link)


def find_converter() -> str:
    """Path of dcm2niix: the wheel's, else that on PATH.

    The wheel is not imported: some of its releases contain no program and download it on import.
    """
    import_pydicom()
    wheel = importlib.util.find_spec("dcm2niix")
    places = [] if wheel is None or wheel.origin is None else [str(Path(wheel.origin).parent)]
    program = shutil.which("dcm2niix", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if program is None:
        raise ConfigError("DICOM needs dcm2niix. Install it with: pip install 'crossmr[dicom]'")
    return program
