"""The wiring of each stage: what it learns from, what is random, and what its loss depends on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from trainings import ANY, COMPUTE, JOINT, LAST, SOURCES, TARGETS, TRAIN, gradients, start_training, write_cases

from crossmr.baselines import fit_baselines, predict_baselines
from crossmr.display import Display
from crossmr.errors import ModelError
from crossmr.networks.c_unet import deviation_error
from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.scale import standardise
from crossmr.ranks import Ranks
from crossmr.tensors import seeded
from crossmr.training import stages
from crossmr.training.augmentation import AugmentationConfig
from crossmr.training.loop import Trainer
from crossmr.training.plan import Budget
from crossmr.training.recipes import Recipe
from crossmr.training.shared import cut
from crossmr.training.stages import (
    DistributionStage,
    GuidanceStage,
    RepresentationStage,
    SynthesisStage,
    random_subsets,
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture
def start(cases, tmp_path):
    """From a recipe to a training and a model; other cases by name."""
    return lambda recipe, compute=COMPUTE, **changes: start_training(tmp_path, {**cases, **changes}, recipe, compute)


def some(data, step: int = 0):
    """A batch of a stage as the loop draws it."""
    return data.batch(data.data[step], seeded("test", step))


def mean(stage, batch) -> float:
    total, count = stage.loss(stage.network, batch)
    return (total / count).item()


def equal(a, b) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def every_stage(start, recipe: Recipe) -> list:
    training, model = start(recipe)
    return [stages.STAGES[name](training, model) for name in training.config.stages]


# All stages


@pytest.mark.parametrize("recipe", [LAST, JOINT, ANY], ids=["last", "joint", "any"])
def test_everything_random_is_drawn_in_the_batch_and_by_its_generator_alone(start, recipe):
    for stage in every_stage(start, recipe):
        raw = stage.data[1]
        batch = stage.batch(raw, seeded("one"))
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert equal(batch, stage.batch(raw, seeded("one"))), stage.name
        assert mean(stage, batch) == mean(stage, batch), stage.name
        assert torch.equal(torch.get_rng_state(), state), stage.name
        assert {len(part) for part in batch if part is not None} == {len(raw[0])}


@pytest.mark.parametrize("recipe", [LAST, JOINT, ANY], ids=["last", "joint", "any"])
@pytest.mark.parametrize("size", [2, 5])
def test_what_processes_draw_together_is_what_one_draws(start, recipe, size):
    """Batches of six, whose samples differ in what they lack; a process reads and draws for its own alone."""
    recipe = replace(recipe, flip=True, augmentation=AugmentationConfig(probability=0.5))
    for stage in every_stage(start, recipe):
        whole, shards = some(stage, 3), [Ranks(rank, size).shard(6) for rank in range(size)]
        drawn = []
        for shard in shards:
            stage.data.shard = shard
            drawn.append(stage.batch(stage.data[3], seeded("test", 3), shard))
        assert [len(batch[0]) for batch in drawn] == [shard.stop - shard.start for shard in shards]
        for tensor, *shares in zip(whole, *drawn, strict=True):
            assert shares[0] is tensor is None or torch.equal(torch.cat(shares), tensor), stage.name


@pytest.mark.parametrize("recipe", [LAST, JOINT, ANY], ids=["last", "joint", "any"])
def test_of_every_stage_the_parts_add_up(start, recipe):
    for stage in every_stage(start, recipe):
        batch = some(stage)
        stage.network.requires_grad_(True)
        whole = gradients(stage, stage.network, batch, 1, COMPUTE)
        want = torch.cat([p.grad.flatten() for p in stage.network.parameters() if p.grad is not None])
        part = gradients(stage, stage.network, batch, 4, COMPUTE)
        got = torch.cat([p.grad.flatten() for p in stage.network.parameters() if p.grad is not None])
        assert part.item() == pytest.approx(whole.item(), rel=1e-5), stage.name
        assert ((got - want).norm() / want.norm()).item() < 1e-5, stage.name


def test_every_stage_is_validated_where_there_are_patients_for_it(start, tmp_path):
    for stage in every_stage(start, LAST):
        measured = stage.validate(stage.network, tmp_path / f"{stage.name}.png")
        assert measured, stage.name
        assert np.isfinite([*measured.values()]).all()
        assert (tmp_path / f"{stage.name}.png").exists() == (stage.name in ("synthesis", "guidance"))
    training, model = start(LAST, val=())
    for name in training.config.stages:
        assert stages.STAGES[name](replace(training, folder=tmp_path / "other"), model).validate(model, tmp_path) == {}


def test_validation_measures_the_network_that_it_is_given(start, tmp_path):
    for stage in every_stage(start, LAST):
        other = type(stage)(*start(LAST)).network
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        first, second = (stage.validate(network, tmp_path / "x.png") for network in (stage.network, other))
        assert first != second, stage.name


# Representation


def test_the_masked_autoencoder_never_sees_what_it_has_to_tell(start):
    training, model = start(ANY)
    stage = RepresentationStage(training, model)
    batch, seen = some(stage), []

    def spy(masked: Tensor) -> Tensor:
        seen.append(masked)
        return torch.zeros_like(masked)

    stage.loss(spy, batch)
    hidden = batch.mask.expand_as(batch.images) > 0
    assert not seen[0][hidden].any()
    assert torch.equal(seen[0][~hidden], standardise(batch.images)[~hidden])
    assert batch.mask.mean() == 0.75


def test_the_masked_autoencoder_sees_what_the_mdn_needs_and_nobody_loses_by_what_he_lacks(start):
    assert RepresentationStage(*start(JOINT)).data.modalities == TARGETS
    stage = RepresentationStage(*start(LAST))
    assert stage.data.modalities == (*SOURCES, *TARGETS)
    assert len(stage.data.cases) == 4
    batch = next(batch for step in range(9) if not (batch := some(stage, step)).present.all())
    other = batch._replace(images=torch.where(batch.present[..., None, None] > 0, batch.images, 0.7))
    assert mean(stage, batch) == pytest.approx(mean(stage, other), abs=1e-6)


# Distribution


def test_the_mdn_learns_from_every_slice_of_every_patient_with_what_it_needs(start):
    conditional, alone = DistributionStage(*start(LAST)), DistributionStage(*start(replace(JOINT, samples=1)))
    assert conditional.data.vectors.pooled.shape == (3 * 4, 4, 8)  # C lacks a source
    assert alone.data.vectors is not None
    batch = conditional.batch(conditional.data.vectors, seeded("all"))
    lacks = (batch.target_features == 0).any(1)
    assert lacks.sum() == 4  # B has no FLAIR, and serves T1ce
    assert not batch.y_0[lacks][:, 8:].any()
    assert batch.y_0[lacks][:, :8].any()
    assert batch.condition.shape == (12, 2 * 8 + 2)


def test_without_a_condition_the_mdn_learns_from_whoever_has_a_target(start):
    stage = DistributionStage(*start(JOINT))
    assert stage.data.vectors.pooled.shape == (4 * 4, 2, 8)
    batch = some(stage)
    assert batch.condition is None
    assert batch.keep is None


def test_for_any_subset_each_vector_has_a_part_that_is_given_and_a_part_that_is_drawn(start):
    training, model = start(ANY)
    stage = DistributionStage(training, model)
    raw = stage.data.vectors
    batch = stage.batch(raw, seeded("any"))
    target_mask, available = batch.target_features[:, ::8], batch.condition[:, 32:]
    assert torch.equal(target_mask + available, raw.present)
    assert (available.sum(1) >= 1).all()
    assert (target_mask.sum(1) >= 1).all()
    assert torch.equal(batch.condition, model.condition(raw.pooled, available))
    assert torch.equal(batch.y_0, model.y_0(raw.pooled, target_mask))
    assert len({tuple(row) for row in available.tolist()}) > 5
    assert not torch.equal(stage.batch(raw, seeded("other")).condition, batch.condition)


def test_steps_noise_and_dropped_conditions_of_the_mdn(start):
    stage = DistributionStage(*start(LAST))
    raw = cut(stage.data.vectors, slice(0, 1))
    many = stages.VectorBatch(raw.pooled.expand(4000, -1, -1), raw.present.expand(4000, -1))
    batch = stage.batch(many, seeded("many"))
    assert (batch.t.min(), batch.t.max()) == (0, 999)
    assert batch.keep.mean().item() == pytest.approx(0.8, abs=0.03)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.02)


def test_the_mdn_s_features_are_standardised_before_it_learns(start):
    training, model = start(LAST)
    stage = DistributionStage(training, model)
    batch = stage.batch(stage.data.vectors, seeded("all"))
    whole = batch.target_features.all(1)
    standard = ((batch.y_0 - model.distribution.centre) / model.distribution.scale)[:, :8]
    assert standard.mean(0).abs().max() < 1e-3
    assert whole.any()


def test_vectors_are_made_once_per_run(start, monkeypatch):
    training, model = start(LAST)
    first = DistributionStage(training, model)
    monkeypatch.setattr(stages, "pooled_features", None)
    again = DistributionStage(training, model)
    assert equal(first.data.vectors, again.data.vectors)
    assert equal(first.validation_batch, again.validation_batch)


def test_too_short_a_budget_represents_fewer_patients(start, capsys):
    training, model = start(LAST, replace(COMPUTE, display=Display()))
    stage = DistributionStage(replace(training, budget=Budget(minutes=1e-9)), model)
    assert len(stage.data.vectors.pooled) == 4
    assert "no time for more than 1 of 3 studies" in capsys.readouterr().out


def test_nobody_to_learn_from(start, cases):
    training, model = start(LAST, train=cases["train"][2:3])
    with pytest.raises(ModelError, match="No training patient has what the MDN learns from, t1n, t2w, t1c, t2f"):
        DistributionStage(training, model)


def test_collapsed_representations_are_named(start, monkeypatch, capsys):
    training, model = start(LAST, replace(COMPUTE, display=Display()))
    DistributionStage(replace(training, folder=training.folder / "a"), model)
    assert "hardly differ" not in capsys.readouterr().out
    constant = torch.randn(1, 1, 8)
    monkeypatch.setattr(
        CrossConditionedModel, "pooled", lambda self, images: constant.expand(*images.shape[:2], 8).clone()
    )
    DistributionStage(replace(training, folder=training.folder / "b"), model)
    assert "hardly differ between samples (standard deviation 0.000" in " ".join(capsys.readouterr().out.split())


# The guidance is used


@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
def test_joint_every_patient_has_vectors_of_his_own(start, conditional):
    training, model = start(replace(JOINT, distribution=replace(JOINT.distribution, conditional=conditional)))
    stage = SynthesisStage(training, model)
    assert stage.representations.shape == (len(stage.data.cases), 3, 16)
    assert len({tuple(row) for row in stage.representations.flatten(0, 1).tolist()}) == 3 * len(stage.data.cases)
    used = set()
    for step in range(8):
        raw = stage.data[step]
        batch = stage.batch(raw, seeded("test", step))
        for y_0, case in zip(batch.y_0, raw.case.tolist(), strict=True):
            (sample,) = (k for k in range(3) if torch.equal(y_0, stage.representations[case, k]))
            used.add((case, sample))
    assert len(used) == 3 * len(stage.data.cases)


def test_joint_the_loss_changes_with_y_0_and_condition_layers_learn(start):
    stage = SynthesisStage(*start(JOINT))
    batch = some(stage)
    assert mean(stage, batch) != pytest.approx(mean(stage, batch._replace(y_0=batch.y_0 + 1)), rel=1e-4)
    assert mean(stage, batch) != pytest.approx(mean(stage, batch._replace(y_0=batch.y_0.roll(1, 0))), rel=1e-5)
    gradients(stage, stage.network, batch, 1, COMPUTE)
    assert all(parameter.grad.abs().max() > 0 for parameter in stage.network.condition_layers())


def test_joint_validation_is_guided_by_each_patient_s_own_vector(start, tmp_path):
    stage = SynthesisStage(*start(JOINT))
    first = stage.validate(stage.network, tmp_path / "x.png")
    assert len({tuple(row) for row in stage.validation_batch.y_0.tolist()}) > 1
    stage.validation_batch = stage.validation_batch._replace(y_0=stage.validation_batch.y_0 + 1)
    assert stage.validate(stage.network, tmp_path / "x.png") != first


def test_last_the_condition_layers_learn_from_the_true_representation_and_nothing_else_does(start, tmp_path):
    training, model = start(LAST)
    stage = GuidanceStage(training, model)
    batch = some(stage)
    y_0 = stage.guide(batch)
    assert torch.equal(y_0, model.y_0(model.pooled(batch.truth), batch.target_mask))
    lacks = batch.target_mask == 0
    assert lacks.any()
    assert not y_0.reshape(len(y_0), 2, -1)[lacks].any()
    assert len({tuple(row) for row in y_0.tolist()}) == len(y_0)
    trainer = Trainer(tmp_path, stage, TRAIN, COMPUTE, Budget())
    gradients(stage, trainer.network, batch, 1, COMPUTE)
    learning = {id(parameter) for parameter in model.synthesis.condition_layers()}
    for parameter in model.synthesis.parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in learning)
    assert all(parameter.grad is None for parameter in model.representation.parameters())


def test_last_the_loss_changes_with_the_guidance(start, monkeypatch):
    stage = GuidanceStage(*start(LAST))
    batch = some(stage)
    before = mean(stage, batch)
    monkeypatch.setattr(stage, "guide", lambda batch: None)
    assert mean(stage, batch) != pytest.approx(before, rel=1e-4)


def test_last_the_c_unet_itself_learns_unguided(start):
    stage = SynthesisStage(*start(LAST))
    batch = some(stage)
    assert batch.y_0 is None
    gradients(stage, stage.network, batch, 1, COMPUTE)
    layers = {id(parameter) for parameter in stage.network.condition_layers()}
    for parameter in stage.network.parameters():
        assert (parameter.grad is None) == (id(parameter) in layers)


# Synthesis


def test_for_any_subset_the_loss_is_over_what_is_hidden_and_reads_what_is_available_alone(start):
    stage = SynthesisStage(*start(ANY))
    batch = some(stage)
    before = mean(stage, batch)
    masks = batch.available[..., None, None], batch.target_mask[..., None, None]
    assert not (batch.available * batch.target_mask).any()
    nothing_read = batch.neighbours.unflatten(1, (4, 3)) * masks[0][:, :, None]
    assert mean(stage, batch._replace(neighbours=nothing_read.flatten(1, 2))) == before
    assert mean(stage, batch._replace(truth=torch.where(masks[1] > 0, batch.truth, 0.9))) == before
    assert mean(stage, batch._replace(truth=torch.where(masks[1] > 0, 0.9, batch.truth))) != before
    nothing_hidden = batch._replace(neighbours=batch.neighbours * 0.5)
    assert mean(stage, nothing_hidden) != before


def weight_of(batch, lesion_weight: float = 0.0) -> Tensor:
    """What the error of each voxel counts: within the heads of what is a target, lesions more."""
    inside = (batch.truth > 0) & (batch.target_mask > 0)[..., None, None]
    return inside * (1 + lesion_weight * batch.lesion)


@pytest.mark.parametrize("lesion_weight", [0.0, 3.0])
@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_the_error_of_a_synthesis_is_the_recipe_s_within_the_head_and_more_in_lesions(start, loss, lesion_weight):
    synthesis = replace(LAST.synthesis, loss=loss, lesion_weight=lesion_weight)
    training, model = start(replace(LAST, synthesis=synthesis, uncertainty=False))
    stage = SynthesisStage(training, model)
    batch = next(batch for step in range(9) if (batch := some(stage, step)).lesion.any())
    with torch.no_grad():
        prediction, log_scale = stage.predict(stage.network, batch)
    assert log_scale is None
    error = prediction - standardise(batch.truth)
    error = error.abs() if loss == "absolute" else error**2
    weight = weight_of(batch, lesion_weight)
    assert weight.amax() == 1 + lesion_weight
    assert mean(stage, batch) == pytest.approx(float((error * weight).sum() / weight.sum()), rel=1e-5)
    unlabelled = mean(stage, batch._replace(lesion=torch.zeros_like(batch.lesion)))
    assert (mean(stage, batch) == unlabelled) == (lesion_weight == 0)


def test_nothing_outside_the_head_is_learnt(start):
    stage = SynthesisStage(*start(LAST))
    batch = some(stage)
    assert (batch.truth == 0).any()
    margin = (batch.neighbours == 0).all(1, keepdim=True)
    assert margin.any()
    prediction = torch.zeros(1)

    def moved(network, part):
        nonlocal prediction
        prediction, log_scale = SynthesisStage.predict(stage, network, part)
        return prediction + 7 * (part.truth == 0), log_scale - 3 * (part.truth == 0)

    before = mean(stage, batch)
    stage.predict = moved
    assert mean(stage, batch) == before
    assert prediction[batch.truth == 0].abs().max() > 0


def test_the_error_is_learnt_beside_the_image_with_its_weight(start):
    training, model = start(LAST)
    stage = SynthesisStage(training, model)
    batch = some(stage)
    with torch.no_grad():
        prediction, log_scale = stage.predict(stage.network, batch)
    truth, weight = standardise(batch.truth), weight_of(batch)
    squared = ((prediction - truth) ** 2 * weight).sum()
    both = squared + stages.DEVIATION_WEIGHT * deviation_error(log_scale, prediction, truth, weight)
    assert mean(stage, batch) == pytest.approx(float(both / weight.sum()), rel=1e-5)
    guided = GuidanceStage(training, model)
    with torch.no_grad():
        prediction, _ = guided.predict(guided.network, batch)
    squared = ((prediction - truth) ** 2 * weight).sum()
    assert mean(guided, batch) == pytest.approx(float(squared / weight.sum()), rel=1e-5)


def test_the_image_s_layer_learns_by_the_image_s_error_alone(start, monkeypatch):
    stage = SynthesisStage(*start(LAST))
    batch = some(stage)

    def slopes(weight: float) -> Tensor:
        monkeypatch.setattr(SynthesisStage, "deviation_weight", weight)
        gradients(stage, stage.network, batch, 1, COMPUTE)
        return stage.network.decoder.out.out.weight.grad.clone()

    without, with_error = slopes(0.0), slopes(stages.DEVIATION_WEIGHT)
    torch.testing.assert_close(with_error[:2], without[:2])
    assert not without[2:].any()
    assert with_error[2:].abs().amax((1, 2, 3)).min() > 0


def test_sources_are_augmented_truths_are_not(start):
    for plain in (LAST, replace(ANY, context_slices=1)):
        recipe = replace(plain, augmentation=AugmentationConfig(probability=1.0))
        one, other = (some(SynthesisStage(*start(each))) for each in (plain, recipe))
        assert torch.equal(one.truth, other.truth)
        assert (one.neighbours - other.neighbours).abs().max() > 0.01
        assert RepresentationStage(*start(recipe)).data.augment is None


def test_validation_is_scored_where_there_is_a_target(start, tmp_path, cases):
    validation = (replace(cases["train"][1], split="val"),)  # lacks FLAIR
    stage = SynthesisStage(*start(LAST, val=validation))
    scores = stage.validate(stage.network, tmp_path / "x.png")
    assert set(scores) == {"val_correlation_t1c", "val_error_t1c"}


def test_validation_measures_correlation_and_error_within_heads(start, tmp_path, monkeypatch):
    stage = SynthesisStage(*start(LAST))
    monkeypatch.setattr(stage, "chunk", 3)
    wanted = (stage.validation_batch.truth > 0) & (stage.validation_batch.target_mask > 0)[..., None, None]
    given = iter((standardise(stage.validation_batch.truth) * torch.tensor([1.0, -1])[:, None, None] + 0.25).split(3))
    monkeypatch.setattr(stage, "predict", lambda network, batch: (next(given), None))
    scores = stage.validate(stage.network, tmp_path / "x.png")
    assert scores["val_correlation_t1c"] == pytest.approx(1, abs=1e-5)
    assert scores["val_correlation_t2f"] == pytest.approx(-1, abs=1e-5)
    assert scores["val_error_t1c"] == pytest.approx(0.25, abs=1e-5)
    truth = standardise(stage.validation_batch.truth)[:, 1][wanted[:, 1]]
    assert scores["val_error_t2f"] == pytest.approx(float((0.25 - 2 * truth).abs().mean()), rel=1e-5)


@pytest.mark.parametrize("recipe", [LAST, ANY], ids=["fixed", "any"])
def test_validation_measures_the_linear_regression_of_the_same_sources(start, tmp_path, recipe):
    training, model = start(recipe)
    model.baselines = fit_baselines(
        [lambda c=c: {m: c.volume(m) for m in c.modalities} for c in training.train], training.config.modalities
    )
    stage = SynthesisStage(training, model)
    scores, fixed = stage.validate(stage.network, tmp_path / "x.png"), stage.validation_batch
    names = training.config.sources
    context = training.config.context_slices
    for index, target in enumerate(training.config.targets):
        made, truth = [], []
        for k in torch.nonzero(fixed.target_mask[:, index]).flatten().tolist():
            given = {m: fixed.neighbours[k, i * context + context // 2][None].numpy() for i, m in enumerate(names)}
            given = {m: image for (m, image), there in zip(given.items(), fixed.available[k], strict=True) if there}
            (image,) = predict_baselines(model.baselines, training.config.modalities, given, [target])[
                "linear regression"
            ]
            head = fixed.truth[k, index].numpy() > 0
            made.append(image[0][head])
            truth.append(fixed.truth[k, index].numpy()[head])
        expected = np.corrcoef(np.concatenate(made), np.concatenate(truth))[0, 1]
        assert scores[f"regression_correlation_{target}"] == pytest.approx(expected, abs=1e-4)


def test_no_regression_is_measured_where_one_sample_has_none(start, tmp_path):
    training, model = start(LAST)
    some = [{m: c.volume(m) for m in c.modalities if m != "t2w"} for c in training.train]
    model.baselines = fit_baselines([lambda one=one: one for one in some], training.config.modalities)
    stage = SynthesisStage(training, model)
    assert not any(name.startswith("regression") for name in stage.validate(stage.network, tmp_path / "x.png"))


# Subsets


def test_subsets_are_proper_and_each_further_missing_one_is_half_as_likely():
    generator = torch.Generator().manual_seed(0)
    present = torch.tensor([[1.0, 1, 0, 1]]).expand(6000, -1)
    chosen = random_subsets(present, generator)
    assert torch.equal(present, torch.tensor([[1.0, 1, 0, 1]]).expand(6000, -1))
    assert not chosen[:, 2].any()
    codes = (chosen * torch.tensor([1.0, 2, 0, 4])).sum(1).long()
    counts = codes.bincount(minlength=8)
    assert counts[0] == counts[7] == 0
    for hidden, share in ((1, 2 / 3), (2, 1 / 3)):  # of three, of which each is as likely as the other
        some = [code for code in range(1, 7) if code.bit_count() == 3 - hidden]
        assert (counts[some] - 6000 * share / 3).abs().max() < 150
    whole = random_subsets(torch.ones(7000, 4), generator)
    missing = (4 - whole.sum(1)).long().bincount(minlength=5)
    assert missing[0] == missing[4] == 0
    assert (missing[1:4] - torch.tensor([4000, 2000, 1000])).abs().max() < 200
    assert len({tuple(row) for row in whole.tolist()}) == 14


def test_with_less_than_two_there_is_nothing_to_hide():
    generator = torch.Generator().manual_seed(0)
    assert random_subsets(torch.tensor([[0.0, 1], [0, 0]]), generator).tolist() == [[0, 1], [0, 0]]
    pairs = random_subsets(torch.ones(400, 2), generator)
    assert pairs.sum(1).tolist() == [1.0] * 400
    assert 150 < pairs[:, 0].sum() < 250
