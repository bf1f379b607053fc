"""Reading a prepared set: memory-mapped, and every batch a pure function of seed and step.

Because step N always gives the same batch, training resumes in the middle of an epoch with nothing to
restore, and worker processes cannot change the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmr.data.augmentation import Augmentation, AugmentationConfig
from crossmr.data.prepare import FORMAT, FORMAT_VERSION, PARTS
from crossmr.data.volume import content_sha256
from crossmr.errors import ConfigError, SetError
from crossmr.files import digest, read_json

Array = npt.NDArray[np.float32]

HEAD_SHARE = 0.1
"""Slices with less head than this share of the volume's largest are neither trained on nor represented."""
MAPPED_AT_ONCE = 128
"""Cases whose images stay mapped: each is an open file, of which a process may have 256 (macOS) to 1024."""


@dataclass(frozen=True)
class Case:
    """One prepared study."""

    name: str
    patient: str
    part: str
    modalities: tuple[str, ...]
    head_voxels: tuple[int, ...]
    """Voxels of head in each axial slice."""
    masked_background: bool
    labelled: bool
    folder: Path
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of (Z, Y, X)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the arrays, held against them once a process."""

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
            if mapped.ndim != 4 or mapped.shape[:2] != (len(self.head_voxels), channels) or mapped.dtype != dtype:
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


class PreparedSet:
    """A set written by `prepare`, opened."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.exists():
            raise SetError(
                f"{self.folder} is no prepared set: it has no manifest.json. "
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

    def part(self, part: str) -> tuple[Case, ...]:
        """The cases of 'train', 'val' or 'test'."""
        if part not in PARTS:
            raise ConfigError(f"'{part}' is no part of a set; wanted one of {', '.join(PARTS)}.")
        return tuple(case for case in self.cases if case.part == part)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that could change a training: cases, split and pixels."""
        files = {name: case["files"] for name, case in self.manifest["cases"].items()}
        return digest({"cases": files, "split": self.manifest["split"]})


def _case(folder: Path, name: str, said: Mapping[str, Any]) -> Case:
    """A case as the manifest describes it."""
    return Case(
        name=name,
        patient=said["patient"],
        part=said["part"],
        modalities=tuple(said["modalities"]),
        head_voxels=tuple(said["head_voxels"]),
        spacing_mm=tuple(said["spacing_mm"]),
        masked_background=said["masked_background"],
        labelled=said["labelled"],
        folder=folder / "cases" / name,
        files=said["files"],
    )


@cache
def _sha256(path: Path, _written_ns: int) -> str:
    return content_sha256(path)


def useful_slices(head_voxels: Sequence[int]) -> list[int]:
    """Axial slices with enough head to learn from: at least a tenth of the largest slice's."""
    return [z for z, voxels in enumerate(head_voxels) if voxels >= max(1, HEAD_SHARE * max(head_voxels))]


def fit_size(image: Tensor, size: Sequence[int], offset: Sequence[float]) -> Tensor:
    """Crop or zero-pad the last axes of `image` to `size`; `offset` in [0, 1) places a crop, 0.5 central."""
    for axis, (want, where) in enumerate(zip(size, offset, strict=True), start=image.ndim - len(size)):
        have = image.shape[axis]
        if have > want:
            image = image.narrow(axis, min(int(where * (have - want + 1)), (have - want)), want)
        elif have < want:
            before = (want - have + 1) // 2  # where the middle crop begins, so that it undoes the padding
            shape = list(image.shape)
            shape[axis] = want
            padded = image.new_zeros(shape)
            padded.narrow(axis, before, have).copy_(image)
            image = padded
    return image


def to_multiple(image: Tensor, dims: int, divisor: int) -> Tensor:
    """Zero-pad the last `dims` axes, evenly to multiples of `divisor`; undone by `fit_size`."""
    size = [-(-side // divisor) * divisor for side in image.shape[-dims:]]
    return fit_size(image, size, [0.5] * dims)


def as_inputs(volume: Tensor, chosen: Sequence[int], dims: int, divisor: int, context: int = 1) -> Tensor:
    """A volume (M, Z, Y, X) as the networks read it, padded to multiples of `divisor`.

    In 2D its chosen axial slices as a batch, (N, M·context, Y, X); in 3D the volume, (1, M, Z, Y, X).
    """
    if dims == 3:
        return to_multiple(volume[None], dims, divisor)
    planes = torch.tensor([around(z, context, volume.shape[1]) for z in chosen])
    images = volume[:, planes].transpose(0, 1).flatten(1, 2)  # (N, M·context, Y, X)
    return to_multiple(images, dims, divisor)


def around(z: int, context: int, slices: int) -> list[int]:
    """The `context` slices in whose middle z is; beyond a volume's end its last one again."""
    return [min(max(z + step, 0), slices - 1) for step in range(-(context // 2), context // 2 + 1)]


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of training; every tensor float32 unless said."""

    images: Tensor
    """(B, M, *S) in [0, 1], M the batch source's modalities; a modality that a patient lacks is zero."""
    present: Tensor
    """(B, M), 0 where the patient lacks the modality, or it was not acquired here: slices beyond its field of view
    are black throughout."""
    case: Tensor
    """int64 (B,), the index of each sample's case in the batch source."""
    around: Tensor
    """(B, M·C, *S), of each modality the C slices whose middle one `images` holds, as a source: augmented, if asked."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        parts = (self.images, self.present, self.case, self.around)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in parts))


class Batches(Dataset[Batch]):
    """The batches of a training: `batches[step]` is drawn from the seed and the step alone.

    Each epoch is a fresh permutation of all slices (2D) or cases (3D); crops, left–right flips and the augmentation of
    the first `augmented` modalities are random.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        modalities: Sequence[str],
        *,
        size: Sequence[int],
        batch_size: int,
        seed: int,
        flip: bool = True,
        context: int = 1,
        augmentation: AugmentationConfig | None = None,
        augmented: int | None = None,
    ):
        self.cases, self.modalities, self.context = tuple(cases), tuple(modalities), context
        self.size, self.batch_size, self.seed, self.flip = tuple(size), batch_size, seed, flip
        self.augmented = len(self.modalities) if augmented is None else augmented
        changes = augmentation is not None and augmentation.probability > 0
        self.augment = Augmentation(cast(AugmentationConfig, augmentation), len(self.size)) if changes else None
        if len(self.size) == 2:
            self.items = [(i, z) for i, case in enumerate(self.cases) for z in useful_slices(case.head_voxels)]
        else:
            self.items = [(i, -1) for i, _ in enumerate(self.cases)]
        if not self.items:
            raise SetError(
                f"No study of the set can serve this training, which needs {', '.join(self.modalities)}. "
                "Prepare more patients, or choose other --sources and --targets."
            )
        self._mapped: dict[int, npt.NDArray[np.float16]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Batches that see every item once."""
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // len(self.items) for p in positions}}
        chosen = [self.items[int(orders[p // len(self.items)][p % len(self.items)])] for p in positions]
        generator = seeded("batch", self.seed, step)
        samples = [self._sample(item, generator) for item in chosen]
        batch = self._batch(samples, chosen)
        if self.augment is None:
            return batch
        sources = batch.around.unflatten(1, (len(self.modalities), -1))  # type: ignore[no-untyped-call]
        changed = sources.clone()
        for row, sample in enumerate(sources):
            for channel, image in enumerate(sample[: self.augmented]):
                changed[row, channel] = self.augment(image, generator)
        return replace(batch, around=changed.flatten(1, 2))

    def fixed(self, count: int) -> Batch:
        """Up to `count` items spread evenly, cropped in the middle, never flipped: for validation."""
        picked = np.linspace(0, len(self.items) - 1, min(count, len(self.items))).round().astype(int)
        chosen = [self.items[int(i)] for i in picked]
        middle = [0.5] * len(self.size)
        samples = [fit_size(self.read(*item), self.size, middle) for item in chosen]
        return self._batch(samples, chosen)

    def _batch(self, samples: Sequence[Tensor], chosen: Sequence[tuple[int, int]]) -> Batch:
        whole = torch.stack(list(samples))  # (B, M[, C], *S)
        images = whole if self.context == 1 else whole[:, :, self.context // 2]
        present = (images.flatten(2).amax(-1) > 0).float()
        surrounding = whole if self.context == 1 else whole.flatten(1, 2)
        return Batch(images, present, torch.tensor([i for i, _ in chosen]), surrounding)

    def read(self, index: int, z: int) -> Tensor:
        """One slice (M[, context], Y, X), or, z being -1, a volume (M, Z, Y, X); float32 in [0, 1], 0 where missing."""
        case = self.cases[index]
        if index not in self._mapped:
            if len(self._mapped) >= MAPPED_AT_ONCE:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[index] = case.images()
        mapped = self._mapped[index]
        if z < 0 or self.context > 1:
            chosen = slice(None) if z < 0 else around(z, self.context, len(mapped))
            stored = mapped[chosen].transpose(1, 0, 2, 3)
        else:
            stored = mapped[z]
        image = torch.zeros(len(self.modalities), *stored.shape[1:])
        for channel, modality in enumerate(self.modalities):
            if modality in case.modalities:
                image[channel] = torch.from_numpy(stored[case.modalities.index(modality)].astype(np.float32))
        return image

    def _sample(self, item: tuple[int, int], generator: torch.Generator) -> Tensor:
        image = self.read(*item)
        *offset, coin = torch.rand(len(self.size) + 1, generator=generator).tolist()
        image = fit_size(image, self.size, offset)
        return image.flip(-1) if self.flip and coin < 0.5 else image

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.items), generator=seeded("epoch", self.seed, epoch))


def seeded(*key: object) -> torch.Generator:
    """A CPU generator whose state is a hash of `key`: the one way in which crossmr seeds anything."""
    number = int(digest("/".join(map(str, key)))[:15], 16)
    return torch.Generator().manual_seed(number)
