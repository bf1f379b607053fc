"""Recipes: the published numbers, and settings that make no sense."""

import math
from dataclasses import replace

import pytest

from crossmr.config import with_settings
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
        assert (train.schedule, train.warm_up, train.optimiser, train.beta_2) == ("polynomial", 0, "adam", 0.999)


def test_paper_is_the_published_method():
    assert PAPER.guidance == "joint"
    assert not PAPER.distribution.conditional
    assert PAPER.representation.decoder == "u-net"
    form = PAPER.synthesis
    assert (form.loss, form.form, form.patch, form.lesion_weight) == ("squared", "published", 1, 0)
    assert form.condition_width == 192
    assert (PAPER.augmentation.probability, PAPER.lesion_draws, PAPER.uncertainty) == (0, 1, False)
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
    guided = replace(STANDARD, guidance="last")
    trains = {name: TrainConfig(epochs=number) for number, name in enumerate(guided.model_config("a", "b").stages, 1)}
    recipe = replace(guided, **{f"{name}_train": train for name, train in trains.items()})
    assert {name: recipe.train_config(name) for name in trains} == trains
    assert list(trains) == ["representation", "distribution", "synthesis", "guidance"]


@pytest.mark.parametrize("recipe", [STANDARD, ANY, TINY], ids=["standard", "any", "tiny"])
def test_what_is_ours_is_one_network_that_knows_its_error(recipe):
    config = recipe.model_config(SOURCES, SOURCES if recipe.any_subset else TARGETS)
    assert config.stages == ("synthesis",)
    assert config.default_guidance == "none"
    assert config.uncertainty
    assert config.context_slices == (1 if recipe is TINY else 3)
    assert (recipe.synthesis.form, recipe.synthesis.patch, recipe.synthesis.loss) == ("light", 2, "absolute")
    assert recipe.synthesis.lesion_weight > 0
    assert recipe.lesion_draws > 1
    assert recipe.augmentation.probability > 0
    train = recipe.synthesis_train
    assert (train.schedule, train.optimiser) == ("cosine", "adamw")
    assert train.warm_up > 0
    assert config.any_subset == (recipe is ANY)


@pytest.mark.parametrize("recipe", [STANDARD, ANY, TINY], ids=["standard", "any", "tiny"])
def test_ours_may_be_guided_last(recipe):
    config = with_settings(recipe, {"guidance": "last"}).model_config(
        SOURCES, SOURCES if recipe.any_subset else TARGETS
    )
    assert config.stages == ("representation", "distribution", "synthesis", "guidance")
    assert config.default_guidance == "none"
    assert recipe.distribution.conditional
    assert recipe.distribution.width <= 512
    assert recipe.representation.decoder == "skip-free"


# The learning rate


def rates(train, steps=100):
    return [train.rate(step, step / steps) for step in range(steps)]


def test_the_rate_falls_by_a_polynomial_or_along_half_a_cosine():
    polynomial, cosine = rates(TrainConfig(learning_rate=0.5)), rates(TrainConfig(learning_rate=0.5, schedule="cosine"))
    assert polynomial == pytest.approx([0.5 * (1 - step / 100) ** 0.9 for step in range(100)])
    assert cosine == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])
    for each in (polynomial, cosine):
        assert each[0] == 0.5
        assert each == sorted(each, reverse=True)
        assert each[-1] < 0.02 * 0.5
    assert cosine[25] > polynomial[25]
    assert cosine[50] == pytest.approx(0.25)
    assert TrainConfig(schedule="cosine").rate(7, 1.0) == pytest.approx(0)
    assert TrainConfig().rate(7, 1.0) == 0


@pytest.mark.parametrize("schedule", ["polynomial", "cosine"])
def test_the_rate_first_grows_from_0_in_even_steps(schedule):
    plain, warm = (TrainConfig(schedule=schedule, warm_up=steps) for steps in (0, 10))
    for step, (one, other) in enumerate(zip(rates(plain), rates(warm), strict=True)):
        assert other == pytest.approx(one * min(1, (step + 1) / 10))
    assert rates(warm)[0] == pytest.approx(warm.learning_rate / 10)
    assert rates(replace(warm, warm_up=1)) == rates(plain)
    long = rates(replace(plain, warm_up=300))
    assert long[1:30] == pytest.approx([one * step / 50 for step, one in enumerate(rates(plain))][1:30])
    assert long[50:] == rates(plain)[50:]  # in a training of fewer steps it lasts half of these


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
        {"warm_up": -1},
        {"beta_2": 0.0},
        {"beta_2": 1.0},
    ],
)
def test_a_senseless_training_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


@pytest.mark.parametrize("name", ["samples", "lesion_draws"])
def test_nothing_to_draw_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        replace(PAPER, **{name: 0})


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"synthesis_train.schedule": "linear"}, "linear"),
        ({"synthesis_train.optimiser": "sgd"}, "sgd"),
        ({"synthesis.form": "heavy"}, "heavy"),
        ({"synthesis.patch": "3"}, "patch is 3"),
        ({"synthesis.residual": "true"}, "residual"),
        ({"uncertainty_train.epochs": "3"}, "uncertainty_train"),
    ],
)
def test_settings_that_there_are_none_are_refused(setting, match):
    with pytest.raises(ConfigError, match=match):
        with_settings(STANDARD, setting)


def test_the_error_of_an_unguided_image_is_learnt_where_there_is_one():
    with pytest.raises(ConfigError, match="uncertainty"):
        replace(PAPER, uncertainty=True).model_config(SOURCES, TARGETS)


@pytest.mark.parametrize("crop", [(224,), (224, 220), (0, 224), (224, 224, 224)])
def test_a_crop_that_fits_no_network_is_refused_with_the_model(crop):
    with pytest.raises(ConfigError, match="crop"):
        replace(PAPER, crop=crop).model_config(SOURCES, TARGETS)
