"""What a training is: what is refused, what a run goes on with, and what it takes from an initial model."""

# ruff: noqa: F811  (fixtures of test_run are arguments)

import contextlib
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_head, sha256, tree, write_study
from test_run import (  # noqa: F401  (fixtures)
    ANY_SMALL,
    MODALITIES,
    SMALL,
    SOURCES,
    STAGES,
    STEPS,
    any_run,
    prepared,
    quick,
    records,
    resplit,
    same,
    train,
    trained,
    weights,
)

from crossmr.baselines import together
from crossmr.config import with_settings
from crossmr.data.dataset import PreparedDataset
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.display import Display
from crossmr.errors import ConfigError, ModelError, OutputError, SetError
from crossmr.networks.model import CrossConditionedModel, read_model
from crossmr.networks.trained_on import find, names_of
from crossmr.training import start
from crossmr.training.recipes import RECIPES, TINY, Recipe
from crossmr.training.settings import TrainingSettings
from crossmr.training.start import WRITTEN


def test_a_target_that_no_training_study_shows_is_refused(tmp_path):
    for name, had in {"A": ("t1n", "t1c", "t2f"), "B": ("t1n", "t2w"), "C": MODALITIES}.items():
        write_study(tmp_path / "cohort", name, had, seed=ord(name))
    table = tmp_path / "whose.csv"
    table.write_text("case,patient,part\nA,A,train\nB,B,train\nC,C,test\n")
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(patients=table))
    with pytest.raises(SetError, match=r"No training study of .*set has t1c and t1n \+ t2w\. Prepare more patients"):
        train(tmp_path / "set", tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()
    (tmp_path / "whose.csv").write_text("case,patient,part\nA,A,train\nB,B,test\nC,C,test\n")
    prepare(tmp_path / "cohort", tmp_path / "other", PrepareSettings(patients=table))
    with pytest.raises(SetError, match="has t2w and another contrast"):
        train(tmp_path / "other", tmp_path / "run", ANY_SMALL, sources=MODALITIES, targets=MODALITIES)
    assert not (tmp_path / "run").exists()


def test_any_subset_of_the_modalities_named(prepared, tmp_path):
    train(prepared, tmp_path, ANY_SMALL, targets=("t2f", "t1n"), steps=1, stages=("representation",))
    assert json.loads((tmp_path / "run.json").read_text())["sources"] == ["t1n", "t2f"]


def test_a_task_of_one_contrast_to_itself_is_no_any_subset(prepared, tmp_path):
    with pytest.raises(ConfigError, match="t1n is both source and target"):
        train(prepared, tmp_path, sources=("t1n", "t2w"), targets=("t1n", "t2f"), steps=1)
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_continued_with_other_settings(prepared, trained):
    with pytest.raises(ConfigError, match="holds a run with another seed"):
        train(prepared, trained, steps=STEPS, seed=7)
    with pytest.raises(ConfigError, match="holds a run with another recipe"):
        train(prepared, trained, TINY, steps=STEPS, seed=5)


@pytest.mark.parametrize(("key", "value"), [("device", "cuda"), ("precision", "float64")])
def test_a_run_of_another_machine_is_not_blamed_on_the_settings(prepared, trained, tmp_path, key, value):
    theirs = json.loads((trained / "run.json").read_text()) | {key: value, "recipe": {}}
    (tmp_path / "run.json").write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match=rf"holds a run by --{key} {value}, .* Go on with --{key} {value}, on a mach"):
        train(prepared, tmp_path, steps=STEPS, seed=5)


def test_a_run_is_not_continued_on_a_set_that_changed(prepared, trained, tmp_path):
    changed = shutil.copytree(prepared, tmp_path / "set")
    write_study(tmp_path / "cohort", "New", MODALITIES, seed=99)
    prepare(tmp_path / "cohort", changed, PrepareSettings(split=Split(1, 0, 0), prune=True))
    with pytest.raises(ConfigError, match=r"a run on another set, or on this one before it changed\. Prepare it as it"):
        train(changed, trained, steps=STEPS, seed=5)


def test_another_budget_is_refused_and_no_budget_goes_on(prepared, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"is planned for --steps 3, not --steps 500\. Give neither"):
        train(prepared, trained, steps=500, seed=5)
    with pytest.raises(ConfigError, match="is planned for --steps 3, not --minutes 2"):
        train(prepared, trained, minutes=2, seed=5)
    before = weights(trained / "model")
    train(prepared, trained, steps=STEPS, seed=5)
    train(prepared, trained, seed=5)
    assert all(torch.equal(before[key], value) for key, value in weights(trained / "model").items())
    train(prepared, tmp_path, steps=2, stages=("representation",))
    train(prepared, tmp_path)  # goes on with two steps, not with epochs
    assert json.loads((tmp_path / "plan.json").read_text())["guidance"]["segments"] == [[0, 2]]


def test_a_run_of_epochs_takes_no_steps_afterwards(prepared, tmp_path):
    recipe = replace(SMALL, representation_train=replace(SMALL.representation_train, epochs=0.01))
    train(prepared, tmp_path, recipe, stages=("representation",))
    with pytest.raises(ConfigError, match="is planned for its recipe's epochs, not --steps 5"):
        train(prepared, tmp_path, recipe, steps=5)


def test_refusals(prepared, tmp_path):
    with pytest.raises(ConfigError, match="has pdw; it has"):
        train(prepared, tmp_path, targets=("pdw",))
    with pytest.raises(ConfigError, match="is not a stage"):
        train(prepared, tmp_path, stages=("discriminator",), steps=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SetError, match="is not a prepared"):
        train(tmp_path, tmp_path / "run")


def test_a_set_without_training_patients_is_refused_before_anything_is_written(tmp_path):
    write_study(tmp_path / "cohort", "P", MODALITIES)
    table = tmp_path / "whose.csv"
    table.write_text("case,patient,part\nP,P,test\n")
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(patients=table))
    for recipe in (*RECIPES.values(), SMALL):
        with pytest.raises(SetError, match=r"No patient of .*set is for training"):
            train(tmp_path / "set", tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run.json", *WRITTEN])
def test_nothing_of_another_s_is_replaced(prepared, trained, tmp_path, name):
    """A run goes into a folder that has none of its files, or on in its own."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    for place in (path, path / "config.json"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        place.parent.mkdir(exist_ok=True)
        place.write_text('{"format": "another"}')
        with pytest.raises(OutputError, match=rf"{name} is not crossmr's, so it is not replaced\. Name another folder"):
            train(prepared, tmp_path / "run", steps=STEPS)
        assert tree(tmp_path / "run") == {str(place.relative_to(tmp_path / "run")): sha256(place)}
    begun = shutil.copytree(trained, tmp_path / "begun")
    for foreign in (begun / "run.json", begun / "model" / "config.json"):
        ours = foreign.read_bytes()
        foreign.write_text('{"model_type": "bert"}')
        before = tree(begun)
        with pytest.raises(OutputError, match=rf"{foreign.name} is not crossmr's"):
            train(prepared, begun, steps=STEPS, seed=5)
        assert tree(begun) == before
        foreign.write_bytes(ours)


def test_a_training_starts_from_the_weights_of_a_model(prepared, trained, tmp_path):
    other = train(prepared, tmp_path / "a", frozen(SMALL), initial=trained / "model", steps=1, seed=8)
    before, after = weights(trained / "model"), weights(other)
    own = {"baselines.mean_image", "calibration.variance", "distribution.centre", "distribution.scale"}
    assert before.keys() == after.keys()
    for key in before.keys() - own:
        assert torch.allclose(before[key].float(), after[key].float(), atol=1e-6), key
    model = read_model(other)
    assert model.patients[1:] == read_model(trained / "model").patients
    assert model.record["training"]["initial_model"] == read_model(trained / "model").record["sha256"]
    assert model.config == read_model(trained / "model").config


def test_a_model_of_any_subset_goes_on_with_the_modalities_a_cohort_has(any_run, tmp_path):
    for number in range(2):
        write_study(tmp_path / "cohort", f"Q-0000{number}-000", ("t1n", "t1c", "t2f"), seed=9 + number, air=False)
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1.0, 0.0, 0.0)))
    model = read_model(train(tmp_path / "set", tmp_path / "run", None, initial=any_run / "model", steps=2))
    earlier = read_model(any_run / "model")
    assert model.config == earlier.config
    assert model.patients[1:] == earlier.patients
    own = PreparedDataset(tmp_path / "set").split("train")
    assert len(find(model.patients[:1], {case.name: names_of(case.patient, ()) for case in own})) == len(own) == 2
    assert torch.equal(model.calibration["variance"], earlier.calibration["variance"])  # nobody here to calibrate on
    assert model.record["training"]["seen"]["studies"] == earlier.record["training"]["seen"]["studies"] + 2
    assert together(model.baselines, range(4)).any()  # it completes studies that have T2, as before
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run" / "model").values())


def test_a_contrast_that_the_initial_model_does_not_know_is_named(any_run, tmp_path, capsys):
    for number in range(2):
        swi = {"swi": make_head("t1c", seed=7 + number, air=False)}
        case = f"Q-0000{number}-000"
        write_study(tmp_path / "cohort", case, ("t1n", "t2f"), seed=9 + number, air=False, replace=swi)
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings({"swi": "*swi*"}, split=Split(1.0, 0.0, 0.0)))
    train(tmp_path / "set", tmp_path / "run", None, initial=any_run / "model", steps=1, display=Display())
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Warning: swi, of .*, cannot be learnt: the initial model knows T1, T1ce, T2, FLAIR alone", said)


def test_one_contrast_alone_is_no_model_of_any_subset(prepared, any_run, tmp_path):
    for initial in ({"initial": any_run / "model"}, {"recipe": ANY_SMALL}):
        for named, options in (
            ({"targets": "t2f"}, "--targets"),
            ({"sources": "T1", "targets": "t1n"}, "--sources and --targets"),
        ):
            with pytest.raises(ConfigError, match=rf"from the others, but there is t\w+ alone in {options}\. Name oth"):
                train(prepared, tmp_path, **{"recipe": None, **initial}, **named)
    assert not [*tmp_path.iterdir()]


def test_a_model_of_any_subset_goes_on_with_no_fewer_modalities(prepared, any_run, tmp_path):
    for named in ({"sources": SOURCES}, {"sources": SOURCES, "targets": ("t1c",)}):
        with pytest.raises(ConfigError, match=r"has another sources .* Leave --recipe, --sources and --targets away"):
            train(prepared, tmp_path, None, initial=any_run / "model", **named)
    assert not [*tmp_path.iterdir()]
    train(prepared, tmp_path, None, initial=any_run / "model", steps=1, sources=MODALITIES)


def test_a_model_that_was_never_saved_is_no_start(prepared, trained, tmp_path):
    made = CrossConditionedModel(read_model(trained / "model").config)
    for recipe in (None, SMALL):
        with pytest.raises(ModelError, match="has no record of its training"):
            train(prepared, tmp_path, recipe, initial=made)
    assert not [*tmp_path.iterdir()]


def test_a_training_that_starts_from_a_model_without_its_patients_does_not_know_them(prepared, trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "stripped")
    (tmp_path / "stripped" / "patients.json").unlink()
    model = read_model(train(prepared, tmp_path / "run", initial=tmp_path / "stripped", steps=1))
    assert [bool(one.salt) for one in model.patients] == [True, False]


def test_validation_patients_whom_the_initial_model_learnt_from_are_left_out(resplit, trained, tmp_path, capsys):
    data, learnt, others = resplit(("train", "train", "val", "test"), ("train", "val", "test"))
    model = read_model(train(data, tmp_path / "run", initial=trained / "model", steps=1, display=Display()))
    said = capsys.readouterr().out
    assert f"initial model: it learnt from 2 of 3 training patients ({learnt[0]}, {learnt[1]}) before" in said
    assert (
        f"Warning: the initial model learnt from 1 of 2 validation patients ({learnt[2]}): they are left out, and 1 "
        "validates this training"
    ) in " ".join(said.split())
    assert f"learnt from 1 of 2 test patients ({learnt[3]}): for them an evaluation says" in " ".join(said.split())
    assert "does not say whom" not in said
    whole = find(model.patients[:1], {case: names_of(case, ()) for case in (*learnt, *others)})
    assert [case for case, part in whole.items() if part == "val"] == [others[1]]
    assert [*whole] == [learnt[0], learnt[1], others[0], others[1]]


def test_where_the_initial_model_learnt_from_all_validation_patients_there_are_none(resplit, trained, tmp_path, capsys):
    data, learnt, _ = resplit(("train", "val", "val", "train"), ("train", "train", "train"))
    model = read_model(train(data, tmp_path / "run", initial=trained / "model", steps=1, display=Display()))
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 of 2 validation patients ({learnt[1]}, {learnt[2]}): they are left out, and none validates" in said
    assert model.record["training"]["validation"] == {}
    assert torch.equal(model.calibration["variance"], read_model(trained / "model").calibration["variance"])
    assert not any(key.startswith("val_") for line in records(tmp_path / "run") for key in line)


def test_all_processes_leave_out_the_patients_that_the_first_one_found(tmp_path):
    """A model elsewhere may have lost its list."""
    agreed = {"minutes": 2.0, "kept": [None, 2.0], "identity": {}, "learnt": ["A"]}
    second = SimpleNamespace(first=False, broadcast_json=lambda _: agreed)
    started = start._agree(
        lambda *given: SimpleNamespace(identity={}, given=given), tmp_path, TrainingSettings(), second
    )
    assert started[0].given == (2.0, ["A"])


def test_of_an_initial_model_without_its_patients_it_is_said_that_nobody_knows(prepared, trained, tmp_path, capsys):
    shutil.copytree(trained / "model", tmp_path / "stripped")
    (tmp_path / "stripped" / "patients.json").unlink()
    train(prepared, tmp_path / "run", initial=tmp_path / "stripped", steps=1, display=Display())
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "the initial model does not say whom it learnt from: patients of validation and test may be among them" in said
    )
    assert any(key.startswith("val_") for line in records(tmp_path / "run") for key in line)


def test_a_training_starts_from_no_other_network(prepared, trained, any_run, tmp_path):
    with pytest.raises(ConfigError, match="has another synthesis"):
        train(prepared, tmp_path, with_settings(SMALL, {"synthesis.channels": "8"}), initial=trained / "model")
    with pytest.raises(ConfigError, match="has another sources"):
        train(prepared, tmp_path, sources=("t1n", "t2f"), targets=("t1c",), initial=trained / "model")
    with pytest.raises(ModelError, match="neither a folder nor"):
        train(prepared, tmp_path, initial="nowhere")
    with pytest.raises(ConfigError, match="initial model is of any subset"):
        train(prepared, tmp_path, SMALL, initial=any_run / "model")
    other_error = with_settings(SMALL, {"synthesis.loss": "absolute", "synthesis.lesion_weight": "3"})
    model = read_model(train(prepared, tmp_path / "error", other_error, initial=trained / "model", steps=1))
    assert (model.config.synthesis.loss, model.config.synthesis.lesion_weight) == ("absolute", 3)
    train(prepared, tmp_path / "run", initial=trained / "model", steps=1, stages=("representation",))
    with pytest.raises(ConfigError, match="another initial_model"):
        train(prepared, tmp_path / "run", steps=1)


def frozen(recipe: Recipe) -> Recipe:
    """The recipe with learning rates too small to change a weight."""
    return with_settings(recipe, {f"{name}_train.learning_rate": "1e-12" for name in STAGES})


def test_a_run_goes_on_with_the_same_validation_patients_or_not_at_all(resplit, trained, tmp_path):
    """Without its list the initial model leaves nobody out; the calibration would see those it learnt from."""
    data, _, _ = resplit(("train", "train", "val", "test"), ("train", "val", "test"))
    train(data, tmp_path / "run", initial=trained / "model", steps=1)
    shutil.copytree(trained / "model", tmp_path / "stripped")
    (tmp_path / "stripped" / "patients.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run that other patients validate.*patients\.json is beside it"):
        train(data, tmp_path / "run", initial=tmp_path / "stripped", steps=1)
    path = tmp_path / "run" / "run.json"  # as an earlier version wrote it
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "validation"})
    )
    train(data, tmp_path / "run", initial=trained / "model", steps=1)


def test_a_finished_run_leaves_its_model_as_it_is_and_a_damaged_one_is_written_again(prepared, trained, tmp_path):
    """Other runs may have started from it, and know it by its hash."""
    shutil.copytree(trained, tmp_path / "run")
    model = tmp_path / "run" / "model"
    before = tree(model)
    train(prepared, tmp_path / "run", steps=STEPS, seed=5)
    assert tree(model) == before
    next(model.glob("*.safetensors")).write_bytes(b"cut off")
    train(prepared, tmp_path / "run", steps=STEPS, seed=5)
    assert same(model, trained / "model")


def test_a_set_that_grew_is_named_where_the_recipe_follows_from_it(tmp_path):
    folder = tmp_path / "cohort"
    for number in range(6):
        write_study(folder, f"P-0000{number}-000", MODALITIES, seed=number, air=False)
    recipe = replace(RECIPES["standard"], crop=(16, 16), synthesis=replace(SMALL.synthesis, channels=8, patch=2))
    prepare(folder, tmp_path / "set", PrepareSettings(split=Split(0.6, 0.2, 0.2)))
    train(tmp_path / "set", tmp_path / "run", recipe, steps=1)
    write_study(folder, "P-00006-000", MODALITIES, seed=6, air=False)
    prepare(folder, tmp_path / "set", PrepareSettings(split=Split(0.6, 0.2, 0.2)))
    with pytest.raises(ConfigError, match="holds a run on another set, or on this one before it changed"):
        train(tmp_path / "set", tmp_path / "run", recipe, steps=1)
