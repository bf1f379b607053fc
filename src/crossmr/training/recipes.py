"""Recipes: everything that defines a training but its data.

PAPER is the published form, STANDARD our own, ANY the same for any subset of the modalities,
TINY a small STANDARD for a demo.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from crossmr.config import from_dict, read_fields
from crossmr.errors import ConfigError
from crossmr.networks.c_unet import SynthesisConfig
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import CrossConditionedModel, ModelConfig
from crossmr.training.augmentation import AugmentationConfig

DECAY = 0.9
"""Power of the learning rate's polynomial decay [C]."""


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained; the defaults are published [C]."""

    epochs: float = 20.0
    """Passes over the training data, unless --steps or --minutes say otherwise."""
    batch_size: int = 24
    """Samples per step: slices, 3D crops, or representations."""
    learning_rate: float = 1e-4
    """The largest."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """How the rate falls to 0: by a polynomial of power 0.9, or along half a cosine."""
    warm_up: int = 0
    """Steps in which the rate first grows from 0; at most half of a short training."""
    optimiser: Literal["adam", "adamw"] = "adam"
    """Adam (Kingma & Ba 2015), or with decoupled weight decay (Loshchilov & Hutter 2019)."""
    beta_2: float = 0.999
    """Decay of the squared gradient's average."""
    weight_decay: float = 3e-5
    """L2 penalty, as the optimiser applies it."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are the ones validated and kept."""
    fraction: float = 1.0
    """Part of --minutes, relative to the other stages'."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.learning_rate, self.gradient_clip, self.fraction) <= 0:
            raise ConfigError("epochs, batch_size, learning_rate, gradient_clip and fraction are positive.")
        if not 0 <= self.ema_decay < 1 or not 0 < self.beta_2 < 1 or min(self.weight_decay, self.warm_up) < 0:
            raise ConfigError("ema_decay lies in [0, 1), beta_2 in (0, 1); weight_decay and warm_up are not negative.")

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step, `progress` being what is done before it, from 0 to 1."""
        fall = (1 - progress) ** DECAY if self.schedule == "polynomial" else (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * min(1.0, max((step + 1) / max(1, self.warm_up), 2 * progress)) * fall


BY_SET = ("crop", "context_slices", "synthesis.channels", "synthesis_train.epochs")
"""All that a recipe can leave to the set."""


@dataclass(frozen=True)
class Recipe:
    """One training, from masked autoencoder to C-UNet."""

    by_set: tuple[str, ...] = ()
    """Settings that the set, the device and the time decide (choices.py), as far as they are left at their defaults."""
    spatial_dims: int = 2
    """2: axial slices, as published. 3: volumes."""
    any_subset: bool = False
    """One model for whatever a patient has and whatever is missing: each training sample hides a random part."""
    context_slices: int = 1
    """Axial slices that a synthetic one is made from: 1, 3 or 5."""
    planes: int = 1
    """1: axial slices. 3: coronal and sagittal ones too, in studies with thin slices; see ModelConfig."""
    crop: tuple[int, ...] = (224, 224)
    """Size of the training crops, in voxels."""
    flip: bool = True
    """Mirror samples left to right at random."""
    lesion_draws: int = 1
    """How often a slice that has a lesion is drawn per epoch; every other is drawn once."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What other scanners might do to the sources."""
    guidance: Literal["joint", "last", "none"] = "joint"
    """How the C-UNet learns to use the representation; see ModelConfig."""
    samples: int = 8
    """Representations drawn per training case, of which the C-UNet sees one at a time, with guidance 'joint'."""
    uncertainty: bool = False
    """Whether the C-UNet learns how large its unguided image's error is; not with guidance 'joint'."""
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

    def __post_init__(self) -> None:
        read_fields(self)
        if min(self.samples, self.lesion_draws) < 1:
            raise ConfigError("samples and lesion_draws are counts of at least 1.")
        if unknown := set(self.by_set) - set(BY_SET):
            raise ConfigError(f"by_set has '{min(unknown)}'; it may have {', '.join(BY_SET)}.")

    def model_config(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> ModelConfig:
        """The configuration of the model that this recipe trains."""
        return ModelConfig(
            sources=sources,
            targets=targets,
            spatial_dims=self.spatial_dims,
            window=self.crop,
            context_slices=self.context_slices,
            planes=self.planes,
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

_TRAIN = TrainConfig(
    epochs=40,
    batch_size=8,
    learning_rate=1e-3,
    schedule="cosine",
    warm_up=200,
    optimiser="adamw",
    beta_2=0.99,
    weight_decay=0.01,
    gradient_clip=1.0,
    ema_decay=0.998,
)
STANDARD = Recipe(
    by_set=BY_SET,
    context_slices=3,
    crop=(192, 160),
    augmentation=AugmentationConfig(probability=0.15),
    lesion_draws=2,
    guidance="none",
    uncertainty=True,
    representation=RepresentationConfig(channels=48, multipliers=(1, 2, 3, 4), decoder="skip-free"),
    distribution=DistributionConfig(width=512, blocks=6, conditional=True),
    synthesis=SynthesisConfig(
        channels=48,
        multipliers=(1, 2, 4, 6),
        patch=2,
        form="light",
        condition_width=128,
        loss="absolute",
        lesion_weight=2.0,
    ),
    synthesis_train=_TRAIN,
)
"""Our own design: a wide C-UNet on patches of 2 x 2 pixels and three neighbouring slices,
which learns by its absolute error, lesions weighted, and learns how large that error is; nothing guides it."""

TINY = replace(
    STANDARD,
    by_set=(),
    context_slices=1,
    crop=(96, 96),
    representation=RepresentationConfig(channels=16, multipliers=(1, 2, 3, 4), patch_size=8, decoder="skip-free"),
    distribution=DistributionConfig(width=128, blocks=3, conditional=True),
    synthesis=replace(STANDARD.synthesis, channels=24, multipliers=(1, 2, 4), lesion_weight=4.0),
    representation_train=TrainConfig(batch_size=8, learning_rate=1e-3, ema_decay=0.99, fraction=0.15),
    distribution_train=TrainConfig(epochs=100, batch_size=64, learning_rate=1e-3, ema_decay=0.99, fraction=0.1),
    synthesis_train=replace(_TRAIN, epochs=20, warm_up=20, ema_decay=0.99),
    guidance_train=TrainConfig(epochs=5, batch_size=8, learning_rate=1e-3, ema_decay=0.99, fraction=0.1),
)
"""Minutes on a laptop's processor: to see that everything works, not to get good images."""

ANY = replace(STANDARD, any_subset=True)
"""STANDARD for any subset of the set's modalities."""

RECIPES = {"standard": STANDARD, "any": ANY, "paper": PAPER, "tiny": TINY}


def recipe_of(model: CrossConditionedModel) -> Recipe:
    """The recipe that a model was trained by.

    Raises:
        ConfigError: its record is of a version that had other settings.
    """
    return from_dict(Recipe, model.record["training"].get("recipe", {}))
