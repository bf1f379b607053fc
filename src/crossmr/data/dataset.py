"""Reading a prepared dataset: its manifest, and its arrays mapped into memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossmr.data.head import Normalisation
from crossmr.data.prepare import FORMAT, FORMAT_VERSION, SPLITS
from crossmr.data.volume import content_sha256
from crossmr.errors import ConfigError, SetError
from crossmr.files import digest, read_json

Array = npt.NDArray[np.float32]
ENHANCING = 3
"""Smallest label of enhancing tumour: 4 in BraTS until 2021, 3 from 2023 on."""


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
    lesion_voxels: tuple[int, ...] = ()
    """Voxels that the labels count to a lesion, per axial slice; empty without labels."""
    shape: tuple[int, int, int] = (1, 1, 1)
    """Voxels of its arrays, (Z, Y, X)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each array file, checked when it is first opened in a process."""

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
            mapped = np.lib.format.open_memmap(self.folder / name, mode="r")
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


class PreparedDataset:
    """A dataset that `prepare` wrote, opened for reading."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise SetError(
                f"{self.folder} is no prepared dataset: it has no manifest.json. "
                "Make one with: crossmr prepare COHORT -o SET"
            )
        self.manifest = read_json(path, SetError)
        if self.manifest.pop("sha256", None) != digest(self.manifest):
            raise SetError(f"{path} does not match its own SHA-256: it was changed or damaged. Run prepare again.")
        if (self.manifest.get("format"), self.manifest.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise SetError(f"{path} is of another format or version than {FORMAT} {FORMAT_VERSION}. Run prepare again.")
        try:
            self.cases = tuple(_case(self.folder, name, case) for name, case in self.manifest["cases"].items())
        except (AttributeError, KeyError, TypeError) as error:
            raise SetError(f"{path} does not say what its cases are ({error!r}). Run prepare again.") from error

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of 'train', 'val' or 'test'."""
        if name not in SPLITS:
            raise ConfigError(f"'{name}' is no split of a prepared dataset; wanted one of {', '.join(SPLITS)}.")
        return tuple(case for case in self.cases if case.split == name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a training depends on: the cases, the split and the voxels."""
        files = {name: case["files"] for name, case in self.manifest["cases"].items()}
        return digest({"cases": files, "split": self.manifest["split"]})


def _case(folder: Path, name: str, record: Mapping[str, Any]) -> Case:
    """A case from its record in the manifest."""
    return Case(
        name=name,
        patient=record["patient"],
        split=record["part"],
        modalities=tuple(record["modalities"]),
        foreground_voxels=tuple(record["head_voxels"]),
        shape=tuple(stop - start for start, stop in record["box"]),
        spacing_mm=tuple(record["spacing_mm"]),
        air={m: Normalisation(**fitted).air_level for m, fitted in record["normalisation"].items()},
        lesion_voxels=tuple(record["lesion_voxels"]),
        masked_background=record["masked_background"],
        has_labels=record["labelled"],
        folder=folder / "cases" / name,
        files=record["files"],
    )


@cache
def _sha256(path: Path, _written_ns: int) -> str:
    return content_sha256(path)
