"""A whole training: every stage, its record, and runs that were stopped, repeated, or asked for something else."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_study

from crossmr import tensors
from crossmr.config import with_settings
from crossmr.data.dataset import PreparedDataset
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.display import LOG, SILENT, Display
from crossmr.errors import ConfigError, ModelError
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import calibrated_on, read_model
from crossmr.networks.trained_on import find, names_of
from crossmr.networks.unet import Encoder, LightEncoder
from crossmr.training import calibration, loop, memory, run, stages, start
from crossmr.training.memory import StepMemory
from crossmr.training.plan import Budget
from crossmr.training.recipes import RECIPES, TINY, Recipe, TrainConfig, recipe_of
from crossmr.training.settings import TrainingSettings
from crossmr.typical import FEWEST

SETTINGS = {
    "crop": "16,16",
    "guidance": "last",
    "samples": "2",
    "representation.channels": "4",
    "representation.multipliers": "1,2",
    "distribution.width": "16",
    "distribution.blocks": "1",
    "synthesis.channels": "4",
    "synthesis.multipliers": "1,2",
    **{f"{name}_train.batch_size": "4" for name in ("representation", "synthesis", "guidance")},
    "distribution_train.batch_size": "16",
}
SMALL = with_settings(TINY, SETTINGS)
JOINT = with_settings(SMALL, {"guidance": "joint", "uncertainty": "false", "distribution.conditional": "false"})
UNGUIDED = replace(SMALL, guidance="none")
ANY_SMALL = replace(SMALL, any_subset=True)
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
MODALITIES = ("t1n", "t1c", "t2w", "t2f")
STAGES = ("representation", "distribution", "synthesis", "guidance")
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few slices to validate on, and no time for estimates of memory."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (stages, calibration):
            patch.setattr(module, "VALIDATION_SLICES", 6)
        patch.setattr(loop, "step_memory", lambda *_: StepMemory(per_sample=1, fixed=0))
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Seven patients, one of whom lacks FLAIR and one T2; every second has a lesion."""
    folder = tmp_path_factory.mktemp("training")
    lacking = {0: ("t1n", "t1c", "t2w"), 1: ("t1n", "t1c", "t2f")}
    for number in range(7):
        modalities, form = lacking.get(number, MODALITIES), {"air": False, "lesion": number % 2 == 0}
        write_study(folder / "cohort", f"P-0000{number}-000", modalities, seed=number, **form)
    prepare(folder / "cohort", folder / "set", PrepareSettings(split=Split(0.6, 0.2, 0.2, seed=34)))
    split = {name: [case.name for case in PreparedDataset(folder / "set").split(name)] for name in ("train", "val")}
    assert {"P-00000-000", "P-00001-000"} <= {*split["train"]}
    assert split["val"]
    return folder / "set"


def train(prepared: Path, folder: Path, recipe: Recipe | None = SMALL, *, display=SILENT, initial=None, **settings):
    """Train with fewer words; sources and targets as published unless the recipe or the initial model says."""
    if recipe is not None and not recipe.any_subset and initial is None:
        settings = {"sources": SOURCES, "targets": TARGETS} | settings
    return run.train(
        prepared, folder, TrainingSettings(recipe=recipe, **settings), initial_model=initial, display=display
    )


def weights(model: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        for key, value in safetensors.torch.load_file(path).items():
            tensors[f"{path.stem}.{key}"] = value
    return tensors


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(prepared, folder, steps=STEPS, seed=5)
    return folder


@pytest.fixture(scope="module")
def any_run(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("any") / "run"
    train(prepared, folder, ANY_SMALL, steps=STEPS, seed=5)
    return folder


@pytest.fixture(scope="module")
def resplit(prepared, trained, tmp_path_factory):
    """Prepares the cohort again: case by number -> its part, of those whom `trained` learnt from and of the others."""
    earlier = PreparedDataset(prepared)
    learnt, others = ([c.name for c in earlier.cases if (c.split == "train") is known] for known in (True, False))

    def prepare_again(parts_of_learnt, parts_of_others):
        folder = tmp_path_factory.mktemp("resplit")
        parts = [*zip(learnt, parts_of_learnt, strict=True), *zip(others, parts_of_others, strict=True)]
        rows = [f"{case},{case},{part}" for case, part in parts]
        (folder / "patients.csv").write_text("\n".join(["case,patient,part", *rows]))
        prepare(prepared.parent / "cohort", folder / "set", PrepareSettings(patients=folder / "patients.csv"))
        return folder / "set", learnt, others

    return prepare_again


# What comes out


def test_a_run_keeps_what_was_said_and_unforeseen_errors_in_its_log(trained, prepared, tmp_path, monkeypatch):
    again = Path(shutil.copytree(trained, tmp_path / "run"))
    train(prepared, again, seed=5, display=Display(quiet=True))
    first, *said = (again / LOG).read_text().splitlines()
    assert "not for sharing" in first
    assert [line.partition("  ")[0].split(maxsplit=2)[2] for line in said] == [
        "synthesis: 3 of 4 training studies can serve, since it needs t1n + t2w and a target; a model of --recipe any "
        "needs none of them",
        "synthesis: of 3 training studies 2 have t2f",
        *(f"{stage}: finished before" for stage in STAGES),
        "model: finished before",
    ]
    shutil.rmtree(again / "model")

    def fail(*_):
        raise ZeroDivisionError("nobody foresaw it")

    monkeypatch.setattr(run, "save_model", fail)
    with pytest.raises(ZeroDivisionError):
        train(prepared, again, seed=5)
    assert "ZeroDivisionError: nobody foresaw it" in (again / LOG).read_text()
    with pytest.raises(ConfigError, match="another seed"):
        train(prepared, again, seed=6, display=Display(quiet=True))
    with pytest.raises(ConfigError, match="both source and target"):
        train(prepared, tmp_path / "new", targets=("t1n",), display=Display(quiet=True))
    assert not (tmp_path / "new").exists()  # what is refused leaves nothing


def test_one_command_trains_every_stage(trained):
    model = read_model(trained / "model")
    assert (model.config.sources, model.config.targets, model.config.stages) == (SOURCES, TARGETS, STAGES)
    assert set(model.networks()) == {"representation", "distribution", "synthesis"}
    assert model.calibration["variance"].shape == (2, 2)
    assert set(model.baselines) == {"mean_image", "present", "gram"}
    assert list(dict.fromkeys(line["stage"] for line in records(trained))) == list(STAGES)
    assert len(list((trained / "pictures").glob("synthesis-*.png"))) == STEPS
    last = [line for line in records(trained) if line["stage"] == "synthesis"][-1]
    assert last["step"] == STEPS
    assert {"val_correlation_t1c", "val_error_t2f", "loss", "learning_rate", "steps_per_second"} <= last.keys()


def test_the_record_says_what_was_trained_on_whom(prepared, trained):
    record = read_model(trained / "model").record["training"]
    assert record["plan"]["synthesis"]["segments"] == [[0, STEPS]]
    assert record["budget"] == {"steps": STEPS, "minutes": None}
    assert record["seed"] == 5
    opened = PreparedDataset(prepared)
    usable = [case for case in opened.split("train") if set(SOURCES) <= set(case.modalities)]
    assert record["seen"]["studies"] == len(usable) < len(opened.split("train"))  # who teaches nothing is not seen
    assert set(record["seen"]["contrasts"]) == {"with_skull", "without_skull"}
    assert set(record["typical"]) <= {"with_skull", "without_skull"}
    assert record["set"] == opened.fingerprint
    last = [line for line in records(trained) if line["stage"] == "synthesis"][-1]
    assert record["validation"] == {
        target: {"correlation": last[f"val_correlation_{target}"], "linear_regression": linear}
        for target, linear in ((target, last[f"regression_correlation_{target}"]) for target in TARGETS)
    }


def test_a_run_says_how_many_studies_can_serve(prepared, tmp_path):
    def said_of(name: str, recipe: Recipe) -> str:
        train(prepared, tmp_path / name, recipe, steps=1, display=Display())
        return (tmp_path / name / LOG).read_text()

    count = len(PreparedDataset(prepared).split("train"))
    said = said_of("fixed", UNGUIDED)
    assert f"{count - 1} of {count} training studies can serve, since it needs t1n + t2w and a target" in said
    assert f"synthesis: of {count - 1} training studies {count - 2} have t2f" in said
    said = said_of("any", replace(ANY_SMALL, guidance="none"))
    assert "can serve" not in said
    assert f"synthesis: of {count} training studies {count - 1} have t2w, {count - 1} have t2f" in said


def test_of_a_run_that_never_measured_the_regression_nothing_is_said_of_it(prepared, trained, tmp_path):
    run_ = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    lines = [{k: v for k, v in line.items() if not k.startswith("regression")} for line in records(trained)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_ / "metrics.jsonl").write_bytes(b'{"damaged": "\xff"}\n' + text.encode() + b'{"cut')
    model = read_model(train(prepared, run_, steps=STEPS, seed=5))
    assert model.record["training"]["validation"] == {}


def test_the_model_knows_its_patients_by_name_and_by_scan_and_names_none(prepared, trained):
    lists, opened = read_model(trained / "model").patients, PreparedDataset(prepared)
    for names in (lambda case: names_of(case.patient, ()), lambda case: names_of("another", case.scans[:1])):
        seen = find(lists, {case.name: names(case) for case in opened.cases})
        assert seen == {case.name: case.split for case in opened.cases if case.split != "test"}
    for path in trained.rglob("*.json"):
        text = path.read_text()
        assert not [c for c in opened.cases if c.name in text or c.patient in text or any(s in text for s in c.scans)]


def test_losses_fall(prepared, tmp_path):
    fit = TrainConfig(batch_size=8, learning_rate=3e-3, ema_decay=0.9)
    trains = {f"{stage}_train": fit for stage in STAGES} | {"distribution_train": replace(fit, batch_size=256)}
    train(prepared, tmp_path, replace(SMALL, **trains), steps=24, seed=1, stages=STAGES[:3])
    for stage in STAGES[:3]:  # test_c_unet.py has the condition layers, whose loss starts where the C-UNet has arrived
        losses = [line["loss"] for line in records(tmp_path) if line["stage"] == stage]
        fall = 0.99 if stage == "distribution" else 0.9  # a standardised vector starts at a loss of 1
        first, last = (sum(part) for part in (losses[:8], losses[-8:]))
        assert last < fall * first, stage


def test_guidance_last_leaves_the_unguided_pass_as_it_is_bit_for_bit(trained):
    model = read_model(trained / "model")
    newest = max((trained / "stages" / "synthesis").glob("*.safetensors"))
    finished = safetensors.torch.load_file(newest)
    state = model.synthesis.state_dict()
    moved = {name for name, value in state.items() if not torch.equal(value, finished[f"ema.{name}"])}
    learning = {name for name in state if "condition" in name.split(".")}
    assert moved
    assert moved <= learning
    inputs = torch.rand(2, model.config.in_channels, 16, 16)
    before = model.synthesis(inputs)
    assert (model.synthesis(inputs, torch.randn(2, 16)) - before).abs().max() > 0
    model.synthesis.load_state_dict({name: finished[f"ema.{name}"] for name in state})
    assert torch.equal(model.synthesis(inputs), before)


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
def test_joint_trains_on_samples_of_the_mdn(prepared, tmp_path, conditional):
    recipe = with_settings(JOINT, {"distribution.conditional": str(conditional).lower()})
    model = read_model(train(prepared, tmp_path, recipe, steps=2))
    assert model.config.default_guidance == ("sample" if conditional else "unconditional")
    assert set(model.networks()) == {"representation", "distribution", "synthesis"}
    assert [*json.loads((tmp_path / "plan.json").read_text())] == ["representation", "distribution", "synthesis"]


@pytest.mark.parametrize("uncertainty", [False, True])
def test_without_guidance_there_is_neither_mrm_nor_mdn(prepared, tmp_path, uncertainty):
    recipe = replace(UNGUIDED, uncertainty=uncertainty)
    model = read_model(train(prepared, tmp_path, recipe, steps=2))
    assert set(model.networks()) == {"synthesis"}
    assert set(model.calibration) == ({"variance", "patients"} if uncertainty else set())


def test_three_dimensions(prepared, tmp_path):
    recipe = with_settings(
        SMALL,
        {
            "spatial_dims": "3",
            "context_slices": "1",
            "crop": "8,8,8",
            "representation.patch_size": "4",
            "representation.multipliers": "1,1,2",
        },
    )
    model = read_model(train(prepared, tmp_path, recipe, steps=2, precision="float32"))
    assert model.config.spatial_dims == 3
    assert model.synthesis.encoder.stem.conv.weight.ndim == 5


@pytest.mark.parametrize("name", ["standard", "any", "paper"])
def test_recipes_keep_what_they_set_when_they_are_made_small(prepared, tmp_path, name):
    """Their form, loss, schedule and draws; 'standard' and 'any' guided last, as they may be."""
    small = {key: value for key, value in SETTINGS.items() if key != "guidance"}
    small |= {"representation.patch_size": "4"} | ({} if name == "paper" else {"guidance": "last"})
    recipe = with_settings(replace(RECIPES[name], by_set=()), small)
    assert recipe.synthesis_train.schedule == RECIPES[name].synthesis_train.schedule
    model = read_model(train(prepared, tmp_path, recipe, steps=2, precision="float32"))
    assert model.config.stages == (STAGES[:3] if name == "paper" else STAGES)
    assert (model.config.synthesis.form, model.config.synthesis.patch) == (
        ("published", 1) if name == "paper" else ("light", 2)
    )
    assert recipe_of(model) == recipe
    case = next(case for case in PreparedDataset(prepared).cases if len(case.modalities) == 4)
    head = HeadVolumes({m: case.volume(m) for m in SOURCES}, case.foreground_voxels, case.spacing_mm[0])
    for guidance in ("unconditional",) if name == "paper" else ("none", "sample", "unconditional"):
        wish = InferenceSettings(precision="float32", targets=TARGETS, guidance=guidance, ddim_steps=2)
        images = synthesise(model, head, case.name, wish).images.numpy()
        inside = (head.volumes["t1n"] > 0) & (np.array(case.foreground_voxels) > 0)[:, None, None]
        assert (images[:, inside] > 0).all()
        assert not images[:, ~inside].any()


# Any subset


def test_one_model_of_any_subset_learns_from_patients_who_lack_something(any_run):
    model = read_model(any_run / "model")
    assert model.config.sources == model.config.targets == MODALITIES
    assert model.config.in_channels == 4 + 4 + 1
    assert model.calibration["variance"].shape == (4, 2)
    assert list(dict.fromkeys(line["stage"] for line in records(any_run))) == list(STAGES)
    present = {tuple(row) for row in model.baselines["present"].tolist()}
    assert (1, 1, 1, 1) in present
    assert len(present) > 1


# Repeating and going on


def test_same_seed_same_weights_other_seed_others(prepared, trained, tmp_path):
    assert same(trained / "model", train(prepared, tmp_path / "a", steps=STEPS, seed=5))
    assert not same(trained / "model", train(prepared, tmp_path / "b", steps=STEPS, seed=6))


@pytest.mark.parametrize("form", ["last", "any"])
def test_stages_one_by_one_equal_one_command(prepared, trained, any_run, tmp_path, form):
    recipe, whole = {"last": (SMALL, trained), "any": (ANY_SMALL, any_run)}[form]
    for stage in STAGES:
        model = train(prepared, tmp_path, recipe, stages=(stage,), steps=STEPS, seed=5)
    assert same(whole / "model", model)


def test_a_stage_needs_those_before_it(prepared, tmp_path):
    with pytest.raises(ConfigError, match="'representation' comes before 'synthesis' and is not finished"):
        train(prepared, tmp_path, stages=("synthesis",), steps=2)


SCRIPT = """
import json, sys
from crossmr.config import with_settings
from crossmr.errors import Interrupted
from crossmr.training import calibration, loop, stages
from crossmr.training.memory import StepMemory
from crossmr.training.recipes import TINY
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings
calibration.VALIDATION_SLICES = stages.VALIDATION_SLICES = 4
loop.step_memory = lambda *_: StepMemory(1, 0)
prepared, folder, steps, changes = sys.argv[1:]
recipe = with_settings(TINY, json.loads(changes))
settings = TrainingSettings(recipe, ("t1n", "t2w"), ("t1c", "t2f"), steps=int(steps), seed=5)
try:
    train(prepared, folder, settings)
except Interrupted as error:
    sys.exit(str(error))
"""
LONG = 10


def command(prepared: Path, folder: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(prepared), str(folder), str(LONG), json.dumps(SETTINGS)]


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Path:
    """The same run in a process that nobody stops."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(command(prepared, folder), check=True, capture_output=True)
    return folder


def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(prepared, uninterrupted, tmp_path):
    """Killed in the first stage and in the C-UNet, interrupted in its guidance."""
    folder = tmp_path / "stopped"
    environment = {**os.environ, "CROSSMR_SECONDS_BETWEEN_CHECKPOINTS": "0.1"}
    log = folder / "metrics.jsonl"
    for lines, kind in ((5, signal.SIGKILL), (LONG * 2 + 5, signal.SIGKILL), (LONG * 3 + 3, signal.SIGINT)):
        process = subprocess.Popen(
            command(prepared, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.02)
        assert process.poll() is None, "it finished before it was stopped"
        process.send_signal(kind)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        assert kind == signal.SIGKILL or b"the same command goes on from there" in errors
    subprocess.run(command(prepared, folder), check=True, capture_output=True, env=environment)
    assert same(uninterrupted / "model", folder / "model")
    steps = [(line["stage"], line["step"]) for line in records(folder)]
    assert len(steps) == len(set(steps)) == LONG * len(STAGES)


def test_a_damaged_newest_checkpoint_falls_back(prepared, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    train(prepared, tmp_path, steps=STEPS, seed=5)
    newest = max((tmp_path / "stages" / "guidance").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    model = train(prepared, tmp_path, steps=STEPS, seed=5, display=Display())
    assert "Going on from the checkpoint before it" in capsys.readouterr().out
    assert same(trained / "model", model)


# First weights


def test_first_weights_follow_from_seed_and_name_alone(prepared, tmp_path):
    def first(recipe: Recipe, seed: int = 0):
        settings = TrainingSettings(recipe, SOURCES, TARGETS, seed=seed)
        training = start._training(tmp_path, PreparedDataset(prepared), settings, None, SILENT, Budget())
        torch.manual_seed(3)  # nobody else's random numbers matter, nor are touched
        state = torch.get_rng_state()
        networks = run._first_model(training, None).networks()
        assert torch.equal(torch.get_rng_state(), state)
        return {name: network.state_dict() for name, network in networks.items()}

    def equal(a, b) -> bool:
        return all(torch.equal(a[key], b[key]) for key in a)

    one = first(SMALL)
    wider = first(with_settings(SMALL, {"distribution.blocks": "3"}))
    alone = first(UNGUIDED)
    for name in ("representation", "synthesis"):
        assert equal(one[name], wider[name])
    assert [*alone] == ["synthesis"]
    assert equal(alone["synthesis"], one["synthesis"])
    other = first(SMALL, seed=1)
    assert not any(equal(one[name], other[name]) for name in one)


# Divergence


def test_a_diverged_training_gives_advice_that_is_accepted(prepared, tmp_path):
    fit = TrainConfig(batch_size=4, learning_rate=1e18, gradient_clip=1e18)
    with pytest.raises(ModelError, match="Start in another folder with --set representation_train") as error:
        train(prepared, tmp_path / "a", replace(SMALL, representation_train=fit), steps=30)
    (setting, value) = re.search(r"--set (\S+)=(\S+)$", str(error.value)).groups()
    recipe = with_settings(replace(SMALL, representation_train=fit), {setting: value})
    assert recipe.representation_train.learning_rate == 1e18 / 4
    recipe = with_settings(recipe, {setting: "1e-3"})
    train(prepared, tmp_path / "b", recipe, steps=1, stages=("representation",))


# --minutes


def test_minutes_are_wall_time_over_all_calls(prepared, tmp_path):
    begin = time.monotonic()
    train(prepared, tmp_path, minutes=0.1, stages=("representation",))
    first = time.monotonic() - begin
    assert first < 6
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert 1.2 <= plan["representation"]["until"] < 1.2 + 0.8 * first  # a fifth of what reading leaves of six seconds
    model = read_model(train(prepared, tmp_path))
    assert time.monotonic() - begin == pytest.approx(6, rel=0.5)  # other programs may take their share
    plan = model.record["training"]["plan"]
    assert set(plan) == set(STAGES)
    assert [plan[stage]["until"] for stage in STAGES] == sorted(plan[stage]["until"] for stage in STAGES)
    assert model.record["training"]["budget"] == {"steps": None, "minutes": 0.1}


def test_with_next_to_no_time_every_stage_has_a_step(prepared, tmp_path):
    plan = read_model(train(prepared, tmp_path, minutes=1e-6)).record["training"]["plan"]
    assert {stage: plan[stage]["segments"][-1][1] for stage in STAGES} == dict.fromkeys(STAGES, 1)


# Going on from a trained model


def test_the_list_of_patients_of_an_old_run_is_left_out(prepared, trained, tmp_path):
    """Runs kept unsalted hashes of their patients in run.json."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patients": {"train": ["015f1c9f23a16063"]}}))
    model = read_model(train(prepared, tmp_path / "run", steps=STEPS, seed=5))
    assert "patients" not in model.record["training"]
    assert len(model.patients) == 1


def test_a_target_that_no_validation_patient_has_is_said_not_to_be_calibrated(resplit, tmp_path, capsys):
    data, learnt, _ = resplit(("val", "train", "train", "train"), ("train", "train", "test"))
    assert learnt[0] == "P-00000-000"  # has no FLAIR
    model = read_model(train(data, tmp_path / "run", UNGUIDED, steps=1, display=Display()))
    said = capsys.readouterr().out
    assert "standard deviations of FLAIR: not calibrated, since no validation patient has it" in said
    assert calibrated_on(model.calibration, model.config.targets) == {"t1c": 1, "t2f": 0}


# Memory


@pytest.mark.parametrize(("recipe", "most"), [(JOINT, 3), (ANY_SMALL, 4)], ids=["joint", "any"])
def test_where_memory_runs_out_steps_validation_and_calibration_all_go_on(
    prepared, tmp_path, monkeypatch, capsys, recipe, most
):
    """The MRM sees each of two, or four, modalities of a sample by itself."""
    sizes = set()

    def limited(forward):
        def small(self, x, *rest):
            if len(x) > most:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
            sizes.add(len(x))
            return forward(self, x, *rest)

        return small

    for encoder in (Encoder, LightEncoder):
        monkeypatch.setattr(encoder, "forward", limited(encoder.forward))
    train(prepared, tmp_path / "run", recipe, steps=2, seed=5, display=Display())
    read_model(tmp_path / "run" / "model")
    assert 1 < max(sizes) <= most
    assert "out of memory; batches go through in" in capsys.readouterr().out
    measured = [value for line in records(tmp_path / "run") for key, value in line.items() if key.startswith("val_")]
    assert len(measured) > 5
    assert np.isfinite(measured).all()


@pytest.mark.parametrize("recipe", [SMALL, JOINT, ANY_SMALL, UNGUIDED], ids=["last", "joint", "any", "none"])
def test_the_memory_of_every_stage_is_estimated(prepared, tmp_path, monkeypatch, capsys, recipe):
    estimates = []

    def spy(*arguments):
        estimates.append(memory.step_memory(*arguments))
        return estimates[-1]

    monkeypatch.setattr(loop, "step_memory", spy)
    train(prepared, tmp_path / "run", recipe, steps=1, display=Display())
    said = re.findall(r"^(\w+): a batch of \d+ needs about", capsys.readouterr().out, re.MULTILINE)
    assert said == list(read_model(tmp_path / "run" / "model").config.stages)
    assert len(estimates) == len(said)
    assert all(estimate.per_sample > 100 for estimate in estimates)


def test_what_is_typical_of_too_few_studies_to_tell_is_as_the_initial_model_has_it(prepared, trained, tmp_path):
    initial = read_model(trained / "model")
    known = {"with_skull": {"shape 0": [0.1, 0.02]}, "without_skull": {"smooth t1n": [0.9, 0.03]}}
    initial.record["training"]["typical"] = known
    assert len(PreparedDataset(prepared).split("train")) < FEWEST
    train(prepared, tmp_path / "run", None, initial=initial, steps=1)
    assert read_model(tmp_path / "run" / "model").record["training"]["typical"] == known
    train(prepared, tmp_path / "without", steps=1)
    assert not any(read_model(tmp_path / "without" / "model").record["training"]["typical"].values())


def test_three_planes_are_learnt_in_studies_with_thin_slices(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "NEIGHBOURS_MM", 4.0)  # slices of 7 mm are thin
    recipe = replace(ANY_SMALL, guidance="none")
    train(prepared, tmp_path / "axial", recipe, steps=1)
    axial = read_model(tmp_path / "axial" / "model")
    train(prepared, tmp_path / "run", replace(recipe, planes=3), initial=axial, steps=2)
    model = read_model(tmp_path / "run" / "model")
    assert model.config.planes == 3
    case = PreparedDataset(prepared).split("train")[0]
    head = HeadVolumes({m: case.volume(m) for m in case.modalities[:2]}, case.foreground_voxels, case.spacing_mm[0])
    three, one = (synthesise(model, head, "P", InferenceSettings(planes=count)).images for count in (3, 1))
    assert not torch.equal(three, one)
    with pytest.raises(ConfigError, match="planes is 3; expected 1 or 3, and 1 in 3D or with guidance"):
        train(prepared, tmp_path / "guided", replace(ANY_SMALL, planes=3, guidance="last"), steps=2)
