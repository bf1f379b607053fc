"""The networks composed into one model, and the folder it lives in.

MODEL/
├── config.json                 the configuration, how it was trained, and the SHA-256 of every file below
├── representation.safetensors  MRM, where the C-UNet can be guided
├── distribution.safetensors    MDN, where the C-UNet can be guided
├── synthesis.safetensors       C-UNet
├── calibration.safetensors     what makes its standard deviations true on validation patients, where it gives any
├── baselines.safetensors       the baselines that every evaluation prints beside the model
└── patients.json               on whom it was trained, as slow hashes; may be missing, see trained_on.py
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.config import from_dict, to_dict
from crossmr.errors import ConfigError, CrossmrError, ModelError
from crossmr.files import digest
from crossmr.networks.c_unet import CUNet, SynthesisConfig
from crossmr.networks.distribution import DistributionConfig, DistributionNetwork
from crossmr.networks.masked_autoencoder import MaskedAutoencoder, RepresentationConfig, z_score
from crossmr.networks.scale import RANGE, on_unit_scale, standardise
from crossmr.networks.trained_on import FILE, PatientList, is_seen, read_list, write_list
from crossmr.paths import check_model
from crossmr.tensors import seeded
from crossmr.typical import is_typical

FORMAT = "crossmr-model"
FORMAT_VERSION = 9
EXTRAS = ("baselines", "calibration")
"""Files beside the networks'."""
LOG_SCALE_RANGE = -5.0, 3.0
"""Range of log b, b being the error that the C-UNet expects, in robust standard deviations."""
INHERITED = -1
"""Stands for a count of patients where a target's calibration is the initial model's: see `calibrated_on`."""
PADDING = 16
"""Sides of completed images are padded to multiples of this at least, so that heads of similar size share one shape."""
Guidance = Literal["sample", "unconditional", "reference", "none"]
GUIDANCES: tuple[Guidance, ...] = ("sample", "unconditional", "reference", "none")


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to build the networks and to use them."""

    sources: tuple[str, ...]
    """Modalities the model reads, in channel order."""
    targets: tuple[str, ...]
    """Modalities it synthesises, in channel order: the sources, of which then any subset may be missing, or others."""
    spatial_dims: int = 2
    """2: axial slices, as published. 3: volumes."""
    window: tuple[int, ...] = (224, 224)
    """Size of the training crops, in voxels; larger volumes are completed 3D window by 3D window."""
    context_slices: int = 1
    """Axial slices of each source that a synthetic slice is made from: itself and as many above as below."""
    planes: int = 1
    """1: the C-UNet learns axial slices. 3: coronal and sagittal ones, too, and the image is the mean of the three."""
    guidance: Literal["joint", "last", "none"] = "joint"
    """How the C-UNet learns to use y_0. 'joint': its condition layers learn with the rest, on samples of the MDN, as
    published. 'last': they learn alone, after the rest, on the true y_0. 'none': no MRM and no MDN, a plain U-Net."""
    uncertainty: bool = False
    """Whether the C-UNet learns, beside the image, how large the error of each voxel of its unguided image is."""
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    """Stage 1."""
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    """Stage 2."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """Stage 3."""

    def __post_init__(self) -> None:
        named = self.modalities
        if not self.sources or not self.targets or len(set(named)) < len(named) or len(named) < 2:
            sources, targets = ", ".join(self.sources) or "none", ", ".join(self.targets) or "none"
            raise ConfigError(
                f"sources are {sources}, targets {targets}; expected at least one of each and none twice; for any "
                "subset, the same two or more for both."
            )
        if self.spatial_dims not in (2, 3) or len(self.window) != self.spatial_dims:
            raise ConfigError(
                f"spatial_dims is {self.spatial_dims} and the crop {self.window}; expected 2 or 3, and as many sides."
            )
        if any(side < 1 or side % self.stride for side in self.window):
            raise ConfigError(f"The crop is {self.window}; expected multiples of {self.stride}, the networks' stride.")
        if self.context_slices not in (1, 3, 5) or (self.context_slices > 1 and self.spatial_dims == 3):
            raise ConfigError(f"context_slices is {self.context_slices}; expected 1, 3 or 5, and 1 in 3D.")
        if self.planes not in (1, 3) or (self.planes == 3 and (self.spatial_dims == 3 or self.guidance != "none")):
            raise ConfigError(f"planes is {self.planes}; expected 1 or 3, and 1 in 3D or with guidance.")
        if self.guidance == "joint" and self.any_subset:
            raise ConfigError(
                "any_subset needs guidance 'last' or 'none': with 'joint' representations are drawn once per case, and "
                "would fit one of its subsets alone."
            )
        if self.uncertainty and self.guidance == "joint":
            raise ConfigError(
                "uncertainty is of the unguided image, which guidance 'joint' does not have; choose 'last' or 'none'."
            )

    @property
    def any_subset(self) -> bool:
        """Whether any subset of the modalities may be missing."""
        return self.sources == self.targets

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that the model knows: sources, then targets, each once."""
        return self.sources if self.any_subset else (*self.sources, *self.targets)

    @property
    def represented(self) -> tuple[str, ...]:
        """Modalities that the MRM learns: the targets, and, where the MDN is conditional, the sources."""
        return self.modalities if self.distribution.conditional else self.targets

    @property
    def in_channels(self) -> int:
        """Channels that the C-UNet reads."""
        return len(self.sources) * (self.context_slices + self.any_subset) + 1

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in the order of their training."""
        guided = ("representation", "distribution") if self.guidance != "none" else ()
        last = ("guidance",) if self.guidance == "last" else ()
        return (*guided, "synthesis", *last)

    @property
    def default_guidance(self) -> Guidance:
        """What guides an image unless something else is asked for: what the C-UNet was trained with, or nothing."""
        if self.guidance != "joint":
            return "none"
        return "sample" if self.distribution.conditional else "unconditional"

    @property
    def stride(self) -> int:
        """What every side of an image must be a multiple of: how far the networks' deepest features lie apart."""
        return math.lcm(self.synthesis.stride, self.representation.stride if self.guidance != "none" else 1)

    @property
    def divisor(self) -> int:
        """What the sides of completed images are padded to multiples of."""
        return math.lcm(PADDING, self.stride)


class CrossConditionedModel(nn.Module):
    """MRM, MDN and C-UNet of one configuration, as far as it has them.

    `seed` and a network's name decide its first weights, so that no network changes another's. `baselines` holds the
    fitted baselines; `calibration` 'variance' (T, 2): the squared error of a target, in robust standard deviations, is
    a·variance + c, and 'patients' (T,), see `calibrated_on`. `record`, once loaded, is its SHA-256 and how it was
    trained, `patients` on whom, as far as known.
    """

    representation: MaskedAutoencoder | None
    distribution: DistributionNetwork | None
    synthesis: CUNet

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__()
        dims, guided = config.spatial_dims, config.guidance != "none"
        sources, targets, dim = len(config.sources), len(config.targets), config.representation.dim
        self.config = config
        self.representation = self.distribution = None
        if guided:
            with first_weights(seed, "representation"):
                self.representation = MaskedAutoencoder(config.representation, dims)
            with first_weights(seed, "distribution"):
                self.distribution = DistributionNetwork(config.distribution, targets * dim, sources * (dim + 1))
        with first_weights(seed, "synthesis"):
            self.synthesis = CUNet(
                config.synthesis,
                config.in_channels,
                targets * (1 + config.uncertainty),
                dims,
                representation_dim=targets * dim if guided else None,
            )
        if config.guidance == "last":
            self.synthesis.zero_condition()
        self.baselines: dict[str, Tensor] = {}
        self.calibration: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {}
        self.patients: tuple[PatientList, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def networks(self) -> dict[str, nn.Module]:
        """The networks there are, by the names of their files."""
        return dict(self.named_children())

    def network_of(self, stage: str) -> nn.Module:
        """The network that a stage trains."""
        return self.networks()["synthesis" if stage == "guidance" else stage]

    def network_input(self, neighbours: Tensor, available: Tensor) -> Tensor:
        """What the C-UNet reads of the sources.

        Args:
            neighbours: (N, S·C, *S) in [0, 1], of each source C = context_slices slices around the synthetic one.
            available: (N, S), 0 where a source is missing or to be hidden, where any subset may be; else ignored.

        Returns:
            (N, in_channels, *S): the standardised images, 0 where nothing is available; then, where any subset may be
            missing, for each source a map of where it is available and more than 0; then a map of the head, where any
            available source is more than 0. Of fixed sources no map tells what one lacks alone from its median.
        """
        config, count = self.config, neighbours.shape[1]
        slices = rearrange(neighbours, "n (s c) ... -> n s c ...", c=config.context_slices)
        middle = slices[:, :, config.context_slices // 2] > 0  # (N, S, *S)
        if config.any_subset:
            middle = middle & (available > 0)[(...,) + (None,) * (middle.ndim - 2)]
        head = middle.any(1, keepdim=True)
        layout = torch.channels_last if neighbours.ndim == 4 else torch.contiguous_format
        shape = len(neighbours), config.in_channels, *neighbours.shape[2:]
        whole = torch.empty(shape, dtype=neighbours.dtype, device=neighbours.device, memory_format=layout)
        whole[:, :count] = standardise(neighbours)
        if config.any_subset:
            there = middle.flatten(2).any(-1)[(...,) + (None,) * (middle.ndim - 2)]  # (N, S, 1, ...)
            whole[:, :count] *= there.repeat_interleave(config.context_slices, 1)
            whole[:, count:-1] = middle
        whole[:, -1:] = head
        return whole

    def predict(self, inputs: Tensor, y_0: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the C-UNet makes of inputs (N, in_channels, *S), guided by y_0 (N, T·D) or by nothing; float32.

        Returns standardised images (N, T, *S) and, where it learns them, the logarithms (N, T, *S) of the absolute
        errors that are to be expected of them.
        """
        return self.split(self.synthesis(inputs, y_0))

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The C-UNet's outputs (N, O, *S) as images and logarithms of expected errors; see `predict`."""
        targets, outputs = len(self.config.targets), outputs.float()
        if not self.config.uncertainty:
            return outputs, None
        return outputs[:, :targets], outputs[:, targets:].clamp(*LOG_SCALE_RANGE)

    def image(self, standardised: Tensor, inputs: Tensor) -> Tensor:
        """Standardised images (N, T, *S) in [0, 1], exactly 0 outside the head of the inputs (N, in_channels, *S)."""
        return on_unit_scale(standardised) * (inputs[:, -1:] > 0)

    def pooled(self, images: Tensor) -> Tensor:
        """The pooled features (N, M, D) of images (N, M, *S) in [0, 1], from which `y_0` and `condition` are made.

        Raises:
            ConfigError: the model has no MRM.
        """
        if self.representation is None:
            raise ConfigError("This model was trained without guidance; use guidance 'none'.")
        return self.representation.pooled(standardise(images))

    def y_0(self, pooled: Tensor, mask: Tensor) -> Tensor:
        """The representation (N, M·D) of pooled features (N, M, D): z-scored per modality, 0 where mask (N, M) is 0."""
        return (z_score(pooled) * mask.to(pooled)[..., None]).flatten(1)

    def condition(self, pooled: Tensor, available: Tensor) -> Tensor:
        """What a conditional MDN is given of the sources (N, S, D): their representations, and which are available."""
        return torch.cat([self.y_0(pooled, available), available.to(pooled)], 1)  # (N, S·D + S)

    def target_features(self, target_mask: Tensor) -> Tensor:
        """(N, T·D) of zeros and ones: the features of the targets in target_mask (N, T)."""
        return target_mask.repeat_interleave(self.config.representation.dim, 1)

    def draw(
        self,
        generators: Sequence[torch.Generator],
        condition: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        steps: int = 50,
    ) -> Tensor:
        """Draw one y_0 (K, T·D) per generator for one volume.

        `condition` (1, C) of the volume's sources; None draws from p(y_0), as published. `target_mask` (1, T), all by
        default: the other targets' features are zero.

        Raises:
            ConfigError: there is no MDN, or it was trained without the condition.
        """
        if self.distribution is None:
            raise ConfigError("This model was trained without guidance; use guidance 'none'.")
        if condition is not None and not self.config.distribution.conditional:
            raise ConfigError("This model's MDN was trained without a condition; use guidance 'unconditional'.")
        count = len(generators)
        given = None if condition is None else condition.to(self.device).expand(count, -1)
        mask = None if target_mask is None else self.target_features(target_mask.to(self.device)).expand(count, -1)
        return self.distribution.sample(generators, given, mask, steps=steps)

    def std(self, log_scale: Tensor) -> Tensor:
        """Standard deviations (N, T, *S) on the [0, 1] scale, from the logarithms of `predict`; calibrated if known."""
        variance = laplace_variance(log_scale)
        if self.calibration:
            a, c = self.calibration["variance"].to(variance).unbind(1)
            whole = (...,) + (None,) * (variance.ndim - 2)
            variance = a[whole] * variance + c[whole]
        return variance.sqrt() / RANGE


def calibrated_on(calibration: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, int | None]:
    """Target → how many validation patients its standard deviation was fitted to: 0 where it was not calibrated.

    INHERITED where it was fitted to the errors of the model that the training started from; None where it is not known
    how many, as of models that were trained before that was kept.
    """
    variance, patients = calibration.get("variance"), calibration.get("patients")
    if variance is None:
        return dict.fromkeys(targets, 0)
    counts = [None] * len(targets) if patients is None else patients.tolist()
    pairs = zip(targets, counts, variance.tolist(), strict=True)
    return {target: 0 if pair == [1, 0] else count for target, count, pair in pairs}


def laplace_variance(log_scale: Tensor) -> Tensor:
    """The variance 2·b² of a Laplace distribution of scale b, from log b."""
    return 2 * (2 * log_scale).exp()


@contextmanager
def first_weights(seed: int, name: str) -> Iterator[None]:
    """Build a network within this: its first weights follow from the seed and its name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded("weights", seed, name).get_state())
        yield


def save_model(
    folder: Path, model: CrossConditionedModel, training: Mapping[str, Any], patients: Sequence[PatientList] = ()
) -> None:
    """Write a model folder; config.json comes last, so that a half-written folder is not a model.

    `training` is the record of it, and `patients` on whom it was, as far as that is known.
    """
    (folder / FILE).unlink(missing_ok=True)
    if patients:
        write_list(folder, patients)
    tensors: dict[str, Mapping[str, Tensor]] = {name: net.state_dict() for name, net in model.networks().items()}
    tensors |= {name: extra for name in EXTRAS if (extra := getattr(model, name))}
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": to_dict(model.config),
        "training": dict(training),
    }
    save_bundle(folder, tensors, data, "config")


def read_model(folder: Path | str, device: torch.device | str = "cpu") -> CrossConditionedModel:
    """Read a model folder, ready for use.

    Raises:
        ModelError: it is missing, damaged, of another version, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    check_model(folder)
    tensors, data = load_bundle(folder, "config")
    _check_record(folder, data)
    extras = {name: tensors.pop(name, {}) for name in EXTRAS}
    try:
        config = from_dict(ModelConfig, cast(dict[str, Any], data["config"]))
        _check_blocks(config, sum(len(group) for group in tensors.values()))
        with torch.device("meta"):  # names and shapes are compared before memory is taken
            model = CrossConditionedModel(config)
    except (CrossmrError, RuntimeError, MemoryError, OverflowError, TypeError) as error:  # TypeError: beyond 64 bits
        reason, *_ = str(error).split("\n")
        raise ModelError(f"{folder / 'config.json'}: {reason}") from error
    if set(tensors) != set(model.networks()):
        raise ModelError(
            f"{folder} holds {', '.join(sorted(tensors))}; expected {', '.join(sorted(model.networks()))}."
        )
    for name, network in model.networks().items():
        _load_weights(folder / f"{name}.safetensors", network, tensors[name])
    if not _calibration_fits(extras["calibration"], len(config.targets)):
        raise ModelError(f"{folder / 'calibration.safetensors'} does not fit config.json. Copy the model again.")
    if not _baselines_fit(extras["baselines"], len(config.modalities)):
        raise ModelError(f"{folder / 'baselines.safetensors'} does not fit config.json. Copy the model again.")
    model.baselines, model.calibration = dict(extras["baselines"]), dict(extras["calibration"])
    model.record, model.patients = {"sha256": digest(data), "training": data["training"]}, read_list(folder)
    return model.to(device).eval().requires_grad_(False)


def _check_record(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse another format, or a config.json that lacks what a model needs."""
    found = (data.get("format"), data.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ModelError(
            f"{folder} is {found[0]} {found[1]}; this crossmr reads {FORMAT} {FORMAT_VERSION}. "
            "Update crossmr, or train the model again."
        )
    if missing := {"config", "training"} - set(data):
        raise ModelError(f"{folder / 'config.json'} has no '{min(missing)}'. Copy or train the model again.")
    record = data["training"]
    if not (
        isinstance(record, dict)
        and is_seen(record.get("seen", {}))
        and is_typical(record.get("typical", {}))
        and _is_validation(record.get("validation", {}))
    ):
        raise ModelError(f"{folder / 'config.json'}: 'training' is not a record of one. Copy or train the model again.")


def _is_validation(record: Any) -> bool:
    """Whether what a model's record says of its validation is, of each target, two correlations."""
    return isinstance(record, dict) and all(
        isinstance(one, dict) and [type(one.get(who)) for who in ("correlation", "linear_regression")] == [float] * 2
        for one in record.values()
    )


def _check_blocks(config: ModelConfig, tensors: int) -> None:
    """Refuse more blocks than there are tensors: even without weights, to build them could take hours."""
    guided = (config.representation, config.distribution) if config.guidance != "none" else ()
    if (blocks := max(form.blocks for form in (config.synthesis, *guided))) > tensors:
        raise ModelError(f"blocks is {blocks}, but the model has {tensors} tensors. Copy or train it again.")


def _load_weights(file: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network on the meta device its weights, after checking that every one fits and is finite."""
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ModelError(f"{file} holds weights that are no real numbers. Copy it again.")
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*wanted, *shapes}):
        if wanted.get(name) != shapes.get(name):
            there, needed = (f"{s[name]}" if name in s else "missing" for s in (shapes, wanted))
            raise ModelError(
                f"{file} does not fit config.json: {name} is {there}, expected {needed}. Copy or train it again."
            )
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise ModelError(f"{file} holds NaN or infinite weights; the training diverged. Train it again.")
    network.load_state_dict(weights, assign=True)


def _calibration_fits(calibration: Mapping[str, Tensor], targets: int) -> bool:
    """Whether the calibration, where there is one, is of so many targets; older ones do not count patients."""
    variance = calibration.get("variance", torch.zeros(0))
    if not calibration or variance.shape != (targets, 2) or variance.dtype != torch.float32:
        return not calibration
    patients = calibration.get("patients", torch.zeros(targets, dtype=torch.int32))
    if patients.shape != (targets,) or patients.dtype != torch.int32:
        return False
    return bool((torch.isfinite(variance) & (variance >= 0)).all())


def _baselines_fit(baselines: Mapping[str, Tensor], count: int) -> bool:
    """Whether the baselines, where there are any, are of so many modalities; see `fit_baselines`."""
    if not baselines:
        return True
    present, gram, mean = (baselines.get(name, torch.zeros(0)) for name in ("present", "gram", "mean_image"))
    if present.shape[1:] != (count,) or gram.shape != (len(present), count + 1, count + 1):
        return False
    return gram.dtype == torch.float64 and bool(torch.isfinite(gram).all()) and mean.ndim == 4 and len(mean) == count
