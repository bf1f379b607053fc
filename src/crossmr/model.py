"""The three networks composed into one model, and the folder it lives in.

MODEL/
├── config.json                      the configuration, how it was trained, and the SHA-256 of every file
├── representation.safetensors       MRM of the targets
├── source_representation.safetensors  MRM of the sources, where the MDN is conditional
├── distribution.safetensors         MDN
├── synthesis.safetensors            C-UNet
├── twin.safetensors                 its unguided twin, where one was trained; with cells the C-UNet is its own
├── uncertainty.safetensors          with cells, the network that says how far a synthesis may be off
├── calibration.safetensors          and what makes its standard deviations true on validation patients
└── trivial.safetensors              the trivial predictors that every evaluation prints beside the model
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.config import from_dict, to_dict
from crossmr.errors import ConfigError, CrossmrError, ModelError
from crossmr.files import digest
from crossmr.stages.distribution import DistributionConfig, DistributionNetwork
from crossmr.stages.representation import MaskedAutoencoder, RepresentationConfig, z_score
from crossmr.stages.synthesis import (
    CUNet,
    LinearMix,
    SynthesisConfig,
    central_slices,
    mean_where_present,
    shown_sources,
)

FORMAT = "crossmr-model"
FORMAT_VERSION = 6
EXTRAS = ("trivial", "calibration")
"""Files beside the networks'."""
SHOWN = 0.1
"""Value of the map of a source that is shown: ones would drown the images in the first group normalisations."""
Guidance = Literal["sample", "unconditional", "mean", "reference", "none"]
GUIDANCES: tuple[Guidance, ...] = ("sample", "unconditional", "mean", "reference", "none")


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
    guidance: Literal["sample", "unconditional", "truth", "none"] = "unconditional"
    """What the C-UNet was shown in training: MDN samples given the sources, MDN samples given nothing (as
    published), the true target's representation (as in RCG), or nothing."""
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
                f"sources are {sources}, targets {targets}; wanted at least one of each and none twice, or two or more "
                "that are both, for any subset of them."
            )
        if self.spatial_dims not in (2, 3) or len(self.window) != self.spatial_dims:
            raise ConfigError(
                f"spatial_dims is {self.spatial_dims} and the crop {self.window}; wanted 2 or 3, and as many sides."
            )
        if any(side < 1 or side % self.divisor for side in self.window):
            raise ConfigError(f"The crop is {self.window}; wanted multiples of {self.divisor}, the networks' stride.")
        if self.guidance == "sample" and not self.distribution.conditional:
            raise ConfigError("guidance 'sample' needs distribution.conditional = true.")
        if self.representation.cell and (self.guidance != "truth" or not self.distribution.conditional):
            raise ConfigError("A grid of cells needs guidance 'truth' and distribution.conditional = true.")
        if self.context_slices not in (1, 3, 5) or (self.context_slices > 1 and self.spatial_dims == 3):
            raise ConfigError(f"context_slices is {self.context_slices}; wanted 1, 3 or 5, and 1 in 3D.")
        if (self.any_subset or self.context_slices > 1) and not self.representation.cell:
            raise ConfigError("Any subset of modalities, and neighbouring slices, need a grid of cells.")

    @property
    def any_subset(self) -> bool:
        """Whether any subset of the modalities may be missing."""
        return self.sources == self.targets

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that the model knows: sources, then targets, each once."""
        return self.sources if self.any_subset else (*self.sources, *self.targets)

    @property
    def inputs(self) -> int:
        """Channels that the C-UNet reads."""
        return len(self.sources) * (self.context_slices + self.any_subset)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in the order of their training; the twin is the C-UNet without guidance, same seeds and steps.

        With cells 'synthesis' is the C-UNet without guidance, its own twin, and 'guidance' its condition layers alone;
        the MDN is told the representation of the unguided synthesis, and the last network its error.
        """
        if self.representation.cell:
            return ("representation", "synthesis", "guidance", "distribution", "uncertainty")
        source = ("source_representation",) if self.distribution.conditional else ()
        return ("representation", *source, "distribution", "synthesis", "twin")

    @property
    def divisor(self) -> int:
        """What every side of an image must be a multiple of."""
        return math.lcm(self.synthesis.divisor, self.representation.stride, self.representation.cell or 1)


class CrossConditionedModel(nn.Module):
    """MRM, MDN and C-UNet of one configuration.

    With cells there is a network of half the C-UNet's width for the variance of its error. `trivial` holds the fitted
    trivial predictors; `calibration` 'variance' (T, 2): the squared error of a target is a·variance + b. `record`, once
    loaded, is its SHA-256 and how it was trained.
    """

    def __init__(self, config: ModelConfig, *, twin: bool = False):
        super().__init__()
        dims, cells = config.spatial_dims, bool(config.representation.cell)
        sources, targets, inputs = len(config.sources), len(config.targets), config.inputs
        told_sources = config.distribution.conditional and not cells
        self.config = config
        self.representation = MaskedAutoencoder(config.representation, targets, dims)
        self.source_representation = MaskedAutoencoder(config.representation, sources, dims) if told_sources else None
        dim = self.representation.dim
        told = dim + sources * config.any_subset
        self.distribution = DistributionNetwork(config.distribution, dim, told, dims if cells else 0)
        mixes = [
            LinearMix(sources, targets, config.context_slices, any_subset=config.any_subset)
            if config.synthesis.residual
            else None
            for _ in range(2)
        ]
        self.synthesis = CUNet(config.synthesis, inputs, targets, dim, dims, guided_last=cells, mix=mixes[0])
        self.twin = CUNet(config.synthesis, inputs, targets, None, dims, mix=mixes[1]) if twin else None
        half = replace(config.synthesis, channels=max(1, config.synthesis.channels // 2))
        self.uncertainty = CUNet(half, inputs + targets, targets, None, dims) if cells else None
        self.trivial: dict[str, Tensor] = {}
        self.calibration: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def pool_sources(self, sources: Tensor) -> Tensor:
        """The pooled features (N, D) of source images (N, S, *S), from which `guide` makes its condition.

        Raises:
            ConfigError: the MDN was trained without the condition.
        """
        if self.source_representation is None:
            raise ConfigError("This model's MDN knows no condition; use guidance 'unconditional' or 'none'.")
        return self.source_representation.pooled(sources)

    def guide(
        self,
        pooled: Tensor | None,
        generators: Sequence[torch.Generator],
        *,
        steps: int = 50,
        eta: float = 1.0,
    ) -> Tensor:
        """Draw one representation (K, D) a generator for one volume.

        `pooled` (N, D) are the pooled features of the volume's slices: their mean, z-scored, is the
        condition, so that one vector stands for the volume. None draws from p(y_0), as published.
        """
        condition = None
        if pooled is not None:
            condition = z_score(pooled.mean(0, keepdim=True)).expand(len(generators), -1)
        return self.distribution.sample(generators, condition, steps=steps, eta=eta)

    def inputs(self, around: Tensor, shown: Tensor) -> Tensor:
        """What C-UNet and the network of the error read of the sources.

        Args:
            around: (N, S·C, *S) in [0, 1], of each source C = context_slices slices around the one synthesised.
            shown: (N, S), 0 where a source is missing or to be hidden, where any subset may be; else all are there.

        Returns:
            (N, inputs, *S): what is not shown is zero; then, where any subset may be missing, a map for each source, of
            SHOWN if it is shown and not black throughout this slice, or else of zeros.
        """
        if not self.config.any_subset:
            return around
        apart = rearrange(around, "n (s c) ... -> n s c ...", c=self.config.context_slices)
        there = apart[:, :, apart.shape[2] // 2].flatten(2).amax(-1) > 0
        maps = (shown.to(around) * there)[(...,) + (None,) * (around.ndim - 2)]  # (N, S, 1, ...)
        layout = torch.channels_last if around.ndim == 4 else torch.contiguous_format
        shape = len(around), self.config.inputs, *around.shape[2:]
        whole = torch.empty(shape, dtype=around.dtype, device=around.device, memory_format=layout)
        whole[:, : around.shape[1]] = around * maps.repeat_interleave(apart.shape[2], 1)
        whole[:, around.shape[1] :] = SHOWN * maps
        return whole

    def unguided(self, inputs: Tensor) -> Tensor:
        """The synthesis (N, T, *S) of what the C-UNet reads (N, inputs, *S), guided by nothing, in [0, 1]."""
        return cast(Tensor, self.synthesis(inputs)).float().clamp(0, 1)

    def shown(self, inputs: Tensor) -> Tensor:
        """Which sources (N, S) a model of any subset is shown."""
        return shown_sources(inputs, len(self.config.sources))

    def told(self, inputs: Tensor, unguided: Tensor) -> Tensor:
        """What the MDN is told, (N, D[ + S], *G): the representation of the unguided synthesis (N, T, *S).

        Where any subset may be missing, of what is there instead, and which that is.
        """
        if not self.config.any_subset:
            return self.representation.represent(unguided)
        maps = self.shown(inputs)[(...,) + (None,) * (unguided.ndim - 2)]
        central = central_slices(inputs, len(self.config.sources), self.config.context_slices)
        cells = self.representation.represent(torch.where(maps > 0, central.float(), unguided))
        return torch.cat([cells, maps.to(cells).expand(-1, -1, *cells.shape[2:])], 1)

    def wanted_features(self, wanted: Tensor) -> Tensor:
        """(N, D) of zeros and ones: the features of the targets wanted (N, T)."""
        return wanted.repeat_interleave(self.representation.dim // len(self.config.targets), 1)

    def guidance_of(self, truth: Tensor, wanted: Tensor) -> Tensor:
        """The representation of the true targets (N, T, *S); a grid is zero where its target is not wanted (N, T)."""
        cells = self.representation.represent(truth)
        if not self.config.representation.cell:
            return cells
        return cells * self.wanted_features(wanted)[(...,) + (None,) * (cells.ndim - 2)].to(cells)

    def guide_cells(
        self,
        inputs: Tensor,
        unguided: Tensor,
        generators: Sequence[torch.Generator],
        *,
        told: bool = True,
        steps: int = 50,
        eta: float = 1.0,
    ) -> Tensor:
        """Draw a grid a generator for each of N slices from what is there and their unguided synthesis: (K, N, D, *G).

        All slices share one noise, so that neighbours agree; not `told`, the grids are drawn from p(y_0).
        """
        condition = self.told(inputs, unguided.clamp(0, 1))
        count, grid = len(generators), condition.shape[2:]
        states = [generator.get_state() for generator in generators for _ in unguided]
        noises = [torch.Generator().set_state(state) for state in states]
        repeated = condition.repeat(count, *[1] * (condition.ndim - 1)) if told else None
        wanted = None
        if self.config.any_subset:
            wanted = self.wanted_features(1 - self.shown(inputs)).repeat(count, 1)
        drawn = self.distribution.sample(noises, repeated, grid=grid, wanted=wanted, steps=steps, eta=eta)
        if wanted is not None:
            drawn = drawn * wanted[(...,) + (None,) * len(grid)]
        return drawn.reshape(count, len(unguided), *drawn.shape[1:])

    def log_variance(self, inputs: Tensor, unguided: Tensor) -> Tensor:
        """Of the error of an unguided synthesis (N, T, *S) in [0, 1] from inputs (N, inputs, *S), uncalibrated."""
        return variance_of(cast(CUNet, self.uncertainty), inputs, unguided)

    def deviation(self, inputs: Tensor, unguided: Tensor) -> Tensor:
        """The standard deviation (N, T, *S) of that error, calibrated where the model is."""
        variance = self.log_variance(inputs, unguided).exp()
        if self.calibration:
            a, b = self.calibration["variance"].to(variance).unbind(1)
            whole = (...,) + (None,) * (variance.ndim - 2)
            variance = a[whole] * variance + b[whole]
        return variance.sqrt()

    def networks(self) -> dict[str, nn.Module]:
        """The networks there are, by the names of their files."""
        return dict(self.named_children())

    def stages(self) -> dict[str, nn.Module]:
        """The stages there are, in the order of their training, and the network that each trains."""
        trained = {**self.networks(), "guidance": self.synthesis}
        return {stage: trained[stage] for stage in self.config.stages if stage in trained}


def variance_of(network: nn.Module, inputs: Tensor, unguided: Tensor) -> Tensor:
    """The logarithm of the error's variance (N, T, *S), which starts near that of a tenth of the intensity range."""
    said = cast(Tensor, network(torch.cat([inputs, unguided], 1))).float() - 4
    return said.clamp(-12, 2)


def variance_loss(network: nn.Module, inputs: Tensor, unguided: Tensor, truth: Tensor, wanted: Tensor) -> Tensor:
    """Gaussian likelihood, log σ² + error²/σ², over the targets (B, T, *S) that are wanted (B, T)."""
    log_variance = variance_of(network, inputs, unguided)
    return mean_where_present(log_variance + (unguided - truth) ** 2 / log_variance.exp(), wanted)


def pseudonym(patient: str) -> str:
    """A hash that tells whether a patient was trained on, without naming them in the model."""
    return digest(f"crossmr patient {patient}")[:16]


def save_model(folder: Path, model: CrossConditionedModel, training: Mapping[str, Any]) -> None:
    """Write a model folder; config.json comes last, so that a half-written folder is no model."""
    tensors: dict[str, Mapping[str, Tensor]] = {name: net.state_dict() for name, net in model.networks().items()}
    tensors |= {name: held for name in EXTRAS if (held := getattr(model, name))}
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": to_dict(model.config),
        "training": dict(training),
    }
    save_bundle(folder, tensors, data, "config")


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> CrossConditionedModel:
    """Read a model folder, ready for use.

    Raises:
        ModelError: it is missing, damaged, of another version, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    if not os.path.exists(folder / "config.json"):  # unlike Path.exists, of a name that is too long as well
        nested = folder / "model" / "config.json"
        hint = (
            f"Did you mean {nested.parent}?" if os.path.exists(nested) else "Train one with: crossmr train SET -o RUN"
        )
        if folder.suffix == ".zip":
            hint = f"If it is an exported one: crossmr models import {folder}"
        raise ModelError(f"{folder} is no model: it has no config.json. {hint}")
    tensors, data = load_bundle(folder, "config")
    found = (data.get("format"), data.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise ModelError(
            f"{folder} is {found[0]} {found[1]}; this crossmr reads {FORMAT} {FORMAT_VERSION}. "
            "Update crossmr, or train the model again."
        )
    if missing := {"config", "training"} - set(data):
        raise ModelError(f"{folder / 'config.json'} has no '{min(missing)}'. Copy or train the model again.")
    training = data["training"]
    if not (isinstance(training, dict) and all(isinstance(training.get(k, {}), dict) for k in ("seen", "patients"))):
        raise ModelError(f"{folder / 'config.json'}: 'training' is no record of one. Copy or train the model again.")
    extras = {name: tensors.pop(name, {}) for name in EXTRAS}
    try:
        model = CrossConditionedModel(
            from_dict(ModelConfig, cast(dict[str, Any], data["config"])), twin="twin" in tensors
        )
    except (CrossmrError, RuntimeError, MemoryError) as error:  # a network larger than memory, too
        raise ModelError(f"{folder / 'config.json'}: {error}") from error
    if set(tensors) != set(model.networks()):
        raise ModelError(f"{folder} holds {', '.join(sorted(tensors))}; wanted {', '.join(sorted(model.networks()))}.")
    for name, network in model.networks().items():
        if not all(tensor.is_floating_point() for tensor in tensors[name].values()):
            raise ModelError(f"{folder / name}.safetensors holds weights that are no real numbers. Copy it again.")
        try:
            network.load_state_dict(tensors[name])
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ModelError(
                f"{folder / name}.safetensors does not fit config.json: {first} Copy or train it again."
            ) from error
        if not all(torch.isfinite(tensor).all() for tensor in tensors[name].values()):
            raise ModelError(
                f"{folder / name}.safetensors holds NaN or infinite weights; the training diverged. Train it again."
            )
    variance = extras["calibration"].get("variance", torch.zeros(len(model.config.targets), 2))
    if variance.shape != (len(model.config.targets), 2) or not (variance >= 0).all():
        raise ModelError(
            f"{folder / 'calibration.safetensors'} does not fit config.json. Copy or train the model again."
        )
    if not _trivial_fits(extras["trivial"], len(model.config.modalities)):
        raise ModelError(f"{folder / 'trivial.safetensors'} does not fit config.json. Copy or train the model again.")
    model.trivial, model.calibration = dict(extras["trivial"]), dict(extras["calibration"])
    model.record = {"sha256": digest(data), "training": data["training"]}
    return model.to(device).eval().requires_grad_(False)


def _trivial_fits(trivial: Mapping[str, Tensor], count: int) -> bool:
    """Whether the trivial predictors, where there are any, are of so many modalities; see `fit_trivial`."""
    if "present" not in trivial:
        return True
    present, gram, mean = (trivial.get(name, torch.zeros(0)) for name in ("present", "gram", "mean_image"))
    grams = (len(present), count + 1, count + 1)
    return present.shape == (*grams[:1], count) and gram.shape == grams and mean.ndim == 4 and len(mean) == count
