"""Small trainings, made in milliseconds: heads of 16 × 16 voxels, and models whose every layer is random."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crossmr.data.dataset import Case
from crossmr.display import SILENT
from crossmr.networks.c_unet import SynthesisConfig
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import CrossConditionedModel
from crossmr.training import loop
from crossmr.training.plan import Budget
from crossmr.training.recipes import Recipe, TrainConfig
from crossmr.training.shared import Compute, Training
from crossmr.training.stages import Stage

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
COMPUTE = Compute(torch.device("cpu"), torch.float32, 0, SILENT)
TRAIN = TrainConfig(batch_size=6)
LAST = Recipe(
    crop=(16, 16),
    flip=False,
    guidance="last",
    uncertainty=True,
    samples=3,
    representation=RepresentationConfig(channels=4, multipliers=(1, 2), patch_size=4),
    distribution=DistributionConfig(width=16, blocks=1, conditional=True),
    synthesis=SynthesisConfig(channels=4, multipliers=(1, 2)),
    **{f"{name}_train": TRAIN for name in ("representation", "distribution", "synthesis", "guidance")},
)
JOINT = replace(LAST, guidance="joint", uncertainty=False, distribution=replace(LAST.distribution, conditional=False))
ANY = replace(LAST, any_subset=True, context_slices=3)


def write_case(folder: Path, name: str, modalities=MODALITIES, split="train", slices=4, labelled=True) -> Case:
    """A head of 12 × 12 voxels in the middle of 16 × 16, each contrast another smooth pattern; a lesion in slice 1."""
    rng = np.random.default_rng([*name.encode()])
    images = np.zeros((slices, len(modalities), 16, 16))
    y, x = np.mgrid[0:12, 0:12] / 12
    for channel, modality in enumerate(modalities):
        phase = MODALITIES.index(modality) + rng.random()
        for z in range(slices):
            images[z, channel, 2:14, 2:14] = 0.5 + 0.3 * np.sin(4 * x + phase + z) * np.cos(3 * y * rng.random())
    (folder / name).mkdir(parents=True)
    np.save(folder / name / "images.npy", images.astype(np.float16))
    masks = np.zeros((slices, 2, 16, 16), np.uint8)
    masks[:, 0, 2:14, 2:14] = 1
    masks[1, 1, 4:8, 5:10] = 2 if labelled else 0
    np.save(folder / name / "masks.npy", masks)
    lesion = tuple((masks[:, 1] > 0).sum((1, 2)).tolist()) if labelled else ()
    where = {"folder": folder / name, "lesion_voxels": lesion}
    return Case(name, name, split, tuple(modalities), (144,) * slices, True, labelled, **where)


def write_cases(folder: Path) -> dict[str, tuple[Case, ...]]:
    """Four patients to train on, of whom one lacks FLAIR, one T2 and one labels, and two to validate on."""
    lacking = {"B": ("t1n", "t1c", "t2w"), "C": ("t1n", "t1c", "t2f")}
    train = tuple(write_case(folder, name, lacking.get(name, MODALITIES), labelled=name != "D") for name in "ABCD")
    return {"train": train, "val": tuple(write_case(folder, name, split="val") for name in "VW")}


def gradients(stage: Stage[Any, Any], network: nn.Module, batch: Any, parts: int, compute: Compute) -> torch.Tensor:
    """What the loop does of a step before the optimiser's; returns the mean error."""
    return loop._divided(network, *loop._summed_gradients(stage, network, batch, parts, compute), compute)


def start_training(
    folder: Path, cases: Mapping[str, tuple[Case, ...]], recipe: Recipe, compute: Compute = COMPUTE
) -> tuple[Training, CrossConditionedModel]:
    """A training, and a model whose every layer is random, so that everything matters."""
    tasks = (MODALITIES, MODALITIES) if recipe.any_subset else (SOURCES, TARGETS)
    config = recipe.model_config(*tasks)
    training = Training(folder, recipe, config, cases["train"], cases["val"], compute, Budget())
    model, generator = CrossConditionedModel(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return training, model
