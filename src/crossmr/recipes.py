"""Recipes: everything that defines a training but its data.

PAPER is the published form, STANDARD what docs/evidence.md found best, ANY the same for any subset of the modalities,
TINY a small STANDARD for a demo.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from crossmr.config import from_dict
from crossmr.data.augmentation import AugmentationConfig
from crossmr.errors import ConfigError
from crossmr.model import CrossConditionedModel, ModelConfig
from crossmr.stages.distribution import DistributionConfig
from crossmr.stages.representation import RepresentationConfig
from crossmr.stages.synthesis import SynthesisConfig


@dataclass(frozen=True)
class FitConfig:
    """How one stage is trained. The optimiser is Adam with a polynomial decay of power 0.9 [C]."""

    epochs: float = 20.0
    """Passes over the training data, unless --steps or --minutes say otherwise."""
    batch_size: int = 24
    """Samples a step: slices, 3D crops, or representations."""
    learning_rate: float = 1e-4
    """At the first step."""
    weight_decay: float = 3e-5
    """L2 penalty, as Adam applies it."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones validated and kept."""
    share: float = 1.0
    """Share of --minutes, relative to the other stages'."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate, self.gradient_clip, self.share) <= 0:
            raise ConfigError("epochs, batch_size, learning_rate, gradient_clip and share are positive.")
        if not 0 <= self.ema_decay < 1 or self.weight_decay < 0:
            raise ConfigError("ema_decay lies in [0, 1), weight_decay is not negative.")


@dataclass(frozen=True)
class Recipe:
    """One training, from masked autoencoder to C-UNet."""

    spatial_dims: int = 2
    """2: axial slices, as published. 3: volumes."""
    any_subset: bool = False
    """One model for whatever a patient has and whatever is missing: each training sample hides a random part."""
    context_slices: int = 1
    """Axial slices that a synthetic one is made from: 1, 3 or 5."""
    crop: tuple[int, ...] = (224, 224)
    """Size of the training crops, in voxels."""
    flip: bool = True
    """Mirror samples left to right at random."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What other scanners might do to the sources."""
    guidance: Literal["sample", "unconditional", "truth", "none"] = "unconditional"
    """What the C-UNet is shown in training; see ModelConfig."""
    guidance_dropout: float = 0.1
    """Share of samples that are shown nothing, so that --guidance none is no surprise; with cells it never is."""
    samples: int = 8
    """Representations drawn a patient before the C-UNet is trained on them."""
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    """Stage 1, MRM."""
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    """Stage 2, MDN."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """Stage 3, C-UNet."""
    representation_fit: FitConfig = field(default_factory=lambda: FitConfig(share=0.15))
    """Training of stage 1: once for the targets, once for the sources."""
    distribution_fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=50, batch_size=128, share=0.05))
    """Training of stage 2."""
    synthesis_fit: FitConfig = field(default_factory=FitConfig)
    """Training of stage 3, and of the twin."""
    guidance_fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=4, learning_rate=1e-3, share=0.15))
    """With cells: training of the C-UNet's condition layers, when the rest is finished."""
    uncertainty_fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=4, learning_rate=1e-3, share=0.1))
    """With cells: training of the network that learns the error's variance."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_dropout <= 1:
            raise ConfigError(f"guidance_dropout is {self.guidance_dropout}; wanted a share from 0 to 1.")
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}; wanted at least 1.")

    def model_config(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> ModelConfig:
        """The configuration of the model that this recipe trains."""
        return ModelConfig(
            sources=sources,
            targets=targets,
            spatial_dims=self.spatial_dims,
            window=self.crop,
            context_slices=self.context_slices,
            guidance=self.guidance,
            representation=self.representation,
            distribution=self.distribution,
            synthesis=self.synthesis,
        )

    def fit_config(self, stage: str) -> FitConfig:
        """How a stage is trained."""
        return {
            "representation": self.representation_fit,
            "source_representation": self.representation_fit,
            "distribution": self.distribution_fit,
            "guidance": self.guidance_fit,
            "uncertainty": self.uncertainty_fit,
        }.get(stage, self.synthesis_fit)


PAPER = Recipe()
"""The published form and sizes (arXiv 2409.08500), guided by samples drawn without the patient."""

STANDARD = replace(
    PAPER,
    guidance="truth",
    representation=RepresentationConfig(cell=16),
    distribution=DistributionConfig(width=96, blocks=4),
    synthesis=SynthesisConfig(condition_width=128, residual=True, loss="absolute"),
)
"""The design that docs/evidence.md found best: a grid of cells for each target, condition layers trained last, and a
C-UNet that starts from the least-squares mix of the sources and learns by its absolute error."""

_FAST = FitConfig(epochs=20, batch_size=8, learning_rate=1e-3, ema_decay=0.99)
TINY = replace(
    STANDARD,
    crop=(96, 96),
    representation=RepresentationConfig(channels=16, multipliers=(1, 2, 3, 4), patch_size=8, cell=8),
    distribution=DistributionConfig(width=64, blocks=3),
    synthesis=replace(STANDARD.synthesis, channels=16, multipliers=(1, 2, 3, 4)),
    representation_fit=replace(_FAST, share=0.15),
    distribution_fit=replace(_FAST, epochs=100, batch_size=64, share=0.1),
    synthesis_fit=_FAST,
    guidance_fit=replace(_FAST, epochs=5, share=0.1),
    uncertainty_fit=replace(_FAST, epochs=5, learning_rate=3e-3, share=0.2),
)
"""Minutes on a laptop's processor: to see that everything works, not to get good images."""

ANY = replace(STANDARD, any_subset=True, context_slices=3)
"""STANDARD for any subset of the set's modalities, from three neighbouring slices."""

RECIPES = {"standard": STANDARD, "any": ANY, "paper": PAPER, "tiny": TINY}


def recipe_of(model: CrossConditionedModel) -> Recipe:
    """The recipe that a model was trained by.

    Raises:
        ConfigError: its record is of a version that had other settings.
    """
    return from_dict(Recipe, model.record["training"].get("recipe", {}))
