"""Recipes: everything that defines a training but its data.

PAPER is the published form, STANDARD what docs/evidence.md found best, ANY the same for any subset of the modalities,
TINY a small STANDARD for a demo.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, cast

from crossmr.config import from_dict
from crossmr.errors import ConfigError
from crossmr.networks.c_unet import SynthesisConfig
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import CrossConditionedModel, ModelConfig
from crossmr.training.augmentation import AugmentationConfig


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained. The optimiser is Adam with a polynomial decay of power 0.9 [C]."""

    epochs: float = 20.0
    """Passes over the training data, unless --steps or --minutes say otherwise."""
    batch_size: int = 24
    """Samples per step: slices, 3D crops, or representations."""
    learning_rate: float = 1e-4
    """At the first step."""
    weight_decay: float = 3e-5
    """L2 penalty, as Adam applies it."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones validated and kept."""
    fraction: float = 1.0
    """Part of --minutes, relative to the other stages'."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate, self.gradient_clip, self.fraction) <= 0:
            raise ConfigError("epochs, batch_size, learning_rate, gradient_clip and fraction are positive.")
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
    guidance: Literal["joint", "last", "none"] = "joint"
    """How the C-UNet learns to use the representation; see ModelConfig."""
    samples: int = 8
    """Representations drawn per training case, of which the C-UNet sees one at a time, with guidance 'joint'."""
    uncertainty: bool = False
    """Whether a network learns the variance of the unguided image's error; not with guidance 'joint'."""
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    """MRM."""
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    """MDN."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """C-UNet."""
    representation_train: TrainConfig = field(default_factory=lambda: TrainConfig(fraction=0.15))
    """Training of the MRM."""
    distribution_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=50, batch_size=128, fraction=0.05)
    )
    """Training of the MDN."""
    synthesis_train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the C-UNet."""
    guidance_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=4, learning_rate=1e-3, fraction=0.15)
    )
    """With guidance 'last': training of the C-UNet's condition layers, when the rest is finished."""
    uncertainty_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=4, learning_rate=1e-3, fraction=0.1)
    )
    """Training of the network that learns the error's variance, where there is one."""

    def __post_init__(self) -> None:
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
            uncertainty=self.uncertainty,
            representation=self.representation,
            distribution=self.distribution,
            synthesis=self.synthesis,
        )

    def train_config(self, stage: str) -> TrainConfig:
        """How a stage is trained."""
        return cast(TrainConfig, getattr(self, f"{stage}_train"))


PAPER = Recipe(synthesis=SynthesisConfig(condition_width=192))
"""The published method and sizes (arXiv 2409.08500): the MDN is given nothing of the patient, and the C-UNet learns by
its squared error, guided by samples of the MDN from its first step.

Ours in it: the MRM sees each modality by itself, so that y_0 is one vector per target; the MDN's features are
standardised; the weights kept are an exponential average; heads are cropped, and intensities scaled, by `prepare`;
each training case has eight drawn samples; patch size and mask ratio of the MRM are not published.
"""

STANDARD = replace(
    PAPER,
    guidance="last",
    uncertainty=True,
    representation=RepresentationConfig(decoder="skip-free"),
    distribution=DistributionConfig(width=512, blocks=6, conditional=True),
    synthesis=SynthesisConfig(condition_width=128, residual=True, loss="absolute"),
)
"""The design that docs/evidence.md found best: a C-UNet that starts from the linear regression of the sources and
learns by its absolute error, condition layers trained last on true representations, and a network for the error."""

_FAST = TrainConfig(epochs=20, batch_size=8, learning_rate=1e-3, ema_decay=0.99)
TINY = replace(
    STANDARD,
    crop=(96, 96),
    representation=RepresentationConfig(channels=16, multipliers=(1, 2, 3, 4), patch_size=8, decoder="skip-free"),
    distribution=DistributionConfig(width=128, blocks=3, conditional=True),
    synthesis=replace(STANDARD.synthesis, channels=16, multipliers=(1, 2, 3, 4)),
    representation_train=replace(_FAST, fraction=0.15),
    distribution_train=replace(_FAST, epochs=100, batch_size=64, fraction=0.1),
    synthesis_train=_FAST,
    guidance_train=replace(_FAST, epochs=5, fraction=0.1),
    uncertainty_train=replace(_FAST, epochs=5, learning_rate=3e-3, fraction=0.2),
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
