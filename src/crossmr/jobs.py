"""What each stage learns from, by which loss, and how it is judged; and what calibrates the deviations afterwards."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import Dataset

from crossmr import metrics
from crossmr.data.dataset import Batch, Batches, Case, as_inputs, seeded, useful_slices
from crossmr.device import in_batches
from crossmr.errors import ModelError
from crossmr.fitting import Job, Loop, in_parts
from crossmr.model import CrossConditionedModel, ModelConfig, variance_loss
from crossmr.picture import save_picture
from crossmr.recipes import Recipe
from crossmr.stages.representation import MaskedAutoencoder, z_score

Made = TypeVar("Made")

VALIDATION_SLICES = 48
PATTERNS = 4
"""Random subsets of each validation slice that the deviations of a model of any subset are calibrated on."""
CHUNK = 16
"""Slices through a network at once, where no gradient is needed."""
CROPS = 2048
"""Random crops at most, of two epochs, whose grids the MDN learns from."""
MUTE = 0.05
"""Standard deviation over samples, features being z-scored, below which representations say nothing."""
READERS = 4
"""Processes that read batches for a GPU."""


@dataclass(frozen=True)
class Run:
    """What every stage of one training shares."""

    loop: Loop
    recipe: Recipe
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    start: CrossConditionedModel | None = None
    """A trained model whose weights are the first ones."""

    def batches(self, stage: str, cases: Sequence[Case], modalities: Sequence[str]) -> Batches:
        """The batches of a stage; the twin's are the C-UNet's."""
        masked = stage.endswith("representation")
        return Batches(
            cases,
            modalities,
            size=self.recipe.crop,
            batch_size=self.recipe.fit_config(stage).batch_size,
            seed=self.loop.seed,
            flip=self.recipe.flip,
            context=1 if masked else self.recipe.context_slices,
            augmentation=None if masked else self.recipe.augmentation,
            augmented=len(self.sources),
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that the training reads, as in `ModelConfig.modalities`."""
        return tuple(dict.fromkeys((*self.sources, *self.targets)))


class View(NamedTuple):
    """A batch as the networks learn from it, on their device."""

    inputs: Tensor
    """(B, inputs, *S), what the C-UNet reads."""
    truth: Tensor
    """(B, T, *S), all targets."""
    wanted: Tensor
    """(B, T), 1 where a target is to be synthesised and the patient has it."""


def job_of(run: Run, model: CrossConditionedModel, stage: str) -> Job:
    match stage:
        case "representation":
            return _representation_job(run, stage, run.targets)
        case "source_representation":
            return _representation_job(run, stage, run.sources)
        case "distribution":
            return _distribution_job(run, model)
        case "uncertainty":
            return _uncertainty_job(run, model)
        case _:
            return _synthesis_job(run, model, stage)


def _having(cases: Sequence[Case], wanted: Sequence[str], *, all_of: bool) -> list[Case]:
    """Cases that have all, or any, of the modalities."""
    test = all if all_of else any
    return [case for case in cases if test(m in case.modalities for m in wanted)]


def _translatable(run: Run, cases: Sequence[Case]) -> list[Case]:
    """Cases that have all sources and any of the targets, or, for any subset, any two modalities."""
    if run.recipe.any_subset:
        return [case for case in cases if len(set(run.sources) & set(case.modalities)) > 1]
    return [case for case in _having(cases, run.sources, all_of=True) if _having([case], run.targets, all_of=False)]


def _loss_on(run: Run, loss: Callable[..., Tensor], fixed: Any) -> Callable[[nn.Module, Path], dict[str, float]] | None:
    """A stage's validation by its loss on one fixed batch; None without one."""

    @torch.no_grad()
    def validate(network: nn.Module, picture: Path) -> dict[str, float]:
        def measure(parts: Sequence[tuple[Any, float]]) -> float:
            generator = seeded("validate", run.loop.seed)
            return sum(share * float(loss(network, part, generator)) for part, share in parts)

        network.eval()
        with run.loop.fabric.autocast():
            return {"val_loss": in_parts("validation", fixed, measure)[0]}

    return None if fixed is None else validate


def _in_chunks(run: Callable[[slice], Made], count: int) -> list[Made]:
    """What is made of so many samples, CHUNK at once, or fewer where memory runs out."""
    return [made for _, made, _ in in_batches(run, count, CHUNK)]


def _placed(run: Run, batch: Batch) -> Batch:
    """A batch on the run's device, its images channels_last in 2D."""
    batch = batch.to(run.loop.fabric.device)
    if run.recipe.spatial_dims == 2:
        last = {"memory_format": torch.channels_last}
        batch = replace(batch, images=batch.images.contiguous(**last), around=batch.around.contiguous(**last))
    return batch


def _view(run: Run, model: CrossConditionedModel, batch: Batch, generator: torch.Generator) -> View:
    """A batch of `run.modalities`; for any subset, a random part of what each sample has is hidden."""
    count, first = len(run.sources), 0 if model.config.any_subset else len(run.sources)
    shown, wanted = batch.present[:, :count], batch.present[:, first:]
    if model.config.any_subset:
        shown = random_subsets(batch.present, generator)
        wanted = batch.present - shown
    batch = _placed(run, batch)
    inputs = model.inputs(batch.around[:, : count * model.config.context_slices], shown.to(batch.images.device))
    return View(inputs, batch.images[:, first:], wanted.to(inputs.device))


def random_subsets(present: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of present (B, M) one of the non-empty proper subsets of its ones, all equally likely.

    A row of less than two ones stays as it is.
    """
    chosen = torch.zeros_like(present)
    for row, there in zip(chosen, present > 0, strict=True):
        own = there.nonzero().flatten()
        last = 2 ** len(own) - 1
        code = int(torch.randint(1, last, (1,), generator=generator)) if len(own) > 1 else last
        row[own] = torch.tensor([float(code >> bit & 1) for bit in range(len(own))]).to(row)
    return chosen


def _representation_job(run: Run, stage: str, modalities: tuple[str, ...]) -> Job:
    """MRM over one group of modalities; a patient who lacks some of them brings no loss for these."""

    def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        batch = _placed(run, batch)
        return network.loss(batch.images, batch.present, generator)  # type: ignore[operator, no-any-return]

    data = run.batches(stage, _having(run.train, modalities, all_of=False), modalities)
    held_out = _having(run.val, modalities, all_of=False)
    fixed = run.batches(stage, held_out, modalities).fixed(VALIDATION_SLICES) if held_out else None
    return Job(stage, data, loss, _loss_on(run, loss, fixed), READERS)


@torch.no_grad()
def _pooled(run: Run, network: MaskedAutoencoder, cases: Sequence[Case], modalities: Sequence[str]) -> list[Tensor]:
    """The pooled features (N, D) of each case's useful slices (2D) or of its volume (3D), on the CPU."""
    network.eval()
    pooled = []
    reader = run.batches("representation", cases, modalities)
    divisor = run.recipe.model_config(run.sources, run.targets).divisor
    with run.loop.display.task("represent", len(cases)) as task, run.loop.fabric.autocast():
        for index, case in enumerate(cases):
            images = as_inputs(
                reader.read(index, -1), useful_slices(case.head_voxels), run.recipe.spatial_dims, divisor
            )

            def pool(some: slice, images: Tensor = images) -> Tensor:
                return network.pooled(images[some].to(run.loop.fabric.device)).float().cpu()

            pooled.append(torch.cat(_in_chunks(pool, len(images))))
            task.advance()
    return pooled


class Vectors(NamedTuple):
    """What the MDN learns from."""

    y_0: Tensor
    """(N, D[, *G]), representations of true targets."""
    told: Tensor
    """(N, C[, *G]), the conditions."""
    wanted: Tensor
    """(N, D), 1 for the features of a target that is to be drawn."""


class _Vectors(Dataset[Vectors]):
    """Batches of vectors, drawn from seed and step alone."""

    def __init__(self, vectors: Vectors, batch_size: int, seed: int):
        self.vectors, self.batch_size, self.seed = vectors, batch_size, seed
        self.steps_per_epoch = -(-len(vectors.y_0) // batch_size)

    def __getitem__(self, step: int) -> Vectors:
        generator = seeded("vectors", self.seed, step)
        chosen = torch.randint(len(self.vectors.y_0), (self.batch_size,), generator=generator)
        return Vectors(*(part[chosen] for part in self.vectors))


@torch.no_grad()
def _cells(run: Run, model: CrossConditionedModel, cases: Sequence[Case]) -> Vectors:
    """The grids of the true targets and what the MDN is told, of random crops."""
    model.eval()
    found = []
    batches = run.batches("synthesis", cases, run.modalities)
    steps = min(2 * batches.steps_per_epoch, -(-CROPS // batches.batch_size))
    with run.loop.display.task("represent", steps) as task, run.loop.fabric.autocast():
        for step in range(steps):
            view = _view(run, model, batches[step], seeded("cells", run.loop.seed, step))
            some = view.wanted.amax(1) > 0
            if some.any():
                view = View(*(part[some] for part in view))

                def vectors(rows: slice, view: View = view) -> list[Tensor]:
                    inputs, truth, wanted = (part[rows] for part in view)
                    told = model.told(inputs, model.unguided(inputs))
                    parts = model.representation.represent(truth), told, model.wanted_features(wanted)
                    return [part.cpu() for part in parts]

                found += _in_chunks(vectors, len(view.inputs))
            task.advance()
    return Vectors(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _distribution_job(run: Run, model: CrossConditionedModel) -> Job:
    """MDN over representations: of random crops with cells, or else of every slice of patients who have everything."""
    cells = bool(model.config.representation.cell)
    conditional = model.config.distribution.conditional

    def vectors(cases: Sequence[Case]) -> Vectors:
        if cells:
            return _cells(run, model, cases)
        y_0 = told = z_score(torch.cat(_pooled(run, model.representation, cases, run.targets)))
        if model.source_representation is not None:
            told = z_score(torch.cat(_pooled(run, model.source_representation, cases, run.sources)))
        return Vectors(y_0, told, torch.ones_like(y_0))

    def usable(cases: Sequence[Case]) -> list[Case]:
        if cells:
            return _translatable(run, cases)
        return _having(cases, (*run.targets, *(run.sources if conditional else ())), all_of=True)

    def loss(network: nn.Module, batch: Vectors, generator: torch.Generator) -> Tensor:
        y_0, told, wanted = (tensor.to(run.loop.fabric.device) for tensor in batch)
        return network.loss(y_0, told if conditional else None, generator, wanted)  # type: ignore[operator, no-any-return]

    if not usable(run.train):
        raise ModelError(f"No training patient has all of {', '.join(run.modalities)}.")
    config = run.recipe.fit_config("distribution")
    known = vectors(usable(run.train))
    model.distribution.standardise(known.y_0, known.wanted)
    _warn_if_mute(run, known)
    held_out = vectors(usable(run.val)) if usable(run.val) else None
    data = _Vectors(known, config.batch_size, run.loop.seed)
    return Job("distribution", data, loss, _loss_on(run, loss, held_out))


def _warn_if_mute(run: Run, known: Vectors) -> None:
    """Say so where representations hardly differ between samples."""
    several = (known.wanted.sum(0) > 1).nonzero().flatten()
    each = [known.y_0[known.wanted[:, d] > 0, d].std(0).mean() for d in several]
    if each and (deviation := float(torch.stack(each).mean())) < MUTE:
        run.loop.display.say(
            f"Warning: representations hardly differ between samples (standard deviation {deviation:.3f}, wanted .2 or "
            "so), so guidance will say little. Train 'representation' longer or by another seed."
        )


def _synthesis_job(run: Run, model: CrossConditionedModel, stage: str) -> Job:
    """C-UNet, guided as the recipe says, or its twin, never guided; with cells, guided in stage 'guidance' alone."""
    cells = bool(run.recipe.representation.cell)
    unguided = stage == "twin" or (cells and stage == "synthesis")
    guidance = "none" if unguided else run.recipe.guidance
    usable, held_out = (_translatable(run, cases) for cases in (run.train, run.val))
    data = run.batches(stage, usable, run.modalities)
    vectors = _drawn(run, model, usable, guidance)

    def guide(case: Tensor, view: View, drawn: Tensor | None, generator: torch.Generator) -> Tensor | None:
        if guidance == "truth":
            with torch.no_grad(), run.loop.fabric.autocast():
                return model.guidance_of(view.truth, view.wanted)
        if drawn is None:
            return None
        which = torch.randint(drawn.shape[1], (len(case),), generator=generator)
        return drawn[case.to(drawn.device), which.to(drawn.device)]

    def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        view = _view(run, model, batch, generator)
        keep = (torch.rand(len(batch.case), 1, generator=generator) >= run.recipe.guidance_dropout).float()
        y_0 = guide(batch.case, view, vectors, generator)
        return network.loss(*view, y_0, keep.to(view.inputs.device))  # type: ignore[operator, no-any-return]

    if not held_out:
        return Job(stage, data, loss, None, READERS)
    fixed = run.batches(stage, held_out, run.modalities).fixed(VALIDATION_SLICES)
    seen = _view(run, model, fixed, seeded("validate", run.loop.seed))
    fixed_vectors = _drawn(run, model, held_out, guidance)

    @torch.no_grad()
    def validate(network: nn.Module, picture: Path) -> dict[str, float]:
        def predict(some: slice) -> Tensor:
            part = View(*(tensor[some] for tensor in seen))
            y_0 = guide(fixed.case[some], part, fixed_vectors, seeded("validate", run.loop.seed, some.start))
            return cast(Tensor, network(part.inputs, y_0)).float()

        network.eval()
        with run.loop.fabric.autocast():
            prediction = torch.cat(_in_chunks(predict, len(seen.inputs))).clamp(0, 1)
        scores = {}
        for index, target in enumerate(run.targets):
            there = seen.wanted[:, index] > 0
            if there.any():
                pair = prediction[there, index], seen.truth[there, index]
                scores[f"val_psnr_{target}"] = float(metrics.psnr(*pair, 1.0).mean())
                scores[f"val_ssim_{target}"] = float(metrics.ssim(*pair, 1.0).mean())
        _draw(run, picture, model.config, seen, prediction)
        return scores

    return Job(stage, data, loss, validate, READERS)


def _uncertainty_job(run: Run, model: CrossConditionedModel) -> Job:
    """The variance of the finished C-UNet's error, by the Gaussian likelihood of that error."""

    def loss(network: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        view = _view(run, model, batch, generator)
        with torch.no_grad(), run.loop.fabric.autocast():
            unguided = model.unguided(view.inputs)
        return variance_loss(network, view.inputs, unguided, view.truth, view.wanted)

    model.eval()
    data = run.batches("uncertainty", _translatable(run, run.train), run.modalities)
    held_out = _translatable(run, run.val)
    fixed = run.batches("uncertainty", held_out, run.modalities).fixed(VALIDATION_SLICES) if held_out else None
    return Job("uncertainty", data, loss, _loss_on(run, loss, fixed), READERS)


def _drawn(run: Run, model: CrossConditionedModel, cases: Sequence[Case], guidance: str) -> Tensor | None:
    """Representations (cases, K, D) sampled for each patient exactly as completion does, or None."""
    if guidance not in ("sample", "unconditional"):
        return None
    pooled: Sequence[Tensor | None] = [None] * len(cases)
    if guidance == "sample" and model.source_representation is not None:
        pooled = _pooled(run, model.source_representation, cases, run.sources)
    drawn = []
    model.distribution.eval()
    with run.loop.display.task("sample", len(cases)) as task:
        for case, features in zip(cases, pooled, strict=True):
            generators = [seeded("drawn", run.loop.seed, case.name, k) for k in range(run.recipe.samples)]
            device = run.loop.fabric.device
            drawn.append(model.guide(None if features is None else features.to(device), generators))
            task.advance()
    return torch.stack(drawn)


def _draw(run: Run, path: Path, config: ModelConfig, view: View, prediction: Tensor) -> None:
    """Source, prediction, truth and error of four held-out slices; what was not asked for is black."""
    rows, context = [], config.context_slices
    for index in sorted({round(i * (len(prediction) - 1) / 3) for i in range(4)}):

        def plane(images: Tensor, channel: int, index: int = index) -> Any:
            image = images[index, channel].float().cpu()
            return (image if image.ndim == 2 else image[len(image) // 2]).numpy()

        row = [(name, plane(view.inputs, i * context + context // 2)) for i, name in enumerate(run.sources)]
        for i, name in enumerate(run.targets):
            asked = float(view.wanted[index, i])
            made, true = asked * plane(prediction, i), asked * plane(view.truth, i)
            row += [(f"{name} synthetic", made), (f"{name} truth", true), (f"{name} |error|", abs(made - true))]
        rows.append(row)
    save_picture(path, rows)


@torch.no_grad()
def calibration(run: Run, model: CrossConditionedModel) -> dict[str, Tensor]:
    """'variance' (T, 2), squared error = a·variance + b of each target, a, b >= 0, within validation patients' heads.

    By the Gaussian likelihood, for which a few large errors do not outweigh the rest. Where no validation patient has
    what it takes, that of the model that the training started from, or {}.
    """
    usable = _translatable(run, run.val)
    before = {} if run.start is None else run.start.calibration
    if not usable:
        return dict(before)
    model.eval()
    batch = run.batches("synthesis", usable, run.modalities).fixed(VALIDATION_SLICES)
    parts: list[list[Tensor]] = [[] for _ in run.targets]
    with run.loop.fabric.autocast():
        for number in range(PATTERNS if model.config.any_subset else 1):
            view = _view(run, model, batch, seeded("calibrate", run.loop.seed, number))

            def pairs(some: slice, view: View = view) -> list[Tensor]:
                unguided = model.unguided(view.inputs[some])
                variance = model.log_variance(view.inputs[some], unguided).exp()
                squared = (unguided - view.truth[some]) ** 2
                head = (batch.images[some] > 0).any(1).to(squared.device)
                wanted = (view.wanted[some] > 0)[(...,) + (None,) * (head.ndim - 1)]
                insides = [head & wanted[:, index] for index in range(len(run.targets))]
                return [
                    torch.stack([variance[:, index][inside], squared[:, index][inside]]).double().cpu()
                    for index, inside in enumerate(insides)
                ]

            for made in _in_chunks(pairs, len(batch.case)):
                for found, pair in zip(parts, made, strict=True):
                    found.append(pair)
    fitted = []
    for index, found in enumerate(parts):
        said, error = torch.cat(found, 1)
        unknown = before["variance"][index].cpu() if before else torch.tensor([1.0, 0.0])
        fitted.append(_likeliest(said, error) if len(said) else unknown)
    return {"variance": torch.stack(fitted).float()}


def _likeliest(variance: Tensor, squared: Tensor) -> Tensor:
    """(a, b) under which squared errors (N,) are likeliest, if Gaussian of variance a·variance + b (N,)."""

    def cost(logs: Any) -> float:
        a, b = torch.from_numpy(logs).exp()
        told = a * variance + b
        return float((told.log() + squared / told).mean())

    floor = max(float(squared.mean()), 1e-12)
    start = [float((squared.mean() / variance.mean()).clamp(1e-6, 1e6).log()), math.log(floor * 1e-3)]
    return torch.from_numpy(minimize(cost, start, method="Nelder-Mead", options={"xatol": 1e-3}).x).exp()
