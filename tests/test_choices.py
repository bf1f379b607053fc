"""What a recipe leaves to the set: settled by heads, slices, device and time, said, and the same on every call."""

from dataclasses import replace
from pathlib import Path

import pytest

from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.display import SILENT
from crossmr.errors import ConfigError
from crossmr.files import read_json
from crossmr.phantom import write_cohort
from crossmr.training.choices import GPU_WIDTH, STEPS, choose, left_open
from crossmr.training.recipes import ANY, BY_SET, RECIPES, STANDARD, TINY, Recipe
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings


def case(shape=(155, 180, 140), spacing=1.0, lesion=()):
    """A study with this much head in every slice."""
    return Case(
        *("a", "a", "train", ("t1n", "t2f"), (100,) * shape[0], True, bool(lesion), Path()),
        spacing_mm=(spacing, 1.0, 1.0),
        lesion_voxels=lesion,
        shape=shape,
    )


def test_crops_hold_nearly_all_heads_and_fit_the_network():
    cases = [case()] * 30 + [case(shape=(155, 500, 500))]
    recipe, said = choose(STANDARD, cases, "cpu", None)
    assert recipe.crop == (192, 144)  # multiples of 16
    assert recipe.crop[0] % recipe.synthesis.stride == 0
    assert any("192 x 144 voxels, for heads of up to 180 x 140" in line for line in said)
    large, _ = choose(STANDARD, [case(shape=(155, 900, 900))], "cpu", None)
    assert large.crop == (256, 256)
    guided = replace(STANDARD, guidance="last", representation=replace(STANDARD.representation, multipliers=(1,) * 6))
    assert choose(guided, [case()], "cpu", None)[0].crop == (192, 160)  # multiples of 32, the MRM's stride
    volumes, _ = choose(replace(STANDARD, spatial_dims=3), [case()], "cpu", None)
    assert volumes.crop == (128, 128, 128)
    assert volumes.context_slices == 1


@pytest.mark.parametrize(("spacing", "context"), [(1.0, 3), (2.0, 3), (2.1, 1), (5.0, 1)])
def test_neighbouring_slices_where_slices_are_thin(spacing, context):
    recipe, said = choose(STANDARD, [case(spacing=spacing)], "cpu", None)
    assert recipe.context_slices == context
    assert said[0].startswith("each slice with its two neighbours" if context == 3 else "each slice by itself")
    mixed = [case(spacing=1.0)] * 2 + [case(spacing=5.0)] * 3
    assert choose(STANDARD, mixed, "cpu", None)[0].context_slices == 1  # as most of them are


@pytest.mark.parametrize(
    ("device", "minutes", "width"),
    [("cpu", 2.0, 24), ("cpu", 30.0, 32), ("cpu", 600.0, 48), ("cpu", None, 48), ("cuda", 2.0, GPU_WIDTH)],
)
def test_the_width_follows_time_and_device(device, minutes, width):
    assert choose(STANDARD, [case()], device, minutes)[0].synthesis.channels == width


def test_epochs_make_neither_too_few_nor_too_many_steps():
    few, _ = choose(STANDARD, [case()], "cpu", None)
    per_epoch = -(-155 // STANDARD.synthesis_train.batch_size)
    assert few.synthesis_train.epochs * per_epoch == pytest.approx(STEPS[0], rel=0.01)
    many, _ = choose(STANDARD, [case()] * 1000, "cpu", None)
    assert many.synthesis_train.epochs * 155_000 / STANDARD.synthesis_train.batch_size == pytest.approx(STEPS[1], 0.01)
    some, _ = choose(STANDARD, [case(lesion=(5,) * 155)] * 30, "cpu", None)
    assert some.synthesis_train.epochs == STANDARD.synthesis_train.epochs
    planes, _ = choose(replace(STANDARD, planes=3), [case(lesion=(5,) * 155)] * 30, "cpu", None)
    assert 3 * planes.synthesis_train.epochs == pytest.approx(some.synthesis_train.epochs, rel=0.01)  # as many steps
    thick, _ = choose(replace(STANDARD, planes=3), [case(lesion=(5,) * 155, spacing=5.0)] * 30, "cpu", None)
    assert thick.synthesis_train.epochs == some.synthesis_train.epochs  # which are cut in one plane
    less, _ = choose(STANDARD, [case(lesion=(5,) * 155)], "cpu", None)
    assert less.synthesis_train.epochs == pytest.approx(few.synthesis_train.epochs / 2, rel=0.05)  # drawn twice


def test_only_what_is_left_open_is_chosen():
    recipe, said = choose(replace(STANDARD, by_set=("synthesis.channels",)), [case(spacing=5)], "cpu", 2.0)
    assert recipe == replace(STANDARD, by_set=(), synthesis=replace(STANDARD.synthesis, channels=24))
    assert len(said) == 1
    assert choose(TINY, [case()], "cpu", 2.0) == (TINY, [])
    assert set(STANDARD.by_set) == set(BY_SET) == set(RECIPES["any"].by_set)
    assert not RECIPES["paper"].by_set
    with pytest.raises(ConfigError, match="by_set has 'crops'"):
        Recipe(by_set=("crops",))


def test_what_a_caller_changed_is_not_chosen():
    synthesis = replace(ANY.synthesis, channels=8)
    changed = replace(ANY, crop=(48, 48), context_slices=1, synthesis=synthesis)
    recipe, said = choose(changed, [case()], "cpu", None)
    assert (recipe.crop, recipe.context_slices, recipe.synthesis.channels) == ((48, 48), 1, 8)
    assert recipe.synthesis_train.epochs != ANY.synthesis_train.epochs
    (line,) = said
    assert "epochs" in line
    published, _ = choose(replace(STANDARD, crop=(224, 224)), [case()], "cpu", None)  # the default of a Recipe
    assert published.crop == (224, 224)
    assert left_open(STANDARD) == left_open(ANY) == BY_SET
    assert left_open(replace(STANDARD, by_set=("crop",), crop=(48, 48))) == ()
    assert left_open(Recipe(by_set=("crop",))) == ("crop",)
    assert left_open(Recipe(by_set=("crop",), crop=(48, 48))) == ()


def test_a_run_keeps_what_was_chosen_when_it_goes_on(tmp_path):
    write_cohort(tmp_path / "cohort", 4, seed=3, shape=(36, 40, 32), spacing_mm=(5.0, 5.5, 5.5))
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(0.5, 0.25, 0.25)))
    small = replace(
        STANDARD,
        by_set=("crop", "context_slices"),
        synthesis=replace(STANDARD.synthesis, channels=8, multipliers=(1, 2)),
    )
    lines = []
    display = type("Lines", (type(SILENT),), {"say": lambda self, text: lines.append(text)})(quiet=True)
    settings = TrainingSettings(recipe=small, sources=("t1n", "t2w"), targets=("t2f",), minutes=0.05)
    train(tmp_path / "set", tmp_path / "run", settings, display=display)
    kept = read_json(tmp_path / "run" / "run.json")["recipe"]
    assert kept["by_set"] == []
    assert kept["context_slices"] == 1
    heads = [c.shape for c in PreparedDataset(tmp_path / "set").split("train")]
    assert all(side >= head for head in heads for side, head in zip(kept["crop"], head[1:], strict=True))
    assert sum(line.startswith("chosen by the set: ") for line in lines) == 2
    train(tmp_path / "set", tmp_path / "run", replace(settings, minutes=None))  # the same run


def test_crops_hold_the_slices_of_all_planes():
    tall = case(shape=(200, 180, 140))
    assert choose(replace(STANDARD, by_set=("crop",)), [tall], "cpu", None)[0].crop == (192, 144)
    recipe = replace(STANDARD, by_set=("crop",), planes=3)
    assert choose(recipe, [tall], "cpu", None)[0].crop == (208, 208)  # coronal: 200 x 140, sagittal: 180 x 200
    thick = case(shape=(200, 180, 140), spacing=4.0)
    assert choose(recipe, [thick], "cpu", None)[0].crop == (192, 144)
