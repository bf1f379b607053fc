"""The model and its folder: what it is made of, and that what comes back is what was saved, or one clear line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import unguided
from fake_cuda import fake_cuda

from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.config import to_dict
from crossmr.data.head import DARKEST
from crossmr.errors import ConfigError, ModelError
from crossmr.files import digest, write_json
from crossmr.networks.c_unet import SynthesisConfig, synthesis_error
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig, z_score
from crossmr.networks.model import (
    INHERITED,
    LOG_SCALE_RANGE,
    CrossConditionedModel,
    ModelConfig,
    calibrated_on,
    laplace_variance,
    read_model,
    save_model,
)
from crossmr.networks.scale import on_unit_scale, standardise
from crossmr.networks.trained_on import names_of, remember
from crossmr.networks.unet import ResidualBlock

FORM = {"channels": 4, "multipliers": (1, 2)}
THREE = ("t1n", "t1c", "t2f")


def a_config(*, conditional=True, **changes):
    settings = {"sources": ("t1n", "t2w"), "targets": ("t1c", "t2f"), "window": (8, 8), "guidance": "last"} | changes
    return ModelConfig(
        **{
            "representation": RepresentationConfig(**FORM, patch_size=2),
            "distribution": DistributionConfig(width=8, blocks=1, conditional=conditional),
            "synthesis": SynthesisConfig(**FORM),
        }
        | settings
    )


def random_model(**settings):
    model = CrossConditionedModel(a_config(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    count = len(model.config.modalities)
    model.baselines = {
        "mean_image": torch.rand(count, 2, 2, 2).half(),
        "present": torch.ones(1, count, dtype=torch.uint8),
        "gram": torch.rand(1, count + 1, count + 1, dtype=torch.float64),
    }
    return model.eval().requires_grad_(False)


def any_model(**changes):
    """A random model of any subset of three modalities, from three slices."""
    return random_model(**{"sources": THREE, "targets": THREE, "context_slices": 3} | changes)


def generators(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


def images(count=3, channels=2, seed=9):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def outputs(model):
    """What every network of the model makes."""
    sources, made = images(), []
    inputs = model.network_input(sources, torch.ones(3, 2))
    y_0 = None
    if model.representation is not None:
        pooled = model.pooled(sources)
        condition = model.condition(pooled[:1], torch.ones(1, 2)) if model.config.distribution.conditional else None
        y_0 = model.draw(generators(3), condition, steps=3)
        made += [y_0, pooled, model.representation(sources), model.draw(generators(3), steps=3)]
    made += [model.synthesis(inputs, y_0), unguided(model, inputs)]
    if model.config.uncertainty:
        made.append(model.std(model.predict(inputs)[1]))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, random_model(uncertainty=True), {"steps": 3})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def resave(folder, change):
    """Write the folder again, hashes and all, after `change(tensors, data)`."""
    tensors, data = load_bundle(folder, "config")
    data.pop("files")
    change(tensors, data)
    save_bundle(folder, tensors, data, "config")


def refused(folder, match):
    with pytest.raises(ModelError, match=match) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# The configuration


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"sources": ()}, "sources are none"),
        ({"targets": ()}, "targets none"),
        ({"targets": ("t1n", "t1c")}, "none twice"),
        ({"sources": ("t1n", "t1n")}, "none twice"),
        ({"sources": ("t1n",), "targets": ("t1n",)}, "two or more"),
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"window": (8, 8, 8)}, r"crop \(8, 8, 8\)"),
        ({"window": (8, 7)}, "multiples of 2"),
        ({"window": (8, 0)}, "multiples of 2"),
        ({"context_slices": 2}, "expected 1, 3 or 5"),
        ({"spatial_dims": 3, "window": (8, 8, 8), "context_slices": 3}, "and 1 in 3D"),
        ({"targets": ("t1n", "t2w"), "guidance": "joint"}, "any_subset needs guidance 'last' or 'none'"),
        ({"uncertainty": True, "guidance": "joint"}, "unguided image, which guidance 'joint' does not have"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(wrong, match):
    with pytest.raises(ConfigError, match=match):
        a_config(**wrong)


@pytest.mark.parametrize("uncertainty", [True, False])
@pytest.mark.parametrize(
    ("guidance", "stages"),
    [
        ("joint", ("representation", "distribution", "synthesis")),
        ("last", ("representation", "distribution", "synthesis", "guidance")),
        ("none", ("synthesis",)),
    ],
)
def test_the_stages_are_those_of_the_guidance_in_the_order_of_their_training(guidance, stages, uncertainty):
    if guidance == "joint" and uncertainty:
        return
    model = random_model(guidance=guidance, uncertainty=uncertainty)
    assert model.config.stages == stages  # the error is learnt beside the image
    networks = [name for name in stages if name != "guidance"]
    assert set(model.networks()) == set(networks)
    for name in networks:
        assert model.network_of(name) is model.networks()[name] is getattr(model, name)
    if guidance == "last":
        assert model.network_of("guidance") is model.synthesis


@pytest.mark.parametrize(
    ("guidance", "conditional", "want"),
    [
        ("joint", True, "sample"),
        ("joint", False, "unconditional"),
        ("last", True, "none"),
        ("last", False, "none"),
        ("none", True, "none"),
    ],
)
def test_an_image_is_guided_by_what_the_c_unet_was_trained_with(guidance, conditional, want):
    assert a_config(guidance=guidance, conditional=conditional).default_guidance == want


def test_any_subset_is_every_modality_read_and_synthesised():
    config = a_config(sources=THREE, targets=THREE, context_slices=3)
    assert config.any_subset
    assert config.modalities == config.sources == config.targets
    assert config.in_channels == 3 * 3 + 3 + 1
    other = a_config(context_slices=5)
    assert not other.any_subset
    assert other.modalities == ("t1n", "t2w", "t1c", "t2f")
    assert other.in_channels == 2 * 5 + 1


def test_the_mrm_learns_the_targets_and_the_sources_where_they_condition_the_mdn():
    assert a_config(conditional=False).represented == ("t1c", "t2f")
    assert a_config(conditional=True).represented == ("t1n", "t2w", "t1c", "t2f")
    assert a_config(sources=THREE, targets=THREE).represented == THREE


def test_the_stride_is_that_of_the_networks_there_are():
    deep, flat = (1, 1, 1, 1, 1, 1), (1, 1)
    for one, other in ((deep, flat), (flat, deep)):
        forms = {
            "window": (32, 32),
            "representation": RepresentationConfig(multipliers=one),
            "synthesis": SynthesisConfig(multipliers=other),
        }
        assert (a_config(**forms).stride, a_config(**forms).divisor) == (32, 32)
        plain = a_config(**forms, guidance="none")
        assert (plain.stride, plain.divisor) == ((2, 16) if one is deep else (32, 32))
    patches = {"guidance": "none", "synthesis": SynthesisConfig(multipliers=(1, 1, 1, 1), patch=4), "window": (32, 32)}
    assert (a_config(**patches).stride, a_config(**patches).divisor) == (32, 32)
    with pytest.raises(ConfigError, match="multiples of 32"):
        a_config(**patches | {"window": (48, 32)})
    thirds = a_config(synthesis=SynthesisConfig(multipliers=(1, 1), patch=6), guidance="none", window=(24, 24))
    assert (thirds.stride, thirds.divisor) == (12, 48)


# First weights


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_first_weights_follow_from_the_seed_and_the_networks_name_alone():
    before = torch.get_rng_state()
    first = CrossConditionedModel(a_config(uncertainty=True), seed=1)
    torch.manual_seed(5)
    again, other = (CrossConditionedModel(a_config(uncertainty=True), seed=seed) for seed in (1, 2))
    for name, network in first.networks().items():
        assert equal(weights(network), weights(again.networks()[name]))
        assert not equal(weights(network), weights(other.networks()[name]))
    alike = CrossConditionedModel(a_config(sources=("t1n",), targets=("t1c",)))
    stems = [network.encoder.middle_1.conv_1.weight for network in (alike.representation, alike.synthesis)]
    assert stems[0].shape == stems[1].shape
    assert not torch.equal(*stems)
    torch.set_rng_state(before)
    CrossConditionedModel(a_config())
    assert torch.equal(torch.get_rng_state(), before)  # nothing else is drawn differently for it


@pytest.mark.parametrize(
    "change",
    [
        {"distribution": DistributionConfig(width=16, blocks=3, conditional=True)},
        {"representation": RepresentationConfig(channels=4, multipliers=(1, 2, 2), patch_size=2)},
        {"representation": RepresentationConfig(channels=8, multipliers=(2, 1), decoder="skip-free")},
    ],
)
def test_no_network_changes_anothers_first_weights(change):
    first, changed = CrossConditionedModel(a_config(), seed=1), CrossConditionedModel(a_config(**change), seed=1)
    assert equal(weights(first.synthesis), weights(changed.synthesis))
    if "distribution" in change:
        assert equal(weights(first.representation), weights(changed.representation))


FORMS = pytest.mark.parametrize(
    "form", [SynthesisConfig(**FORM), SynthesisConfig(**FORM, form="light", patch=2)], ids=["published", "light"]
)


def read(model, sources):
    """What the C-UNet reads where all sources are there."""
    return model.network_input(sources, torch.ones(sources.shape[:2]))


@pytest.mark.parametrize("guidance", ["joint", "last"])
@FORMS
def test_a_guided_c_unet_starts_as_the_plain_one(guidance, form):
    """So that a comparison of the two is of guidance alone."""
    guided, plain = (CrossConditionedModel(a_config(guidance=g, synthesis=form), seed=3) for g in (guidance, "none"))
    with torch.no_grad():
        assert torch.equal(unguided(guided, read(guided, images())), unguided(plain, read(plain, images())))
    for name, tensor in plain.synthesis.state_dict().items():
        assert torch.equal(guided.synthesis.state_dict()[name], tensor), name


@FORMS
def test_the_unguided_pass_is_the_plain_networks_before_and_after_the_condition_layers_learn(form):
    model, plain = (CrossConditionedModel(a_config(guidance=g, synthesis=form), seed=3) for g in ("last", "none"))
    inputs, truth, mask = read(model, images()), images(seed=1), torch.ones(3, 2)

    def train(network, parameters, y_0=None):
        optimiser = torch.optim.Adam(parameters, 1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            made = network(inputs, y_0)
            synthesis_error(made, standardise(truth), torch.ones_like(truth), absolute=False)[0].backward()
            optimiser.step()

    for each in (model, plain):  # what both train alike
        train(each.synthesis, [p for n, p in each.synthesis.named_parameters() if "condition" not in n])
    with torch.no_grad():
        want = unguided(plain, inputs)
        y_0 = model.y_0(model.pooled(truth), mask)
        assert torch.equal(unguided(model, inputs), want)
        assert torch.equal(model.image(model.predict(inputs, y_0)[0], inputs), want)
    train(model.synthesis, model.synthesis.condition_layers(), y_0)
    with torch.no_grad():
        assert torch.equal(unguided(model, inputs), want)
        assert (model.predict(inputs, y_0)[0] - model.predict(inputs)[0]).abs().max() > 1e-3


def test_a_joint_model_starts_with_guidance_that_matters():
    model = CrossConditionedModel(a_config(guidance="joint"))
    blocks = [module for module in model.synthesis.modules() if isinstance(module, ResidualBlock)]
    assert all(block.condition.weight.any() for block in blocks)


@pytest.mark.parametrize("uncertainty", [True, False])
def test_without_guidance_there_is_neither_mrm_nor_mdn(uncertainty, tmp_path):
    model = random_model(guidance="none", uncertainty=uncertainty)
    assert model.representation is None
    assert model.distribution is None
    assert model.synthesis.condition is None
    with pytest.raises(ConfigError, match="without guidance; use guidance 'none'"):
        model.pooled(images())
    with pytest.raises(ConfigError, match="without guidance; use guidance 'none'"):
        model.draw(generators(1))
    save_model(tmp_path, model, {})
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"baselines", "synthesis"}
    assert read_model(tmp_path).representation is None


# What guides


def test_y_0_is_scored_modality_by_modality_and_zero_where_there_is_none():
    model = random_model()
    pooled = 3 + 100 * torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]])
    y_0 = model.y_0(pooled, mask)
    assert y_0.shape == (4, 16)
    for row, column in ((0, 0), (0, 1), (1, 0), (2, 1)):
        scored = y_0[row, 8 * column : 8 * column + 8]
        torch.testing.assert_close(scored, z_score(pooled[row, column]))
        torch.testing.assert_close(scored.std(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not y_0[1, 8:].any()
    assert not y_0[2, :8].any()
    assert not y_0[3].any()
    assert torch.equal(model.target_features(mask), mask.repeat_interleave(8, 1))


def test_the_condition_is_what_the_sources_represent_and_which_there_are():
    model = random_model()
    pooled, available = model.pooled(images()), torch.tensor([[1.0, 1], [1, 0], [0, 1]])
    condition = model.condition(pooled, available)
    assert condition.shape == (3, 2 * 8 + 2)
    assert torch.equal(condition[:, :16], model.y_0(pooled, available))
    assert torch.equal(condition[:, 16:], available)
    changed = pooled.clone()
    changed[1, 1] += 5 * torch.randn(8)
    assert torch.equal(model.condition(changed, available), condition)


def test_a_draw_depends_on_its_generator_condition_and_targets():
    model = random_model()
    one, other = (model.condition(model.pooled(x)[:1], torch.ones(1, 2)) for x in (images(), 1 - images()))
    first = model.draw(generators(2), one, steps=3)
    assert first.shape == (2, 2 * model.config.representation.dim)
    assert torch.equal(first, model.draw(generators(2), one, steps=3))
    torch.testing.assert_close(model.draw(generators(1), one, steps=3), first[:1])
    for changed in (model.draw(generators(2), other, steps=3), model.draw(generators(2), steps=3), first.flip(0)):
        assert (changed - first).abs().amax(1).min() > 1e-3
    half = model.draw(generators(2), one, torch.tensor([[0.0, 1.0]]), steps=3)
    assert not half[:, :8].any()
    assert half[:, 8:].abs().amax(1).min() > 0


def test_a_draw_is_the_mdns_with_one_condition_for_all():
    model = random_model()
    condition = model.condition(model.pooled(images())[:1], torch.ones(1, 2))
    want = model.distribution.sample(generators(2), condition.expand(2, -1), torch.ones(2, 16), steps=3)
    assert torch.equal(model.draw(generators(2), condition, torch.ones(1, 2), steps=3), want)


def test_a_model_whose_mdn_has_no_condition_says_so():
    model = random_model(conditional=False)
    condition = model.condition(model.pooled(images())[:1], torch.ones(1, 2))
    with pytest.raises(ConfigError, match="use guidance 'unconditional'"):
        model.draw(generators(1), condition)
    assert model.draw(generators(1), steps=2).shape == (1, 16)


def test_a_model_of_volumes_works_alike():
    model = random_model(spatial_dims=3, window=(4, 8, 8), guidance="joint", sources=("t1n",))
    sources = torch.rand(1, 1, 4, 8, 8)
    condition = model.condition(model.pooled(sources), torch.ones(1, 1))
    y_0 = model.draw(generators(1), condition, steps=2)
    inputs = model.network_input(sources, torch.ones(1, 1))
    assert inputs.shape == (1, 2, 4, 8, 8)
    assert model.predict(inputs, y_0)[0].shape == (1, 2, 4, 8, 8)


def test_a_gpu_gives_what_the_processor_gives():
    model = random_model(uncertainty=True)
    model.calibration = {"variance": torch.tensor([[4.0, 0.0], [0.5, 0.09]])}

    def made(sources):
        pooled = model.pooled(sources)
        condition = model.condition(pooled[:1], torch.ones(1, 2).to(sources.device))
        y_0 = model.draw(generators(1), condition.cpu(), torch.ones(1, 2), steps=2)
        standardised, log_scale = model.predict(model.network_input(sources, torch.ones(1, 2).to(sources.device)), y_0)
        return pooled, y_0, standardised, model.std(log_scale)

    want = made(images(1))
    with fake_cuda():
        model.to("cuda")
        assert model.device.type == "cuda"
        for mine, theirs in zip(made(images(1).to("cuda")), want, strict=True):
            assert mine.is_cuda
            torch.testing.assert_close(mine.cpu(), theirs, atol=1e-4, rtol=1e-4)


# What the C-UNet reads


def neighbours_of(model, count=2, side=8, seed=0):
    """Neighbouring slices of all sources, in [0, 1], 0 within a border of one pixel."""
    channels = len(model.config.sources) * model.config.context_slices
    images = 0.1 + 0.9 * torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    for edge in (images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]):
        edge.zero_()
    return images


def test_what_is_not_available_is_not_read():
    model = any_model()
    neighbours, available = neighbours_of(model), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    inputs = model.network_input(neighbours, available)
    assert inputs.shape == (2, 9 + 3 + 1, 8, 8)
    head = torch.zeros(8, 8)
    head[1:-1, 1:-1] = 1
    for row, there in enumerate(available):
        for source, flag in enumerate(there):
            channels = slice(3 * source, 3 * source + 3)
            assert torch.equal(inputs[row, channels], flag * standardise(neighbours[row, channels]))
            assert torch.equal(inputs[row, 9 + source], flag * head)
        assert torch.equal(inputs[row, -1], head)
    changed = neighbours.clone()
    changed[0, 3:6], changed[1, 6:] = 0.9, 0.9  # outside the head, too
    assert torch.equal(model.network_input(changed, available), inputs)


def test_a_black_slice_of_a_source_was_not_acquired_there():
    model = any_model()
    neighbours = neighbours_of(model)
    neighbours[1, 7] = 0  # the middle slice of the last source
    inputs = model.network_input(neighbours, torch.ones(2, 3))
    assert inputs[:, 9:12].amax((2, 3)).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not inputs[1, 6:9].any()
    assert inputs[0, 6:9].any()
    neighbours[0] = 0
    assert not model.network_input(neighbours, torch.ones(2, 3))[0].any()


def test_a_median_voxel_is_not_taken_for_one_outside():
    for model in (any_model(), random_model()):
        neighbours = neighbours_of(model)
        neighbours[:, :, 4, 4] = 1 / 3
        inputs = model.network_input(neighbours, torch.ones(2, len(model.config.sources)))
        torch.testing.assert_close(inputs[:, : neighbours.shape[1], 4, 4], torch.zeros(2, neighbours.shape[1]))
        assert (inputs[:, neighbours.shape[1] :, 4, 4] == 1).all()
        assert not inputs[:, :, 0].any()
        assert (unguided(model, inputs)[:, :, 4, 4] >= DARKEST).all()


def test_the_head_is_where_any_available_source_is():
    model = any_model()
    neighbours = torch.zeros(1, 9, 8, 8)
    neighbours[0, 1, :3], neighbours[0, 4, 5:], neighbours[0, 7, 3:5] = 0.5, DARKEST, 0.5
    neighbours[0, 0] = 0.5  # another slice, which says nothing of this one
    inputs = model.network_input(neighbours, torch.tensor([[1.0, 1, 0]]))
    rows = inputs[0, -1].amax(1)
    assert rows.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    maps = inputs[0, 9:12].amax(2)
    assert maps.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1], [0] * 8]  # each where it is


@pytest.mark.parametrize("context", [1, 3])
def test_a_model_of_one_task_reads_all_its_sources_and_the_head(context):
    model = random_model(context_slices=context)
    neighbours = neighbours_of(model)
    inputs = model.network_input(neighbours, torch.zeros(2, 2))  # what is available is not asked
    assert inputs.shape == (2, 2 * context + 1, 8, 8)
    assert torch.equal(inputs[:, :-1], standardise(neighbours))
    assert torch.equal(inputs[:, -1], (neighbours[:, 0] > 0).float())
    if context > 1:
        neighbours[:, context // 2] = 0  # the middle slice of one source alone is black: its neighbours are read
        assert torch.equal(model.network_input(neighbours, torch.ones(2, 2))[:, :-1], standardise(neighbours))


def test_a_model_of_any_subset_in_volumes():
    model = any_model(context_slices=1, spatial_dims=3, window=(4, 8, 8))
    volumes = torch.rand(1, 3, 4, 8, 8)
    volumes[:, :, 2] = 0
    inputs = model.network_input(volumes, torch.tensor([[1.0, 0, 1]]))
    assert inputs.shape == (1, 7, 4, 8, 8)
    assert inputs[:, 3:].amax((0, 2, 3, 4)).tolist() == [1, 0, 1, 1]
    assert not inputs[:, :, 2].any()
    image = unguided(model, inputs)
    assert image.shape == (1, 3, 4, 8, 8)
    assert torch.equal(image > 0, (inputs[:, -1:] > 0).expand_as(image))


def test_inputs_are_of_the_sources_precision_and_layout():
    model = any_model()
    neighbours = neighbours_of(model).bfloat16()
    inputs = model.network_input(neighbours, torch.ones(2, 3))
    assert inputs.dtype == torch.bfloat16
    assert inputs.is_contiguous(memory_format=torch.channels_last)


# What the C-UNet makes


@pytest.mark.parametrize("make", [random_model, any_model])
def test_nothing_outside_the_head_is_synthetic(make):
    model = make(uncertainty=True)
    inputs = model.network_input(neighbours_of(model), torch.ones(2, len(model.config.sources)))
    image = unguided(model, inputs)
    assert torch.equal(image > 0, (inputs[:, -1:] > 0).expand_as(image))
    assert image[image > 0].min() >= DARKEST
    assert image.max() <= 1
    standardised, _ = model.predict(inputs)
    assert standardised[..., 0, :].any()  # the network itself says something there
    torch.testing.assert_close(image, on_unit_scale(standardised) * inputs[:, -1:])


def test_the_error_is_learnt_beside_the_image():
    model = random_model(uncertainty=True)
    inputs = model.network_input(neighbours_of(model), torch.ones(2, 2))
    outputs = model.synthesis(inputs)
    assert outputs.shape[1] == 2 * 2
    standardised, log_scale = model.predict(inputs)
    assert torch.equal(standardised, outputs[:, :2])
    assert torch.equal(log_scale, outputs[:, 2:].clamp(*LOG_SCALE_RANGE))
    extreme = model.split(torch.tensor([0.0, 1, -100, 100]).reshape(1, 4, 1, 1).bfloat16())
    assert [part.flatten().tolist() for part in extreme] == [[0, 1], list(LOG_SCALE_RANGE)]
    assert extreme[0].dtype == torch.float32
    plain = random_model()
    assert plain.predict(inputs)[1] is None
    assert plain.synthesis(inputs).shape[1] == 2


def test_representations_are_of_standardised_images():
    model = random_model()
    assert torch.equal(model.pooled(images()), model.representation.pooled(standardise(images())))


def test_standard_deviations_are_calibrated_target_by_target():
    model = random_model(uncertainty=True)
    _, log_scale = model.predict(model.network_input(neighbours_of(model), torch.ones(2, 2)))
    raw = model.std(log_scale)
    torch.testing.assert_close(raw, 2**0.5 * log_scale.exp() / 15)
    assert raw.shape == (2, 2, 8, 8)
    model.calibration = {"variance": torch.tensor([[4.0, 0.0], [0.0, 0.09]])}
    scaled = model.std(log_scale)
    torch.testing.assert_close(scaled[:, 0], 2 * raw[:, 0])
    torch.testing.assert_close(scaled[:, 1], torch.full_like(raw[:, 1], 0.3 / 15))


def test_the_variance_of_the_error_is_laplaces():
    scale = torch.tensor([0.1, 1.0, 3.0])
    want = torch.distributions.Laplace(torch.zeros(3), scale).variance
    torch.testing.assert_close(laplace_variance(scale.log()), want)


# The folder


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": "joint"},
        {"guidance": "joint", "conditional": False},
        {"guidance": "last", "uncertainty": True},
        {"guidance": "none", "uncertainty": True, "synthesis": SynthesisConfig(**FORM, form="light", patch=2)},
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, settings):
    model = random_model(**settings)
    if model.distribution is not None:
        model.distribution.fit_standardisation(7 + 3 * torch.randn(9, 16), torch.ones(9, 16))
    if model.config.uncertainty:
        model.calibration = {"variance": torch.tensor([[3.0, 0.01], [0.5, 0.0]])}
    save_model(tmp_path, model, {"steps": 3, "note": "é"})
    loaded = read_model(tmp_path)
    assert loaded.config == model.config
    assert set(loaded.networks()) == set(model.networks())
    for mine, theirs in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in ((model.baselines, loaded.baselines), (model.calibration, loaded.calibration)):
        assert equal(mine, theirs)
    assert loaded.record["training"] == {"steps": 3, "note": "é"}


def test_a_loaded_model_is_ready_for_use(saved):
    model = read_model(str(saved))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    with fake_cuda():
        assert all(tensor.is_cuda for tensor in read_model(saved, "cuda").state_dict().values())


def test_loading_draws_nothing(saved):
    before = torch.get_rng_state()
    read_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_baselines_loads(tmp_path):
    model = random_model()
    model.baselines = {}
    save_model(tmp_path, model, {})
    assert read_model(tmp_path).baselines == {}


def test_the_record_tells_models_apart(saved, tmp_path):
    model = random_model(uncertainty=True)
    save_model(tmp_path / "same", model, {"steps": 3})
    with torch.no_grad():
        model.synthesis.decoder.out.out.bias[0] += 1e-3
    save_model(tmp_path / "other", model, {"steps": 3})
    first, same, other = (read_model(f).record["sha256"] for f in (saved, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first != other


def test_saving_over_a_larger_model_leaves_no_part_of_it(folder):
    save_model(folder, random_model(guidance="none"), {})
    assert set(read_model(folder).networks()) == {"synthesis"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_read_as_float32(folder, dtype):
    resave(
        folder,
        lambda tensors, _: tensors.update(
            synthesis={name: tensor.to(dtype) for name, tensor in tensors["synthesis"].items()}
        ),
    )
    model = read_model(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert unguided(model, read(model, images())).isfinite().all()


@pytest.mark.parametrize(
    "change", [{"format_version": 1}, {"format_version": 8}, {"format_version": None}, {"format": "somebody-else"}]
)
def test_another_format_is_refused_by_name(folder, change):
    resave(folder, lambda _, data: data.update(change))
    found = {"format": "crossmr-model", "format_version": 9} | change
    refused(folder, f"is {found['format']} {found['format_version']}; this crossmr reads crossmr-model 9.*train")


@pytest.mark.parametrize("key", ["format", "format_version", "config", "training"])
def test_a_config_that_lacks_a_part_is_refused(folder, key):
    resave(folder, lambda _, data: data.pop(key))
    refused(folder, f"has no '{key}'|this crossmr reads crossmr-model 9")


@pytest.mark.parametrize(
    "value",
    [
        *(3, None, [], {"seen": ["a"]}, {"seen": {"contrasts": {"with_skull": 3}}}, {"typical": {"a": {"b": [1.0]}}}),
        *({"validation": []}, {"validation": {"t1c": {"correlation": 0.5}}}, {"validation": {"t1c": 0.5}}),
    ],
)
def test_a_record_of_training_that_is_none_is_refused(folder, value):
    resave(folder, lambda _, data: data.update(training=value))
    refused(folder, "'training' is not a record of one")


@pytest.mark.parametrize("name", ["representation", "distribution", "synthesis"])
def test_a_network_that_is_missing_is_refused(folder, name):
    resave(folder, lambda tensors, _: tensors.pop(name))
    refused(folder, f"holds .*; expected .*{name}")


def test_a_network_too_many_is_refused(folder):
    resave(folder, lambda tensors, _: tensors.update(surprise={"w": torch.zeros(1)}))
    refused(folder, "holds .*surprise.*; expected")
    resave(folder, lambda tensors, data: (tensors.pop("surprise"), data["config"].update(guidance="none")))
    refused(folder, "holds .*distribution.*; expected synthesis")


def test_weights_of_another_shape_are_refused(folder):
    def widen(tensors, _):
        tensors["synthesis"]["decoder.out.out.weight"] = torch.zeros(3, 4, 3, 3)

    resave(folder, widen)
    refused(folder, r"synthesis\.safetensors does not fit config\.json: decoder\.out\.out\.weight is \(3, 4, ")


@pytest.mark.parametrize(("part", "setting"), [("distribution", "width"), ("synthesis", "condition_width")])
def test_a_config_of_another_size_is_refused(folder, part, setting):
    resave(folder, lambda _, data: data["config"][part].update({setting: 24}))
    refused(folder, rf"{part}\.safetensors does not fit")


@pytest.mark.parametrize("change", ["lack", "surplus"])
def test_weights_by_other_names_are_refused(folder, change):
    def rename(tensors, _):
        weight = tensors["synthesis"].pop("decoder.out.out.bias")
        if change == "surplus":
            tensors["synthesis"].update({"decoder.out.out.bias": weight, "decoder.out.surplus": weight.clone()})

    resave(folder, rename)
    refused(folder, r"synthesis\.safetensors does not fit config\.json: .*decoder\.out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["representation", "synthesis"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    def spoil(tensors, _):
        tensors[name]["encoder.stem.conv.weight"][0, 0, 0, 0] = value

    resave(folder, spoil)
    refused(folder, rf"{name}\.safetensors holds NaN or infinite")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(2, dtype=torch.int64), "no real numbers"),
        (torch.zeros(2, dtype=torch.complex64), "no real numbers"),
        (torch.full((4,), 1e300, dtype=torch.float64), "NaN or infinite"),  # in float32
    ],
)
def test_weights_of_another_kind_are_refused(folder, tensor, match):
    resave(folder, lambda tensors, _: tensors["synthesis"].update({"decoder.out.out.bias": tensor}))
    refused(folder, match)


@pytest.mark.parametrize(
    "variance",
    [
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]),
        torch.tensor([[1.0, 0.0], [float("inf"), 0.0]]),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2, dtype=torch.int64),
        None,
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(folder, variance):
    calibration = {"other": torch.ones(2, 2)} if variance is None else {"variance": variance}
    resave(folder, lambda tensors, _: tensors.update(calibration=calibration))
    refused(folder, r"calibration\.safetensors does not fit")


@pytest.mark.parametrize("patients", [torch.zeros(3, dtype=torch.int32), torch.zeros(2)])
def test_counts_of_patients_that_do_not_fit_are_refused(folder, patients):
    calibration = {"variance": torch.ones(2, 2), "patients": patients}
    resave(folder, lambda tensors, _: tensors.update(calibration=calibration))
    refused(folder, r"calibration\.safetensors does not fit")


def test_a_model_says_on_how_many_patients_each_standard_deviation_was_calibrated():
    targets, variance = ("t1c", "t2f"), torch.tensor([[1.0, 0.0], [2.0, 0.1]])
    assert calibrated_on({}, targets) == {"t1c": 0, "t2f": 0}
    assert calibrated_on({"variance": variance}, targets) == {"t1c": 0, "t2f": None}  # of old
    counts = torch.tensor([0, INHERITED], dtype=torch.int32)
    assert calibrated_on({"variance": variance, "patients": counts}, targets) == {"t1c": 0, "t2f": INHERITED}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("present", torch.ones(1, 3)),
        ("present", torch.ones(())),
        ("gram", torch.ones(2, 5, 5, dtype=torch.float64)),
        ("gram", torch.ones(1, 4, 4, dtype=torch.float64)),
        ("gram", torch.full((1, 5, 5), float("nan"), dtype=torch.float64)),
        ("gram", torch.ones(1, 5, 5, dtype=torch.int64)),
        ("mean_image", torch.ones(3, 2, 2, 2)),
        ("mean_image", None),
        ("present", None),
        ("gram", None),
    ],
)
def test_baselines_that_do_not_fit_are_refused(folder, name, tensor):
    def change(tensors, _):
        tensors["baselines"].pop(name)
        tensors["baselines"].update({} if tensor is None else {name: tensor})

    resave(folder, change)
    refused(folder, r"baselines\.safetensors does not fit")


# Hostile files


def test_a_config_of_another_width_is_refused_before_memory_is_taken(folder):
    """A network of 400 channels takes gigabytes, of 40,000 more than any machine has."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell how much memory a process has taken")
    for number, channels in enumerate((400, 40_000)):
        shutil.copytree(folder, folder.parent / f"hostile {number}")
        resave(
            folder.parent / f"hostile {number}",
            lambda _, data, channels=channels: data["config"]["synthesis"].update(channels=channels),
        )
    script = """
import sys
from crossmr.errors import ModelError
from crossmr.networks.model import read_model
def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
sound, *hostile = sys.argv[1:]
read_model(sound)
before = most()
for folder in hostile:
    try:
        read_model(folder)
    except ModelError as error:
        print(error)
print(most() - before)
"""
    folders = [folder, *sorted(folder.parent.glob("hostile *"))]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    *errors, growth = done.stdout.splitlines()
    assert len(errors) == 2
    assert all("synthesis.safetensors does not fit config.json: " in error for error in errors)
    assert int(growth) < 100  # MiB


@pytest.mark.parametrize("guidance", ["last", "none"])
@pytest.mark.parametrize("part", ["representation", "distribution", "synthesis"])
def test_more_blocks_than_there_are_tensors_are_not_built(tmp_path, guidance, part):
    save_model(tmp_path, random_model(guidance=guidance), {})
    resave(tmp_path, lambda _, data: data["config"][part].update(blocks=10**9))
    if guidance == "none" and part != "synthesis":
        assert set(read_model(tmp_path).networks()) == {"synthesis"}  # it is not built
    else:
        refused(tmp_path, "blocks is 1000000000, but the model has .* tensors")


@pytest.mark.parametrize(
    "change",
    [
        {"synthesis": {"channels": 10**12}},
        {"synthesis": {"channels": 10**30}},
        {"synthesis": {"condition_width": 10**30}},
        {"distribution": {"width": 10**30}},
        {"representation": {"channels": 10**30}},
    ],
)
def test_sizes_beyond_any_machine_are_refused(folder, change):
    resave(folder, lambda _, data: [data["config"][part].update(values) for part, values in change.items()])
    refused(folder, r"config\.json: .*(overflow|Overflow)")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sources": []}, "sources are none"),
        ({"targets": ["t1n"]}, "none twice"),
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"window": [8, 7]}, "multiples of 2"),
        ({"chanels": 3}, "'chanels' is not a setting"),
        ({"synthesis": 3}, "expected settings by name"),
        ({"synthesis": {"patch": 3}}, "patch is 3"),
        ({"synthesis": {"residual": True}}, "'synthesis.residual' is not a setting"),
        ({"synthesis": {"form": "heavy"}}, "form is 'heavy'"),
        ({"guidance": "psychic"}, "guidance is 'psychic'"),
        ({"guidance": "joint"}, "unguided image"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(folder, change, match):
    resave(folder, lambda _, data: data["config"].update(change))
    refused(folder, match)


@pytest.mark.parametrize("value", [None, 3, [], "model"])
def test_a_config_that_is_no_mapping_is_refused(folder, value):
    resave(folder, lambda _, data: data.update(config=value))
    refused(folder, "expected settings by name")


def test_a_changed_config_is_noticed(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"width": 8', '"width": 6'))
    refused(folder, "SHA-256")


def test_nan_in_config_is_refused_even_if_signed(folder):
    data = json.loads((folder / "config.json").read_text())
    data["training"]["steps"] = float("nan")
    (folder / "config.json").write_text(json.dumps(data))
    refused(folder, "damaged")


def test_the_run_is_met_with_the_model_inside_it(folder):
    with pytest.raises(ModelError, match=rf"not a model.* Did you mean {folder}\?$"):
        read_model(folder.parent)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_without_a_model_is_met_with_how_to_make_one(tmp_path, name):
    with pytest.raises(ModelError, match=r"no config\.json.*crossmr train"):
        read_model(tmp_path / name)


def test_a_half_written_model_is_no_model(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("crossmr.checkpoint.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, random_model(), {})
    assert (tmp_path / "synthesis.safetensors").exists()
    refused(tmp_path, "no config.json")


def test_a_folder_of_this_version_is_laid_out_as_ever(saved):
    """What is on people's disks looks like this."""
    body = json.loads((saved / "config.json").read_text())
    assert set(body) == {"format", "format_version", "config", "training", "files", "sha256"}
    names = ["representation", "distribution", "synthesis", "baselines"]
    assert sorted(p.name for p in saved.iterdir()) == sorted(["config.json", *(f"{n}.safetensors" for n in names)])
    assert body["config"] == json.loads(json.dumps(to_dict(a_config(uncertainty=True))))
    sha256 = body.pop("sha256")
    assert sha256 == digest(body)
    for file, want in body["files"].items():
        assert digest((saved / file).read_bytes()) == want
    tensors, _ = load_bundle(saved, "config")
    assert {"encoder.stem.conv.weight", "decoder.out.out.bias", "condition.embed.0.weight"} <= set(tensors["synthesis"])
    assert "encoder.levels.0.blocks.0.condition.weight" in tensors["synthesis"]
    assert {"input_projection.weight", "no_condition", "blocks.0.condition.weight"} <= set(tensors["distribution"])


def test_settings_that_a_later_crossmr_added_take_their_defaults(folder):
    body = json.loads((folder / "config.json").read_text())
    body.pop("sha256")
    del body["config"]["representation"]["decoder"]
    write_json(folder / "config.json", {**body, "sha256": digest(body)})
    assert read_model(folder).config == a_config(uncertainty=True)


# Patients


def test_whom_it_was_trained_on_lies_beside_the_model_and_is_no_part_of_it(tmp_path):
    lists = [remember(names_of("Doe^Jane", ["0123"]), names_of("Roe", ()))]
    for folder, patients in (("with", lists), ("without", ())):
        save_model(tmp_path / folder, random_model(), {}, patients)
    assert all(b"Doe" not in path.read_bytes() for path in (tmp_path / "with").iterdir())
    one, other = read_model(tmp_path / "with"), read_model(tmp_path / "without")
    assert (one.patients, other.patients) == (tuple(lists), ())
    assert one.record == other.record
    save_model(tmp_path / "with", random_model(), {})
    assert read_model(tmp_path / "with").patients == ()
    (tmp_path / "with" / "patients.json").write_text("{}")
    with pytest.raises(ModelError, match=r"patients\.json was changed or damaged"):
        read_model(tmp_path / "with")
