"""One patient's study: volumes on one grid, checked, with a head mask and intensities scaled to [0, 1]."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crossmr.data.head import (
    SMALLEST_SIDE,
    Array,
    Box,
    Head,
    Mask,
    Normalisation,
    bounding_box,
    find_head,
    fit_normalisation,
    foreground,
    in_threads,
    was_acquired,
)
from crossmr.data.labels import as_counted, not_a_lesion, note_on
from crossmr.data.naming import StudyFiles, display_name, in_usual_order
from crossmr.data.nifti import is_synthetic, read_header
from crossmr.data.registration import Registered, RegistrationMode, register_rigidly
from crossmr.data.volume import Volume, describe_grid, displacement_mm, read_grid, read_labels, read_volume, same_grid
from crossmr.errors import StudyError, VolumeError, names_only

EVERYTHING: Box = (slice(None), slice(None), slice(None))
SMALLEST_MM, LARGEST_MM = 5, 1000
"""The longest side of a scan of a head lies between these."""
MAX_INTENSITY = 1e15
"""Largest intensity that is taken for one: some programs mark missing voxels with larger numbers."""
NOTED = 0.01
"""Of the head: where more of it is NaN in one volume, the note says how much."""


HEAD_FRACTION = 0.8
"""Fraction of a scan's voxels that the box around its head holds, at most as a rule."""
ALLOCATED = 1.25
"""What arrays take in fact, as a factor: the allocator leaves gaps."""


class StudyMemory(NamedTuple):
    """About how much main memory a study takes, in bytes per voxel, by the headers of its volumes."""

    shape: tuple[int, ...] = ()
    """(X, Y, Z) of the largest volume; empty where no header can be read."""
    reading: int = 0
    """The most while its volumes are read, searched for the head, and registered."""
    kept: int = 0
    """Once it is loaded: every volume, float32, and the mask."""
    head: float = HEAD_FRACTION
    """Fraction of the voxels that lie in the box around the head."""

    def bytes(self, later: float = 0.0) -> int:
        """What it takes in all; `later` is the most that a voxel takes after it was loaded."""
        return int(ALLOCATED * math.prod(self.shape) * max(self.reading, later)) if self.shape else 0


def study_memory(images: Mapping[str, Any], register: RegistrationMode = "never") -> StudyMemory:
    """Estimate the memory of a study, modality → path or nibabel image, from the headers alone."""
    headers = [header for image in images.values() if (header := read_header(image)) is not None]
    if not headers:
        return StudyMemory()
    reading = sum(4 + header.get_data_dtype().itemsize + 6 for header in headers)  # float32, stored; copies and masks
    registering = 0 if register == "never" else 20 + 4 * len(headers)  # ITK's copies; each volume as it was
    shape = max((header.get_data_shape()[:3] for header in headers), key=math.prod)
    return StudyMemory(tuple(shape), reading + registering, 4 * len(headers) + 1 + registering)


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
    """Lesion labels (Z, Y, X), 0 outside, or None; see `labels.as_counted`."""
    label_values: Sequence[int] = ()
    """The labels that the segmentation's file has, without 0."""
    notes: Sequence[str] = field(default_factory=tuple)
    """Remarks on the input that belong in every report of a result."""
    stripped: Sequence[str] = ()
    """The volumes without skull, where others have one."""
    parts: Mapping[str, Mask] = field(default_factory=dict)
    """Modality → what a volume shows of the head, bool (Z, Y, X), of those that show clearly less than others."""

    def mask_of(self, modality: str) -> Mask:
        """What one volume shows of the head."""
        return self.parts.get(modality, self.mask)

    @property
    def reference(self) -> Volume:
        """The volume on whose grid the others are: the first in modality order."""
        return next(iter(self.volumes.values()))

    def normalised(self, modality: str, within: Box = EVERYTHING) -> Array:
        """One volume in [0, 1], float32 (Z, Y, X), 0 outside the head and in axial slices that were not acquired."""
        data, mask = self.volumes[modality].data[within], self.mask_of(modality)[within]
        result = np.zeros(data.shape, np.float32)
        for made, plane, head in zip(result, data, mask, strict=True):
            if was_acquired(plane):
                np.copyto(made, self.normalisation[modality].apply(plane), where=head)
        return result

    def box(self, margin: int = 4) -> Box:
        """The head's bounding box, `margin` voxels wider where the volume allows."""
        return bounding_box(self.mask, margin)


def load_study(
    source: StudyFiles | Mapping[str, Any],
    case: str = "study",
    *,
    allow: Sequence[str] | None = None,
    register: RegistrationMode = "never",
    labels: bool = True,
) -> Study:
    """Read, check and normalise one study.

    Args:
        source: what `find_studies` found, or modality → path or nibabel image, in any order. Volumes that their header
            marks as synthetic count as missing.
        case: name of the study, where `source` does not say.
        allow: the modalities to read; by default all.
        register: which volumes are registered to the first one; the notes say how far each was moved.
        labels: whether the segmentation is read, and a study with several of them refused. One that cannot be of a
            lesion is not used, nor, with `register`, one on the grid of no volume, nor one that is a segmentation by
            its folder alone and is not valid; a note says so.

    Raises:
        NamingError, VolumeError, StudyError: one line that names the case, the volume and the remedy.
        ConfigError: a volume is to be registered, and SimpleITK is not installed.
    """
    if isinstance(source, StudyFiles):
        case, patient, label = source.case, source.patient, source.label() if labels else None
        images: Mapping[str, Any] = source.images()
    else:
        patient, label = case, None
        images = {m: source[m] for m in in_usual_order(source)}
    read = in_threads(
        lambda modality, image: read_volume(image, name=_name(case, modality, image)),
        {m: image for m, image in images.items() if allow is None or m in allow},
    )
    volumes = _acquired(case, read, source)
    notes = [*source.notes] if isinstance(source, StudyFiles) else []
    notes += [f"{m} is itself synthetic, so it was not used as an input." for m in read if m not in volumes]
    notes += [f"{display_name(m)} {volume.remark}" for m, volume in volumes.items() if volume.remark]
    checked = {m: _checked(case, m, volume) for m, volume in volumes.items()}
    before = {m: volume for m, (volume, _) in checked.items()}
    volumes, moved = _on_one_grid(case, before, register)
    head = find_head(case, volumes)
    for m, (volume, nan) in checked.items():
        if nan is not None:
            notes.append(_nan_note(m, nan, head.parts.get(m, head.mask) if volumes[m] is volume else None))
    notes += [*skull_note(volumes, head.stripped), *_less_note(head)]
    lesion = None
    if label is not None:
        guessed = isinstance(source, StudyFiles) and source.guessed
        lesion = (_if_valid if guessed else _lesion)(case, label, before, moved, register)
    spacing_mm = next(iter(volumes.values())).spacing_mm
    if lesion and lesion.labels is not None and (why := not_a_lesion(lesion.labels, head.mask, spacing_mm)):
        lesion = _Lesion(why=why)
    if lesion and label is not None and lesion.why:
        notes.append(f"the segmentation {label.name.replace(case, '*')} is not used: {lesion.why}.")
    elif lesion and (note := note_on(lesion.values, case)):
        notes.append(note)
    first = next(iter(volumes))
    movements = [
        f"{m} was {'resampled' if result.kept else 'registered'} to {first}: {result}." for m, result in moved.items()
    ]
    return Study(
        case=case,
        patient=patient,
        volumes=volumes,
        mask=head.mask,
        masked_background=head.masked,
        normalisation=in_threads(
            lambda m, volume: fit_normalisation(volume.data, head.parts.get(m, head.mask)), volumes
        ),
        labels=lesion.labels if lesion else None,
        label_values=lesion.values if lesion else (),
        notes=(*notes, *movements),
        stripped=head.stripped,
        parts=head.parts,
    )


def check_headers(files: StudyFiles, register: RegistrationMode = "never") -> Volume | None:
    """Check what the headers of a study say, as `load_study` does; returns the reference, every voxel 0.

    None where a header cannot be read, so that nobody knows.

    Raises:
        NamingError, VolumeError, StudyError: as `load_study`.
    """
    read = {m: read_grid(path, name=_name(files.case, m, path)) for m, path in files.images().items()}
    volumes = {m: volume for m, volume in read.items() if volume is not None}
    if len(volumes) < len(read):
        return None
    volumes = _acquired(files.case, volumes, files)
    for modality, volume in volumes.items():
        _check_size(files.case, modality, volume)
    _to_register(files.case, volumes, register)
    return next(iter(volumes.values()))


def _acquired(case: str, volumes: Mapping[str, Volume], source: StudyFiles | Mapping[str, Any]) -> dict[str, Volume]:
    """The volumes that are not synthetic.

    Raises:
        StudyError: all are.
    """
    if acquired := {m: volume for m, volume in volumes.items() if not volume.synthetic}:
        return acquired
    raise StudyError(
        f"{case}: no acquired volume to work from. Expected at least one of T1, T1ce, T2, FLAIR{_hint(source)}."
    )


def _on_one_grid(
    case: str, volumes: Mapping[str, Volume], register: RegistrationMode
) -> tuple[dict[str, Volume], dict[str, Registered]]:
    """Compare all grids, and register the volumes that `register` says; also returns how each of them was moved."""
    reference = next(iter(volumes.values()))
    aligned = dict(volumes)
    moved: dict[str, Registered] = {}
    for modality in _to_register(case, volumes, register):
        result = register_rigidly(case, modality, volumes[modality], reference)
        if result.volume is not volumes[modality]:
            aligned[modality] = result.volume
            moved[modality] = result
    return aligned, moved


def _to_register(case: str, volumes: Mapping[str, Volume], register: RegistrationMode) -> list[str]:
    """The volumes that are to be registered to the first one.

    Raises:
        StudyError: another one is not on its grid.
    """
    first, reference = next(iter(volumes.items()))
    chosen: list[str] = []
    for modality, volume in volumes.items():
        fits = same_grid(volume, reference)
        if volume is not reference and (register == "always" or (register == "if needed" and not fits)):
            chosen.append(modality)
        elif not fits:
            raise StudyError(
                f"{case}: {modality} is {describe_grid(volume)}, but {first} is "
                f"{describe_grid(reference)}{_same_shape_hint(volume, reference)}. "
                "Register and resample them to one grid first, or pass --register."
            )
    return chosen


def _hint(source: StudyFiles | Mapping[str, Any]) -> str:
    """How to supply a volume: by another file, or by naming those that were not recognised."""
    unrecognised = source.unrecognised if isinstance(source, StudyFiles) else ()
    scans = [path for path in unrecognised if not is_synthetic(path)]
    paths = scans or unrecognised
    listed = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    if scans:
        return f"; the names of {listed} say none of them: name them with --map, such as t1n='*_NAME.nii.gz'"
    if unrecognised:
        return f"; {listed} {'is' if len(paths) == 1 else 'are'} synthetic: give the folder of the scans"
    return "; add one, or leave this study out"


class _Lesion(NamedTuple):
    """What a segmentation says."""

    labels: npt.NDArray[np.uint8] | None = None
    """As they are counted, on the first volume's grid; None where they are not used."""
    values: tuple[int, ...] = ()
    """Those of the file, without 0."""
    why: str = ""
    """Why they are not used."""


def _lesion(
    case: str,
    label: Path,
    volumes: Mapping[str, Volume],
    moved: Mapping[str, Registered],
    register: RegistrationMode,
) -> _Lesion:
    """Read lesion labels; those on the grid of a volume that was registered are moved as it was.

    Raises:
        VolumeError: they cannot be read, or, where nothing is registered, lie on another grid.
    """
    reference = next(iter(volumes.values()))
    try:
        grid = read_grid(label) or read_volume(label)
        drawn_on = [m for m in moved if same_grid(grid, volumes[m])]
        if same_grid(grid, reference) or (register == "never" and not drawn_on):
            labels = stored = read_labels(label, reference)
        elif drawn_on:
            stored = read_labels(label, volumes[drawn_on[0]])
            labels = moved[drawn_on[0]].move_labels(stored, volumes[drawn_on[0]])
        else:
            return _Lesion(why=f"it is {describe_grid(grid)}, on the grid of none of the volumes")
    except VolumeError as error:
        raise VolumeError(f"{case}: {error}") from error
    return _Lesion(as_counted(labels, case), tuple(int(value) for value in np.unique(stored) if value))


def _if_valid(
    case: str,
    label: Path,
    volumes: Mapping[str, Volume],
    moved: Mapping[str, Registered],
    register: RegistrationMode,
) -> _Lesion:
    """As `_lesion`, of a file of which its folder alone says that it holds labels: why one is not used that is none.

    Raises:
        VolumeError: the file cannot be read at the moment.
    """
    try:
        return _lesion(case, label, volumes, moved, register)
    except VolumeError as error:
        if isinstance(reason := error.__cause__ and error.__cause__.__cause__, OSError) and reason.errno is not None:
            raise
        said = names_only(str(error).removeprefix(f"{case}: "), [label])
        return _Lesion(why=said.replace(case, "*").rstrip("."))


def _name(case: str, modality: str, image: Any) -> str:
    return f"{case}: {Path(image).name}" if isinstance(image, (str, Path)) else f"{case}: {modality}"


def _same_shape_hint(a: Volume, b: Volume) -> str:
    if a.data.shape != b.data.shape:
        return ""
    return f" placed elsewhere (by up to {displacement_mm(a, b):.3g} mm)"


def _checked(case: str, modality: str, volume: Volume) -> tuple[Volume, Mask | None]:
    """A volume whose NaN outside the head is background, and where that was, if anywhere.

    Refuses volumes of impossible sizes or intensities, and those that are constant, infinite, or NaN within the head.
    """
    _check_size(case, modality, volume)
    data = volume.data
    nan = np.isnan(data)
    lowest, largest = (float(f(data, initial=end, where=~nan)) for f, end in ((np.min, np.inf), (np.max, -np.inf)))
    if np.isinf([lowest, largest]).any():
        bad = int(data.size - np.isfinite(data).sum())
        raise StudyError(
            f"{case}: {modality} has {bad} voxels that are NaN or infinite. "
            "Repair them, or replace them by 0, and run again."
        )
    if (most := max(-lowest, largest)) > MAX_INTENSITY:
        raise StudyError(
            f"{case}: {modality} has intensities of {most:.3g}, as no scan has. "
            "Repair them, or replace them by 0, and run again."
        )
    if lowest == largest:
        values = "all zero" if largest == 0 else f"constant at {largest:g}"
        raise StudyError(f"{case}: {modality} is {values}: it holds no image. Export it again, or remove the file.")
    if not nan.any():
        return volume, None
    filled = np.where(nan, np.float32(min(0, lowest)), data)
    if inside := int((nan & _within(filled, nan)).sum()):
        raise StudyError(
            f"{case}: {modality} has {inside} voxels within the head that are NaN. "
            "Repair them, or replace them by 0, and run again."
        )
    return replace(volume, data=filled), nan


def _check_size(case: str, modality: str, volume: Volume) -> None:
    """Refuse a volume of an impossible size."""
    if sorted(volume.data.shape)[1] < SMALLEST_SIDE:
        raise StudyError(
            f"{case}: {modality} is {describe_grid(volume)}; that is too small to be a scan of a head. "
            "Export the whole series, or leave this study out."
        )
    extent = max(count * side for count, side in zip(volume.data.shape, volume.spacing_mm, strict=True))
    if not SMALLEST_MM < extent < LARGEST_MM:
        raise StudyError(
            f"{case}: {modality} is {describe_grid(volume)}; no scan of a head is {extent:.3g} mm long. "
            "Correct the sizes of the voxels in its header: they are in mm."
        )


def _within(data: Array, nan: Mask) -> Mask:
    """What the head encloses, and what lies between slices of it, in a volume (Z, Y, X) with background for NaN."""
    inside: Mask = ndimage.binary_fill_holes(foreground(data)[0])
    for axis in range(3):
        there = np.flatnonzero(~nan.all(tuple({0, 1, 2} - {axis})))  # slices that are not all NaN
        lost = np.setdiff1d(np.arange(there[0], there[-1]), there)
        inside[(slice(None),) * axis + (lost,)] = True
    return inside


def _nan_note(modality: str, nan: Mask, head: Mask | None) -> str:
    """What is to be said of a volume whose NaN became background; `head` None where it was moved."""
    note = f"{display_name(modality)} has {int(nan.sum())} voxels of NaN outside the head, "
    note += "which were taken for background."
    share = 0.0 if head is None else float((nan & head).sum() / head.sum())
    return note + (f" They are {share:.0%} of what other volumes show of the head." if share > NOTED else "")


def _less_note(head: Head) -> list[str]:
    """What is to be said of volumes that show less of the head than others, but for the skull."""
    return [
        f"{display_name(m)} shows {1 - part.sum() / head.mask.sum():.0%} less of the head than the others: "
        "what it lacks counts as not acquired."
        for m, part in head.parts.items()
        if m not in head.stripped
    ]


def skull_note(volumes: Mapping[str, Volume], stripped: Sequence[str]) -> list[str]:
    """What is to be said where some volumes have a skull and others have none."""
    if not stripped:
        return []
    names = {m: display_name(m) for m in volumes}
    without, having = [names[m] for m in stripped], [names[m] for m in volumes if m not in stripped]
    return [
        f"{' and '.join(having)} {'has' if len(having) == 1 else 'have'} a skull, {' and '.join(without)} "
        f"{'has' if len(without) == 1 else 'have'} none: each was normalised within what it has. Strip all, or none."
    ]
