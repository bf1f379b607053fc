"""What guidance.py and realism.py share: MRM and MDN, their vectors of each study, and the shipped network converted.

MRM and MDN are trained by the product's own stages on the training patients with four contrasts: one MRM, as each
contrast passes through it by itself, and an MDN for each task. Both are modest: OUT/representations keeps them.

Vectors are standardised feature by feature, as the MDN diffuses them: z-scored vectors share most of their direction,
so a C-UNet learns from what is left more quickly. This favours the guidance.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from grid import CROP, Task, four_contrasts, split_set
from safetensors.torch import load_file, save_file
from scans import write_set
from torch import Tensor

from crossmr.checkpoint import load_bundle, load_checkpoint, save_bundle
from crossmr.config import to_dict
from crossmr.data.dataset import Case, PreparedDataset
from crossmr.device import autocast, choose_precision
from crossmr.display import Display
from crossmr.files import read_json, write_json
from crossmr.networks.distribution import DistributionConfig, DistributionNetwork
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import CrossConditionedModel
from crossmr.tensors import foreground_slices, seeded, to_model_input
from crossmr.training.loop import without_prefix
from crossmr.training.recipes import STANDARD, Recipe, TrainConfig
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
"""Of the shipped weights, in their order; the order of all pooled features here."""
ANY: Task = MODALITIES, MODALITIES
"""The task of the shipped weights."""
STAGES = ("representation", "distribution")
EVERY = 4
"""Of a training study every so many slices are represented."""
FARTHEST = 6.0
"""Standard deviations to which vectors are cut: features that hardly vary in training may lie anywhere elsewhere."""
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Of the ridge regression."""
BATCH = 8
"""Slices at once."""


OF_TINY = (
    *("BraTSReg_002_00_0000", "BraTSReg_002_01_0262", "Brats18_2013_11_1", "BraTS-SSA-00010-000"),
    *("BraTS2021_00006", "Brats18_2013_23_1", "BraTS-SSA-00007-000"),
)
"""Studies of a rehearsal: to train, to validate, to test."""


@dataclass(frozen=True)
class Sizes:
    """Of MRM and MDN, and how long they learn."""

    channels: int = 16
    mrm_steps: int = 500
    width: int = 512
    blocks: int = 6
    mdn_steps: int = 3000


TINY = Sizes(4, 3, 32, 2, 3)


def recipe_for(task: Task, sizes: Sizes, cases: Sequence[Case]) -> Recipe:
    """STANDARD with guidance by y_0, its MRM and MDN of these sizes and steps."""
    slices = sum(len(foreground_slices(case.foreground_voxels)) for case in cases)
    mrm = TrainConfig(batch_size=2, learning_rate=5e-4, schedule="cosine", warm_up=50, ema_decay=0.99)
    mdn = TrainConfig(batch_size=128, learning_rate=5e-4, schedule="cosine", warm_up=50, ema_decay=0.99)
    return replace(
        STANDARD,
        by_set=(),
        any_subset=task == ANY,
        guidance="last",
        uncertainty=False,
        crop=CROP,
        representation=RepresentationConfig(sizes.channels, (1, 2, 4, 8), decoder="skip-free"),
        distribution=DistributionConfig(width=sizes.width, blocks=sizes.blocks, conditional=True),
        representation_train=replace(mrm, epochs=sizes.mrm_steps / -(-slices // mrm.batch_size)),
        distribution_train=replace(mdn, epochs=sizes.mdn_steps / -(-slices // mdn.batch_size)),
    )


def with_four_contrasts(base: Path, folder: Path) -> Path:
    """A prepared set of the studies of `base` that have all four contrasts, phantoms left out; its arrays are links."""
    if not (folder / "manifest.json").exists():
        names = {case.name for split in ("train", "val", "test") for case in four_contrasts(base, split)}
        split_set(base / "set", folder, lambda case, before: before if case in names else None)
    return folder


def tiny_base(base: Path, folder: Path, slices: int = 6) -> Path:
    """For a rehearsal: a base of a few studies, of each of which the middle slices are left."""
    if not (folder / "set" / "manifest.json").exists():
        manifest, chosen = PreparedDataset(base / "set").manifest, {}
        for name in OF_TINY:
            case = {**manifest["cases"][name], "files": {}}
            first = (len(case["head_voxels"]) - slices) // 2
            own = folder / "set" / "cases" / name
            own.mkdir(parents=True, exist_ok=True)
            for array in ("images.npy", "masks.npy"):
                np.save(own / array, np.load(base / "set" / "cases" / name / array)[first : first + slices])
            for key in ("head_voxels", "lesion_voxels"):
                case[key] = case[key][first : first + slices]
            case["box"] = [[0, slices], *case["box"][1:]]
            chosen[name] = case
        write_set(folder / "set", manifest, chosen)
    return folder


def trained_representations(base: Path, out: Path, task: Task, sizes: Sizes, display: Display) -> CrossConditionedModel:
    """MRM and MDN of a task, trained by the product's stages, or read where they are finished; without a C-UNet's use.

    The MRM and the vectors that it gives are those of ANY, whatever the task.
    """
    prepared = with_four_contrasts(base, out / "representations" / "set")
    sources, targets = task
    run = out / "representations" / ("any" if task == ANY else "+".join(sources))
    recipe = recipe_for(task, sizes, PreparedDataset(prepared).split("train"))
    if task != ANY and not (run / "stages" / "vectors" / "vectors.json").exists():
        trained_representations(base, out, ANY, sizes, display)
        _take_over(run.with_name("any"), run, recipe, task)
    if not (run / "finished").exists():
        settings = TrainingSettings(recipe=recipe, sources=sources, targets=targets, stages=STAGES)
        train(prepared, run, settings, display=display)
        (run / "finished").touch()
    model = CrossConditionedModel(recipe.model_config(tuple(sources), tuple(targets)))
    for stage in STAGES:
        checkpoint = load_checkpoint(run / "stages" / stage, display.say)
        if checkpoint is None:
            raise SystemExit(f"{run / 'stages' / stage} holds no checkpoint; remove {run} and start again.")
        model.network_of(stage).load_state_dict(without_prefix(checkpoint[0], "ema."))
    return model.eval().requires_grad_(False)


def _take_over(old: Path, new: Path, recipe: Recipe, task: Task) -> None:
    """Begin a run with the finished MRM of another, and with its vectors in the order of the task's contrasts."""
    (new / "stages").mkdir(parents=True, exist_ok=True)
    known = {"recipe": to_dict(recipe), "sources": list(task[0]), "targets": list(task[1])}
    write_json(new / "run.json", {**read_json(old / "run.json"), **known})
    shutil.copytree(old / "stages" / "representation", new / "stages" / "representation", dirs_exist_ok=True)
    order = [MODALITIES.index(m) for part in task for m in part]
    groups, _ = load_bundle(old / "stages" / "vectors", "vectors")
    reordered = {
        part: {name: tensor[:, order].contiguous() for name, tensor in group.items()} for part, group in groups.items()
    }
    save_bundle(new / "stages" / "vectors", reordered, {}, "vectors")


class Pooled:
    """The pooled features of the four contrasts of studies, computed once and kept in a folder."""

    def __init__(self, model: CrossConditionedModel, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.folder = model, folder
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, case: Case) -> tuple[Tensor, Tensor]:
        """(Z, 4, D) of the slices that hold any head, or of some of a training study, and (Z,), which hold enough."""
        if case.name not in self.known:
            path = self.folder / f"{case.name}.safetensors"
            if not path.exists():
                write_tensors(path, self._compute(case))
            tensors = load_file(path)
            self.known[case.name] = tensors["pooled"], tensors["enough"] > 0
        return self.known[case.name]

    def mean(self, case: Case) -> Tensor:
        """The mean (1, 4, D) over the slices with enough head, as completion takes it."""
        pooled, enough = self.of(case)
        return pooled[enough].mean(0, keepdim=True)

    @torch.no_grad()
    def _compute(self, case: Case) -> dict[str, Tensor]:
        chosen = foreground_slices(case.foreground_voxels)
        every = [z for z, voxels in enumerate(case.foreground_voxels) if voxels]
        slices = chosen[::EVERY] if case.split == "train" else every
        volumes = torch.from_numpy(np.stack([case.volume(m) for m in MODALITIES]))
        divisor, device = self.model.config.divisor, self.model.device
        with autocast(device, choose_precision("auto", device)):
            parts = [
                self.model.pooled(to_model_input(volumes, [[z] for z in slices[k : k + BATCH]], 2, divisor)).float()
                for k in range(0, len(slices), BATCH)
            ]
        return {"pooled": torch.cat(parts), "enough": torch.tensor([float(z in chosen) for z in slices])}


@dataclass(frozen=True, eq=False)
class Guide:
    """The vectors that may guide the synthesis of a task's targets, standardised, and what draws them."""

    model: CrossConditionedModel
    pooled: Pooled
    task: Task

    @property
    def hidden(self) -> Tensor:
        """(1, T), which of the model's targets are wanted."""
        return torch.tensor([[float(m in self.task[1]) for m in self.model.config.targets]])

    @property
    def available(self) -> Tensor:
        """(1, S), which of the model's sources are given."""
        return torch.tensor([[float(m in self.task[0]) for m in self.model.config.sources]])

    def standardised(self, y_0: Tensor, mask: Tensor | None = None) -> Tensor:
        """y_0 (N, T·D) as the MDN diffuses it; the features of targets that are not in mask (N, T) are 0."""
        network = cast(DistributionNetwork, self.model.distribution)
        features = self.model.target_features(self.hidden if mask is None else mask)
        return (features.to(y_0) * (y_0 - network.centre) / network.scale).clamp(-FARTHEST, FARTHEST)

    def slices(self, case: Case) -> Tensor:
        """The true y_0 (Z, T·D) of each slice with any head."""
        return self._true(self.pooled.of(case)[0])

    def volume(self, case: Case) -> Tensor:
        """The true y_0 (1, T·D) of the volume."""
        return self._true(self.pooled.mean(case))

    def _true(self, pooled: Tensor) -> Tensor:
        own = pooled[:, [MODALITIES.index(m) for m in self.model.config.targets]]
        return self.standardised(self.model.y_0(own, self.hidden.expand(len(own), -1)))

    def of_crops(self, images: Tensor, mask: Tensor) -> Tensor:
        """The true y_0 (N, T·D) of crops of the model's targets (N, T, Y, X) in [0, 1], 0 where mask (N, T) is 0."""
        with torch.no_grad():
            return self.standardised(self.model.y_0(self.model.pooled(images), mask), mask)

    def condition(self, case: Case) -> Tensor:
        """What the MDN is given of the sources, (1, C)."""
        own = self.pooled.mean(case)[:, [MODALITIES.index(m) for m in self.model.config.sources]]
        return self.model.condition(own, self.available)

    def samples(self, case: Case, count: int, *, given: bool, seed: int = 0) -> Tensor:
        """So many y_0 (count, T·D) from the MDN, drawn for a patient: given the sources, or not, as published."""
        generators = [seeded("drawn", seed, case.name, k) for k in range(count)]
        drawn = self.model.draw(generators, self.condition(case) if given else None, self.hidden)
        return self.standardised(drawn)

    def slice_samples(self, case: Case, seed: int = 0) -> Tensor:
        """A y_0 (Z, T·D) from the MDN for each slice with any head, given that slice's sources."""
        own = self.pooled.of(case)[0][:, [MODALITIES.index(m) for m in self.model.config.sources]]
        generators = [seeded("drawn", seed, case.name, k) for k in range(len(own))]
        condition = self.model.condition(own, self.available.expand(len(own), -1))
        return self.standardised(self.model.draw(generators, condition, self.hidden))


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D, E) and offset (E,) of the ridge regression of y (N, E) on x (N, D).

    The penalty is the one with the smallest squared error when each row is left out in turn.
    """
    centre, offset = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - centre, full_matrices=False)
    inner = u.T @ (y - offset)

    def left_out(penalty: float) -> float:
        hat = u * (s**2 / (s**2 + penalty))
        leverage = (hat * u).sum(1, keepdim=True) + 1 / len(x)
        return float((((y - offset) - hat @ inner) / (1 - leverage).clamp(min=1e-3)).square().mean())

    best = min(PENALTIES, key=left_out)
    weights = v.T @ ((s / (s**2 + best))[:, None] * inner)
    return weights, offset - centre @ weights


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half)
    os.replace(half, path)
