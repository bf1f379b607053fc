"""The unguided image is smooth: can the last stage draw texture without harm?

Of the shipped any-subset network all is frozen but the decoder's finest level and the last layers. These learn again,
by the absolute error and a discriminator of patches (least squares, MONAI), which sees the four contrasts of a slice,
the hidden ones synthetic or true. They are given y_0: the true one of the hidden contrasts in training, a sample of
p(y_0 | sources) at completion. Controls: a map of noise instead; the adversary with nothing given; an adversary of an
eightieth of the weight; and the same steps without one. The adversary's weight was chosen by a short training on noise
and three validation studies: `--weights`.

Measured on the test studies, FLAIR, T1ce and T2 from the three others each: the rows of grid.py; the power of axial
patches within the brain, synthetic over real, in three bands of cycles per millimetre, and from .48 cycles per voxel on
along rows or columns, where the grid of the network's own patches of 2 x 2 would lie; the area under the ROC curve of
a small network that tells synthetic patches from real ones (1/2: it cannot), trained on the other half of the patients,
all with noise of a grey level's size, since real scans have few of them; and millilitres of bright areas that the true
FLAIR does not have. At the end stands whether the conditions hold under which this would be shipped as
`--style realistic`.

python benchmarks/realism.py runs/default -o runs/evidence    # two hours; goes on where it was stopped; --table
python benchmarks/realism.py runs/default -o runs/evidence --weights 1 4 16    # half an hour
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from grid import (
    COLUMNS,
    HOW,
    Kept,
    Row,
    arguments,
    batches,
    by_patient,
    fit,
    four_contrasts,
    images_folder,
    keep_images,
    light_measures,
    parser,
    seconds,
    synthesised,
    table,
)
from guided import LESION_WEIGHT, Measuring, measuring
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from representations import (
    ANY,
    MODALITIES,
    TINY,
    Guide,
    Pooled,
    Sizes,
    tiny_base,
    trained_representations,
    write_tensors,
)
from safetensors.torch import load_file
from scans import cohort_of
from texture import TELLING, area, patches, places, telling_apart, texture_row, without_levels
from torch import Tensor, nn

from crossmr.data.dataset import Case
from crossmr.display import Display
from crossmr.evaluation.measures import KEPT, LOST
from crossmr.evaluation.subjects import Array, Subject, subject_of_case
from crossmr.networks.c_unet import CUNet, synthesis_error
from crossmr.networks.model import CrossConditionedModel, first_weights
from crossmr.networks.scale import standardise
from crossmr.registry import load_model
from crossmr.tensors import seeded
from crossmr.training.batches import Batches
from crossmr.training.stages import random_subsets

STEPS, TRIAL_STEPS = 700, 250
ADVERSARIAL, WEAK_ADVERSARIAL = 16.0, 0.2
"""Weight of the discriminator's loss beside the absolute error, in robust standard deviations."""
TARGETS = ("t2f", "t1c", "t2w")
SHIPPED, Y_0, NOISE = "shipped", "realistic: y_0", "realistic: noise"
ALONE, WEAK, ERROR = "realistic: nothing given", "realistic: y_0, weak adversary", "absolute error alone"
LEARNT = Y_0, ALONE, NOISE, WEAK, ERROR
TEXTURE = {
    "power, .03–.1": ("power_low", 2),
    "power, .1–.25": ("power_middle", 2),
    "power, .25–.45 cycles/mm": ("power_high", 2),
    "power, the patches' grid": ("power_grid", 1),
    "AUC": ("auc", 3),
    "invented, ml": ("invented_ml", 2),
}
SECONDS_A_STUDY, TELLING_MINUTES = 4.0, 1.0
"""To synthesise and measure one image, on two idle cores; to learn to tell a predictor's three contrasts apart."""


class Textured(nn.Module):
    """The shipped network, whose finest level and last layers learn, given y_0, a map of noise or nothing."""

    def __init__(self, shipped: CrossConditionedModel, kind: str, dim: int, seed: int = 0):
        super().__init__()
        config, weights = shipped.config, dict(shipped.synthesis.state_dict())
        self.noise, noise = kind == NOISE, int(kind == NOISE)
        outputs = len(config.targets) * (1 + config.uncertainty)
        with first_weights(seed, "realism"):
            guided = dim if kind in (Y_0, WEAK) else None
            self.network = CUNet(config.synthesis, config.in_channels + noise, outputs, representation_dim=guided)
        for name in ("encoder.stem.conv.weight", "decoder.out.correct.0.weight") if self.noise else ():
            weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:, :1])], 1)
        self.network.load_state_dict(weights, strict=False)
        self.network.zero_condition()
        self.requires_grad_(False)
        finest = self.network.decoder.levels[-1]
        for part in (finest, self.network.decoder.out, self.network.condition):
            if part is not None:
                part.requires_grad_(True)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: Tensor, given: Tensor | None) -> Tensor:
        """Map a model's inputs (N, inputs, Y, X) and y_0 (N, T·D), or noise (N, 1, Y, X), to its outputs."""
        if self.noise and given is not None:
            return cast(Tensor, self.network(torch.cat([inputs, given.to(inputs)], 1)))
        return cast(Tensor, self.network(inputs, given))  # which looks at y_0 if it has condition layers


class Adversary:
    """A discriminator of patches, and how it learns."""

    def __init__(self, contrasts: int, seed: int):
        with first_weights(seed, "adversary"):
            self.network = PatchDiscriminator(2, 32, contrasts, num_layers_d=2, norm="INSTANCE")
        self.loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.optimiser = torch.optim.Adam(self.network.parameters(), 2e-4, betas=(0.5, 0.99))

    def learn(self, real: Tensor, synthetic: Tensor) -> None:
        """One step towards telling them apart."""
        self.optimiser.zero_grad(set_to_none=True)
        wrong = self.loss(self.network(real)[-1], True, True) + self.loss(
            self.network(synthetic.detach())[-1], False, True
        )
        wrong.backward()
        self.optimiser.step()

    def found_out(self, synthetic: Tensor) -> Tensor:
        """How clearly synthetic images (N, contrasts, Y, X) are told from real ones."""
        return cast(Tensor, self.loss(self.network(synthetic)[-1], True, False))


def realistic_loss(
    shipped: CrossConditionedModel, guide: Guide, data: Batches, seed: int, kind: str, weight: float
) -> Callable[[nn.Module, int], Tensor]:
    """The absolute error of the hidden contrasts, and, of some weight, how clearly they are told from real ones."""
    adversary = Adversary(len(MODALITIES), seed)

    def loss(network: nn.Module, step: int) -> Tensor:
        raw, generator = data[step], seeded("realism", seed, step)
        available = random_subsets(raw.present, generator)
        hidden = raw.present - available
        given: Tensor | None = None
        if cast(Textured, network).noise:
            given = torch.randn(len(raw.images), 1, *raw.images.shape[2:], generator=generator)
        elif kind in (Y_0, WEAK):
            given = guide.of_crops(raw.images, hidden)
        inputs = shipped.network_input(raw.neighbours, available).contiguous(memory_format=torch.channels_last)
        prediction, truth = network(inputs, given)[:, : len(MODALITIES)], standardise(raw.images)
        wanted = hidden[:, :, None, None] * (raw.images > 0)
        error, count = synthesis_error(prediction, truth, wanted * (1 + LESION_WEIGHT * raw.lesion), absolute=True)
        if kind == ERROR:
            return error / count.clamp(min=1)
        synthetic = torch.where(wanted > 0, prediction.float(), truth)
        adversary.learn(truth, synthetic)
        return error / count.clamp(min=1) + weight * adversary.found_out(synthetic)

    return loss


class Completing(nn.Module):
    """Stands for the C-UNet of a model while one study is completed: given its y_0, or noise drawn for it."""

    def __init__(self, network: Textured, y_0: Tensor, case: str):
        super().__init__()
        self.network, self.y_0, self.generator = network, y_0, seeded("noise", case)

    def forward(self, inputs: Tensor, y_0: Tensor | None = None) -> Tensor:
        """Map inputs (N, inputs, Y, X) to the outputs; y_0 is not looked at."""
        if self.network.noise:
            noise = torch.randn(len(inputs), 1, *inputs.shape[2:], generator=self.generator)
            return cast(Tensor, self.network(inputs, noise))
        return cast(Tensor, self.network(inputs, self.y_0.expand(len(inputs), -1)))


def completed(model: CrossConditionedModel, subject: Subject, target: str) -> dict[str, Array]:
    """A contrast of a study from its three others, (Z, Y, X) in [0, 1]."""
    return dict(synthesised(model, subject, [m for m in MODALITIES if m != target], [target]))


@dataclass(frozen=True)
class Experiment:
    """All of it: what there is, and where it goes."""

    base: Path
    out: Path
    seed: int
    tiny: bool
    display: Display
    shipped: CrossConditionedModel
    mrm: CrossConditionedModel
    weight: float | None = None
    """Of the adversary in a trial."""

    @property
    def steps(self) -> int:
        """Of every training."""
        return 2 if self.tiny else STEPS if self.weight is None else TRIAL_STEPS

    def weight_of(self, kind: str) -> float:
        """The adversary's weight beside the absolute error."""
        return self.weight or (WEAK_ADVERSARIAL if kind == WEAK else ADVERSARIAL)

    @property
    def test(self) -> list[Case]:
        """The test studies."""
        return four_contrasts(self.base, "test")

    def guide(self, target: str) -> Guide:
        """The vectors of one contrast, the three others given."""
        others = tuple(m for m in MODALITIES if m != target)
        return Guide(self.mrm, Pooled(self.mrm, self.out / "representations" / "pooled"), (others, (target,)))


def trained(experiment: Experiment, kind: str) -> Textured:
    """A network with texture, trained or read."""
    seed, dim = experiment.seed, experiment.mrm.config.representation.dim * len(MODALITIES)
    network = Textured(experiment.shipped, kind, dim, seed)
    trial = "" if experiment.weight is None else f"-weight-{experiment.weight:g}"
    name = f"{kind.removeprefix('realistic: ').replace(', ', ' ').replace(' ', '-')}{trial}-{seed}"
    path = experiment.out / "realism" / f"{name}.safetensors"
    if not path.exists():
        how = replace(HOW, learning_rate=3e-4, warm_up=50 if experiment.weight is None else 30, ema_decay=0.99)
        averaged = fit(network, loss_of(experiment, kind), experiment.steps, how, name=name, display=experiment.display)
        write_tensors(path, averaged.state_dict())
    network.load_state_dict(load_file(path))
    return network.eval()


def loss_of(experiment: Experiment, kind: str) -> Callable[[nn.Module, int], Tensor]:
    """The loss, on batches of the training patients."""
    size = 2 if experiment.tiny else HOW.batch_size
    data = batches(four_contrasts(experiment.base, "train"), MODALITIES, experiment.seed, batch_size=size)
    guide, weight = experiment.guide(TARGETS[0]), experiment.weight_of(kind)
    return realistic_loss(experiment.shipped, guide, data, experiment.seed, kind, weight)


def measure_images(experiment: Experiment, predictor: str, work: Measuring) -> None:
    """Keep the images of a predictor, and their rows, as far as they are missing."""
    key = {"predictor": predictor, "seed": experiment.seed}
    missing = [
        (case, target)
        for case in experiment.test
        for target in TARGETS
        if not work.kept.has(case=case.name, target=target, kind="image", **key)
    ]
    network = trained(experiment, predictor) if missing and predictor != SHIPPED else None
    for case, target in missing:
        subject, model, guide = subject_of_case(case), load_model("default"), experiment.guide(target)
        if network is not None:
            y_0 = guide.samples(case, 1, given=True, seed=experiment.seed + 1000)
            model.synthesis = cast(CUNet, Completing(network, y_0, case.name))
        images = completed(model, subject, target)
        keep_images(folder_of(experiment), predictor, subject, images)
        work.add(subject, guide.task[0], images, kind="image", **key)
    work.finish()


def try_weight(experiment: Experiment, kept: Kept) -> None:
    """Rows of a short training with noise, and of the shipped network, on three validation studies."""
    network: Textured | None = None
    for case in four_contrasts(experiment.base, "val")[::2]:
        key: dict[str, Any] = {
            "case": case.name,
            "weight": experiment.weight or 0.0,
            "seed": experiment.seed,
            "kind": "trial",
        }
        if kept.has(**key):
            continue
        subject, model, rows = subject_of_case(case), load_model("default"), list[Row]()
        if experiment.weight is not None:
            network = network or trained(experiment, NOISE)
            model.synthesis = cast(CUNet, Completing(network, torch.zeros(1, 0), case.name))
        for target in TARGETS:
            sources, images = experiment.guide(target).task[0], completed(model, subject, target)
            texture = texture_row(subject, target, images[target])
            rows += [row | texture for row in light_measures(subject, sources, images, **key)]
        kept.add(rows)


def show_weights(rows: Sequence[Row]) -> None:
    """What each weight makes of power and correlation: means over the validation studies."""
    bands = "power_middle", "power_high", "power_grid"
    heads = "", "adversary's weight", "power, .1–.25", "power, .25–.45", "the grid's", "correlation"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for target in TARGETS:
        for weight in sorted({row["weight"] for row in rows}):
            rows = [row for row in rows if (row["target"], row["weight"]) == (target, weight)]
            middle, high, grid, deep = (np.mean([row[name] for row in rows]) for name in (*bands, "correlation_deep"))
            print(f"| {target} | {weight:g} | {middle:.2f} | {high:.2f} | {grid:.2f} | {deep:.3f} |")


def folder_of(experiment: Experiment) -> Path:
    """Where images are kept: those of the first seed where segmenter.py looks."""
    return experiment.out if experiment.seed == 0 else experiment.out / f"seed{experiment.seed}"


def measure_texture(experiment: Experiment, predictor: str, target: str, kept: Kept) -> None:
    """Rows of the texture of one contrast; each half of the patients is told apart by what the other teaches."""
    key = {"predictor": predictor, "seed": experiment.seed, "target": target, "kind": "texture"}
    cases = [case for case in experiment.test if not kept.has(case=case.name, **key)]
    if not cases:
        return
    rows: list[Row] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for case in experiment.test:
        subject, at = subject_of_case(case), places(case.masks()[:, 0] > 0)
        synthetic = np.load(images_folder(folder_of(experiment), predictor) / f"{case.name}-{target}.npy")
        both = enumerate((subject.volumes[target], synthetic))
        real, made = (without_levels(patches(volume, at), case.name, target, which) for which, volume in both)
        pairs.append((real, made))
        facts = {"case": case.name, "patient": case.patient, "cohort": cohort_of(case.name)}
        row = {"sources": "+".join(experiment.guide(target).task[0]), **facts, **key}
        rows.append(row | texture_row(subject, target, synthetic))
    for half in (0, 1):
        others = [pair for i, pair in enumerate(pairs) if i % 2 != half and len(pair[0])]
        judge = telling_apart(others, 2 if experiment.tiny else TELLING, half)
        for i in range(half, len(rows), 2):
            if len(pairs[i][0]):
                rows[i]["auc"] = area(judge, *pairs[i])
    kept.add(row for row in rows if row["case"] in {case.name for case in cases})


def conditions(rows: Sequence[Row], predictor: str) -> list[str]:
    """Why a predictor must not be shipped as `--style realistic`; nothing if it may."""
    against = []
    for target in TARGETS:
        own, shipped = (
            [row for row in rows if row["target"] == target and row["predictor"] == name]
            for name in (predictor, SHIPPED)
        )
        for band in ("power_middle", "power_high", "power_grid"):
            far = [
                float(np.mean(np.abs(np.log(list(by_patient(some, band).values()) or [np.inf]))))
                for some in (own, shipped)
            ]
            if far[0] >= far[1]:
                against.append(f"{target}: {band} is no nearer to the real one")
        now, before = (by_patient(some, "lesion_kept") for some in (own, shipped))
        no_more = [p for p, share in before.items() if KEPT[0] <= share <= KEPT[1] and not KEPT[0] <= now[p] <= KEPT[1]]
        lost = [patient for patient, share in before.items() if share >= LOST > now[patient]]
        if no_more or lost:
            against.append(f"{target}: lesions of {len(no_more)} patients are no more kept, of {len(lost)} newly lost")
    return against


def show(rows: Sequence[Row]) -> None:
    """The tables and the verdict, from the rows that are kept."""
    print(table(rows, SHIPPED, COLUMNS | TEXTURE))
    for predictor in LEARNT:
        if {predictor, SHIPPED} <= {row["predictor"] for row in rows}:
            against = conditions(rows, predictor)
            print(f"\n{predictor}: {'ship it' if not against else 'do not ship it: ' + '; '.join(against)}")


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=(SHIPPED, *LEARNT), default=[SHIPPED, *LEARNT])
    options.add_argument("--weights", nargs="+", type=float, default=(), help="try these weights of the adversary")
    given = arguments(options)
    base, out = given.base, given.out
    kept, display = Kept(out, "realism_weights" if given.weights else "realism"), Display()
    if not given.table:
        base = tiny_base(base, out / "base") if given.tiny else base
        begin, shipped = time.monotonic(), load_model("default")
        mrm = trained_representations(base, out, ANY, TINY if given.tiny else Sizes(), display)
        for seed in given.seeds:
            experiment = Experiment(base, out, seed, given.tiny, display, shipped, mrm)
            if given.weights:
                for weight in (None, *given.weights):
                    try_weight(replace(experiment, weight=weight), kept)
                continue
            say_how_long(experiment, given.only)
            with measuring(kept) as work:
                for predictor in given.only:
                    measure_images(experiment, predictor, work)
            for predictor in given.only:
                for target in TARGETS:
                    measure_texture(experiment, predictor, target, kept)
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    (show_weights if given.weights else show)(kept.of(given.shown))


def say_how_long(experiment: Experiment, predictors: Sequence[str]) -> None:
    """Print steps times measured seconds a step, and studies to measure."""
    dim = experiment.mrm.config.representation.dim * len(MODALITIES)
    network, loss = Textured(experiment.shipped, Y_0, dim), loss_of(experiment, Y_0)
    took = min(seconds(lambda: fit(network, loss, 1))[0] for _ in range(2))
    studies = len(predictors) * len(TARGETS) * len(experiment.test)
    steps = experiment.steps * sum(name != SHIPPED for name in predictors)
    minutes = (took * steps + studies * SECONDS_A_STUDY) / 60 + TELLING_MINUTES * len(predictors)
    print(
        f"{steps} steps of {took:.2f} s; {studies} images to make and measure, {SECONDS_A_STUDY:g} s each; "
        f"{TELLING_MINUTES:g} minutes a predictor to tell it apart: {minutes:.0f} minutes if nothing is kept",
        flush=True,
    )


if __name__ == "__main__":
    main()
