"""One patient's study: volumes on one grid, checked, with a head mask and intensities scaled to [0, 1]."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crossmr.data.naming import MODALITIES, StudyFiles
from crossmr.data.registration import register
from crossmr.data.volume import Volume, describe_grid, read_labels, read_volume, same_grid
from crossmr.errors import StudyError, VolumeError

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Given = TypeVar("Given")
Made = TypeVar("Made")

EVERYTHING: Box = (slice(None), slice(None), slice(None))

MEDIANS = 4.0
"""The head's median lies at a quarter of the scale, whatever is brightest: scalp where there is a skull, vessels where
there is none. By the 99.9th percentile the T1 of one cohort lay at .30, of another at .71."""
LARGEST = 1e30
"""Intensity beyond which float32 overflows where volumes are compared; what is larger marks a missing value."""
SMALLEST_SIDE = 8
"""Voxels; a volume with a shorter side than this in two directions is no scan of a head."""


@dataclass(frozen=True)
class Normalisation:
    """The linear map of one volume's intensities: `low` → 0, `high` → 1; kept so that it can be inverted."""

    low: float
    """Intensity of air (the median outside the head), or lower where the head itself is darker (z-scores)."""
    high: float
    """What lies four times as far above air as the median within the head."""

    def apply(self, intensities: Array) -> Array:
        """Map intensities to [0, 1]; what lies outside `low`..`high` saturates."""
        return np.clip(self.scale(intensities), 0, 1)

    def scale(self, intensities: Array) -> Array:
        """Map intensities without saturating."""
        return (intensities - np.float32(self.low)) / np.float32(self.high - self.low)

    def invert(self, normalised: Array) -> Array:
        """Map [0, 1] back to the volume's own intensities."""
        return normalised * np.float32(self.high - self.low) + np.float32(self.low)


@dataclass(frozen=True, eq=False)
class Study:
    """One patient's volumes, all on one grid."""

    case: str
    patient: str
    volumes: Mapping[str, Volume]
    """Modality → volume with its own intensities, float32 (Z, Y, X)."""
    mask: Mask
    """The head, or the brain where skull-stripped: bool (Z, Y, X), one component without holes."""
    masked_background: bool
    """Whether every volume's background is one exact value, as after skull-stripping or masking."""
    normalisation: Mapping[str, Normalisation]
    labels: npt.NDArray[np.uint8] | None = None
    """Lesion labels (Z, Y, X), 0 outside, or None."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What a reader of the results should know about the input, in plain words."""

    @property
    def reference(self) -> Volume:
        """The volume whose grid is everyone's: the first in modality order."""
        return next(iter(self.volumes.values()))

    def normalised(self, modality: str, within: Box = EVERYTHING) -> Array:
        """One volume in [0, 1], float32 (Z, Y, X), with 0 outside the mask where the background is masked."""
        image = self.normalisation[modality].apply(self.volumes[modality].data[within])
        return np.where(self.mask[within], image, np.float32(0)) if self.masked_background else image

    def box(self, margin: int = 4) -> Box:
        """The head's bounding box, `margin` voxels wider where the volume allows."""
        return bounding_box(self.mask, margin)


def bounding_box(mask: Mask, margin: int) -> Box:
    """The smallest box around a mask (Z, Y, X), `margin` voxels wider on every side, cut at the border."""
    inside = [np.flatnonzero(mask.any(others)) for others in ((1, 2), (0, 2), (0, 1))]
    z, y, x = (
        slice(max(0, int(found[0]) - margin), min(n, int(found[-1]) + 1 + margin))
        for found, n in zip(inside, mask.shape, strict=True)
    )
    return z, y, x


def load_study(
    source: StudyFiles | Mapping[str, Any],
    case: str = "study",
    *,
    allow: Sequence[str] | None = None,
    registered: bool | None = False,
) -> Study:
    """Read and check one study.

    `source` is what `find_studies` found, or modality → path or nibabel image, in any order. Volumes that
    their header marks as synthetic count as missing. `allow` limits which modalities are read. `registered`: volumes
    are moved onto the first one's grid, with None only those on another, and the notes say how far.

    Raises:
        NamingError, VolumeError, StudyError: one line that names the case, the volume and the remedy.
    """
    if isinstance(source, StudyFiles):
        case, patient, label = source.case, source.patient, source.label()
        images: Mapping[str, Any] = source.images()
    else:
        patient, label = case, None
        images = {m: source[m] for m in sorted(source, key=_modality_order)}
    read = _in_threads(
        lambda modality, image: read_volume(image, name=_name(case, modality, image)),
        {m: image for m, image in images.items() if allow is None or m in allow},
    )
    volumes = {m: volume for m, volume in read.items() if not volume.synthetic}
    notes = [f"{m} is itself synthetic, so it was not used as an input." for m in read if m not in volumes]
    if not volumes:
        raise StudyError(
            f"{case}: no acquired volume to work from. Wanted at least one of T1, T1ce, T2, FLAIR{_unnamed(source)}."
        )
    reference_modality, reference = next(iter(volumes.items()))
    for modality, volume in volumes.items():
        _check_values(case, modality, volume)
        if volume is not reference and (registered or (registered is None and not same_grid(volume, reference))):
            moved = register(case, modality, volume, reference)
            if moved.volume is not volume:
                volumes[modality] = moved.volume
                notes.append(f"{modality} was registered to {reference_modality}: {moved}.")
        elif not same_grid(volume, reference):
            raise StudyError(
                f"{case}: {modality} is {describe_grid(volume)}, but {reference_modality} is "
                f"{describe_grid(reference)}{_same_shape_hint(volume, reference)}. "
                "Register and resample them to one grid first, or pass --register."
            )
    mask, masked = head_mask(case, volumes)
    return Study(
        case=case,
        patient=patient,
        volumes=volumes,
        mask=mask,
        masked_background=masked,
        normalisation=_in_threads(lambda _, volume: fit_normalisation(volume.data, mask), volumes),
        labels=None if label is None else _read_labels(case, label, reference),
        notes=tuple(notes),
    )


def _in_threads(make: Callable[[str, Given], Made], given: Mapping[str, Given]) -> dict[str, Made]:
    """What is made of each volume, side by side: NumPy, SciPy and zlib do most of it without the interpreter."""
    with ThreadPoolExecutor(max(1, len(given))) as pool:
        return dict(zip(given, pool.map(make, given, given.values()), strict=True))


def _unnamed(source: StudyFiles | Mapping[str, Any]) -> str:
    """What to do about files whose names say nothing."""
    unnamed = source.unrecognised if isinstance(source, StudyFiles) else ()
    if not unnamed:
        return "; add one, or leave this study out"
    listed = ", ".join(path.name for path in unnamed[:3]) + (", …" if len(unnamed) > 3 else "")
    return f"; the names of {listed} say none of them: name them with --map, such as t1n='*_NAME.nii.gz'"


def _modality_order(modality: str) -> int:
    return MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES)


def _read_labels(case: str, label: Path, reference: Volume) -> npt.NDArray[np.uint8]:
    try:
        return read_labels(label, reference)
    except VolumeError as error:
        raise VolumeError(f"{case}: {error}") from error


def _name(case: str, modality: str, image: Any) -> str:
    return f"{case}: {Path(image).name}" if isinstance(image, (str, Path)) else f"{case}: {modality}"


def _same_shape_hint(a: Volume, b: Volume) -> str:
    if a.data.shape != b.data.shape:
        return ""
    return f" placed elsewhere (affines differ by up to {np.abs(a.affine - b.affine).max():.3g} mm)"


def _check_values(case: str, modality: str, volume: Volume) -> None:
    """Refuse intensities that no scan has."""
    data = volume.data
    if sorted(data.shape)[1] < SMALLEST_SIDE:
        raise StudyError(
            f"{case}: {modality} is {describe_grid(volume)}; that is too small to be a scan of a head. "
            "Export the whole series, or leave this study out."
        )
    if not np.isfinite(data).all():
        bad = int(data.size - np.isfinite(data).sum())
        raise StudyError(
            f"{case}: {modality} has {bad} voxels that are NaN or infinite. "
            "Repair them, or replace them by 0, and run again."
        )
    if (largest := float(np.abs(data).max())) > LARGEST:
        raise StudyError(
            f"{case}: {modality} has intensities of {largest:.3g}, as no scan has. "
            "Repair them, or replace them by 0, and run again."
        )
    if data.min() == data.max():
        what = "all zero" if data.max() == 0 else f"constant at {data.max():g}"
        raise StudyError(f"{case}: {modality} is {what}: it holds no image. Export it again, or remove the file.")


def head_mask(case: str, volumes: Mapping[str, Volume]) -> tuple[Mask, bool]:
    """Find the head in a study's volumes: bool (Z, Y, X), and whether every background is one exact value.

    The union of the volumes' foregrounds, its largest component, filled slice by slice.
    """
    masks = _in_threads(lambda _, volume: foreground(volume.data), volumes).values()
    masked = all(exact for _, exact in masks)
    union = np.logical_or.reduce([mask for mask, _ in masks])
    if union.any():
        box = bounding_box(union, 0)
        union[box] = fill_slices(largest_component(union[box]))
    if union.sum() < SMALLEST_SIDE**3:
        raise StudyError(
            f"{case}: no head was found ({int(union.sum())} voxels above the background) in "
            f"{', '.join(volumes)}. Look at the volumes, and export them again or leave this study out."
        )
    return union, masked


def foreground(data: Array) -> tuple[Mask, bool]:
    """Tell one volume's head from its background, and whether that background is one exact value.

    A volume whose border is one exact value is foreground wherever it differs from it (skull-stripped, or
    masked), unless much of that is air: then, as in any other volume, Otsu's threshold tells air from tissue.
    """
    tissue = data > otsu_threshold(data)
    if tissue.any():
        box = bounding_box(tissue, 0)  # nothing of the following leaves it
        opened = ndimage.binary_opening(tissue[box])
        closed = ndimage.binary_closing(np.pad(opened, 3), iterations=3)[3:-3, 3:-3, 3:-3]
        tissue = np.zeros_like(tissue)
        tissue[box] = fill_slices(largest_component(closed))
    faces = [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, 0], data[:, :, -1]]
    border = np.concatenate([face.ravel() for face in faces])
    different = data != data[0, 0, 0]
    if (border == data[0, 0, 0]).mean() >= 0.95 and (different & ~tissue).sum() < 0.25 * different.sum():
        return different, True
    return tissue, False


def largest_component(mask: Mask) -> Mask:
    """The largest connected part of a mask."""
    components, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest: Mask = components == sizes.argmax()
    return largest


def fill_slices(mask: Mask) -> Mask:
    """A mask whose axial slices have no holes: what is outside is what reaches a slice's border."""
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    outside, count = ndimage.label(~mask, in_plane)
    reaches = np.zeros(count + 1, bool)
    for edge in (outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]):
        reaches[np.unique(edge)] = True
    reaches[0] = False  # the mask itself
    filled: Mask = ~reaches[outside]
    return filled


def otsu_threshold(data: Array) -> float:
    """Half of Otsu's threshold between air and tissue, which keeps dark tissue in (Otsu 1979)."""
    low, high = (float(p) for p in np.percentile(data, (0.5, 98)))
    top = high if high > low else float(data.max())
    narrow = top - low < 1024 * np.spacing(np.float32(max(abs(low), abs(top))))  # float32 has no 256 bins there
    counts, edges = np.histogram(data.astype(np.float64) if narrow else data, bins=256, range=(low, top))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(float)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sum_below / below - (sum_below[-1] - sum_below) / above) ** 2
    best = int(np.nan_to_num(between).argmax())  # a cut with nothing on one side separates nothing
    return float(low + (centres[best] - low) / 2)


def fit_normalisation(data: Array, mask: Mask) -> Normalisation:
    """Choose the intensities that become 0 and 1, from the voxels within the head."""
    inside, outside = data[mask], data[~mask]
    floor, middle = (float(p) for p in np.percentile(inside, (0.5, 50)))
    low = min(floor, float(np.median(outside)) if outside.size else 0.0)
    high = low + MEDIANS * (middle - low)
    if high <= low:
        high = float(inside.max())
    return Normalisation(low=low, high=high if high > low else low + 1.0)
