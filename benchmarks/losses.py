"""Which losses of the engine move Dice.

The shipped weights go on for the same steps on the four-contrast training studies, by the error that they were trained
by, its lesions weighted otherwise, or with one term more: the difference between the features that a segmenter's
encoder has of one synthetic and of the real contrast, among three real others. That segmenter is "dropout", and the
other, "all four", measures; both are segmenter.py's, and are trained where OUT lacks them. What is kept are model
folders, OUT/segmenter/fine-tuned-NAME-SEED.

python benchmarks/losses.py runs/default -o runs/evidence
python benchmarks/losses.py runs/default -o runs/evidence --only "lesion weight 0.5" features
python benchmarks/losses.py --table -o runs/evidence                             # from kept rows alone
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from grid import (
    HOW,
    Kept,
    Row,
    arguments,
    batches,
    by_predictor,
    column,
    fit,
    four_contrasts,
    kept_share,
    light_measures,
    parser,
    patients_in,
    seconds,
)
from replacements import by_model
from segmenter import LARGE, of_region, scored, trained, tumours, with_training
from torch import Tensor, nn
from tumours import CONTRASTS, REGIONS, Segmenter, segment

from crossmr.data.naming import DISPLAY_NAMES
from crossmr.device import choose_device
from crossmr.display import Display
from crossmr.evaluation.subjects import subject_of_case
from crossmr.networks.c_unet import deviation_error, synthesis_error
from crossmr.networks.model import CrossConditionedModel, save_model
from crossmr.networks.scale import standardise
from crossmr.registry import load_model
from crossmr.tensors import seeded
from crossmr.training.augmentation import AugmentationConfig
from crossmr.training.stages import DEVIATION_WEIGHT, SynthesisBatch, synthesis_batch

STEPS, RATE, WARM_UP = 400, 2e-4, 20
CONTROL = "lesion weight 0.5"
"""The loss of the shipped weights, whom the others are compared with."""
SHIPPED = "as shipped"
FEATURE_WEIGHT = 2.0
"""Of the features' mean absolute difference, beside the mean absolute error."""
MISSING = ("t2f", "t1c", "t2w")
IMAGE = "image"
"""The region of rows that tell of the image instead of its segmentation."""


@dataclass(frozen=True)
class Variant:
    """One loss."""

    lesion_weight: float
    features: bool = False


VARIANTS = {
    CONTROL: Variant(0.5),
    "lesion weight 0": Variant(0.0),
    "lesion weight 2": Variant(2.0),
    "features": Variant(0.5, features=True),
}


class Lessons:
    """Batches of the training studies, and the loss of a variant."""

    def __init__(
        self, options: argparse.Namespace, model: CrossConditionedModel, variant: Variant, seed: int, reader: Segmenter
    ):
        cases = four_contrasts(options.base, "train")[: 4 if options.tiny else None]
        context, augmentation = model.config.context_slices, AugmentationConfig(probability=0.15)
        self.data = batches(cases, model.config.modalities, seed, context=context, augmentation=augmentation)
        self.model, self.variant, self.seed, self.reader = model, variant, seed, reader

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The error of SynthesisStage, and the features' where the variant has them."""
        generator, model = seeded("fine-tune", self.seed, step), self.model
        batch = synthesis_batch(model.config, self.data[step], None, generator)
        batch = SynthesisBatch._make(None if tensor is None else tensor.to(model.device) for tensor in batch)
        prediction, log_scale = model.split(network(model.network_input(batch.neighbours, batch.available)))
        truth = standardise(batch.truth)
        wanted = (batch.truth > 0) * batch.target_mask[..., None, None]
        weight = wanted * (1 + self.variant.lesion_weight * batch.lesion)
        error, count = synthesis_error(prediction, truth, weight, absolute=True)
        if log_scale is not None:
            error = error + DEVIATION_WEIGHT * deviation_error(log_scale, prediction, truth, weight)
        error = error / count
        if self.variant.features:
            drawn = batch.target_mask * torch.rand(batch.target_mask.shape, generator=generator).to(truth)
            error = error + FEATURE_WEIGHT * self._features(prediction, batch.truth, drawn.argmax(1))
        return error

    def _features(self, prediction: Tensor, real: Tensor, chosen: Tensor) -> Tensor:
        """Mean absolute difference of the encoder's features, one contrast (N,) of each sample being synthetic."""
        order = [self.model.config.modalities.index(m) for m in CONTRASTS]
        one = nn.functional.one_hot(chosen, real.shape[1])[..., None, None] * (real > 0)
        head, truth = (real > 0).any(1, keepdim=True), standardise(real)
        mixed = torch.where(one > 0, prediction, truth)
        with torch.no_grad():
            wanted = self.reader.features(torch.cat([truth[:, order], head], 1))
        found = self.reader.features(torch.cat([mixed[:, order], head], 1))
        differences = [(a.float() - b.float()).abs().mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(differences).mean()


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a fine-tuned model lives."""
    return cast(Path, options.out) / "segmenter" / f"fine-tuned-{name.replace(' ', '-')}-{seed}"


def fine_tune(options: argparse.Namespace, name: str, seed: int) -> CrossConditionedModel:
    """A fine-tuned model, read or trained."""
    folder, device = folder_of(options, name, seed), choose_device(options.device)
    if not (folder / "config.json").exists():
        model, reader = load_model("default", device), trained(options, "dropout", options.seeds[0])
        network = model.synthesis.requires_grad_(True)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        lessons = Lessons(options, model, VARIANTS[name], seed, reader)
        how = replace(HOW, learning_rate=RATE, warm_up=WARM_UP)
        averaged = fit(network, lessons.loss, options.tuning_steps, how, name=f"{name}, seed {seed}", display=Display())
        network.load_state_dict(averaged.state_dict())
        save_model(folder, model, model.record["training"])
    return load_model(folder, device)


def measure(options: argparse.Namespace, kept: Kept, name: str, seed: int) -> None:
    """Keep rows of one variant: Dice with each contrast synthetic, and of the images."""
    cases = tumours(options.base, options.part)[: 1 if options.tiny else None]
    facts = {"predictor": name, "seed": seed, "part": options.part}
    jobs = [(case, target) for case in cases for target in MISSING[: 1 if options.tiny else None]]
    jobs = [(case, target) for case, target in jobs if not kept.has(**facts, missing=target, case=case.name)]
    if not jobs:
        return
    make = by_model(load_model("default", options.device) if name == SHIPPED else fine_tune(options, name, seed))
    reader = trained(options, "all four", options.seeds[0])
    for case, target in jobs:
        subject, its = subject_of_case(case), {**facts, "missing": target}
        sources = [m for m in CONTRASTS if m != target]
        images = make(subject, sources, [target]) or {}
        labels = segment(reader, {**subject.volumes, **images}, subject.head, case.spacing_mm)
        of_image = light_measures(subject, sources, images, **its, region=IMAGE)
        kept.add([*scored(case, labels, **its), *of_image])
        print(f"{case.name}, {target}: {name}, seed {seed}", flush=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table for each missing contrast; * differs from CONTROL."""
    parts = []
    for missing in dict.fromkeys(row["missing"] for row in rows):
        own = [row for row in rows if row["missing"] == missing]
        parts.append(f"\n**{DISPLAY_NAMES[missing]} synthetic**, {patients_in(own)} patients\n")
        heads = [
            "Dice WT",
            "Dice TC",
            "Dice ET",
            "ET of 1 ml or more",
            "correlation, deep",
            "error, deep",
            "lesions kept",
        ]
        parts.append("| fine-tuned by | seeds | " + " | ".join(heads) + " |")
        parts.append("|---" * (len(heads) + 2) + "|")
        columns = [(region, ("dice", 3)) for region in (*REGIONS, LARGE)]
        columns += [(IMAGE, ("correlation_deep", 3)), (IMAGE, ("mae_deep", 4))]
        cells = [column(by_predictor(of_region(own, region)), CONTROL, *rest) for region, rest in columns]
        for predictor, its in by_predictor(own).items():
            texts = [*(one.get(predictor, "–") for one in cells), kept_share(of_region(its, IMAGE))]
            parts.append(f"| {predictor} | {len({row['seed'] for row in its})} | {' | '.join(texts)} |")
    return "\n".join(parts)


def say_how_long(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Time two steps on this machine, and say how long the trainings that are missing take."""
    model, reader = load_model("default", options.device), trained(options, "dropout", options.seeds[0])
    lessons = Lessons(options, model, Variant(0.5, features=True), 0, reader)
    network = model.synthesis.requires_grad_(True)
    fit(network, lessons.loss, 1, name="first step", display=Display())
    step = seconds(lambda: fit(network, lessons.loss, 2, name="two steps", display=Display()))[0] / 2
    missing = sum(not (folder_of(options, n, s) / "config.json").exists() for n in names for s in options.seeds)
    images = (len(names) + 1) * len(MISSING) * len(tumours(options.base, options.part))
    minutes = missing * options.tuning_steps * step / 60
    print(
        f"{missing} trainings of {options.tuning_steps} steps of {step:.2f} s: about {minutes:.0f} minutes; then at "
        f"most {images} images synthesised, segmented and measured, some five seconds each.",
        flush=True,
    )


def main() -> None:
    """Train what is missing, measure what is missing, print the tables."""
    known = with_training(parser(__doc__))
    known.add_argument("--only", nargs="+", choices=VARIANTS)
    known.add_argument("--tuning-steps", type=int, default=STEPS, help="of a fine-tuning, eight slices each")
    options = arguments(known)
    if options.tiny:
        options.steps, options.tuning_steps = 3, 2
    kept = Kept(options.out, "losses")
    if not options.table:
        names = [name for name in VARIANTS if not options.only or name in options.only]
        say_how_long(options, names)
        for seed in options.seeds:
            for name in names:
                fine_tune(options, name, seed)
                measure(options, kept, name, seed)
        measure(options, kept, SHIPPED, options.seeds[0])
    print(table([row for row in kept.of(options.shown) if row["part"] == options.part]))


if __name__ == "__main__":
    main()
