"""Every stage of training, calibration, completion and evaluation on a GPU that is not there (fake_cuda.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda

from crossmr.completion.study import complete
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.device import autocast
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import read_model
from crossmr.phantom import write_cohort
from crossmr.training import stages
from crossmr.training.recipes import ANY, PAPER, STANDARD, TrainConfig
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

FORM = {"shape": (32, 36, 32), "spacing_mm": (6.0, 6.2, 5.6)}
SMALL = {
    "crop": (16, 16),
    "samples": 2,
    "representation": RepresentationConfig(channels=4, multipliers=(1, 2), patch_size=4),
    "representation_train": TrainConfig(batch_size=2),
    "distribution_train": TrainConfig(batch_size=4),
    "synthesis_train": TrainConfig(batch_size=2),
    "guidance_train": TrainConfig(batch_size=2),
}
RECIPES = {
    name: replace(
        recipe,
        **SMALL,
        distribution=DistributionConfig(width=8, blocks=1, conditional=recipe.distribution.conditional),
        synthesis=replace(recipe.synthesis, channels=4, multipliers=(1, 2), condition_width=8),
    )
    for name, recipe in {
        "paper": PAPER,
        "standard": STANDARD,
        "any": ANY,
        "last": replace(ANY, guidance="last"),
    }.items()
}
RECIPES["standard in 3D"] = replace(
    RECIPES["standard"],
    spatial_dims=3,
    context_slices=1,
    crop=(16, 16, 16),
    guidance="last",
    representation=RepresentationConfig(channels=4, multipliers=(1, 1, 2), patch_size=8),
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_cohort(folder / "cohort", 4, seed=3, missing={0: ["t2f"]}, **FORM)
    prepare(folder / "cohort", folder / "set", PrepareSettings(split=Split(0.5, 0.25, 0.25, seed=1)))
    write_cohort(folder / "incomplete", 1, seed=9, missing={0: ["t1c", "t2f"]}, **FORM)
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # there is no memory to pin for
@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("paper", "float32"),
        ("standard", "bfloat16"),
        ("any", "float32"),
        ("last", "float32"),
        ("standard in 3D", "float32"),
    ],
)
def test_everything_runs_on_a_gpu(cohort, tmp_path, monkeypatch, recipe, precision):
    monkeypatch.setattr(stages.Stage, "num_workers", 0)
    monkeypatch.setattr(stages, "VALIDATION_SLICES", 4)
    settings = TrainingSettings(recipe=RECIPES[recipe], steps=1, device="cuda", precision=precision)
    inference = InferenceSettings(ddim_steps=1, device="cuda", precision=precision)
    study = next((cohort / "incomplete").iterdir())
    with fake_cuda(no_float64=True):
        folder = train(cohort / "set", tmp_path / "run", settings)
        model = read_model(folder, "cuda")
        assert model.device.type == "cuda"
        on_gpu = complete(study, model, inference)
        if model.config.spatial_dims == 2:  # the same again in 3D would take a minute
            if model.config.guidance != "none":
                guided = complete(study, model, replace(inference, guidance="unconditional", samples=2))
                assert set(guided.images) == {"t1c", "t2f"}
            evaluation = EvaluationSettings(inference=inference)
            assert not evaluate(model, cohort / "set", tmp_path / "evaluation", evaluation)["failed"]
    assert on_gpu.manifest["settings"]["device"] == "cuda"
    assert set(on_gpu.images) == {"t1c", "t2f"}
    on_cpu = complete(study, read_model(folder), replace(inference, device="cpu", precision="float32"))
    for modality, image in on_cpu.images.items():
        difference = np.abs(image.get_fdata() - on_gpu.images[modality].get_fdata()).max()
        assert difference < (1e-4 if precision == "float32" else 2e-2)


@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False), (torch.bfloat16, True)])
def test_float32_is_not_tf32_on_a_gpu(dtype, tf32):
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = not tf32
        with fake_cuda(), autocast(torch.device("cuda"), dtype):
            assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
