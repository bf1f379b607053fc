"""The variances that the C-UNet expects are calibrated where they matter, on any device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import ANY, COMPUTE, LAST, start_training, write_case, write_cases

from crossmr.networks.model import INHERITED, CrossConditionedModel
from crossmr.networks.scale import standardise
from crossmr.training import stages
from crossmr.training.calibration import _likeliest, calibration
from crossmr.training.shared import Training, in_chunks
from crossmr.training.stages import GuidanceStage, SynthesisStage


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture
def start(cases, tmp_path):
    """From a recipe to a training and a model; other cases by name."""
    return lambda recipe, compute=COMPUTE, **changes: start_training(tmp_path, {**cases, **changes}, recipe, compute)


def half_off(training: Training, model: CrossConditionedModel, monkeypatch, outside: float = 9.0) -> None:
    """Let every synthesis be half a robust deviation off within heads, and far off outside; b is 2 everywhere."""
    reader = training.batches("synthesis", training.val, training.config.modalities)
    truths = reader.validation_batch(stages.VALIDATION_SLICES).images[:, 2:]
    given = iter(truths.split(4))
    monkeypatch.setattr("crossmr.training.calibration.in_chunks", lambda f, n, *_: in_chunks(f, n, 4))

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        truth = next(given)
        prediction = torch.where(truth > 0, standardise(truth) + 0.5, outside)
        return prediction, torch.full_like(prediction, 2.0).log()

    monkeypatch.setattr(model, "predict", predict)


def test_variances_are_calibrated_within_heads_in_squared_robust_deviations(start, monkeypatch):
    training, model = start(LAST)
    half_off(training, model, monkeypatch)
    a, b = calibration(training, model)["variance"].unbind(1)
    torch.testing.assert_close(2 * 2.0**2 * a + b, torch.tensor([0.25, 0.25]), rtol=0.02, atol=0)


def test_a_calibrated_model_gives_the_error_that_it_makes(start, monkeypatch):
    training, model = start(LAST)
    half_off(training, model, monkeypatch)
    model.calibration = calibration(training, model)
    std = model.std(torch.full((1, 2, 4, 4), 2.0).log())
    torch.testing.assert_close(std, torch.full_like(std, 0.5 / 15), rtol=0.02, atol=0)


def test_nothing_is_float64_on_the_device(start, monkeypatch):
    """Apple's GPUs have no float64: only what `.cpu()` returned may become one."""
    training, model = start(LAST)
    fetched, cpu, double = set(), Tensor.cpu, Tensor.double

    def to_cpu(self: Tensor, *args) -> Tensor:
        moved = cpu(self, *args)
        fetched.add(moved.data_ptr())
        return moved

    def to_double(self: Tensor) -> Tensor:
        assert self.data_ptr() in fetched
        return double(self)

    monkeypatch.setattr(Tensor, "cpu", to_cpu)
    monkeypatch.setattr(Tensor, "double", to_double)
    assert calibration(training, model)["variance"].dtype == torch.float32
    assert fetched


def test_without_validation_patients_the_calibration_is_the_initial_model_s(start):
    training, model = start(LAST, val=())
    assert calibration(training, model) == {}
    before = {"variance": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}
    kept = calibration(training, model, before)
    assert torch.equal(kept["variance"], before["variance"])
    assert kept["patients"].tolist() == [INHERITED, 0]  # (1, 0) was fitted to nothing


def test_a_target_that_no_validation_patient_has_keeps_its_calibration(start, cases):
    training, model = start(LAST, val=(replace(cases["train"][1], split="val"),))
    fitted = calibration(training, model)
    assert fitted["variance"][1].tolist() == [1, 0]
    assert fitted["patients"].tolist() == [1, 0]
    before = {"variance": torch.tensor([[3.0, 1.0], [5.0, 2.0]])}
    assert calibration(training, model, before)["patients"].tolist() == [1, INHERITED]
    variance = calibration(training, model, before)["variance"]
    assert variance[1].tolist() == [5, 2]
    assert variance[0].tolist() != [3, 1]


def test_patients_to_whose_errors_it_was_fitted_are_counted_once(start, cases, tmp_path):
    first, second = cases["val"]
    lacking = write_case(tmp_path / "more", "X", ("t1n", "t1c", "t2w"), split="val")
    val = (first, replace(second, patient=first.patient), lacking)
    assert calibration(*start(LAST, val=val))["patients"].tolist() == [2, 1]
    planes = replace(LAST, guidance="none", planes=3)
    assert calibration(*start(planes, val=val))["patients"].tolist() == [2, 1]


def test_any_subset_is_calibrated_on_several_patterns(start):
    training, model = start(ANY)
    assert GuidanceStage(training, model).later_validations == stages.PATTERNS
    assert SynthesisStage(training, model).later_validations == 0  # it comes after the last stage, once
    assert SynthesisStage(*start(replace(LAST, guidance="none"))).later_validations == 1
    assert SynthesisStage(*start(replace(LAST, uncertainty=False))).later_validations == 0
    variance = calibration(training, model)["variance"]
    assert variance.shape == (4, 2)
    assert (variance >= 0).all()


def test_variances_are_calibrated_by_their_likelihood():
    rng = np.random.default_rng(0)
    variance = rng.gamma(2, 0.01, 20_000)
    squared = rng.normal(0, np.sqrt(0.3 * variance + 0.004)) ** 2
    a, b = _likeliest(torch.tensor(variance), torch.tensor(squared)).tolist()
    assert a == pytest.approx(0.3, rel=0.1)
    assert b == pytest.approx(0.004, rel=0.1)
    squared[:20] = 1.0  # a few gross errors, where little was said to be wrong
    variance[:20] = 1e-4
    a, b = _likeliest(torch.tensor(variance), torch.tensor(squared)).tolist()
    assert 0.1 < a < 1
    exact = torch.zeros(100)  # errors that are none at all
    assert torch.isfinite(_likeliest(torch.rand(100).double(), exact.double())).all()
