"""What a caller of the training decides is checked when it is said."""

import pytest

from crossmr.errors import ConfigError
from crossmr.training.recipes import RECIPES
from crossmr.training.settings import TrainingSettings


def test_settings_take_one_name_or_several_in_any_spelling():
    named = TrainingSettings(sources="T1", targets=["FLAIR", "t1c"], stages="synthesis")
    assert (named.sources, named.targets, named.stages) == (("t1n",), ("t2f", "t1c"), ("synthesis",))
    listed = TrainingSettings(sources="T1,T2", targets=["FLAIR,t1c"])
    assert (listed.sources, listed.targets) == (("t1n", "t2w"), ("t2f", "t1c"))


def test_a_recipe_goes_by_its_name_and_steps_are_whole():
    assert TrainingSettings(recipe="tiny").chosen_recipe is RECIPES["tiny"]
    assert TrainingSettings().chosen_recipe is None
    with pytest.raises(ConfigError, match="There is no recipe 'large': expected one of standard, any, paper, tiny"):
        TrainingSettings(recipe="large")
    for wrong in ({"steps": 1.5}, {"steps": "5"}, {"seed": "1"}):
        with pytest.raises(ConfigError, match="expected a whole number"):
            TrainingSettings(**wrong)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="--steps or --minutes"):
        TrainingSettings(steps=1, minutes=1)
    for wrong in ({"steps": 0}, {"minutes": 0.0}, {"minutes": float("nan")}, {"minutes": float("inf")}):
        with pytest.raises(ConfigError, match="--steps and --minutes are positive"):
            TrainingSettings(**wrong)
    with pytest.raises(ConfigError, match="64 bits"):
        TrainingSettings(seed=2**64)
