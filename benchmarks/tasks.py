"""What the benchmarks share: the tasks held in memory, how a network is trained on them, and how it is scored.

A task is a set of 2D slices or 3D cubes with sources and targets, split by patient. Everything is small enough to be
held in memory, and every batch is a function of seed and step, so that all arms of a comparison see the same data in
the same order.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from crossmr import metrics
from crossmr.data.dataset import PreparedSet, fit_size, seeded, useful_slices
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.display import Display
from crossmr.files import digest
from crossmr.fitting import Job, Loop, fit
from crossmr.recipes import FitConfig

LGG_SIZE = (112, 96)
"""Whole heads at 1.875 mm, less a rim of scalp in the largest."""
CUBE_MODALITIES = ("t1n", "t1c", "t2w", "t2f")
CHUNK = 32


@dataclass(frozen=True, eq=False)
class Samples:
    """Slices (N, M, Y, X) or cubes (N, M, Z, Y, X), sources first."""

    images: Tensor
    """float16 in [0, 1]."""
    present: Tensor
    """(N, M), 0 where a slice of a modality was not acquired."""
    head: Tensor
    """bool (N, *S)."""
    labels: Tensor
    """uint8 (N, *S), 0 outside the tumour."""
    patient: Tensor
    """int64 (N,), index into `names`."""
    position: Tensor
    """int64 (N,), the slice's place in its volume."""
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, chosen: Tensor) -> "Samples":
        """Some of the samples."""
        parts = (self.images, self.present, self.head, self.labels, self.patient, self.position)
        return Samples(*(part[chosen] for part in parts), self.names)


@dataclass(frozen=True, eq=False)
class Task:
    """Sources to targets on one cohort."""

    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    train: Samples
    val: Samples
    test: Samples

    @property
    def dims(self) -> int:
        """2 or 3."""
        return self.train.images.ndim - 2


def load_task(name: str, data: Path, out: Path, display: Display) -> Task:
    """One of TASKS; the LGG cohort is prepared under `out` first."""
    sources, targets, read = TASKS[name]
    parts = read(data, out, (*sources, *targets), display)
    return Task(name, sources, targets, *parts)


def _lgg(data: Path, out: Path, modalities: Sequence[str], display: Display) -> list[Samples]:
    split = Split.parse("75/5/20")
    prepare(data / "lgg", out / "lgg-set", split=split, workers=default_workers(), display=display)
    prepared = PreparedSet(out / "lgg-set")
    parts = []
    for part in ("train", "val", "test"):
        images, masks, patient, position, names = [], [], [], [], []
        for index, case in enumerate(prepared.part(part)):
            chosen = useful_slices(case.head_voxels)
            order = [case.modalities.index(modality) for modality in modalities]
            stack = torch.from_numpy(np.asarray(case.images()))[chosen][:, order]
            images.append(fit_size(stack, LGG_SIZE, (0.5, 0.5)))
            masks.append(fit_size(torch.from_numpy(np.asarray(case.masks()))[chosen], LGG_SIZE, (0.5, 0.5)))
            patient += [index] * len(chosen)
            position += chosen
            names.append(case.name)
        image, mask = torch.cat(images), torch.cat(masks)
        parts.append(_samples(image, mask[:, 0] > 0, mask[:, 1], patient, position, names))
    return parts


def _cubes(dims: int) -> Callable[[Path, Path, Sequence[str], Display], list[Samples]]:
    def read(data: Path, out: Path, modalities: Sequence[str], display: Display) -> list[Samples]:
        order = [CUBE_MODALITIES.index(modality) for modality in modalities]
        files = sorted((data / "brats20_cubes").glob("*.npz"))
        share = {file: int(digest(file.stem)[:8], 16) / 16**8 for file in files}
        bounds = ((0.0, 0.7, 2), (0.7, 0.8, 4), (0.8, 1.0, 4))
        parts = []
        for low, high, every in bounds:
            images, labels, patient, names = [], [], [], []
            for file in files:
                if not low <= share[file] < high:
                    continue
                with np.load(file) as arrays:
                    for image, label in zip(arrays["image"], arrays["seg"], strict=True):
                        images.append(image[order])
                        labels.append(label)
                        patient.append(len(names))
                names.append(file.stem)
            # z-scores from -4 to 6 become 0 to 1; brighter voxels saturate
            image = torch.from_numpy(np.clip(np.stack(images) * (1.4 / 255), 0, 1)).half()
            label, index = torch.from_numpy(np.stack(labels)), torch.tensor(patient)
            position = torch.zeros(len(index), dtype=torch.int64)
            if dims == 2:
                planes = torch.arange(every // 2, image.shape[2], every)
                image = image[:, :, planes].transpose(1, 2).flatten(0, 1)
                label = label[:, planes].flatten(0, 1)
                position = planes.repeat(len(index))
                index = index.repeat_interleave(len(planes))
            head = torch.ones_like(label, dtype=torch.bool)
            parts.append(_samples(image, head, label, index, position, names))
        return parts

    return read


def _samples(
    images: Tensor,
    head: Tensor,
    labels: Tensor,
    patient: Sequence[int] | Tensor,
    position: Sequence[int] | Tensor,
    names: Sequence[str],
) -> Samples:
    present = (images.flatten(2).amax(-1) > 0).float()
    return Samples(images, present, head, labels, torch.as_tensor(patient), torch.as_tensor(position), tuple(names))


TASKS = {
    "lgg-t1": (("t1n",), ("t1c", "t2f"), _lgg),
    "lgg-t1-t1ce": (("t1n", "t1c"), ("t2f",), _lgg),
    "cubes-2d": (("t1n", "t2w"), ("t1c", "t2f"), _cubes(2)),
    "cubes-3d": (("t1n", "t2w"), ("t1c", "t2f"), _cubes(3)),
    "lgg-any": (("t1n", "t1c", "t2f"), (), _lgg),
    "cubes-any": (CUBE_MODALITIES, (), _cubes(2)),
}
"""Name → sources, targets, reader of the training, validation and test samples."""


def gram_matrix(samples: Samples) -> Tensor:
    """Products of all modalities and a constant, summed over the voxels of the samples that have everything."""
    whole = samples.present.amin(1) > 0
    size = samples.images.shape[1] + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    for chunk in torch.split(samples.images[whole], 256):
        columns = chunk.transpose(0, 1).flatten(1).double()
        columns = torch.cat([columns, torch.ones_like(columns[:1])])
        gram += columns @ columns.T
    return gram


def least_squares(gram: Tensor, sources: Sequence[int], targets: Sequence[int]) -> Tensor:
    """Weights (S + 1, T) of the mix of the sources and a constant that is closest to the targets."""
    rows = [*sources, len(gram) - 1]
    return torch.linalg.lstsq(gram[rows][:, rows], gram[rows][:, list(targets)]).solution.float()


class Steps(Dataset[tuple[Tensor, Tensor]]):
    """`steps[n]` is the samples' indices and the flips of one step, a function of seed and n alone."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = -(-count // batch_size)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.count, generator=seeded("epoch", self.seed, epoch))
        chosen = order.roll(-place * self.batch_size)[: self.batch_size]
        return chosen, torch.rand(len(chosen), generator=seeded("flip", self.seed, step)) < 0.5


def flipped(images: Tensor, flips: Tensor) -> Tensor:
    """Images (B, ...) mirrored left to right where `flips` (B,) says so."""
    return torch.where(flips.reshape(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def fabric(precision: str) -> Fabric:
    """Where everything runs."""
    chosen = Fabric(accelerator="auto", devices=1, precision=precision)  # type: ignore[arg-type]
    chosen.launch()
    return chosen


def fit_network(
    runner: Fabric,
    folder: Path,
    name: str,
    network: nn.Module,
    data: Steps,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor], torch.Generator], Tensor],
    config: FitConfig,
    steps: int,
    display: Display,
) -> nn.Module:
    """Train by the package's own loop, or go on where an earlier call stopped; returns the averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    network = network.to(runner.device)
    averaged = fit(Loop(folder, runner, data.seed, display), network, Job(name, data, loss, None), config, steps)
    return averaged.eval()


def initialised(seed: int, build: Callable[[], nn.Module], dims: int) -> nn.Module:
    """A network whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
    return network.to(memory_format=torch.channels_last) if dims == 2 else network  # type: ignore[call-overload]


@torch.no_grad()
def in_chunks(runner: Fabric, call: Callable[[Tensor], Tensor], count: int, chunk: int = CHUNK) -> Tensor:
    """`call(indices)` over all samples, float32 on the CPU."""
    parts = []
    with runner.autocast():
        for start in range(0, count, chunk):
            parts.append(call(torch.arange(start, min(start + chunk, count))).float().cpu())
    return torch.cat(parts)


def score(task: Task, samples: Samples, prediction: Tensor) -> list[dict[str, object]]:
    """PSNR, SSIM and HaarPSI of each patient and target, means over slices, and PSNR and SSIM within the tumour.

    `prediction` is (N, T, *S); intensities are compared on their [0, 1] scale, clipped. In 3D PSNR and SSIM are
    those of cubes and HaarPSI that of their slices.
    """
    rows: list[dict[str, object]] = []
    first = len(task.sources)
    for index, target in enumerate(task.targets):
        truth, predicted = samples.images[:, first + index].float(), prediction[:, index].clamp(0, 1)
        similarity, squared = metrics.ssim_map(predicted, truth, 1.0), (predicted - truth) ** 2
        psnr = metrics.psnr(predicted, truth, 1.0)
        ssim = similarity.flatten(1).mean(1)
        if task.dims == 2:
            haar = metrics.haarpsi(predicted, truth, 1.0)
        else:
            count = len(truth)
            haar = metrics.haarpsi(predicted.flatten(0, 1), truth.flatten(0, 1), 1.0).reshape(count, -1).mean(1)
        tumour = samples.labels > 0
        for number, name in enumerate(samples.names):
            own = (samples.patient == number) & (samples.present[:, first + index] > 0)
            if not own.any():
                continue
            row: dict[str, object] = {"patient": name, "target": target}
            for metric, values in (("psnr", psnr), ("ssim", ssim), ("haarpsi", haar)):
                row[metric] = round(float(values[own].nanmean()), 5)
            inside = tumour & own.reshape(-1, *[1] * (tumour.ndim - 1))
            if int(inside.sum()) >= 50:
                row["tumour_psnr"] = round(float(-10 * torch.log10(squared[inside].mean())), 5)
                row["tumour_ssim"] = round(float(similarity[inside].mean()), 5)
            rows.append(row)
    return rows


MEASURES = ("psnr", "ssim", "haarpsi", "tumour_psnr", "tumour_ssim")


def averaged(rows: Iterable[Mapping[str, object]], keys: Sequence[str]) -> dict[tuple[object, ...], dict[str, float]]:
    """Mean of each measure over the rows that share `keys`."""
    groups: dict[tuple[object, ...], dict[str, list[float]]] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[key] for key in keys), {measure: [] for measure in MEASURES})
        for measure in MEASURES:
            if row.get(measure) not in (None, ""):
                group[measure].append(float(row[measure]))  # type: ignore[arg-type]
    return {key: {m: float(np.mean(v)) for m, v in group.items() if v} for key, group in groups.items()}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows as CSV, five digits a number."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
