"""What finished networks say of a study in training is what they say of it in use."""

from dataclasses import replace

import pytest
import torch
from trainings import COMPUTE, JOINT, LAST, SOURCES, start_training, write_cases

from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import CrossConditionedModel
from crossmr.tensors import to_model_input
from crossmr.training.representations import draw_representations, pooled_features


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture
def start(cases, tmp_path):
    """From a recipe to a training and a model; other cases by name."""
    return lambda recipe, compute=COMPUTE, **changes: start_training(tmp_path, {**cases, **changes}, recipe, compute)


def test_vectors_are_drawn_as_completion_draws_them(start, monkeypatch):
    """The same condition, of the same slices."""
    recipe = replace(JOINT, distribution=replace(JOINT.distribution, conditional=True))
    training, model = start(recipe)
    conditions = []
    draw = CrossConditionedModel.draw

    def spy(self, generators, condition=None, target_mask=None, *, steps=50):
        conditions.append(condition)
        return draw(self, generators, condition, target_mask, steps=steps)

    monkeypatch.setattr(CrossConditionedModel, "draw", spy)
    case = training.train[0]
    draw_representations(training, model, [case])
    head = HeadVolumes({m: case.volume(m) for m in SOURCES}, case.foreground_voxels, case.spacing_mm[0])
    synthesise(model, head, case.name, InferenceSettings(precision="float32"))
    torch.testing.assert_close(conditions[0], conditions[1])


def test_features_are_of_every_slice_with_enough_head_or_of_some(start):
    training, model = start(LAST)
    every = pooled_features(training, model, training.train, training.config.represented)
    some = pooled_features(training, model, training.train, training.config.represented, every=3)
    assert [part.pooled.shape for part in every] == [(4, 4, 8)] * 4
    for part, whole in zip(some, every, strict=True):
        torch.testing.assert_close(part.pooled, whole.pooled[::3])
        assert torch.equal(part.present, whole.present[::3])
    case = training.train[0]
    volumes = torch.stack([torch.from_numpy(case.volume(m)) for m in training.config.represented])
    with torch.no_grad():
        want = model.pooled(to_model_input(volumes, [[z] for z in range(4)], 2, training.config.divisor))
    torch.testing.assert_close(every[0].pooled, want)


def test_what_a_patient_lacks_is_said(start):
    training, model = start(LAST)
    (part,) = pooled_features(training, model, training.train[1:2], training.config.represented)
    assert part.present.tolist() == [[1, 1, 1, 0]] * 4


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_depend_on_the_patient_s_name_and_not_on_the_others(start, samples):
    training, model = start(replace(JOINT, samples=samples))
    every = draw_representations(training, model, training.train)
    assert every.shape == (4, samples, 16)
    torch.testing.assert_close(draw_representations(training, model, training.train[2:3]), every[2:3])
