"""Does the guidance pay? The same C-UNet, data, order, seeds and steps, under every guidance.

Arms, by what the C-UNet is shown in training:
  none           (a) nothing: the unguided twin
  constant       (b) one fixed vector
  unconditional  (c) MDN samples drawn without the patient, as published
  truth          (d) the true target's pooled representation, withheld from 15 % of samples
  sample         (e) MDN samples given the sources' representation
  regression     (f) a ridge regression from the sources' representation, cross-fitted over patients
  cells          (d) with a grid of cells for each target, diffused by a random amount, 40 % withheld; the C-UNet
                 starts as the finished twin, so its rival is:
  longer         nothing, for twice the steps
  late           as cells, but started from `longer` and trained for half the steps more; blended with `longer`
  last           the package's own design: `longer` is left as it is, and its condition layers alone learn from the
                 true grids for half the steps, so that its unguided pass stays that of `longer`
  attention      as `last`, but every block attends to all cells (cross-attention) instead of adding its own
  residual       nothing, but what the network gives is added to the least-squares mix of the sources;
                 `residual-longer` for the steps of `longer`
  absolute       as `residual`, learning by the absolute error instead of the squared; `absolute-longer` likewise
  longest        nothing, for the two and a half times the steps that `late` and `last` have had: their rival
  variance       nothing, but a second head learns the error's variance: the rival for uncertainty; `variance-longest`
                 for the steps of `longest`
  variance-last  a network of half the width that sees the sources and the image of `longer`, which is left as it is,
                 learns the variance of its error for half the steps: the package's own uncertainty
  ensemble       nothing, twice, from two seeds, averaged: the rival for averages, at twice the training

`truth` and those with cells are completed with the truth (the oracle, an upper bound), with nothing, with samples, and
`truth` also with a regression, with the representation three slices away in the same patient's true target (g,
reference) and with a stranger's. Sampling arms are completed with one sample and with the mean of K, and those with
cells with the average of that mean and the unguided synthesis (blend). Their uncertainty is the deviation of the K
around the blend; around the unguided synthesis in `last`, as in the package.

python benchmarks/ablation.py ../shared/data -o runs/ablation --task cubes-2d --steps 500 --batch 16 --every 1
python benchmarks/ablation_table.py runs/ablation
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from lightning_fabric import Fabric
from safetensors.torch import save_file
from scipy.optimize import nnls
from tasks import (
    MEASURES,
    TASKS,
    Samples,
    Steps,
    Task,
    averaged,
    fabric,
    fit_network,
    flipped,
    gram_matrix,
    in_chunks,
    initialised,
    least_squares,
    load_task,
    score,
)
from torch import Tensor, nn

from crossmr import metrics
from crossmr.data.dataset import seeded
from crossmr.diffusion import q_sample
from crossmr.display import SILENT, Display
from crossmr.layers import ResidualBlock, zeroed
from crossmr.model import variance_loss, variance_of
from crossmr.recipes import FitConfig
from crossmr.stages.distribution import DistributionConfig, DistributionNetwork
from crossmr.stages.representation import MaskedAutoencoder, RepresentationConfig, z_score
from crossmr.stages.synthesis import CUNet, LinearMix, SynthesisConfig, mean_where_present

ARMS = (
    "none",
    "constant",
    "unconditional",
    "truth",
    "sample",
    "regression",
    "cells",
    "longer",
    "late",
    "last",
    "attention",
    "longest",
    "residual",
    "residual-longer",
    "absolute",
    "absolute-longer",
    "variance",
    "variance-longest",
    "variance-last",
    "ensemble",
)
FORM = {"channels": 16, "multipliers": (1, 2, 3, 4)}
CONDITION_WIDTH = 128
"""Of `last`."""
HEADS = {"patch_size": 8, "cell": 16, "crop": 48, "rate": 3e-3}
CUBES = {"patch_size": 4, "cell": 8, "crop": 32, "rate": 1e-3}
"""Masked patches, cells and crops of the masked autoencoders, and the rate of condition layers that learn last."""
DROPOUT = 0.15
DRAWN = 4
"""Samples drawn a training slice."""
DDIM_STEPS = 25
FIELDS = ("task", "seed", "steps", "arm", "completion", "samples", "patient", "target", *MEASURES)
Row = dict[str, object]
Note = Callable[[str, str, int, Tensor], None]
Predict = Callable[[CUNet, Samples, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Bench:
    """What all arms of one task and seed share."""

    task: Task
    test: Samples
    folder: Path
    runner: Fabric
    seed: int
    steps: int
    batch: int
    display: Display
    keep: bool = False
    """Whether each completion's images are kept, as `downstream.py` reads them."""

    @property
    def sources(self) -> int:
        return len(self.task.sources)

    def images(self, samples: Samples, chosen: Tensor) -> Tensor:
        images = samples.images[chosen].float().to(self.runner.device)
        return images.contiguous(memory_format=torch.channels_last) if self.task.dims == 2 else images

    @property
    def form(self) -> Mapping[str, Any]:
        """What differs between whole heads and cubes around tumours."""
        return HEADS if self.task.name.startswith("lgg") else CUBES

    def fit(
        self, name: str, build: Callable[[], nn.Module], loss: Callable[..., Tensor], steps: int = 0, rate: float = 1e-3
    ) -> nn.Module:
        config = FitConfig(batch_size=self.batch, learning_rate=rate, ema_decay=0.99)
        data = Steps(len(self.task.train), self.batch, self.seed)
        network = initialised(self.seed, build, self.task.dims)
        return fit_network(
            self.runner, self.folder, name, network, data, loss, config, steps or self.steps, self.display
        )


def representation(bench: Bench, name: str, channels: slice, cell: int) -> MaskedAutoencoder:
    """MRM of the targets or of the sources.

    On whole heads from crops, twice as many for 2.5 times the steps; of volumes for three times the steps, without
    which it learns little more than the mean.
    """
    task, crop = bench.task, bench.form["crop"]
    config = RepresentationConfig(**FORM, patch_size=bench.form["patch_size"], cell=cell)  # type: ignore[arg-type]
    if crop < min(task.train.images.shape[2:]):
        bench = replace(bench, batch=2 * bench.batch, steps=5 * bench.steps // 2)
    if task.dims == 3:
        bench = replace(bench, steps=3 * bench.steps)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        images = flipped(bench.images(task.train, chosen), flips.to(bench.runner.device))[:, channels]
        present = task.train.present[chosen][:, channels].to(images.device)
        images = cropped(images, crop, generator)
        return network.loss(images, present, generator)  # type: ignore[operator, no-any-return]

    count = len(range(*channels.indices(len(task.sources) + len(task.targets))))
    network = bench.fit(name, lambda: MaskedAutoencoder(config, count, task.dims), loss)
    return network.requires_grad_(False)  # type: ignore[return-value]


def cropped(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """A random window of `crop` voxels a side of each of images (B, C, *S), or the whole where they are no larger."""
    windows = []
    for image in images:
        window = image
        for axis, side in enumerate(image.shape[1:], start=1):
            if side > crop:
                window = window.narrow(axis, int(torch.randint(side - crop + 1, (1,), generator=generator)), crop)
        windows.append(window)
    stacked = torch.stack(windows)
    return stacked.contiguous(memory_format=torch.channels_last) if stacked.ndim == 4 else stacked


def described(bench: Bench, call: Callable[[Tensor], Tensor], samples: Samples, *, mirrored: bool = False) -> Tensor:
    """`call(images)` over all samples, (N, ...); mirrored too, (2, N, ...), if asked."""

    def run(flip: bool) -> Tensor:
        def of(chosen: Tensor) -> Tensor:
            images = bench.images(samples, chosen)
            return call(images.flip(-1) if flip else images)

        return in_chunks(bench.runner, of, len(samples))

    return torch.stack([run(False), run(True)]) if mirrored else run(False)


def distribution(bench: Bench, name: str, y_0: Tensor, condition: Tensor, steps: int) -> DistributionNetwork:
    """MDN of representations (N, D[, *G]) given conditions (N, C[, *G])."""
    grid_dims = y_0.ndim - 2
    config = DistributionConfig(width=96 if grid_dims else 256, blocks=4)
    batch = 64 if grid_dims else 128

    def loss(network: nn.Module, _: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(y_0), (batch,), generator=generator)
        pair = (part[chosen].to(bench.runner.device) for part in (y_0, condition))
        return network.loss(*pair, generator)  # type: ignore[operator, no-any-return]

    def build() -> nn.Module:
        network = DistributionNetwork(config, y_0.shape[1], condition.shape[1], grid_dims)
        network.standardise(y_0)
        return network

    return bench.fit(name, build, loss, steps)  # type: ignore[return-value]


def drawn(bench: Bench, mdn: DistributionNetwork, key: str, condition: Tensor | None, count: int, k: int) -> Tensor:
    """The k-th sample of each of `count` slices, (count, D[, *G]); the noise is the same in all slices."""
    parts = []
    for start in range(0, count, 256):
        told = None if condition is None else condition[start : start + 256].to(bench.runner.device)
        rows = min(256, count - start)
        if mdn.grid_dims:
            generators = [seeded("drawn", bench.seed, key, k) for _ in range(rows)]
        else:
            generators = [seeded("drawn", bench.seed, key, k, start + row) for row in range(rows)]
        parts.append(
            mdn.sample(
                generators, told, grid=told.shape[2:] if told is not None and mdn.grid_dims else (), steps=DDIM_STEPS
            ).cpu()
        )
    return torch.cat(parts)


def c_unet(
    bench: Bench,
    name: str,
    dim: int | None,
    shown: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    dropout: float = DROPOUT,
    seed: int = 0,
    start: CUNet | None = None,
    steps: int = 0,
    last: bool = False,
    mix: bool = False,
    attention: bool = False,
    absolute: bool = False,
) -> CUNet:
    """The C-UNet of one arm; `shown(images, (flips, chosen), generator)` is its guidance.

    It may start as a finished one; `last` trains nothing but its condition layers, of cross-attention where `attention`
    says so; `mix` adds the least-squares mix; `absolute` is the error it learns by.
    """
    task, first = bench.task, bench.sources

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        images = flipped(bench.images(task.train, chosen), flips.to(bench.runner.device))
        present = task.train.present[chosen][:, first:].to(images.device)
        keep = (torch.rand(len(chosen), 1, generator=generator) >= dropout).float().to(images.device)
        y_0 = None
        if dim is not None:
            with torch.no_grad(), bench.runner.autocast():
                y_0 = shown(images, torch.stack([flips.long(), chosen]), generator).to(images.device)
        return network.loss(images[:, :first], images[:, first:], present, y_0, keep)  # type: ignore[operator, no-any-return]

    width, error = CONDITION_WIDTH if last else None, "absolute" if absolute else "squared"
    config = SynthesisConfig(**FORM, condition_width=width, loss=error)  # type: ignore[arg-type]

    def build() -> nn.Module:
        linear = None
        if mix:
            linear, count = LinearMix(first, len(task.targets)), first + len(task.targets)
            linear.weights[0] = least_squares(gram_matrix(task.train), range(first), range(first, count))
        network = CUNet(config, first, len(task.targets), dim, task.dims, guided_last=last, mix=linear)
        if start is not None:
            network.load_state_dict(start.state_dict(), strict=False)
            network.zero_condition_layers()
        if attention:
            attend_instead(network, task.dims)
        if last:
            network.condition_layers_only()
        return network

    rate = bench.form["rate"] if last else 1e-3
    network = replace(bench, seed=bench.seed + seed).fit(name, build, loss, steps, rate)
    return network  # type: ignore[return-value]


class Attended(nn.Module):
    """A finished residual block whose features attend to the cells of the condition; it starts as it was."""

    def __init__(self, block: ResidualBlock, width: int, dims: int, heads: int = 4):
        super().__init__()
        features = block.conv_1.weight.shape[0]  # type: ignore[union-attr]
        block.condition = None
        self.block, self.heads = block, heads
        self.condition = nn.ModuleDict(
            {
                "q": nn.Linear(features + 8 * dims, features),
                "kv": nn.Linear(width + 8 * dims, 2 * features),
                "out": zeroed(nn.Linear(features, features)),
            }
        )

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = self.block.conv_1(nn.functional.silu(self.block.norm_1(x)))
        if c is not None:
            q = self.condition["q"](torch.cat([h.flatten(2).mT, places(h)], 2))
            kv = self.condition["kv"](torch.cat([nn.functional.silu(c).flatten(2).mT, places(c)], 2))
            apart = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (q, *kv.chunk(2, 2)))
            found = rearrange(nn.functional.scaled_dot_product_attention(*apart), "b h n d -> b n (h d)")
            h = h + self.condition["out"](found).mT.reshape(h.shape)
        h = self.block.conv_2(nn.functional.silu(self.block.norm_2(h)))
        return self.block.shortcut(x) + h  # type: ignore[no-any-return]


def places(grid: Tensor) -> Tensor:
    """Sines and cosines, four octaves an axis, of where each position of (B, C, *G) lies: (B, N, 8 · axes)."""
    axes = [(torch.arange(side) + 0.5) / side for side in grid.shape[2:]]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    angles = (where[..., None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * torch.pi).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1).to(grid).expand(len(grid), -1, -1)


def attend_instead(network: CUNet, dims: int) -> None:
    """Let every block of a C-UNet attend to all cells, instead of adding what its own cell says."""
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ResidualBlock) and block.condition is not None:
                setattr(parent, name, Attended(block, block.condition.in_features, dims))


def diffused(y_0: Tensor, generator: torch.Generator) -> Tensor:
    """√ᾱ(√ᾱ y_0 + √(1 − ᾱ) ε) of grids (B, D, *G), ᾱ uniform in [0, 1]: what is shown is shrunk as far as it is noise.

    So the C-UNet learns every degree of trust in its guidance, down to none.
    """
    alpha_bar = torch.rand(len(y_0), generator=generator).to(y_0.device)
    noise = torch.randn(y_0.shape, generator=generator).to(y_0.device)
    kept = alpha_bar.sqrt()[(...,) + (None,) * (y_0.ndim - 1)]
    return kept * q_sample(y_0, noise, alpha_bar)


def ridge(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Least squares from (N, C) to (N, D) with an L2 penalty."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    a = (x - mean_x).double()
    weights = torch.linalg.solve(a.T @ a + penalty * torch.eye(a.shape[1]).double(), a.T @ (y - mean_y).double())
    return lambda new: ((new - mean_x).double() @ weights).float() + mean_y


def regression(x: Tensor, y: Tensor, patient: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Out-of-fold predictions of the training vectors, five folds over patients, and the regression of all of them."""
    fold = patient % 5
    best: tuple[float, float, Tensor] | None = None
    for penalty in (1.0, 10.0, 100.0, 1000.0, 10000.0):
        out = torch.zeros_like(y)
        for number in range(5):
            out[fold == number] = ridge(x[fold != number], y[fold != number], penalty)(x[fold == number])
        error = float((out - y).square().mean())
        if best is None or error < best[0]:
            best = (error, penalty, out)
    assert best is not None
    return best[2], ridge(x, y, best[1])


def run_arms(bench: Bench, arms: Sequence[str], k: int) -> tuple[list[Row], list[Row]]:
    """Train the arms and score every completion; rows of scores and rows of uncertainty."""
    task, test, first = bench.task, bench.test, bench.sources
    rows: list[Row] = []
    certain: list[Row] = []

    def note(arm: str, completion: str, samples: int, prediction: Tensor) -> None:
        common = {"task": task.name, "seed": bench.seed, "steps": bench.steps, "arm": arm, "completion": completion}
        if bench.keep:
            path = bench.folder / f"{arm}-{completion}-{samples}.safetensors"
            save_file({"prediction": prediction.half().contiguous()}, path)
        scored = score(task, test, prediction)
        rows.extend({**common, "samples": samples, **row} for row in scored)
        shown = {key[0]: value for key, value in averaged(scored, ["target"]).items()}
        line = "  ".join(
            f"{t} {v['psnr']:.2f} dB {v['ssim']:.3f} {v['haarpsi']:.3f} tumour {v.get('tumour_psnr', 0):.2f} "
            f"{v.get('tumour_ssim', 0):.3f}"
            for t, v in shown.items()
        )
        print(f"{task.name} seed {bench.seed} | {arm} <- {completion} x{samples} | {line}", flush=True)

    def predict(network: CUNet, of: Samples, y_0: Tensor | None) -> Tensor:
        def call(chosen: Tensor) -> Tensor:
            told = None if y_0 is None else y_0[chosen].to(bench.runner.device)
            return network(bench.images(of, chosen)[:, :first], told)  # type: ignore[no-any-return]

        return in_chunks(bench.runner, call, len(of)).clamp(0, 1)

    pooled_arms = [arm for arm in arms if arm in ("unconditional", "truth", "sample", "regression")]
    if pooled_arms:
        target_mrm = representation(bench, "mrm-targets", slice(first, None), 0)
        y_train = described(bench, lambda x: target_mrm.represent(x[:, first:]), task.train, mirrored=True)
        y_test = described(bench, lambda x: target_mrm.represent(x[:, first:]), test)
        complete_train = task.train.present.amin(1) > 0
        source_mrm = representation(bench, "mrm-sources", slice(0, first), 0)
        x_train = described(bench, lambda x: source_mrm.represent(x[:, :first]), task.train, mirrored=True)
        x_test = described(bench, lambda x: source_mrm.represent(x[:, :first]), test)
        mdn = distribution(
            bench, "mdn", y_train[:, complete_train].flatten(0, 1), x_train[:, complete_train].flatten(0, 1), 4000
        )
        print(f"MDN: deviation of true vectors {y_test.std(0).mean():.3f}", flush=True)
    if {"regression", "truth"} & set(arms):
        patients = task.train.patient.repeat(2)
        fitted, regress = regression(x_train.flatten(0, 1), y_train.flatten(0, 1), patients)

    def sampled(condition: Tensor | None, number: int) -> Tensor:
        vectors = drawn(bench, mdn, "test", condition, len(test), number)
        if number == 0:
            print(f"MDN: deviation of sampled vectors {vectors.std(0).mean():.3f}", flush=True)
        return vectors

    def several(network: CUNet, arm: str, completion: str, draw: Callable[[int], Tensor]) -> Tensor:
        predictions = torch.stack([predict(network, test, draw(number)) for number in range(k)])
        note(arm, completion, 1, predictions[0])
        note(arm, completion, k, predictions.mean(0))
        return predictions

    def unguided(name: str, seed: int = 0, steps: int = 0) -> CUNet:
        return c_unet(bench, name, None, lambda *_: torch.empty(0), seed=seed, steps=steps)

    for arm in arms:
        if arm == "none":
            note(arm, "none", 1, predict(unguided(arm), test, None))
        elif arm == "constant":
            vector = z_score(torch.randn(1, 64, generator=seeded("constant")))
            network = c_unet(bench, arm, 64, lambda images, *_, v=vector: v.expand(len(images), -1))  # type: ignore[misc]
            note(arm, "constant", 1, predict(network, test, vector.expand(len(test), -1)))
        elif arm in ("unconditional", "sample"):
            told = x_train if arm == "sample" else None
            pool = torch.stack(
                [
                    torch.stack(
                        [
                            drawn(bench, mdn, f"train-{flip}", None if told is None else told[flip], len(task.train), n)
                            for n in range(DRAWN)
                        ]
                    )
                    for flip in (0, 1)
                ]
            )

            def shown(images: Tensor, where: Tensor, generator: torch.Generator, pool: Tensor = pool) -> Tensor:
                which = torch.randint(DRAWN, (len(images),), generator=generator)
                return pool[where[0], which, where[1]]

            network = c_unet(bench, arm, pool.shape[-1], shown)
            condition = x_test if arm == "sample" else None
            several(network, arm, arm, lambda n, c=condition: sampled(c, n))  # type: ignore[misc]
        elif arm == "regression":
            vectors = fitted.reshape(y_train.shape)
            network = c_unet(bench, arm, vectors.shape[-1], lambda _, where, __, v=vectors: v[where[0], where[1]])  # type: ignore[misc]
            note(arm, "regression", 1, predict(network, test, regress(x_test)))
        elif arm == "truth":
            network = c_unet(
                bench, arm, target_mrm.config.dim, lambda images, *_: target_mrm.represent(images[:, first:])
            )
            note(arm, "truth", 1, predict(network, test, y_test))
            note(arm, "none", 1, predict(network, test, None))
            note(arm, "regression", 1, predict(network, test, regress(x_test)))
            note(arm, "reference", 1, predict(network, test, y_test[neighbours(test)]))
            note(arm, "stranger", 1, predict(network, test, y_test[strangers(test)]))
            note(arm, "unconditional", 1, predict(network, test, sampled(None, 0)))
            several(network, arm, "sample", lambda n: sampled(x_test, n))
        elif arm == "cells":
            certain += guided_by_cells(bench, unguided("none"), note, predict, k)
        elif arm in ("late", "last", "attention"):
            twin = unguided("longer", steps=2 * bench.steps)
            certain += guided_by_cells(bench, twin, note, predict, k, arm, bench.steps // 2)
        elif arm in ("longer", "longest"):
            steps = 2 * bench.steps if arm == "longer" else 2 * bench.steps + bench.steps // 2
            note(arm, "none", 1, predict(unguided(arm, steps=steps), test, None))
        elif arm.startswith(("residual", "absolute")):
            form = {"mix": True, "absolute": arm.startswith("absolute")}
            steps = 2 * bench.steps if arm.endswith("longer") else 0
            network = c_unet(bench, arm, None, lambda *_: torch.empty(0), steps=steps, **form)
            note(arm, "none", 1, predict(network, test, None))
        elif arm == "variance":
            certain += with_variance(bench, note, arm)
        elif arm == "variance-longest":
            certain += with_variance(bench, note, arm, 2 * bench.steps + bench.steps // 2)
        elif arm == "variance-last":
            certain += variance_last(bench, unguided("longer", steps=2 * bench.steps), predict)
        elif arm == "ensemble":
            both = [predict(unguided("none"), test, None), predict(unguided("second", seed=100), test, None)]
            note(arm, "none", 1, torch.stack(both).mean(0))
        else:
            raise SystemExit(f"'{arm}' is no arm; wanted some of {', '.join(ARMS)}.")
    return rows, certain


def neighbours(samples: Samples) -> Tensor:
    """For each slice the one of the same patient that is three away, or else the furthest up to that."""
    chosen = []
    for index in range(len(samples)):
        distance = (samples.position - samples.position[index]).abs().float()
        distance = torch.where(samples.patient == samples.patient[index], (distance - 3).abs(), torch.inf)
        distance[index] = torch.inf if len(samples.position) > 1 else 0
        best = int(distance.argmin())
        chosen.append(best if torch.isfinite(distance[best]) else index)
    return torch.tensor(chosen)


def strangers(samples: Samples) -> Tensor:
    """For each slice another patient's, at the most similar height."""
    patient = samples.patient
    chosen = []
    for index in range(len(samples)):
        other = patient == (patient[index] + 1) % len(samples.names)
        distance = torch.where(other, (samples.position - samples.position[index]).abs().float(), torch.inf)
        chosen.append(int(distance.argmin()))
    return torch.tensor(chosen)


def guided_by_cells(
    bench: Bench, twin: CUNet, note: Note, predict: Predict, k: int, arm: str = "cells", steps: int = 0
) -> list[Row]:
    """A grid of cells for each target; the MDN draws it given the grid of the unguided synthesis."""
    task, first, last = bench.task, bench.sources, arm in ("last", "attention")
    name = "mrm-cells" if arm == "cells" else "mrm-late"
    mrm = representation(bench, name, slice(first, None), bench.form["cell"])

    def truth(images: Tensor) -> Tensor:
        return mrm.represent(images[:, first:])

    def shown(images: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        return truth(images) if last else diffused(truth(images), generator)

    form = {"last": last, "attention": arm == "attention"}
    network = c_unet(bench, arm, mrm.dim, shown, 0.0 if last else 0.4, start=twin, steps=steps, **form)

    def told(images: Tensor) -> Tensor:
        return mrm.represent(network(images[:, :first]).float().clamp(0, 1))

    y_test = described(bench, truth, bench.test)
    note(arm, "truth", 1, predict(network, bench.test, y_test))
    y_train, x_train = (described(bench, call, task.train, mirrored=True) for call in (truth, told))
    usable = task.train.present.amin(1) > 0
    mdn = distribution(bench, f"mdn-{arm}", y_train[:, usable].flatten(0, 1), x_train[:, usable].flatten(0, 1), 2000)

    def samples(of: Samples) -> tuple[Tensor, Tensor]:
        """The image and the deviation of the guided syntheses around it."""
        condition = described(bench, told, of)
        drawn_cells = [drawn(bench, mdn, "test", condition, len(of), n) for n in range(k)]
        unguided = predict(network if arm == "cells" else twin, of, None)
        guided = torch.stack([predict(network, of, y_0) for y_0 in drawn_cells])
        if of is bench.test:
            note(arm, "none", 1, predict(network, of, None))
            note(arm, "sample", 1, guided[0])
            note(arm, "sample", k, guided.mean(0))
            note(arm, "blend", k, (guided.mean(0) + unguided) / 2)
        return unguided if last else (guided.mean(0) + unguided) / 2, guided.std(0)

    return uncertainty(bench, arm, samples(task.val), samples(bench.test))


def with_variance(bench: Bench, note: Note, arm: str, steps: int = 0) -> list[Row]:
    """The unguided U-Net with a second head for the logarithm of the error's variance (Gaussian likelihood)."""
    task, first, count = bench.task, bench.sources, len(bench.task.targets)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        images = flipped(bench.images(task.train, chosen), flips.to(bench.runner.device))
        present = task.train.present[chosen][:, first:].to(images.device)
        out = network(images[:, :first]).float()
        squared = (out[:, :count] - images[:, first:]) ** 2
        log_variance = out[:, count:].clamp(-12, 2)
        likelihood = log_variance + squared.detach() / log_variance.exp()
        return mean_where_present(squared + 1e-3 * likelihood, present)

    network = bench.fit(
        arm,
        lambda: CUNet(SynthesisConfig(**FORM), first, 2 * count, None, task.dims),
        loss,  # type: ignore[arg-type]
        steps,
    )

    def predict(of: Samples) -> tuple[Tensor, Tensor]:
        out = in_chunks(bench.runner, lambda chosen: network(bench.images(of, chosen)[:, :first]), len(of))
        return out[:, :count].clamp(0, 1), (0.5 * out[:, count:].clamp(-12, 2)).exp()

    held, test = predict(task.val), predict(bench.test)
    note(arm, "none", 1, test[0])
    return uncertainty(bench, arm, held, test)


def variance_last(bench: Bench, twin: CUNet, predict: Predict) -> list[Row]:
    """A network of its own for the variance of a finished one's error."""
    task, first, count = bench.task, bench.sources, len(bench.task.targets)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], _: torch.Generator) -> Tensor:
        chosen, flips = batch
        images = flipped(bench.images(task.train, chosen), flips.to(bench.runner.device))
        present = task.train.present[chosen][:, first:].to(images.device)
        with torch.no_grad(), bench.runner.autocast():
            image = twin(images[:, :first]).float().clamp(0, 1)
        return variance_loss(network, images[:, :first], image, images[:, first:], present)

    half = SynthesisConfig(**{**FORM, "channels": 8})  # type: ignore[arg-type]
    network = bench.fit(
        "variance-last", lambda: CUNet(half, first + count, count, None, task.dims), loss, bench.steps // 2
    )

    def both(of: Samples) -> tuple[Tensor, Tensor]:
        image = predict(twin, of, None)

        def call(chosen: Tensor) -> Tensor:
            sources = bench.images(of, chosen)[:, :first]
            return (0.5 * variance_of(network, sources, image[chosen].to(sources.device))).exp()

        return image, in_chunks(bench.runner, call, len(of))

    return uncertainty(bench, "variance-last", both(task.val), both(bench.test))


def uncertainty(bench: Bench, arm: str, held: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> list[Row]:
    """How deviations go with errors, patient by patient, as given and calibrated on the validation patients.

    `held` and `test` are predictions and deviations, (N, T, *S) each. Calibration fits the squared error by
    a·deviation² + b with a, b >= 0. Trivial rivals, calibrated alike: a constant, and the predicted intensity.
    """
    task, rows = bench.task, []
    for index, target in enumerate(task.targets):
        channel = bench.sources + index

        def voxels(
            of: Samples, pair: tuple[Tensor, Tensor], own: Tensor, i: int = index, c: int = channel
        ) -> list[Tensor]:
            inside = of.head[own]
            error = (pair[0][own, i] - of.images[own, c].float()).abs()[inside]
            return [error, pair[1][own, i][inside], pair[0][own, i][inside]]

        error, deviation, intensity = voxels(task.val, held, task.val.present[:, channel] > 0)
        rivals = {"deviation": deviation, "intensity": intensity, "constant": torch.zeros_like(error)}
        factors = {}
        for name, guess in rivals.items():
            columns = np.stack([guess.double().numpy() ** 2, np.ones(len(guess))], axis=1)
            factors[name] = nnls(columns, error.double().numpy() ** 2)[0]
        for number, patient in enumerate(bench.test.names):
            own = (bench.test.patient == number) & (bench.test.present[:, channel] > 0)
            if not own.any():
                continue
            error, deviation, intensity = voxels(bench.test, test, own)
            guesses = {"deviation": deviation, "intensity": intensity, "constant": torch.zeros_like(error)}
            for name, guess in guesses.items():
                a, b = factors[name]
                calibrated = (a * guess.double() ** 2 + b).clamp(min=1e-8).sqrt()
                measured = metrics.error_against_uncertainty(error, calibrated)
                nll = (calibrated.log() + 0.5 * (error / calibrated) ** 2).mean()
                row = {"task": task.name, "seed": bench.seed, "steps": bench.steps, "arm": arm, "uncertainty": name}
                row |= {"patient": patient, "target": target, "a": float(a), "b": float(b), "nll": float(nll)}
                if name == "deviation":
                    raw = metrics.error_against_uncertainty(error, deviation)
                    row |= {"raw_coverage_95": raw["coverage_95"], "raw_scale": raw["scale"]}
                rows.append({**row, **measured})
    return rows


def main() -> None:
    """Train and score one task, or draw the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--task", choices=[name for name, task in TASKS.items() if task[1]], default="lgg-t1")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--every", type=int, default=2, help="of the test slices, score each n-th")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--keep", action="store_true", help="keep the images, for downstream.py (with --every 1)")
    options = parser.parse_args()
    task = load_task(options.task, options.data, options.out, SILENT)
    test = task.test.select(torch.arange(0, len(task.test), options.every))
    for seed in options.seeds:
        folder = options.out / task.name / f"{options.steps}-steps" / f"seed-{seed}"
        bench = Bench(
            task, test, folder, fabric(options.precision), seed, options.steps, options.batch, SILENT, options.keep
        )
        for arm in options.arms:
            path = folder / f"{arm}.json"
            if path.exists():
                continue
            rows, certain = run_arms(bench, [arm], options.samples)
            path.write_text(json.dumps({"rows": rows, "uncertainty": certain}))


if __name__ == "__main__":
    main()
