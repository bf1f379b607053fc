"""Training: losses fall, batches are exact, and a run that was stopped anywhere ends as if it never was."""

import json
import os
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

from crossmr import jobs
from crossmr.completion import Settings, synthesise
from crossmr.config import with_settings
from crossmr.data.dataset import Batches, PreparedSet
from crossmr.data.prepare import Split, prepare
from crossmr.display import Display
from crossmr.errors import ConfigError, ModelError, SetError
from crossmr.layers import Encoder
from crossmr.model import CrossConditionedModel, load_model, pseudonym
from crossmr.phantom import write_cohort
from crossmr.recipes import TINY, FitConfig, Recipe
from crossmr.stages.representation import MaskedAutoencoder
from crossmr.training import train
from crossmr.trivial import predict_trivial

COMMAND = "import sys; from crossmr.cli import main; main()"
SETTINGS = {
    "crop": "32,32",
    "samples": "2",
    "representation.channels": "8",
    "representation.multipliers": "1,2",
    "distribution.width": "32",
    "distribution.blocks": "2",
    "synthesis.channels": "8",
    "synthesis.multipliers": "1,2",
    "representation_fit.batch_size": "4",
    "synthesis_fit.batch_size": "4",
    "distribution_fit.batch_size": "16",
}
SMALL = with_settings(TINY, SETTINGS)
POOLED = with_settings(SMALL, {"representation.cell": "0", "guidance": "sample"})
"""One vector a volume, as published, and the sources' own masked autoencoder to condition on."""
ANY_SMALL = replace(SMALL, any_subset=True, context_slices=3)
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")


@pytest.fixture(scope="module", autouse=True)
def few_validation_slices():
    """Short trainings are validated at every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "VALIDATION_SLICES", 8)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Six phantom patients, one of whom lacks FLAIR and one T2."""
    folder = tmp_path_factory.mktemp("training")
    write_cohort(
        folder / "cohort",
        6,
        seed=3,
        missing={0: ["t2f"], 1: ["t2w"]},
        shape=(40, 48, 32),
        spacing_mm=(4.8, 4.8, 5.6),
    )
    prepare(folder / "cohort", folder / "set", split=Split(0.6, 0.2, 0.2, seed=1))
    return folder / "set"


def weights(model: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        for key, value in safetensors.torch.load_file(path).items():
            tensors[f"{path.stem}.{key}"] = value
    return tensors


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "whole"
    train(prepared, run, recipe=SMALL, sources=SOURCES, targets=TARGETS, steps=8, seed=5)
    return run


def test_one_command_trains_every_stage(trained):
    model = load_model(trained / "model")
    assert model.config.sources == SOURCES
    assert model.config.targets == TARGETS
    assert model.twin is None  # it is its own, unguided
    assert model.calibration["variance"].shape == (2, 2)
    assert set(model.trivial) == {"mean_image", "present", "gram"}
    stages = {json.loads(line)["stage"] for line in (trained / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"representation", "synthesis", "guidance", "distribution", "uncertainty"}
    assert list((trained / "pictures").glob("synthesis-*.png"))


def test_validation_measures_held_out_patients(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["stage"] == "synthesis"][-1]
    assert last["step"] == 8
    assert {"val_psnr_t1c", "val_ssim_t1c", "loss", "learning_rate", "steps_per_second"} <= last.keys()


@pytest.mark.parametrize("form", [SMALL, POOLED], ids=["cells", "pooled"])
def test_losses_fall(prepared, tmp_path, form):
    fit = FitConfig(batch_size=8, learning_rate=3e-3, ema_decay=0.9)
    fits = {"representation_fit": fit, "distribution_fit": replace(fit, batch_size=1024), "synthesis_fit": fit}
    recipe = replace(form, **fits, guidance_fit=replace(fit, learning_rate=3e-2), uncertainty_fit=fit)
    recipe = replace(recipe, synthesis=replace(form.synthesis, residual=False))  # the mix is where it would arrive
    train(prepared, tmp_path, recipe=recipe, sources=SOURCES, targets=TARGETS, steps=40, seed=1)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stages = {record["stage"] for record in records}
    assert stages >= {"representation", "distribution", "synthesis"}
    for stage in stages:
        losses = [record["loss"] for record in records if record["stage"] == stage]
        # a standardised vector starts at a loss of 1, and the condition layers where the C-UNet has arrived
        fall = 0.95 if stage in ("distribution", "guidance") else 0.8
        first, last = (sum(part) for part in (losses[:10], losses[-10:]))
        assert last < (first - 1 if stage == "uncertainty" else fall * first), stage  # a log likelihood has no zero


def test_same_seed_same_weights_other_seed_others(prepared, trained, tmp_path):
    again = train(prepared, tmp_path / "a", recipe=SMALL, sources=SOURCES, targets=TARGETS, steps=8, seed=5)
    other = train(prepared, tmp_path / "b", recipe=SMALL, sources=SOURCES, targets=TARGETS, steps=8, seed=6)
    assert same(trained / "model", again)
    assert not same(trained / "model", other)


def test_stages_one_by_one_equal_one_command(prepared, trained, tmp_path):
    for stage in ("representation", "synthesis", "guidance", "distribution", "uncertainty"):
        model = train(
            prepared,
            tmp_path,
            recipe=SMALL,
            sources=SOURCES,
            targets=TARGETS,
            stages=[stage],
            steps=8,
            seed=5,
        )
    assert same(trained / "model", model)


def test_a_stage_needs_those_before_it(prepared, tmp_path):
    with pytest.raises(ConfigError, match="'representation' comes before 'synthesis' and is not finished"):
        train(prepared, tmp_path, recipe=POOLED, sources=SOURCES, targets=TARGETS, stages=["synthesis"], steps=2)


def arguments(prepared: Path, run: Path, steps: int) -> list[str]:
    options = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    return [
        sys.executable, "-c", COMMAND, "train", str(prepared), "-o", str(run), "--recipe", "tiny",
        "--sources", "t1n,t2w", "--targets", "t1c,t2f", "--steps", str(steps), "--seed", "5", *options,
    ]  # fmt: skip


STEPS = 16


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Path:
    """The same run in a process that nobody stops."""
    run = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(arguments(prepared, run, STEPS), check=True, capture_output=True)
    return run


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_stopped_runs_end_with_the_weights_of_an_uninterrupted_one(prepared, uninterrupted, tmp_path, kind):
    steps, whole, stopped = STEPS, uninterrupted, tmp_path / "stopped"
    environment = {**os.environ, "CROSSMR_SECONDS_BETWEEN_CHECKPOINTS": "0.2"}
    log, interruptions = stopped / "metrics.jsonl", 0
    for lines in (5, STEPS * 2 + 6):  # in the first stage, and in the C-UNet
        process = subprocess.Popen(
            arguments(prepared, stopped, steps),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(kind)
            interruptions += 1
        _, errors = process.communicate(timeout=60)
        if kind == signal.SIGINT and process.returncode != 0:
            assert process.returncode == 130
            assert b"the same command goes on from there" in errors
    assert interruptions >= 1
    subprocess.run(arguments(prepared, stopped, steps), check=True, capture_output=True, env=environment)
    assert same(whole / "model", stopped / "model")
    steps_logged = [(r["stage"], r["step"]) for r in map(json.loads, log.read_text().splitlines())]
    assert len(steps_logged) == len(set(steps_logged))


def test_a_damaged_newest_checkpoint_falls_back(prepared, trained, tmp_path, capsys):
    from crossmr import fitting

    before = fitting.SECONDS_BETWEEN_CHECKPOINTS
    fitting.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    try:
        kwargs = {
            "recipe": SMALL,
            "sources": SOURCES,
            "targets": TARGETS,
            "steps": 8,
            "seed": 5,
        }
        train(prepared, tmp_path, **kwargs)
        newest = max((tmp_path / "stages" / "guidance").glob("*.safetensors"))
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        model = train(prepared, tmp_path, **kwargs, display=Display())
    finally:
        fitting.SECONDS_BETWEEN_CHECKPOINTS = before
    assert "Going on from the checkpoint before it" in capsys.readouterr().out
    assert same(trained / "model", model)


def test_a_run_is_never_continued_with_other_settings(prepared, trained):
    with pytest.raises(ConfigError, match="holds a run with another seed"):
        train(prepared, trained, recipe=SMALL, sources=SOURCES, targets=TARGETS, steps=8, seed=7)
    with pytest.raises(ConfigError, match="holds a run with another recipe"):
        train(prepared, trained, recipe=TINY, sources=SOURCES, targets=TARGETS, steps=8, seed=5)


def test_minutes_become_steps_that_are_remembered(prepared, tmp_path):
    start = time.monotonic()
    train(prepared, tmp_path, recipe=SMALL, sources=SOURCES, targets=TARGETS, minutes=0.05)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert set(plan) == {"representation", "synthesis", "guidance", "distribution", "uncertainty"}
    assert plan["synthesis"] > 4
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("guidance", ["sample", "unconditional", "truth", "none"])
def test_every_guidance_of_a_pooled_representation_trains(prepared, tmp_path, guidance):
    model = train(
        prepared,
        tmp_path,
        recipe=replace(POOLED, guidance=guidance),
        sources=SOURCES,
        targets=TARGETS,
        steps=2,
    )
    assert load_model(model).config.guidance == guidance


def test_a_pooled_run_trains_the_sources_representation_and_no_twin_unasked(prepared, tmp_path):
    model = load_model(train(prepared, tmp_path, recipe=POOLED, sources=SOURCES, targets=TARGETS, steps=2))
    assert set(model.networks()) == {"representation", "source_representation", "distribution", "synthesis"}


def test_the_guidance_leaves_the_finished_c_unet_as_it_is(prepared, tmp_path):
    common = {"recipe": SMALL, "sources": SOURCES, "targets": TARGETS, "steps": 4}
    model = load_model(train(prepared, tmp_path, **common))
    newest = max((tmp_path / "stages" / "synthesis").glob("*.safetensors"))
    finished = {key: value for key, value in safetensors.torch.load_file(newest).items() if key.startswith("ema.")}
    moved = set()
    for name, value in model.synthesis.state_dict().items():
        if not torch.equal(value, finished[f"ema.{name}"]):
            moved.add(name)
    learning = {name for name, _ in model.synthesis.named_parameters() if "condition" in name}
    assert moved
    assert moved <= learning


def test_a_representation_that_says_nothing_is_named(prepared, tmp_path, monkeypatch, capsys):
    common = {"recipe": SMALL, "sources": SOURCES, "targets": TARGETS, "steps": 1, "display": Display()}
    represent = MaskedAutoencoder.represent
    train(prepared, tmp_path / "alive", **common)
    assert "hardly differ" not in capsys.readouterr().out
    monkeypatch.setattr(MaskedAutoencoder, "represent", lambda self, image: 0.01 * represent(self, image))
    train(prepared, tmp_path / "mute", **common)
    assert "hardly differ between samples (standard deviation 0.00" in " ".join(capsys.readouterr().out.split())


def test_a_twin_is_trained_where_the_unguided_c_unet_is_none(prepared, tmp_path):
    common = {"sources": SOURCES, "targets": TARGETS, "twin": True}
    pooled = load_model(train(prepared, tmp_path / "pooled", recipe=POOLED, minutes=0.05, **common))
    assert pooled.twin is not None
    plan = json.loads((tmp_path / "pooled" / "plan.json").read_text())
    assert plan["twin"] == plan["synthesis"]
    assert load_model(train(prepared, tmp_path / "cells", recipe=SMALL, steps=1, **common)).twin is None


def test_deviations_are_calibrated_on_validation_patients(prepared, tmp_path, monkeypatch):
    def guesses(self, sources, unguided):
        bright = sources.mean(1, keepdim=True).clamp(0.05, 1)
        return torch.cat([torch.log(0.01 * bright**2), torch.log(0.01 / bright**4)], 1)

    monkeypatch.setattr(CrossConditionedModel, "log_variance", guesses)
    monkeypatch.setattr(jobs, "VALIDATION_SLICES", 48)
    recipe = replace(SMALL, synthesis=replace(SMALL.synthesis, residual=False))  # far from the truth
    common = {"recipe": recipe, "sources": SOURCES, "targets": TARGETS, "steps": 2, "precision": "float32"}
    model = load_model(train(prepared, tmp_path, **common))
    whole = [case for case in PreparedSet(prepared).part("val") if {*SOURCES, *TARGETS} <= {*case.modalities}]
    batch = Batches(whole, (*SOURCES, *TARGETS), size=(32, 32), batch_size=8, seed=0).fixed(48)
    sources, truth = batch.images[:, :2], batch.images[:, 2:]
    with torch.no_grad():
        image = model.synthesis(sources).clamp(0, 1)
    head = (batch.images > 0).any(1)
    squared = ((image - truth) ** 2).movedim(1, -1)[head]
    (a, b), (wrong, constant) = model.calibration["variance"]
    assert a > 1  # hardly trained, its errors are far larger than a tenth of the brightness
    assert wrong < 1e-3  # errors grow with brightness and never with its inverse
    assert float(constant) == pytest.approx(float(squared[:, 1].mean()), rel=0.02)

    def cost(a, b):
        told = (a * guesses(model, sources, image)[:, 0].exp() + b)[head]
        return float((told.log() + squared[:, 0] / told).mean())

    for other in ((a * 1.1, b), (a * 0.9, b), (a, b + 0.005)):
        assert cost(a, b) < cost(*other)  # under no other line are the errors likelier


def test_three_dimensions(prepared, tmp_path):
    recipe: Recipe = with_settings(SMALL, {"spatial_dims": "3", "crop": "16,16,16", "representation.patch_size": "8"})
    model = load_model(
        train(prepared, tmp_path, recipe=recipe, sources=SOURCES, targets=TARGETS, steps=2, precision="float32")
    )
    assert model.config.spatial_dims == 3
    assert model.synthesis.encoder.stem.weight.ndim == 5


def test_a_diverged_training_says_so(prepared, tmp_path):
    fit = FitConfig(batch_size=4, learning_rate=1e18, gradient_clip=1e18)
    with pytest.raises(ModelError, match="Lower representation's learning rate"):
        train(
            prepared,
            tmp_path,
            recipe=replace(SMALL, representation_fit=fit),
            sources=SOURCES,
            targets=TARGETS,
            steps=30,
        )


def test_refusals(prepared, tmp_path):
    with pytest.raises(ConfigError, match="has pdw; it has"):
        train(prepared, tmp_path, recipe=SMALL, targets=["pdw"])
    with pytest.raises(ConfigError, match="--steps or --minutes"):
        train(prepared, tmp_path, recipe=SMALL, steps=1, minutes=1)
    with pytest.raises(ConfigError, match="is no stage"):
        train(prepared, tmp_path, recipe=SMALL, stages=["discriminator"], steps=1)
    with pytest.raises(SetError, match="is no prepared set"):
        train(tmp_path, tmp_path / "run", recipe=SMALL)


# Going on from a trained model


def frozen(recipe: Recipe) -> Recipe:
    """The recipe with learning rates too small to change a weight."""
    fits = ("representation", "distribution", "synthesis", "guidance", "uncertainty")
    return with_settings(recipe, {f"{name}_fit.learning_rate": "1e-12" for name in fits})


def test_a_training_starts_from_the_weights_of_a_model(prepared, trained, tmp_path):
    other = train(prepared, tmp_path / "a", recipe=frozen(SMALL), start=trained / "model", steps=1, seed=8)
    before, after = weights(trained / "model"), weights(other)
    own = {"trivial.mean_image", "calibration.variance", "distribution.centre", "distribution.scale"}
    for key in before.keys() - own:
        assert torch.allclose(before[key].float(), after[key].float(), atol=1e-6), key
    record = load_model(other).record["training"]
    assert record["start"] == load_model(trained / "model").record["sha256"]
    assert load_model(other).config == load_model(trained / "model").config


def test_a_model_of_any_subset_goes_on_with_the_modalities_a_cohort_has(any_run, tmp_path):
    write_cohort(tmp_path / "cohort", 2, seed=9, shape=(40, 48, 32), spacing_mm=(4.8, 4.8, 5.6))
    for path in (tmp_path / "cohort").rglob("*t2w*"):
        path.unlink()
    prepare(tmp_path / "cohort", tmp_path / "set", split=Split(1.0, 0.0, 0.0))
    model = load_model(train(tmp_path / "set", tmp_path / "run", start=any_run / "model", steps=2))
    earlier = load_model(any_run / "model")
    assert model.config == earlier.config
    seen, before = (one.record["training"]["patients"]["train"] for one in (model, earlier))
    own = {pseudonym(case.patient) for case in PreparedSet(tmp_path / "set").part("train")}
    assert set(before) - own
    assert set(seen) == own | set(before)
    assert torch.equal(model.calibration["variance"], earlier.calibration["variance"])  # nobody here to calibrate on
    assert model.record["training"]["seen"]["studies"] == earlier.record["training"]["seen"]["studies"] + 2
    drawn = model.guide_cells(torch.rand(1, 16, 32, 32), torch.rand(1, 4, 32, 32), [torch.Generator()], steps=2)
    assert drawn.isfinite().all()


def test_a_training_starts_from_no_other_network(prepared, trained, tmp_path):
    with pytest.raises(ConfigError, match="has another synthesis"):
        train(prepared, tmp_path, recipe=with_settings(SMALL, {"synthesis.channels": "16"}), start=trained / "model")
    with pytest.raises(ConfigError, match="has another sources"):
        train(prepared, tmp_path, recipe=SMALL, sources=["t1n", "t2f"], targets=["t1c"], start=trained / "model")
    with pytest.raises(ModelError, match="neither a folder nor a model at hand"):
        train(prepared, tmp_path, start="nowhere")
    train(prepared, tmp_path / "run", recipe=SMALL, start=trained / "model", steps=1, stages=["representation"])
    with pytest.raises(ConfigError, match="another start"):
        train(prepared, tmp_path / "run", recipe=SMALL, sources=SOURCES, targets=TARGETS, steps=1)


# Any subset


@pytest.fixture(scope="module")
def any_run(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("any") / "run"
    train(prepared, run, recipe=ANY_SMALL, steps=6, seed=5)
    return run


def test_one_model_of_any_subset_learns_from_patients_who_lack_something(prepared, any_run):
    model = load_model(any_run / "model")
    assert model.config.sources == model.config.targets == ("t1n", "t1c", "t2w", "t2f")
    assert model.config.inputs == 4 * 3 + 4
    assert model.calibration["variance"].shape == (4, 2)
    stages = {json.loads(line)["stage"] for line in (any_run / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"representation", "synthesis", "guidance", "distribution", "uncertainty"}
    assert len(list((any_run / "pictures").glob("synthesis-*.png"))) > 0
    present = {tuple(row) for row in model.trivial["present"].tolist()}
    assert (1, 1, 1, 1) in present
    assert len(present) > 1


def test_a_model_of_any_subset_is_trained_alike_again_and_in_parts(prepared, any_run, tmp_path):
    for stage in ("representation", "synthesis", "guidance", "distribution", "uncertainty"):
        train(prepared, tmp_path, recipe=ANY_SMALL, steps=6, seed=5, stages=[stage])
    assert same(tmp_path / "model", any_run / "model")


def test_the_unguided_pass_of_any_subset_stays_what_it_was(any_run):
    model = load_model(any_run / "model")
    weights = safetensors.torch.load_file(any_run / "model" / "synthesis.safetensors")
    trained = [key for key in weights if "condition" in key]
    assert any(weights[key].abs().max() > 0 for key in trained if "blocks" in key or "condition" in key)
    inputs = torch.rand(2, 16, 32, 32)
    with torch.no_grad():
        guided = model.synthesis(inputs, torch.randn(2, 32, 4, 4))
        assert (guided - model.synthesis(inputs)).abs().max() > 0


def test_any_subset_of_the_modalities_named(prepared, tmp_path):
    train(prepared, tmp_path, recipe=ANY_SMALL, targets=("t2f", "t1n"), steps=1, stages=["representation"])
    assert json.loads((tmp_path / "run.json").read_text())["sources"] == ["t1n", "t2f"]


@pytest.mark.parametrize("any_subset", [False, True])
def test_a_c_unet_starts_from_the_linear_mix_of_what_it_is_shown(prepared, tmp_path, any_subset):
    recipe = replace(ANY_SMALL if any_subset else SMALL, synthesis_fit=FitConfig(learning_rate=1e-12, batch_size=4))
    chosen = {} if any_subset else {"sources": SOURCES, "targets": TARGETS}
    train(prepared, tmp_path, recipe=recipe, steps=1, **chosen)
    model = load_model(tmp_path / "model")
    case = next(case for case in PreparedSet(prepared).part("train") if len(case.modalities) == 4)
    given = {m: case.volume(m) for m in SOURCES}
    made = synthesise(model, given, case.head_voxels, case.name, Settings(precision="float32"))
    want = predict_trivial(model.trivial, model.config.modalities, given, TARGETS)["linear mix"]
    for target, volume in zip(TARGETS, want, strict=True):
        found = made.images[model.config.targets.index(target)].numpy()
        some = np.array(case.head_voxels) > 0
        np.testing.assert_allclose(found[some], volume[some], atol=1e-4)


def test_a_task_of_one_contrast_to_itself_is_no_any_subset(prepared, tmp_path):
    with pytest.raises(ConfigError, match="t1n is both source and target"):
        train(prepared, tmp_path, recipe=SMALL, sources=("t1n", "t2w"), targets=("t1n", "t2f"), steps=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "most"), [(POOLED, 3), (ANY_SMALL, 4)], ids=["pooled", "any"]
)  # MRM sees each of four targets by itself
def test_where_memory_runs_out_steps_validation_and_calibration_all_go_on(
    prepared, tmp_path, monkeypatch, capsys, recipe, most
):
    forward, sizes = Encoder.forward, set()

    def small(self, x, c=None):
        if len(x) > most:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
        sizes.add(len(x))
        return forward(self, x, c)

    monkeypatch.setattr(Encoder, "forward", small)
    train(prepared, tmp_path / "run", recipe=recipe, steps=2, seed=5, display=Display())
    assert load_model(tmp_path / "run" / "model").record["training"]["plan"]["synthesis"] == 2
    assert 1 < max(sizes) <= most
    assert "out of memory; batches go through in" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [value for line in lines for key, value in line.items() if key.startswith("val_")]
    assert len(measured) > 5
    assert np.isfinite(measured).all()
