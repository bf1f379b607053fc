"""What a caller of the training decides is checked when it is said."""

from dataclasses import replace

import pytest

from crossmr.completion.study import complete
from crossmr.errors import ConfigError
from crossmr.evaluation.challenge import ProtocolSettings, evaluate_by_protocol
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.networks.inference import InferenceSettings
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"recipe": {"crop": (3, 3)}},
            r"recipe is \{'crop': \(3, 3\)\}; expected one of standard, any, paper, tiny",
        ),
        ({"minutes": "5"}, "minutes is '5'; expected a number"),
        ({"minutes": True}, "minutes is True; expected a number"),
        ({"stages": 3}, "stages is 3; expected names of stages"),
        ({"stages": (3,)}, "expected names of stages"),
        ({"device": None}, "device is None; expected text"),
        ({"precision": 32}, "precision is 32; expected text"),
    ],
)
def test_what_is_of_another_kind_is_refused_when_it_is_said(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**wrong)


@pytest.mark.parametrize("settings", ["tiny", {"seed": 1}, {}, InferenceSettings()])
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda settings: train("set", "run", settings), "TrainingSettings"),
        (lambda settings: evaluate("model", "set", "out", settings), "EvaluationSettings"),
        (lambda settings: evaluate_by_protocol("model", "set", "out", settings), "ProtocolSettings"),
        (lambda settings: EvaluationSettings(inference=settings), "InferenceSettings"),
        (lambda settings: ProtocolSettings(evaluation=settings), "EvaluationSettings"),
        (lambda settings: complete({}, "model", settings), "InferenceSettings"),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(call, kind, settings):
    if isinstance(settings, InferenceSettings) and kind == "InferenceSettings":
        settings = TrainingSettings()
    with pytest.raises(ConfigError, match=rf"is .*; expected {kind}\(…\)"):
        call(settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingSettings(seed=None), "seed is None; expected a whole number"),
        (lambda: TrainingSettings(sources=3), "3 names no modality"),
        (lambda: InferenceSettings(targets=3), "3 names no modality"),
        (lambda: InferenceSettings(ddim_steps=None), "ddim_steps is None; expected a whole number"),
        (lambda: EvaluationSettings(images="folder"), "images is 'folder'; expected a folder for each name"),
        (lambda: EvaluationSettings(images={"a": None}), "expected a folder for each name"),
        (lambda: replace(RECIPES["tiny"], by_set=None), "by_set is None; expected"),
        (lambda: replace(RECIPES["tiny"], samples="many"), "samples is 'many'; expected int"),
        (lambda: replace(RECIPES["tiny"], guidance="foo"), "guidance is 'foo'; it may be one of: joint, last, none"),
        (lambda: replace(RECIPES["tiny"], any_subset="yes"), "any_subset is 'yes'; expected bool"),
        (lambda: replace(RECIPES["tiny"], crop=48), "crop is 48; expected"),
        (lambda: replace(RECIPES["tiny"], synthesis={}), r"synthesis is \{\}; expected SynthesisConfig"),
        (lambda: replace(RECIPES["tiny"], synthesis_train=None), r"synthesis_train is None; expected TrainConfig"),
        (lambda: replace(RECIPES["tiny"], lesion_draws=1.5), "lesion_draws is 1.5; expected int"),
    ],
)
def test_settings_of_another_kind_are_refused_in_one_line_when_they_are_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_of_a_recipe_may_be_text_and_lists():
    recipe = replace(RECIPES["tiny"], samples="4", crop=[48, 48])
    assert (recipe.samples, recipe.crop) == (4, (48, 48))
    assert hash(recipe)
