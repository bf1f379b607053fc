"""The stages of a training: what each learns from, what it draws at random, its loss, and how it is validated.

A stage's `batch` draws everything random for the whole batch, on the CPU; its `loss` is deterministic and returns a sum
and a count, so that a batch may go through the network in parts (loop.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from crossmr.baselines import linear_regression
from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.data.dataset import Case
from crossmr.device import autocast
from crossmr.display import Display
from crossmr.errors import ModelError
from crossmr.networks.c_unet import CUNet, deviation_error, synthesis_error
from crossmr.networks.distribution import DistributionNetwork
from crossmr.networks.masked_autoencoder import MaskedAutoencoder, masked_squared_error, random_mask
from crossmr.networks.model import CrossConditionedModel, ModelConfig
from crossmr.networks.scale import on_unit_scale, standardise
from crossmr.picture import BRIGHTEST, save_picture, window, windowed
from crossmr.ranks import ALONE, Shard
from crossmr.tensors import foreground_slices, seeded
from crossmr.training.batches import ImageBatch, StepDataset, VectorBatch, Vectors
from crossmr.training.representations import draw_representations, pooled_features
from crossmr.training.shared import CHUNK, Batch, Compute, Training, cut, in_chunks

RawBatch = TypeVar("RawBatch")

VALIDATION_SLICES = 48
VALIDATION_VECTORS = 256
DEVIATION_WEIGHT = 0.2
"""Of the likelihood of the error, beside the error itself."""
REPRESENT_FRACTION = 0.1
"""Of what is left of a budget, at most, for representing the studies from which the MDN learns."""
PATTERNS = 4
"""Random subsets of each validation slice on which a model of any subset is calibrated."""
MIN_SAMPLE_STD = 0.05
"""Standard deviation over samples, features being z-scored, below which representations tell samples hardly apart."""
MAX_WORKERS = 16
"""Processes that read batches for a GPU, at most, and as far as there are cores for them."""


class Stage(ABC, Generic[RawBatch, Batch]):
    """One network's training."""

    name: ClassVar[str]
    num_workers: ClassVar[int] = MAX_WORKERS
    """Processes that read its batches, where a GPU would otherwise wait for them; 0: they are in memory."""
    chunk: int = CHUNK
    """Samples that are validated at once."""
    later_validations: int = 0
    """What comes after the stage's last step, in units of one validation's time."""

    def __init__(self, network: nn.Module, data: StepDataset[RawBatch]):
        self.network, self.data = network, data

    @property
    def trainable(self) -> Sequence[nn.Parameter]:
        """The parameters that learn."""
        return list(self.network.parameters())

    @abstractmethod
    def batch(self, raw: RawBatch, generator: torch.Generator, shard: Shard | None = None) -> Batch:
        """A batch of tensors (B, ...) on the CPU, for which everything random has been drawn.

        `shard` says which samples of a batch `raw` holds; None: all of them.
        """

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the errors of a batch, or of a part of it, on the network's device, and how many there are."""

    @abstractmethod
    def validate(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """What is measured on validation patients, where there are any; a picture of them goes to this path."""


@torch.no_grad()
def mean_loss(stage: Stage[Any, Batch], network: nn.Module, batch: Batch | None, compute: Compute) -> dict[str, float]:
    """The stage's loss on a fixed batch, if there is one; each process computes its share of it."""
    if batch is None:
        return {}
    network.eval()
    sums = torch.zeros(2, device=compute.device)

    def add(some: slice) -> None:
        sums.add_(torch.stack(stage.loss(network, compute.to_device(cut(batch, some)))))

    with autocast(compute.device, compute.dtype):
        in_chunks(add, len(batch[0]), stage.chunk, compute.ranks)
    compute.ranks.all_reduce(sums)
    return {"val_loss": float(sums[0] / sums[1].clamp(min=1))}


class MaskedBatch(NamedTuple):
    """What the masked autoencoder learns from."""

    images: Tensor
    """(B, M, *S)."""
    mask: Tensor
    """(B, 1, *S), 1 where hidden."""
    present: Tensor
    """(B, M)."""


class RepresentationStage(Stage[ImageBatch, MaskedBatch]):
    """MRM, over the represented modalities; a patient who lacks some of them brings no loss for these."""

    name = "representation"

    def __init__(self, training: Training, model: CrossConditionedModel):
        self.compute, self.config = training.compute, training.config.representation
        train, val = (
            [case for case in cases if set(training.config.represented) & set(case.modalities)]
            for cases in (training.train, training.val)
        )
        data = training.batches(self.name, train, training.config.represented, masked=True)
        super().__init__(model.network_of(self.name), data)
        self.chunk = training.inference_batch_size(
            self.config.channels, training.recipe.crop, len(training.config.represented)
        )
        self.validation_batch = None
        if val:
            first = training.batches(self.name, val, training.config.represented, masked=True).validation_batch(
                VALIDATION_SLICES
            )
            self.validation_batch = self.batch(first, seeded("validate", self.compute.seed))

    def batch(self, raw: ImageBatch, generator: torch.Generator, shard: Shard | None = None) -> MaskedBatch:
        """Draw the patches that are hidden, the same in all modalities of a sample."""
        shard = shard or ALONE.shard(len(raw.images))
        shape = (shard.whole, *raw.images.shape[2:])
        mask = shard.of(random_mask(shape, self.config.patch_size, self.config.mask_ratio, generator))
        return MaskedBatch(raw.images, mask, raw.present)

    def loss(self, network: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """L_MRM."""
        images = standardise(batch.images)
        prediction = cast(MaskedAutoencoder, network)(images * (1 - batch.mask)).float()
        return masked_squared_error(prediction, images, batch.mask, batch.present)

    def validate(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """L_MRM on validation patients."""
        return mean_loss(self, network, self.validation_batch, self.compute)


class DiffusionBatch(NamedTuple):
    """What the MDN learns from."""

    y_0: Tensor
    """(B, T·D), representations of true targets; zero where there is none."""
    target_features: Tensor
    """(B, T·D), 1 for the features of a target."""
    t: Tensor
    """int64 (B,), steps of diffusion."""
    noise: Tensor
    """(B, T·D)."""
    condition: Tensor | None
    """(B, C), what is given of the sources."""
    keep: Tensor | None
    """(B, 1), 0 where the condition is withheld."""


class DistributionStage(Stage[VectorBatch, DiffusionBatch]):
    """MDN, over the representations of every slice with enough head (2D), or of every volume (3D)."""

    name = "distribution"
    num_workers = 0
    chunk = VALIDATION_VECTORS

    def __init__(self, training: Training, model: CrossConditionedModel):
        self.compute, self.model, self.config = training.compute, model, training.config
        known = self._vectors(training)
        vectors = known["train"]
        batch_size, ranks = training.recipe.train_config(self.name).batch_size, self.compute.ranks
        data = Vectors(vectors, batch_size, self.compute.seed, ranks.shard(batch_size))
        super().__init__(model.network_of(self.name), data)
        y_0 = model.y_0(*(part[:, self._targets] for part in vectors))
        features = model.target_features(vectors.present[:, self._targets])
        cast(DistributionNetwork, self.network).fit_standardisation(y_0, features)
        _warn_if_collapsed(self.compute.display, y_0, features)
        self.validation_batch = (
            self.batch(known["val"], seeded("validate", self.compute.seed)) if "val" in known else None
        )

    @property
    def _sources(self) -> list[int]:
        return [self.config.represented.index(m) for m in self.config.sources] if self._conditional else []

    @property
    def _targets(self) -> list[int]:
        return [self.config.represented.index(m) for m in self.config.targets]

    @property
    def _conditional(self) -> bool:
        return self.config.distribution.conditional

    def _vectors(self, training: Training) -> dict[str, VectorBatch]:
        """The pooled features of training patients' slices, and of some of the validation patients'; kept in the run.

        Where a budget is too short for all of them, they are of the first studies in a random order.
        """
        place, ranks = training.folder / "stages" / "vectors", self.compute.ranks
        if not ranks.broadcast_json((place / "vectors.json").exists):
            some = partial(training.usable, with_sources=self._conditional)
            train, val = some(training.train), some(training.val)
            if not train:
                raise ModelError(
                    f"No training patient has what the MDN learns from, {', '.join(self.config.modalities)}."
                )
            order = torch.randperm(len(train), generator=seeded("represent", self.compute.seed)).tolist()
            slices = sum(len(foreground_slices(case.foreground_voxels)) for case in val)
            parts = {"train": self._represent(training, [train[i] for i in order])}
            if val:
                parts["val"] = self._represent(training, val, every=-(-slices // VALIDATION_VECTORS))
            if ranks.first:
                save_bundle(place, {name: part._asdict() for name, part in parts.items()}, {}, "vectors")
            return parts

        def load() -> tuple[dict[str, Tensor], None]:
            groups = load_bundle(place, "vectors")[0].items()
            return {f"{name}.{key}": tensor for name, group in groups for key, tensor in group.items()}, None

        tensors, _ = ranks.broadcast(load)
        names = {key.partition(".")[0] for key in tensors}
        return {name: VectorBatch(tensors[f"{name}.pooled"], tensors[f"{name}.present"]) for name in names}

    def _represent(self, training: Training, cases: Sequence[Case], every: int = 1) -> VectorBatch:
        until = training.budget.until(REPRESENT_FRACTION)
        parts = pooled_features(training, self.model, cases, self.config.represented, until=until, every=every)
        return VectorBatch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def batch(self, raw: VectorBatch, generator: torch.Generator, shard: Shard | None = None) -> DiffusionBatch:
        """Draw, for any subset, what is available; then steps of diffusion, noise, and whose condition is kept."""
        shard = shard or ALONE.shard(len(raw.pooled))
        target_mask = raw.present[:, self._targets]
        available = raw.present[:, self._sources]
        if self.config.any_subset:
            available = random_subsets(target_mask, generator, shard)
            target_mask = target_mask - available
        y_0 = self.model.y_0(raw.pooled[:, self._targets], target_mask)
        t = shard.of(torch.randint(self.config.distribution.schedule.steps, (shard.whole,), generator=generator))
        noise = shard.of(torch.randn(shard.whole, y_0.shape[1], generator=generator))
        condition = keep = None
        if self._conditional:
            condition = self.model.condition(raw.pooled[:, self._sources], available)
            dropout = self.config.distribution.condition_dropout
            keep = (shard.of(torch.rand(shard.whole, 1, generator=generator)) >= dropout).float()
        return DiffusionBatch(y_0, self.model.target_features(target_mask), t, noise, condition, keep)

    def loss(self, network: nn.Module, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """‖y_0 − ŷ_0(y_t, t)‖²."""
        return cast(DistributionNetwork, network).squared_error(*batch)

    def validate(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """The same on validation patients."""
        return mean_loss(self, network, self.validation_batch, self.compute)


class SynthesisBatch(NamedTuple):
    """What the C-UNet learns from."""

    neighbours: Tensor
    """(B, S·C, *S), of each source the slices around the synthetic one."""
    available: Tensor
    """(B, S), 1 for a source that is to be read."""
    truth: Tensor
    """(B, T, *S), all targets."""
    target_mask: Tensor
    """(B, T), 1 for a target that is to be synthesised and that the patient has."""
    lesion: Tensor
    """(B, 1, *S), 1 in voxels of a lesion, 2 in what enhances of it."""
    y_0: Tensor | None
    """(B, T·D), a representation that was drawn for the patient."""


class SynthesisStage(Stage[ImageBatch, SynthesisBatch]):
    """C-UNet: unguided, or, with guidance 'joint', guided by samples of the MDN, drawn once per patient."""

    name = "synthesis"
    deviation_weight: ClassVar[float] = DEVIATION_WEIGHT

    def __init__(self, training: Training, model: CrossConditionedModel):
        self.training, self.compute, self.config, self.model = training, training.compute, training.config, model
        cases = training.in_planes(training.usable(training.train))
        super().__init__(model.network_of(self.name), training.batches(self.name, cases, self.config.modalities))
        guiding = len(self.config.targets) * self.config.representation.channels
        channels = max(self.config.synthesis.channels, 0 if self.config.guidance == "none" else guiding)
        self.chunk = training.inference_batch_size(channels, training.recipe.crop)
        self.representations = self._representations(cases)
        self.validation_batch: SynthesisBatch | None = None
        if val := training.usable(training.val):
            first = training.batches(self.name, val, self.config.modalities).validation_batch(VALIDATION_SLICES)
            self.validation_batch = synthesis_batch(
                self.config, first, self._representations(val), seeded("validate", self.compute.seed)
            )
        last = self.config.uncertainty and self.name == self.config.stages[-1]
        self.later_validations = validation_views(self.config) if last else 0  # the calibration

    def _representations(self, cases: Sequence[Case]) -> Tensor | None:
        """(cases, K, T·D), drawn for each of them; None where nothing is."""
        return draw_representations(self.training, self.model, cases) if self.config.guidance == "joint" else None

    def batch(self, raw: ImageBatch, generator: torch.Generator, shard: Shard | None = None) -> SynthesisBatch:
        """Draw, for any subset, what is available, and which of a patient's representations guides."""
        return synthesis_batch(self.config, raw, self.representations, generator, shard)

    def guide(self, batch: SynthesisBatch) -> Tensor | None:
        """What the C-UNet is guided by, (B, T·D)."""
        return batch.y_0

    def predict(self, network: nn.Module, batch: SynthesisBatch) -> tuple[Tensor, Tensor | None]:
        """The synthesis (B, T, *S), standardised, and, where it is learnt, the logarithm of its expected error."""
        inputs = self.model.network_input(batch.neighbours, batch.available)
        return self.model.split(cast(CUNet, network)(inputs, self.guide(batch)))

    def loss(self, network: nn.Module, batch: SynthesisBatch) -> tuple[Tensor, Tensor]:
        """L_Syn of the standardised images, lesions weighted; and, with its weight, the likelihood of the error."""
        prediction, log_scale = self.predict(network, batch)
        truth, form = standardise(batch.truth), self.config.synthesis
        wanted = (batch.truth > 0) * batch.target_mask[(...,) + (None,) * (truth.ndim - 2)]  # (B, T, *S)
        weight = wanted * (1 + form.lesion_weight * batch.lesion)
        error, count = synthesis_error(prediction, truth, weight, absolute=form.loss == "absolute")
        if log_scale is not None and self.deviation_weight:
            error = error + self.deviation_weight * deviation_error(log_scale, prediction, truth, weight)
        return error, count

    @torch.no_grad()
    def validate(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """Of each target within the head: correlation, and mean absolute error in robust standard deviations.

        Also the linear regression's correlation, where there is one of the sources of every sample.
        """
        if (batch := self.validation_batch) is None:
            return {}
        network.eval()
        prediction, compute = torch.zeros(batch.truth.shape), self.compute

        def predict(some: slice) -> None:
            prediction[some] = self.predict(network, compute.to_device(cut(batch, some)))[0].cpu()

        with autocast(compute.device, compute.dtype):
            in_chunks(predict, len(prediction), self.chunk, compute.ranks)
        compute.ranks.all_reduce(prediction)
        truth, scores = standardise(batch.truth), {}
        for index, target in enumerate(self.config.targets):
            chosen = batch.target_mask[:, index] > 0
            inside = (batch.truth[:, index] > 0) & chosen[(...,) + (None,) * (truth.ndim - 2)]
            if inside.any():
                pair = prediction[:, index][inside], truth[:, index][inside]
                scores[f"val_correlation_{target}"] = float(torch.corrcoef(torch.stack(pair))[0, 1])
                scores[f"val_error_{target}"] = float((pair[0] - pair[1]).abs().mean())
        if compute.ranks.first:
            _draw(picture, self.config, batch, on_unit_scale(prediction) * (batch.truth > 0))
        return scores | self._regressions

    @cached_property
    def _regressions(self) -> dict[str, float]:
        """The linear regression's correlation with each target, the same at every validation."""
        if (batch := self.validation_batch) is None:
            return {}
        truth, scores = standardise(batch.truth), {}
        for index, target in enumerate(self.config.targets):
            chosen = batch.target_mask[:, index] > 0
            inside = batch.truth[chosen, index] > 0
            if inside.any() and (regression := self._regression(target, chosen)) is not None:
                pair = regression[inside], truth[chosen, index][inside]
                scores[f"regression_correlation_{target}"] = float(torch.corrcoef(torch.stack(pair))[0, 1])
        return scores

    def _regression(self, target: str, chosen: Tensor) -> Tensor | None:
        """The linear regression (n, *S) of the validation samples chosen (B,), each from its sources; None without."""
        if (batch := self.validation_batch) is None or not self.model.baselines:
            return None
        middle = batch.neighbours[:, self.config.context_slices // 2 :: self.config.context_slices]  # (B, S, *S)
        made = []
        for images, available in zip(middle[chosen].numpy(), batch.available[chosen] > 0, strict=True):
            sources = {m: images[k] for k, m in enumerate(self.config.sources) if available[k]}
            if (one := linear_regression(self.model.baselines, self.config.modalities, sources, target)) is None:
                return None
            made.append(torch.from_numpy(one))
        return torch.stack(made)


class GuidanceStage(SynthesisStage):
    """The C-UNet's condition layers alone, on the true y_0 of what is to be synthesised."""

    name = "guidance"
    deviation_weight = 0.0

    @property
    def trainable(self) -> Sequence[nn.Parameter]:
        """The condition layers."""
        return cast(CUNet, self.network).condition_layers()

    @torch.no_grad()
    def guide(self, batch: SynthesisBatch) -> Tensor:
        """The representation of the true targets; zero where there is none."""
        return self.model.y_0(self.model.pooled(batch.truth), batch.target_mask)


STAGES: dict[str, Callable[[Training, CrossConditionedModel], Stage[Any, Any]]] = {
    "representation": RepresentationStage,
    "distribution": DistributionStage,
    "synthesis": SynthesisStage,
    "guidance": GuidanceStage,
}


def synthesis_batch(
    config: ModelConfig,
    raw: ImageBatch,
    drawn: Tensor | None,
    generator: torch.Generator,
    shard: Shard | None = None,
) -> SynthesisBatch:
    """A batch of `config.modalities` as sources and targets; for any subset a random part of each sample is hidden."""
    shard = shard or ALONE.shard(len(raw.images))
    count = len(config.sources)
    available, truth, target_mask = raw.present[:, :count], raw.images[:, count:], raw.present[:, count:]
    if config.any_subset:
        available, truth = random_subsets(raw.present, generator, shard), raw.images
        target_mask = raw.present - available
    y_0 = None
    if drawn is not None:
        y_0 = drawn[raw.case, shard.of(torch.randint(drawn.shape[1], (shard.whole,), generator=generator))]
    neighbours = raw.neighbours[:, : count * config.context_slices]
    return SynthesisBatch(neighbours, available, truth, target_mask, raw.lesion, y_0)


def random_subsets(present: Tensor, generator: torch.Generator, shard: Shard | None = None) -> Tensor:
    """For each row of present (B, M) one of the non-empty proper subsets of its ones.

    Each further missing one is half as likely, and subsets of one size are equally likely. A row of less than two ones
    stays as it is. Each row takes as many random numbers as any other, whatever it holds.
    """
    shard, chosen = shard or ALONE.shard(len(present)), present.clone()
    uniform = shard.of(torch.rand(shard.whole, 1 + present.shape[1], generator=generator))
    for row, numbers in zip(chosen, uniform, strict=True):
        there = row.nonzero().flatten()
        if len(there) < 2:
            continue
        cumulative = (0.5 ** torch.arange(1.0, len(there))).cumsum(0)  # of hiding 1, 2, ... of them, not normalised
        hidden = 1 + int((numbers[0] * cumulative[-1] >= cumulative[:-1]).sum())
        shuffled = there[numbers[1:][there].argsort()]
        row[shuffled[:hidden]] = 0
    return chosen


def _warn_if_collapsed(display: Display, y_0: Tensor, features: Tensor) -> None:
    """Say so where representations (N, T·D) hardly differ between samples, where `features` (N, T·D) has them."""
    count = features.sum(0)
    mean = (features * y_0).sum(0) / count.clamp(min=1)
    stds = ((features * (y_0 - mean) ** 2).sum(0) / (count - 1).clamp(min=1)).sqrt()[count > 1]
    if len(stds) and (std := float(stds.mean())) < MIN_SAMPLE_STD:
        display.say(
            f"Warning: representations hardly differ between samples (standard deviation {std:.3f}, expected 0.2), "
            "so they cannot guide. Train 'representation' longer or with another seed."
        )


def _draw(path: Path, config: ModelConfig, batch: SynthesisBatch, prediction: Tensor) -> None:
    """Source, prediction, truth and error of four validation slices; what is no target is black."""
    rows, context = [], config.context_slices
    for index in sorted({round(i * (len(prediction) - 1) / 3) for i in range(4)}):

        def plane(images: Tensor, channel: int, given: Tensor, index: int = index) -> Any:
            image = float(given[index]) * images[index, channel]
            return (image if image.ndim == 2 else image[len(image) // 2]).numpy()

        row = []
        for i, name in enumerate(config.sources):
            image = plane(batch.neighbours, i * context + context // 2, batch.available[:, i])
            row.append((name, windowed(image, window(image))))
        for i, name in enumerate(config.targets):
            synthetic, true = (plane(images, i, batch.target_mask[:, i]) for images in (prediction, batch.truth))
            row += [
                (f"{name} synthetic", windowed(synthetic, window(true))),
                (f"{name} truth", windowed(true, window(true))),
                ("|error|", abs(synthetic - true) / BRIGHTEST),
            ]
        rows.append(row)
    save_picture(path, rows)


def validation_views(config: ModelConfig) -> int:
    """How many availabilities of each validation slice the calibration sees."""
    return PATTERNS if config.any_subset else 1
