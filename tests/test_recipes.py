"""Recipes: the published numbers, and settings that make no sense."""

from dataclasses import replace

import pytest

from crossmr.errors import ConfigError
from crossmr.recipes import PAPER, RECIPES, STANDARD, TINY, FitConfig

SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")


def test_paper_has_the_published_numbers():
    assert PAPER.crop == (224, 224)
    for stage in (PAPER.representation, PAPER.synthesis):
        assert (stage.channels, stage.multipliers, stage.blocks) == (96, (1, 1, 2, 2), 1)
    assert (PAPER.distribution.width, PAPER.distribution.blocks) == (1536, 12)
    schedule = PAPER.distribution.schedule
    assert (schedule.steps, schedule.beta_start, schedule.beta_end) == (1000, 0.0015, 0.0195)
    assert (PAPER.distribution_fit.epochs, PAPER.synthesis_fit.epochs) == (50, 20)
    fit = PAPER.synthesis_fit
    assert (fit.batch_size, fit.learning_rate, fit.weight_decay, fit.gradient_clip) == (24, 1e-4, 3e-5, 12)


def test_paper_guides_as_published():
    assert PAPER.guidance == "unconditional"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_of_its_own_networks(name):
    recipe = RECIPES[name]
    config = recipe.model_config(SOURCES, TARGETS)
    assert (config.sources, config.targets, config.window) == (SOURCES, TARGETS, recipe.crop)
    assert config.guidance == recipe.guidance
    assert (config.representation, config.distribution, config.synthesis) == (
        recipe.representation,
        recipe.distribution,
        recipe.synthesis,
    )


def test_each_stage_has_its_fit():
    recipe = replace(
        PAPER,
        representation_fit=FitConfig(epochs=1),
        distribution_fit=FitConfig(epochs=2),
        synthesis_fit=FitConfig(epochs=3),
    )
    assert [recipe.fit_config(stage).epochs for stage in recipe.model_config(("t1n",), ("t1c",)).stages] == [
        1,
        1,
        2,
        3,
        3,
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": -1e-4},
        {"gradient_clip": 0},
        {"share": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"weight_decay": -1e-9},
    ],
)
def test_a_senseless_fit_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FitConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"guidance_dropout": -0.1}, {"guidance_dropout": 1.1}, {"samples": 0}])
def test_a_senseless_recipe_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(PAPER, **wrong)


@pytest.mark.parametrize("crop", [(224,), (224, 220), (0, 224), (224, 224, 224)])
def test_a_crop_that_fits_no_network_is_refused_with_the_model(crop):
    with pytest.raises(ConfigError, match="crop"):
        replace(PAPER, crop=crop).model_config(SOURCES, TARGETS)


def test_standard_is_the_published_form_with_cells():
    assert STANDARD.representation == replace(PAPER.representation, cell=16)
    assert STANDARD.synthesis == replace(PAPER.synthesis, condition_width=128, residual=True, loss="absolute")
    assert (STANDARD.crop, STANDARD.synthesis_fit) == (PAPER.crop, PAPER.synthesis_fit)
    assert STANDARD.guidance == "truth"
    assert PAPER.representation.cell == 0
    last = {name: recipe.model_config(SOURCES, TARGETS).stages[-1] for name, recipe in RECIPES.items()}
    assert last == {"standard": "uncertainty", "any": "uncertainty", "paper": "twin", "tiny": "uncertainty"}
    config = STANDARD.model_config(SOURCES, TARGETS)
    assert (config.divisor, config.distribution.conditional) == (16, True)
    assert TINY.model_config(SOURCES, TARGETS).divisor == 8
