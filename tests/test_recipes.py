"""Recipes: the published numbers, and settings that make no sense."""

from dataclasses import replace

import pytest

from crossmr.errors import ConfigError
from crossmr.training.recipes import ANY, PAPER, RECIPES, STANDARD, TINY, TrainConfig

SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")


def test_paper_has_the_published_numbers():
    assert PAPER.crop == (224, 224)
    for network in (PAPER.representation, PAPER.synthesis):
        assert (network.channels, network.multipliers, network.blocks) == (96, (1, 1, 2, 2), 1)
    assert (PAPER.distribution.width, PAPER.distribution.blocks) == (1536, 12)
    schedule = PAPER.distribution.schedule
    assert (schedule.steps, schedule.beta_start, schedule.beta_end) == (1000, 0.0015, 0.0195)
    assert (PAPER.distribution_train.epochs, PAPER.distribution_train.batch_size) == (50, 128)
    train = PAPER.synthesis_train
    assert (train.epochs, train.batch_size, train.gradient_clip) == (20, 24, 12)
    for train in (PAPER.representation_train, PAPER.distribution_train, PAPER.synthesis_train):
        assert (train.learning_rate, train.weight_decay) == (1e-4, 3e-5)


def test_paper_is_the_published_method():
    assert PAPER.guidance == "joint"
    assert not PAPER.distribution.conditional
    assert PAPER.representation.decoder == "u-net"
    assert (PAPER.synthesis.loss, PAPER.synthesis.residual, PAPER.synthesis.condition_width) == ("squared", False, 192)
    assert PAPER.augmentation.probability == 0
    config = PAPER.model_config(SOURCES, TARGETS)
    assert config.stages == ("representation", "distribution", "synthesis")
    assert config.represented == TARGETS
    assert config.default_guidance == "unconditional"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_of_its_own_networks(name):
    recipe = RECIPES[name]
    config = recipe.model_config(SOURCES, TARGETS)
    assert (config.sources, config.targets, config.window) == (SOURCES, TARGETS, recipe.crop)
    for setting in ("guidance", "uncertainty", "representation", "distribution", "synthesis", "context_slices"):
        assert getattr(config, setting) == getattr(recipe, setting)


def test_every_stage_has_its_training():
    trains = {name: TrainConfig(epochs=number) for number, name in enumerate(STANDARD.model_config("a", "b").stages, 1)}
    recipe = replace(STANDARD, **{f"{name}_train": train for name, train in trains.items()})
    assert {name: recipe.train_config(name) for name in trains} == trains
    assert list(trains) == ["representation", "distribution", "synthesis", "guidance", "uncertainty"]


@pytest.mark.parametrize("recipe", [STANDARD, ANY, TINY], ids=["standard", "any", "tiny"])
def test_what_is_ours_trains_its_guidance_last_and_knows_its_error(recipe):
    config = recipe.model_config(SOURCES, SOURCES if recipe.any_subset else TARGETS)
    assert config.stages == ("representation", "distribution", "synthesis", "guidance", "uncertainty")
    assert config.default_guidance == "none"
    assert recipe.distribution.conditional
    assert recipe.distribution.width <= 512
    assert (recipe.synthesis.residual, recipe.synthesis.loss) == (True, "absolute")
    assert recipe.representation.decoder == "skip-free"
    assert config.any_subset == (recipe is ANY)


def test_standard_has_the_published_size_of_images_and_networks():
    assert (STANDARD.crop, STANDARD.synthesis_train) == (PAPER.crop, PAPER.synthesis_train)
    for ours, paper in ((STANDARD.representation, PAPER.representation), (STANDARD.synthesis, PAPER.synthesis)):
        assert (ours.channels, ours.multipliers, ours.blocks) == (paper.channels, paper.multipliers, paper.blocks)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": -1e-4},
        {"gradient_clip": 0},
        {"fraction": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"weight_decay": -1e-9},
    ],
)
def test_a_senseless_training_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="samples"):
        replace(PAPER, samples=0)


def test_the_error_of_an_unguided_image_is_learnt_where_there_is_one():
    with pytest.raises(ConfigError, match="uncertainty"):
        replace(PAPER, uncertainty=True).model_config(SOURCES, TARGETS)


@pytest.mark.parametrize("crop", [(224,), (224, 220), (0, 224), (224, 224, 224)])
def test_a_crop_that_fits_no_network_is_refused_with_the_model(crop):
    with pytest.raises(ConfigError, match="crop"):
        replace(PAPER, crop=crop).model_config(SOURCES, TARGETS)
