"""From arrays to arrays: the targets of a head, synthesised from its sources; completion and evaluation both use it."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossmr.config import read_text, read_whole
from crossmr.data.naming import modality_names
from crossmr.data.registration import RegistrationMode, registration_mode
from crossmr.device import autocast, choose_precision, in_batches, out_of_memory
from crossmr.errors import ConfigError
from crossmr.networks.diffusion import ddim_timesteps
from crossmr.networks.model import GUIDANCES, CrossConditionedModel, Guidance, ModelConfig
from crossmr.networks.unet import FEATURES_ALIVE
from crossmr.tensors import PLANES, crop_or_pad, foreground_slices, neighbours, planes_of, seeded, to_model_input

Array = npt.NDArray[np.float32]

BATCH = 16
"""Slices that pass through the networks at once, at most."""
PIXELS = 2**20
"""Pixels of all the slices that pass at once, at most: BATCH slices of 256 × 256, fewer of larger ones."""


Scale = Literal["unit", "input"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class InferenceSettings:
    """How to synthesise; the same settings and inputs give the same voxels."""

    targets: Sequence[str] | None = None
    """Modalities requested, in any usual spelling: one, such as "t2f", or several, such as "T1ce,FLAIR"; None for all
    that are missing and the model knows."""
    guidance: Guidance | None = None
    """'sample' (the MDN is given the sources), 'unconditional' (as published), 'reference' (the representation of
    another study's real scans), 'none'; None for what the model was trained with."""
    ddim_steps: int = 50
    """DDIM steps of the MDN."""
    samples: int | None = None
    """Guided syntheses whose mean the image is, where it is guided; None for one."""
    reference: Path | None = None
    """Folder of the study that guidance 'reference' represents: an earlier visit, or one of the site's protocol."""
    planes: int | None = None
    """1 for axial slices alone, in about a third of the time; None for as many planes as the model has learnt."""
    seed: int = 0
    """Of the sampled representation; each case derives its own from it and its name."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; a model that was already loaded stays where it is."""
    precision: str = "auto"
    """'auto', 'bfloat16' or 'float32'."""
    register: RegistrationMode = "never"
    """Whether a study's volumes are moved rigidly onto the first one's grid: 'if needed', those on another grid."""
    scale: Scale = "unit"
    """Of completed studies: 'unit' for [0, 1], 'input' for intensities like those of an acquired volume."""

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", modality_names(self.targets))
        object.__setattr__(self, "register", registration_mode(self.register))
        read_text(self, "reference", Path | None, Path, "earlier/visit")
        read_whole(self, "ddim_steps", "samples", "planes", "seed")
        if self.guidance is not None and self.guidance not in GUIDANCES:
            raise ConfigError(f"--guidance is '{self.guidance}'; expected one of {', '.join(GUIDANCES)}.")
        if self.scale not in SCALES:
            raise ConfigError(f"--scale is '{self.scale}'; expected one of {', '.join(SCALES)}.")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"--samples is {self.samples}; expected at least 1.")
        if (self.guidance == "reference") != (self.reference is not None):
            raise ConfigError("--guidance reference and --reference STUDY go together; give both, or neither.")


@dataclass(frozen=True, eq=False)
class HeadVolumes:
    """The acquired volumes of one head, as the networks read them."""

    volumes: Mapping[str, Array]
    """Modality → (Z, Y, X) in [0, 1], cropped to the head."""
    foreground_voxels: Sequence[int]
    """Voxels of head in each axial slice."""
    spacing_mm: float
    """Distance of the axial slices."""
    in_plane_mm: tuple[float, float] = (1.0, 1.0)
    """Distance of their rows and columns, which are coronal and sagittal slices."""

    @classmethod
    def of(
        cls, volumes: Mapping[str, Array], head: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float]
    ) -> "HeadVolumes":
        """Volumes with their head's mask, all (Z, Y, X), and the distance of their voxels along these."""
        slices_mm, rows_mm, columns_mm = spacing_mm
        return cls(volumes, head.sum((1, 2)).tolist(), slices_mm, (rows_mm, columns_mm))


class Synthesis(NamedTuple):
    """The synthetic targets of one head."""

    targets: tuple[str, ...]
    """Their modalities, in the order of the images."""
    images: Tensor
    """(W, Z, Y, X) in [0, 1], on the CPU."""
    stds: Tensor | None
    """(W, Z, Y, X), the standard deviation of each voxel's error: learnt, or else of two or more samples."""
    batch: int = BATCH
    """Slices that passed through the networks at once; 1 of a network that reads volumes."""
    window: tuple[int, ...] = ()
    """Of a network that reads volumes: the voxels (Z, Y, X) that passed at once."""


def check_settings(model: CrossConditionedModel, settings: InferenceSettings) -> None:
    """Refuse, before anything runs, what this model cannot do.

    Raises:
        ConfigError: a target or a guidance that it was not trained for, or an impossible step count.
    """
    config = model.config
    for target in settings.targets or ():
        if target not in config.targets:
            raise ConfigError(f"This model cannot synthesise {target}; it was trained for {', '.join(config.targets)}.")
    guidance = chosen_guidance(model, settings)
    if guidance == "none" and config.guidance == "joint":
        raise ConfigError(
            "This model's C-UNet was always guided in training; for an unguided baseline train one with "
            "--set guidance=none, and compare with: crossmr evaluate MODEL --against BASELINE"
        )
    if guidance != "none" and config.guidance == "none":
        raise ConfigError(
            f"This model was trained without guidance, so --guidance {guidance} means nothing to it; "
            "use guidance 'none'."
        )
    if guidance == "sample" and not config.distribution.conditional:
        raise ConfigError("This model's MDN was trained without a condition; use guidance 'unconditional'.")
    if settings.samples and guidance in ("none", "reference"):
        raise ConfigError(f"--samples are drawn, and guidance '{guidance}' draws none; add --guidance sample.")
    if settings.planes not in (None, 1, config.planes):
        raise ConfigError(f"--planes is {settings.planes}; this model has learnt {config.planes}, so give that, or 1.")
    ddim_timesteps(config.distribution.schedule.steps, settings.ddim_steps)
    choose_precision(settings.precision, model.device)


def chosen_guidance(model: CrossConditionedModel, settings: InferenceSettings) -> Guidance:
    """The guidance that is asked for, or else the model's default."""
    return settings.guidance or model.config.default_guidance


def samples_drawn(model: CrossConditionedModel, settings: InferenceSettings) -> int:
    """How many representations are drawn."""
    return 0 if chosen_guidance(model, settings) in ("none", "reference") else settings.samples or 1


def chosen_planes(model: CrossConditionedModel, settings: InferenceSettings) -> int:
    """In how many planes a volume with thin slices is completed."""
    return settings.planes or model.config.planes


def slices_at_once(pixels: int) -> int:
    """How many slices of so many pixels pass through the networks at once, while there is memory for them."""
    return max(1, min(BATCH, PIXELS // max(1, pixels)))


def passing_memory(config: ModelConfig, shape: Sequence[int]) -> int:
    """About how many bytes of features pass through the C-UNet at once, of an image of this shape (X, Y, Z)."""
    if config.spatial_dims == 3:
        points = math.prod(config.window)
    else:
        areas = [math.prod(sides) for sides in itertools.combinations(shape, 2)]
        area = shape[0] * shape[1] if config.planes == 1 else max(areas)
        points = slices_at_once(area) * area
    pixels = math.prod([config.synthesis.patch] * config.spatial_dims)
    return 4 * FEATURES_ALIVE * config.synthesis.channels * points // pixels


Watch = Callable[[int, int], object]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Within this, and in its thread, `watch` is called with the slices of a head that are done, and with all."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@torch.no_grad()
def synthesise(
    model: CrossConditionedModel,
    head: HeadVolumes,
    case: str,
    settings: InferenceSettings,
    reference: HeadVolumes | None = None,
) -> Synthesis:
    """Synthesise settings.targets, by default all of the model's, from a head's sources.

    A model of any subset may be given some of its sources only; what it returns for these themselves means nothing.
    Guidance is one vector per sample for the whole volume, drawn from seeds that follow from settings.seed and the
    case's name; the image is the mean over the samples. Axial slices without any head stay zero. `reference` holds the
    real scans of targets that guidance 'reference' represents.
    """
    targets = tuple(settings.targets or model.config.targets)
    sources = model.config.sources
    available = torch.tensor([[float(m in head.volumes) for m in sources]], device=model.device)  # (1, S)
    with autocast(model.device, choose_precision(settings.precision, model.device)):
        vectors = _guidance_vectors(model, head, available, case, settings, reference)
        predictor = _Predictor(model, available, vectors, [model.config.targets.index(target) for target in targets])
        batch, window = 1, tuple[int, ...]()
        if model.config.spatial_dims == 3:
            channels, window = _by_windows(model, head, predictor)
        else:
            channels, batch = _by_slices(model, head, predictor, chosen_planes(model, settings))
    channels[:, [z for z, voxels in enumerate(head.foreground_voxels) if not voxels]] = 0
    images, stds = channels[: len(targets)].clamp_(0, 1), channels[len(targets) :]
    return Synthesis(targets, images, stds if len(stds) else None, batch, window)


def _guidance_vectors(
    model: CrossConditionedModel,
    head: HeadVolumes,
    available: Tensor,
    case: str,
    settings: InferenceSettings,
    reference: HeadVolumes | None,
) -> Tensor | None:
    """What guides each synthesis of a volume, (K, T·D), or None."""
    config, guidance = model.config, chosen_guidance(model, settings)
    if guidance == "none":
        return None
    missing = torch.tensor([[float(m not in head.volumes or not config.any_subset) for m in config.targets]])  # (1, T)
    if guidance == "reference":
        if reference is None:
            raise ConfigError("Guidance 'reference' needs real scans of the model's targets.")
        real = missing * torch.tensor([[float(m in reference.volumes) for m in config.targets]])
        return model.y_0(_pooled(model, reference, config.targets), real.to(model.device))
    condition = None
    if guidance == "sample":
        condition = model.condition(_pooled(model, head, config.sources), available)
    keys = [("case", settings.seed, case, *([k] if k else ())) for k in range(samples_drawn(model, settings))]
    return model.draw([seeded(*key) for key in keys], condition, missing, steps=settings.ddim_steps)


def _pooled(model: CrossConditionedModel, head: HeadVolumes, modalities: Sequence[str]) -> Tensor:
    """The mean of the pooled features over a volume's slices with enough head, (1, M, D)."""
    config = model.config
    slices = foreground_slices(head.foreground_voxels)
    volumes = _volumes(head.volumes, modalities)
    count = 1 if config.spatial_dims == 3 else len(slices)

    def pool(some: slice) -> Tensor:
        images = _inputs(volumes, [[z] for z in slices[some]], config.spatial_dims, config.divisor)
        return model.pooled(images.to(model.device))

    at_once = slices_at_once(math.prod(volumes[0].shape[-2:]))
    return torch.cat([features for _, features, _ in in_batches(pool, count, at_once)]).mean(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Predictor:
    """What the networks make of a batch of slices, or of one window."""

    model: CrossConditionedModel
    available: Tensor
    """(1, S), which sources there are."""
    vectors: Tensor | None
    """(K, T·D), the guidance of each synthesis that is averaged."""
    chosen: Sequence[int]
    """Indices of the targets requested."""

    def __call__(self, neighbours: Tensor) -> Tensor:
        """Map sources (N, S·C, *S) to images and, where there are any, standard deviations, as channels (N, W, *S)."""
        model = self.model
        inputs = model.network_input(neighbours, self.available.expand(len(neighbours), -1))
        unguided = log_scale = None
        if self.vectors is None or model.config.uncertainty:
            unguided, log_scale = model.predict(inputs)
        mean, std, samples = self._mean(inputs, unguided)
        if log_scale is not None:  # of the unguided synthesis
            std = model.std(log_scale)[:, self.chosen] * (inputs[:, -1:] > 0)
        return mean if log_scale is None and samples < 2 else torch.cat([mean, std], 1)

    def _mean(self, inputs: Tensor, unguided: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation (N, W, *S) of the syntheses, and their number; one at a time (Welford 1962)."""
        mean = squares = torch.zeros((), device=inputs.device)
        samples = 0
        for y_0 in [None] if self.vectors is None else self.vectors:
            one = unguided if y_0 is None else self.model.predict(inputs, y_0.expand(len(inputs), -1))[0]
            image = self.model.image(cast(Tensor, one), inputs)[:, self.chosen]
            samples += 1
            off = image - mean
            mean = mean + off / samples
            squares = squares + off * (image - mean)
        return mean, (squares / max(1, samples - 1)).sqrt(), samples


def _by_slices(model: CrossConditionedModel, head: HeadVolumes, predict: _Predictor, planes: int) -> tuple[Tensor, int]:
    """Predict the slices that hold any head, (W, Z, Y, X), in one plane or as the mean of three; how many at once."""
    config, targets = model.config, len(predict.chosen)
    volumes, result, done, batch = _volumes(head.volumes, config.sources), torch.zeros(0), 0, BATCH
    squares = torch.zeros(targets, dtype=torch.float64)
    cuts = [_cut(volumes, plane, head, config.context_slices) for plane in planes_of(planes, head.spacing_mm)]
    total = sum(len(cut.slices) for cut in cuts)
    for cut in cuts:

        def predict_some(some: slice, cut: _Cut = cut) -> Tensor:
            inputs = _inputs(cut.volumes, cut.around[some], 2, config.divisor).to(model.device)
            return predict(inputs.contiguous(memory_format=torch.channels_last)).cpu()

        size = cut.volumes[0].shape[2:]
        for some, predicted, at_once in in_batches(predict_some, len(cut.slices), slices_at_once(math.prod(size))):
            batch = at_once
            if not len(result):
                result = torch.zeros(predicted.shape[1], *volumes[0].shape[1:])
            cropped = crop_or_pad(predicted, size, [0.5] * 2).transpose(0, 1)
            if len(cuts) > 1:
                cropped[targets:] **= 2
                squares += (cropped[:targets].double() ** 2).flatten(1).sum(1)
            _turned(result, cut.plane)[:, cut.slices[some]] += cropped
            done += len(predicted)
            if (watch := _watch.get()) is not None:
                watch(done, total)
    if len(cuts) > 1:
        _average_planes(result[:targets], result[targets:], squares, len(cuts))
    return result, batch


def _average_planes(images: Tensor, variances: Tensor, squares: Tensor, planes: int) -> None:
    """Make sums over planes their mean image and its standard deviation, in place.

    The squared error of a mean image is the planes' mean squared error less their spread about it (ambiguity
    decomposition, Krogh and Vedelsby 1995). The planes' mean variance is scaled by what that leaves over the volume,
    target by target, but to no less than 1/`planes`, which is right where the planes' errors are independent.

    Args:
        planes: how many were added up.
        images: (T, Z, Y, X), sums of the planes' images.
        variances: (T, Z, Y, X), sums of their variances, or empty.
        squares: (T,), sums over planes and voxels of the squared images.
    """
    images /= planes
    if not len(variances):
        return
    variances /= planes
    spread = squares / planes - (images.double() ** 2).flatten(1).sum(1)
    left = 1 - spread / variances.double().flatten(1).sum(1).clamp(min=1e-12)
    variances *= left.clamp(1 / planes, 1)[:, None, None, None].to(variances)
    variances.sqrt_()


class _Cut(NamedTuple):
    """Volumes as they are cut in one plane."""

    plane: str
    volumes: Sequence[Tensor]
    """(1, slices, rows, columns), uncopied."""
    slices: Sequence[int]
    """Those that hold any head."""
    around: Sequence[Sequence[int]]
    """Each with its neighbours."""


def _cut(volumes: Sequence[Tensor], plane: str, head: HeadVolumes, context: int) -> _Cut:
    """Volumes (1, Z, Y, X) in one plane."""
    turned = [_turned(volume, plane) for volume in volumes]
    if plane == "axial":
        slices = [z for z, voxels in enumerate(head.foreground_voxels) if voxels]
    else:
        slices = torch.stack([(volume[0] > 0).flatten(1).any(1) for volume in turned]).any(0).nonzero()[:, 0].tolist()
    spacing_mm = (head.spacing_mm, *head.in_plane_mm)[PLANES[plane][0]]
    return _Cut(plane, turned, slices, [neighbours(z, context, len(turned[0][0]), spacing_mm) for z in slices])


def _turned(channels: Tensor, plane: str) -> Tensor:
    """Volumes (W, Z, Y, X) as a plane's slices, rows and columns, uncopied."""
    return channels.permute(0, *(1 + axis for axis in PLANES[plane]))


def _by_windows(
    model: CrossConditionedModel, head: HeadVolumes, predict: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[int, ...]]:
    """Predict a volume, (W, Z, Y, X), window by window, and how large a window was: half as large if memory runs out.

    The volume and its prediction stay in main memory; the device holds one window.
    """
    from monai.inferers import sliding_window_inference

    config, window = model.config, tuple(model.config.window)
    volumes = _volumes(head.volumes, config.sources)
    whole = _inputs(volumes, (), 3, config.divisor)
    while True:
        try:
            result = sliding_window_inference(
                whole, window, 1, predict, overlap=0.25, mode="gaussian", sw_device=model.device, device="cpu"
            )
            return crop_or_pad(cast(Tensor, result)[0], volumes[0].shape[1:], [0.5] * 3), window
        except (RuntimeError, MemoryError) as error:
            smaller = tuple(max(1, side // 2 // config.stride) * config.stride for side in window)
            if smaller == window or not out_of_memory(error):
                raise
            window = smaller


def _volumes(given: Mapping[str, Array], modalities: Sequence[str]) -> list[Tensor]:
    """The volume of each modality, (1, Z, Y, X), uncopied; what is missing is zero, without memory of its own."""
    nothing = torch.zeros(()).expand(next(iter(given.values())).shape)
    return [(torch.from_numpy(given[m]) if m in given else nothing)[None] for m in modalities]


def _inputs(volumes: Sequence[Tensor], slices: Sequence[Sequence[int]], dims: int, divisor: int) -> Tensor:
    """What `to_model_input` makes of each of these volumes, as channels."""
    return torch.cat([to_model_input(volume, slices, dims, divisor) for volume in volumes], 1)
