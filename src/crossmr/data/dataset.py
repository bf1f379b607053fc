"""Reading a prepared dataset: its manifest, its arrays mapped into memory, and its items as tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmr.data.formats import content_sha256
from crossmr.data.head import Normalisation
from crossmr.data.naming import in_usual_order, modality_names
from crossmr.data.patients import SPLITS
from crossmr.data.prepare import FORMAT
from crossmr.data.prepared_case import FORMAT_VERSION
from crossmr.errors import ConfigError, SetError
from crossmr.files import digest, read_json
from crossmr.paths import check_prepared
from crossmr.tensors import PLANES, crop_or_pad, foreground_slices

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One prepared study."""

    name: str
    patient: str
    split: str
    """'train', 'val' or 'test'."""
    modalities: tuple[str, ...]
    foreground_voxels: tuple[int, ...]
    """Voxels within the head mask, per axial slice."""
    masked_background: bool
    has_labels: bool
    """Whether there is a lesion segmentation; without one the labels are all 0."""
    folder: Path
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of (Z, Y, X)."""
    air: Mapping[str, float] = field(default_factory=dict)
    """Modality → where air lies on the [0, 1] scale; below 0 where it is darker than the scale's end."""
    normalisation: Mapping[str, Normalisation] = field(default_factory=dict)
    """Modality → how its intensities became [0, 1]."""
    lesion_voxels: tuple[int, ...] = ()
    """Voxels that the labels count to a lesion, per axial slice; empty without labels."""
    shape: tuple[int, int, int] = (1, 1, 1)
    """Voxels of its arrays, (Z, Y, X)."""
    corner: tuple[int, int, int] = (0, 0, 0)
    """Voxel (Z, Y, X) of the whole scan at which they begin."""
    grid: tuple[int, int, int] = (1, 1, 1)
    """Voxels of the whole scan, (Z, Y, X)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each array file, checked when it is first opened in a process."""
    scans: tuple[str, ...] = ()
    """SHA-256 of the voxels of each volume as it was acquired: the same under any name; see `voxels_sha256`."""
    named: str = ""
    """The patient by the study's own name or by the table, where scans that it shares make it another one's."""
    plane: str = "axial"
    """In which it is cut; Z, Y and X are slices, rows and columns of this plane throughout. See `in_plane`."""

    def in_plane(self, plane: str) -> "Case":
        """An axial study, cut in another plane (tensors.PLANES).

        Raises:
            SetError: its masks are missing or damaged.
        """
        if plane == self.plane:
            return self
        slices, rows, columns = PLANES[plane]
        counts = (_turned(self.masks(), plane) > 0).sum((2, 3))
        return replace(
            self,
            plane=plane,
            foreground_voxels=tuple(counts[:, 0].tolist()),
            lesion_voxels=tuple(counts[:, 1].tolist()) if self.has_labels else (),
            shape=(self.shape[slices], self.shape[rows], self.shape[columns]),
            spacing_mm=(self.spacing_mm[slices], self.spacing_mm[rows], self.spacing_mm[columns]),
        )

    def images(self) -> npt.NDArray[np.float16]:
        """The memory-mapped images, float16 (Z, M, Y, X) in [0, 1], M as in `modalities`."""
        images: npt.NDArray[np.float16] = self._mapped("images.npy", len(self.modalities), np.float16)
        return images

    def masks(self) -> npt.NDArray[np.uint8]:
        """The memory-mapped head mask and lesion labels, uint8 (Z, 2, Y, X)."""
        masks: npt.NDArray[np.uint8] = self._mapped("masks.npy", 2, np.uint8)
        return masks

    def _mapped(self, name: str, channels: int, dtype: npt.DTypeLike) -> Any:
        try:
            mapped = _turned(np.lib.format.open_memmap(self.folder / name, mode="r"), self.plane)
            if mapped.ndim != 4 or mapped.shape[:2] != (len(self.foreground_voxels), channels) or mapped.dtype != dtype:
                raise ValueError(f"it is {mapped.dtype} {mapped.shape}")
            path = self.folder / name
            if name in self.files and _sha256(path, path.stat().st_mtime_ns) != self.files[name]:
                raise ValueError("its SHA-256 is another")
            return mapped
        except (OSError, ValueError) as error:
            raise SetError(f"{self.folder / name} is missing or damaged ({error}). Run prepare again.") from error

    def volume(self, modality: str) -> Array:
        """One modality, float32 (Z, Y, X)."""
        return np.asarray(self.images()[:, self.modalities.index(modality)], np.float32)

    def channels(self, stored: npt.NDArray[np.float16], modalities: Sequence[str]) -> Tensor:
        """The stored images (M, *S) of `modalities`, in their order, as float32 channels; 0 where one is missing."""
        image = torch.zeros(len(modalities), *stored.shape[1:])
        for channel, modality in enumerate(modalities):
            if modality in self.modalities:
                image[channel] = torch.from_numpy(stored[self.modalities.index(modality)].astype(np.float32))
        return image


class PreparedDataset(Dataset[dict[str, Any]]):
    """A dataset that `prepare` wrote, as a dataset of PyTorch: whole heads, or axial slices.

    An item is a dict:

    - "image": float32 (M, *S) in [0, 1], M as in `modalities`, S being (Z, Y, X) or (Y, X), axes towards superior,
      anterior and right. 1/3 is the median within the head, 1/15 one robust standard deviation; exactly 0 is outside
      the head, or missing.
    - "present": float32 (M,), 1 where the study has the modality, else 0.
    - "head": float32 (1, *S), 1 within the head, else 0.
    - "label": int64 (1, *S), the lesion's labels as `labels.as_counted` has them, 0 outside; 0 where there are none.
    - "spacing_mm": float32 (3,) of (Z, Y, X).
    - "case", "patient": their names.
    - "slice": of slices, the index along Z.

    Without `size` heads have sides of their own, so a DataLoader takes one at a time. Workers open the arrays
    themselves; each checks an array's SHA-256 when it first reads it.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str | None = None,
        *,
        modalities: Sequence[str] | None = None,
        size: Sequence[int] | None = None,
    ):
        """Open a dataset.

        Args:
            folder: what `prepare` wrote.
            split: 'train', 'val' or 'test', for the items; None for all of them.
            modalities: the channels of "image", in any usual spelling; None for all that the dataset has.
            size: (Z, Y, X) to crop or pad each head to, about its middle; or (Y, X) for axial slices, of which those
                with little head are left out; None for whole heads.

        Raises:
            SetError: no such dataset, one that is damaged, or another format. ConfigError: no such split, modality or
                size.
        """
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        check_prepared(self.folder)
        self.manifest = read_json(path, SetError)
        if self.manifest.pop("sha256", None) != digest(self.manifest):
            raise SetError(f"{path} does not match its own SHA-256: it was changed or damaged. Run prepare again.")
        if (self.manifest.get("format"), self.manifest.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise SetError(f"{path} is of another format or version than {FORMAT} {FORMAT_VERSION}. Run prepare again.")
        try:
            self.cases = tuple(_case(self.folder, name, case) for name, case in self.manifest["cases"].items())
        except (AttributeError, KeyError, TypeError) as error:
            raise SetError(f"{path} does not say what its cases are ({error!r}). Run prepare again.") from error
        self.modalities = self._modalities(modalities)
        self.size = None if size is None else _voxels(size)
        self._slices = len(self.size or ()) == 2
        chosen = self.cases if split is None else self.split(split)
        self._items = [(case, z) for case in chosen for z in self._slices_of(case)]

    def _modalities(self, given: Sequence[str] | None) -> tuple[str, ...]:
        known = in_usual_order({m for case in self.cases for m in case.modalities})
        chosen = tuple(known) if given is None else modality_names(given)
        if unknown := [m for m in chosen if m not in known]:
            raise ConfigError(f"No study of {self.folder} has {unknown[0]}; it has {', '.join(known)}.")
        return chosen

    def _slices_of(self, case: Case) -> Sequence[int]:
        return foreground_slices(case.foreground_voxels) if self._slices else (0,)

    def __len__(self) -> int:
        """How many heads, or slices."""
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One head, or one slice; see the class.

        Raises:
            IndexError: there is none of this number. SetError: its arrays are missing or damaged.
        """
        case, z = self._items[index]
        images, masks = case.images(), case.masks()
        images, masks = (images[z], masks[z]) if self._slices else (images.swapaxes(0, 1), masks.swapaxes(0, 1))
        head, label = torch.from_numpy(np.array(masks)).unbind(0)
        item = {
            "image": case.channels(images, self.modalities),
            "head": (head > 0).float()[None],
            "label": label.long()[None],
        }
        if self.size is not None:
            item = {name: crop_or_pad(array, self.size, [0.5] * len(self.size)) for name, array in item.items()}
        present = torch.tensor([float(m in case.modalities) for m in self.modalities])
        names = {"case": case.name, "patient": case.patient, **({"slice": z} if self._slices else {})}
        return {**item, "present": present, "spacing_mm": torch.tensor(case.spacing_mm), **names}

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of 'train', 'val' or 'test'."""
        if name not in SPLITS:
            raise ConfigError(f"'{name}' is not a split of a prepared dataset; expected one of {', '.join(SPLITS)}.")
        return tuple(case for case in self.cases if case.split == name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a training depends on: the cases, whose they are, their part and their voxels."""
        what = ("files", "part", "patient", "named", "modalities", "spacing_mm")
        cases = {name: {key: case.get(key) for key in what} for name, case in self.manifest["cases"].items()}
        return digest({"cases": cases, "split": self.manifest["split"]})


def _voxels(size: object) -> tuple[int, ...]:
    """What `size` gives, as whole numbers.

    Raises:
        ConfigError: it is not two or three whole numbers from 1.
    """
    given: tuple[Any, ...] = tuple(size) if isinstance(size, Iterable) else (size,)
    whole = [not isinstance(n, bool) and isinstance(n, Real) and float(n) % 1 == 0 and float(n) >= 1 for n in given]
    if len(given) not in (2, 3) or not all(whole):
        raise ConfigError(
            f"size is {size!r}; expected (Y, X) for slices, or (Z, Y, X), in voxels: whole numbers from 1."
        )
    return tuple(int(n) for n in given)


def _turned(array: npt.NDArray[Any], plane: str) -> npt.NDArray[Any]:
    """Axial slices (Z, M, Y, X) as those of another plane, uncopied."""
    slices, *rest = ((0, 2, 3)[axis] for axis in PLANES[plane])
    return array.transpose(slices, 1, *rest) if array.ndim == 4 else array


def _case(folder: Path, name: str, record: Mapping[str, Any]) -> Case:
    """A case from its record in the manifest."""
    normalisation = {m: Normalisation(**fitted) for m, fitted in record["normalisation"].items()}
    return Case(
        name=name,
        patient=record["patient"],
        split=record["part"],
        modalities=tuple(record["modalities"]),
        foreground_voxels=tuple(record["head_voxels"]),
        shape=tuple(stop - start for start, stop in record["box"]),
        corner=tuple(start for start, _ in record["box"]),
        grid=tuple(record["shape"]),
        spacing_mm=tuple(record["spacing_mm"]),
        air={m: one.air_level for m, one in normalisation.items()},
        normalisation=normalisation,
        lesion_voxels=tuple(record["lesion_voxels"]),
        masked_background=record["masked_background"],
        has_labels=record["labelled"],
        folder=folder / "cases" / name,
        files=record["files"],
        scans=tuple(record["scans"].values()),
        named=record.get("named", ""),
    )


@cache
def _sha256(path: Path, _written_ns: int) -> str:
    return content_sha256(path)
