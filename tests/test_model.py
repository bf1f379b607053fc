"""The model and its folder: what it is made of, and that what comes back is what was saved, or one clear line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.config import to_dict
from crossmr.errors import ConfigError, ModelError
from crossmr.files import digest, write_json
from crossmr.networks.c_unet import SynthesisConfig, synthesis_error
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig, z_score
from crossmr.networks.model import (
    AVAILABLE,
    CrossConditionedModel,
    ModelConfig,
    load_model,
    pseudonym,
    save_model,
    variance_error,
)
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
    y_0 = None
    if model.representation is not None:
        pooled = model.pooled(sources)
        condition = model.condition(pooled[:1], torch.ones(1, 2)) if model.config.distribution.conditional else None
        y_0 = model.draw(generators(3), condition, steps=3)
        made += [y_0, pooled, model.representation(sources), model.draw(generators(3), steps=3)]
    made += [model.synthesis(sources, y_0), model.unguided(sources)]
    if model.uncertainty is not None:
        made.append(model.std(sources, model.unguided(sources)))
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
        load_model(folder)
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
        ({"context_slices": 2}, "wanted 1, 3 or 5"),
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
    want = (*stages, *(["uncertainty"] if uncertainty else []))
    assert model.config.stages == want
    networks = [name for name in want if name != "guidance"]
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
    assert config.inputs == 3 * 3 + 3
    other = a_config(context_slices=5)
    assert not other.any_subset
    assert other.modalities == ("t1n", "t2w", "t1c", "t2f")
    assert other.inputs == 2 * 5


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
    stems = alike.representation.encoder.stem.weight, alike.synthesis.encoder.stem.weight  # of one shape
    assert not torch.equal(*stems)
    torch.set_rng_state(before)
    CrossConditionedModel(a_config())
    assert torch.equal(torch.get_rng_state(), before)  # nothing else is drawn differently for it


@pytest.mark.parametrize(
    "change",
    [
        {"distribution": DistributionConfig(width=16, blocks=3, conditional=True)},
        {"representation": RepresentationConfig(channels=4, multipliers=(1, 2, 2), patch_size=2)},
        {"uncertainty": True},
        {"representation": RepresentationConfig(channels=8, multipliers=(2, 1), decoder="skip-free")},
    ],
)
def test_no_network_changes_anothers_first_weights(change):
    first, changed = CrossConditionedModel(a_config(), seed=1), CrossConditionedModel(a_config(**change), seed=1)
    assert equal(weights(first.synthesis), weights(changed.synthesis))
    if "distribution" in change:
        assert equal(weights(first.representation), weights(changed.representation))


@pytest.mark.parametrize("guidance", ["joint", "last"])
@pytest.mark.parametrize("residual", [True, False])
def test_a_guided_c_unet_starts_as_the_plain_one(guidance, residual):
    """So that a comparison of the two is of guidance alone."""
    form = {"synthesis": SynthesisConfig(**FORM, residual=residual)}
    guided, plain = (CrossConditionedModel(a_config(guidance=g, **form), seed=3) for g in (guidance, "none"))
    with torch.no_grad():
        assert torch.equal(guided.unguided(images()), plain.unguided(images()))
    for name, tensor in plain.synthesis.state_dict().items():
        assert torch.equal(guided.synthesis.state_dict()[name], tensor), name


def test_the_unguided_pass_is_the_plain_networks_before_and_after_the_condition_layers_learn():
    model, plain = (CrossConditionedModel(a_config(guidance=g), seed=3) for g in ("last", "none"))
    sources, truth, mask = images(), images(seed=1), torch.ones(3, 2)
    for each in (model, plain):  # what both train alike
        optimiser = torch.optim.Adam([p for n, p in each.synthesis.named_parameters() if "condition" not in n], 1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            synthesis_error(each.synthesis(sources), truth, mask, absolute=False)[0].backward()
            optimiser.step()
    with torch.no_grad():
        want = plain.unguided(sources)
        y_0 = model.y_0(model.pooled(truth), mask)
        assert torch.equal(model.unguided(sources), want)
        assert torch.equal(model.synthesis(sources, y_0).clamp(0, 1), want)
    optimiser = torch.optim.Adam(model.synthesis.condition_layers(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        synthesis_error(model.synthesis(sources, y_0), truth, mask, absolute=False)[0].backward()
        optimiser.step()
    with torch.no_grad():
        assert torch.equal(model.unguided(sources), want)
        assert (model.synthesis(sources, y_0).clamp(0, 1) - want).abs().max() > 1e-3


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
    names = {"baselines", "synthesis", *(["uncertainty"] if uncertainty else [])}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == names
    assert load_model(tmp_path).representation is None


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
    assert model.synthesis(sources, y_0).shape == (1, 2, 4, 8, 8)


def test_a_gpu_gives_what_the_processor_gives():
    model = random_model(uncertainty=True)
    model.calibration = {"variance": torch.tensor([[4.0, 0.0], [0.5, 0.09]])}

    def made(sources):
        pooled = model.pooled(sources)
        condition = model.condition(pooled[:1], torch.ones(1, 2).to(sources.device))
        y_0 = model.draw(generators(1), condition.cpu(), torch.ones(1, 2), steps=2)
        return pooled, y_0, model.synthesis(sources, y_0), model.std(sources, model.unguided(sources))

    want = made(images(1))
    with fake_cuda():
        model.to("cuda")
        assert model.device.type == "cuda"
        for mine, theirs in zip(made(images(1).to("cuda")), want, strict=True):
            assert mine.is_cuda
            torch.testing.assert_close(mine.cpu(), theirs, atol=1e-4, rtol=1e-4)


# Any subset


def any_inputs(model, available=(1.0, 0.0, 1.0), seed=0):
    neighbours = torch.rand(2, 9, 8, 8, generator=torch.Generator().manual_seed(seed))
    return neighbours, model.inputs(neighbours, torch.tensor([available, available]))


def test_what_is_not_available_is_not_read():
    model = any_model()
    neighbours, inputs = any_inputs(model)
    assert inputs.shape == (2, 12, 8, 8)
    assert torch.equal(inputs[:, :3], neighbours[:, :3])
    assert torch.equal(inputs[:, 6:9], neighbours[:, 6:9])
    assert not inputs[:, 3:6].any()
    for extreme in (inputs[:, 9:].amax((2, 3)), inputs[:, 9:].amin((2, 3))):
        torch.testing.assert_close(extreme, AVAILABLE * torch.tensor([[1.0, 0, 1]] * 2))
    changed = neighbours.clone()
    changed[:, 3:6] = 7
    assert torch.equal(model.inputs(changed, torch.tensor([[1.0, 0, 1]] * 2)), inputs)


def test_a_black_slice_of_a_source_was_not_acquired_there():
    model = any_model()
    neighbours, _ = any_inputs(model)
    neighbours[1, 7] = 0  # the middle slice of the last source
    inputs = model.inputs(neighbours, torch.ones(2, 3))
    assert model.availability(inputs).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not inputs[1, 6:9].any()


def test_a_model_of_one_task_reads_its_sources_as_they_are():
    model, sources = random_model(), images()
    assert model.inputs(sources, torch.zeros(3, 2)) is sources


def test_a_model_of_any_subset_in_volumes():
    model = any_model(context_slices=1, spatial_dims=3, window=(4, 8, 8))
    volumes = torch.rand(1, 3, 4, 8, 8)
    inputs = model.inputs(volumes, torch.tensor([[1.0, 0, 1]]))
    assert inputs.shape == (1, 6, 4, 8, 8)
    assert model.availability(inputs).tolist() == [[1, 0, 1]]
    assert model.unguided(inputs).shape == (1, 3, 4, 8, 8)


# The network of the error


def test_the_network_of_the_error_is_half_as_wide_and_sees_sources_and_synthesis():
    model = random_model(uncertainty=True)
    assert model.uncertainty.encoder.stem.weight.shape[:2] == (FORM["channels"] // 2, 2 + 2)
    assert model.uncertainty.condition is None
    assert model.uncertainty.regression is None
    unguided = images(seed=1)
    before = model.log_variance(images(), unguided)
    for changed in (model.log_variance(images(), unguided.flip(-1)), model.log_variance(images(seed=2), unguided)):
        assert (before - changed).abs().max() > 1e-3
    assert random_model().uncertainty is None
    with torch.no_grad():
        model.uncertainty.decoder.out.weight.zero_()
        model.uncertainty.decoder.out.bias.copy_(torch.tensor([-100.0, 100.0]))
    assert model.log_variance(images(), unguided).amin((0, 2, 3)).tolist() == [-12, 2]


def test_standard_deviations_are_calibrated_target_by_target():
    model, unguided = random_model(uncertainty=True), images(seed=1)
    raw = model.std(images(), unguided)
    torch.testing.assert_close(raw, (0.5 * model.log_variance(images(), unguided)).exp())
    assert raw.shape == (3, 2, 8, 8)
    model.calibration = {"variance": torch.tensor([[4.0, 0.0], [0.0, 0.09]])}
    scaled = model.std(images(), unguided)
    torch.testing.assert_close(scaled[:, 0], 2 * raw[:, 0])
    torch.testing.assert_close(scaled[:, 1], torch.full_like(raw[:, 1], 0.3))


def test_the_loss_of_the_variance_is_the_gaussian_likelihood():
    prediction, truth = images(seed=1), images(seed=2)
    log_variance, mask = images(seed=3) - 2, torch.tensor([[1.0, 0], [0, 0], [1, 1]])
    total, count = variance_error(log_variance, prediction, truth, mask)
    normal = torch.distributions.Normal(prediction, (0.5 * log_variance).exp())
    want = -2 * normal.log_prob(truth) - torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(total, want.mean((2, 3))[mask > 0].sum())
    assert count == 3
    batch = (log_variance, prediction, truth, mask)
    parts = [torch.stack(variance_error(*part)) for part in zip(*(x.split((1, 2)) for x in batch), strict=True)]
    torch.testing.assert_close(sum(parts), torch.stack((total, count)), atol=1e-6, rtol=1e-6)


# The folder


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": "joint"},
        {"guidance": "joint", "conditional": False},
        {"guidance": "last", "uncertainty": True},
        {"guidance": "none", "synthesis": SynthesisConfig(**FORM, residual=True)},
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, settings):
    model = random_model(**settings)
    if model.distribution is not None:
        model.distribution.standardise(7 + 3 * torch.randn(9, 16), torch.ones(9, 16))
    if model.uncertainty is not None:
        model.calibration = {"variance": torch.tensor([[3.0, 0.01], [0.5, 0.0]])}
    if model.synthesis.regression is not None:
        model.synthesis.regression.weights.copy_(torch.randn(1, 3, 2))
    save_model(tmp_path, model, {"steps": 3, "note": "é"})
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert set(loaded.networks()) == set(model.networks())
    for mine, theirs in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in ((model.baselines, loaded.baselines), (model.calibration, loaded.calibration)):
        assert equal(mine, theirs)
    assert loaded.record["training"] == {"steps": 3, "note": "é"}


def test_a_loaded_model_is_ready_for_use(saved):
    model = load_model(str(saved))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    with fake_cuda():
        assert all(tensor.is_cuda for tensor in load_model(saved, "cuda").state_dict().values())


def test_loading_draws_nothing(saved):
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_baselines_loads(tmp_path):
    model = random_model()
    model.baselines = {}
    save_model(tmp_path, model, {})
    assert load_model(tmp_path).baselines == {}


def test_the_record_tells_models_apart(saved, tmp_path):
    model = random_model(uncertainty=True)
    save_model(tmp_path / "same", model, {"steps": 3})
    with torch.no_grad():
        model.synthesis.decoder.out.bias[0] += 1e-3
    save_model(tmp_path / "other", model, {"steps": 3})
    first, same, other = (load_model(f).record["sha256"] for f in (saved, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first != other


def test_saving_over_a_larger_model_leaves_no_part_of_it(folder):
    save_model(folder, random_model(guidance="none"), {})
    assert set(load_model(folder).networks()) == {"synthesis"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_read_as_float32(folder, dtype):
    resave(
        folder,
        lambda tensors, _: tensors.update(
            synthesis={name: tensor.to(dtype) for name, tensor in tensors["synthesis"].items()}
        ),
    )
    model = load_model(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.unguided(images()).isfinite().all()


@pytest.mark.parametrize(
    "change", [{"format_version": 1}, {"format_version": 6}, {"format_version": None}, {"format": "somebody-else"}]
)
def test_another_format_is_refused_by_name(folder, change):
    resave(folder, lambda _, data: data.update(change))
    found = {"format": "crossmr-model", "format_version": 7} | change
    refused(folder, f"is {found['format']} {found['format_version']}; this crossmr reads crossmr-model 7.*train")


@pytest.mark.parametrize("key", ["format", "format_version", "config", "training"])
def test_a_config_that_lacks_a_part_is_refused(folder, key):
    resave(folder, lambda _, data: data.pop(key))
    refused(folder, f"has no '{key}'|this crossmr reads crossmr-model 7")


@pytest.mark.parametrize("value", [3, None, [], {"patients": 3}, {"seen": ["a"]}])
def test_a_record_of_training_that_is_none_is_refused(folder, value):
    resave(folder, lambda _, data: data.update(training=value))
    refused(folder, "'training' is no record of one")


@pytest.mark.parametrize("name", ["representation", "distribution", "synthesis", "uncertainty"])
def test_a_network_that_is_missing_is_refused(folder, name):
    resave(folder, lambda tensors, _: tensors.pop(name))
    refused(folder, f"holds .*; wanted .*{name}")


def test_a_network_too_many_is_refused(folder):
    resave(folder, lambda tensors, _: tensors.update(surprise={"w": torch.zeros(1)}))
    refused(folder, "holds .*surprise.*; wanted")
    resave(folder, lambda tensors, data: (tensors.pop("surprise"), data["config"].update(guidance="none")))
    refused(folder, "holds .*distribution.*; wanted synthesis, uncertainty")


def test_weights_of_another_shape_are_refused(folder):
    def widen(tensors, _):
        tensors["synthesis"]["decoder.out.weight"] = torch.zeros(3, 4, 3, 3)

    resave(folder, widen)
    refused(folder, r"synthesis\.safetensors does not fit config\.json: decoder\.out\.weight is \(3, 4, 3, 3\), wanted")


@pytest.mark.parametrize(("part", "setting"), [("distribution", "width"), ("synthesis", "condition_width")])
def test_a_config_of_another_size_is_refused(folder, part, setting):
    resave(folder, lambda _, data: data["config"][part].update({setting: 24}))
    refused(folder, rf"{part}\.safetensors does not fit")


@pytest.mark.parametrize("change", ["lack", "surplus"])
def test_weights_by_other_names_are_refused(folder, change):
    def rename(tensors, _):
        weight = tensors["uncertainty"].pop("decoder.out.bias")
        if change == "surplus":
            tensors["uncertainty"].update({"decoder.out.bias": weight, "decoder.out.surplus": weight.clone()})

    resave(folder, rename)
    refused(folder, r"uncertainty\.safetensors does not fit config\.json: .*decoder\.out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["representation", "uncertainty"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    def spoil(tensors, _):
        tensors[name]["encoder.stem.weight"][0, 0, 0, 0] = value

    resave(folder, spoil)
    refused(folder, rf"{name}\.safetensors holds NaN or infinite")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(2, dtype=torch.int64), "no real numbers"),
        (torch.zeros(2, dtype=torch.complex64), "no real numbers"),
        (torch.full((2,), 1e300, dtype=torch.float64), "NaN or infinite"),  # in float32
    ],
)
def test_weights_of_another_kind_are_refused(folder, tensor, match):
    resave(folder, lambda tensors, _: tensors["synthesis"].update({"decoder.out.bias": tensor}))
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
from crossmr.networks.model import load_model
def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
sound, *hostile = sys.argv[1:]
load_model(sound)
before = most()
for folder in hostile:
    try:
        load_model(folder)
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
        assert set(load_model(tmp_path).networks()) == {"synthesis"}  # it is not built
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


def test_a_regression_of_more_sources_than_can_be_counted_is_refused(folder):
    def change(_, data):
        modalities = [f"m{number}" for number in range(80)]
        data["config"].update(sources=modalities, targets=modalities)
        data["config"]["synthesis"].update(residual=True)

    resave(folder, change)
    refused(folder, r"config\.json: .*(overflow|Overflow)")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sources": []}, "sources are none"),
        ({"targets": ["t1n"]}, "none twice"),
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"window": [8, 7]}, "multiples of 2"),
        ({"chanels": 3}, "'chanels' is no setting"),
        ({"synthesis": 3}, "wanted settings by name"),
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
    refused(folder, "wanted settings by name")


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
    with pytest.raises(ModelError, match=rf"no model.* Did you mean {folder}\?$"):
        load_model(folder.parent)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_without_a_model_is_met_with_how_to_make_one(tmp_path, name):
    with pytest.raises(ModelError, match=r"no config\.json.*crossmr train"):
        load_model(tmp_path / name)


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
    names = ["representation", "distribution", "synthesis", "uncertainty", "baselines"]
    assert sorted(p.name for p in saved.iterdir()) == sorted(["config.json", *(f"{n}.safetensors" for n in names)])
    assert body["config"] == json.loads(json.dumps(to_dict(a_config(uncertainty=True))))
    sha256 = body.pop("sha256")
    assert sha256 == digest(body)
    for file, want in body["files"].items():
        assert digest((saved / file).read_bytes()) == want
    tensors, _ = load_bundle(saved, "config")
    assert {"encoder.stem.weight", "decoder.out.bias", "condition.embed.0.weight"} <= set(tensors["synthesis"])
    assert "encoder.levels.0.blocks.0.condition.weight" in tensors["synthesis"]
    assert {"input_projection.weight", "no_condition", "blocks.0.condition.weight"} <= set(tensors["distribution"])


def test_settings_that_a_later_crossmr_added_take_their_defaults(folder):
    body = json.loads((folder / "config.json").read_text())
    body.pop("sha256")
    del body["config"]["representation"]["decoder"]
    write_json(folder / "config.json", {**body, "sha256": digest(body)})
    assert load_model(folder).config == a_config(uncertainty=True)


# Patients


def test_pseudonyms_are_stable_and_hide_the_name():
    assert pseudonym("Müller") == digest("crossmr patient Müller".encode())[:16]
    made = {pseudonym(name) for name in ("a", "A", "a ", "", "Müller", "M\udcfcller")}
    assert len(made) == 6
    assert all(set(p) <= set("0123456789abcdef") and len(p) == 16 for p in made)


def test_no_patient_is_named_in_the_folder(tmp_path):
    save_model(tmp_path, random_model(), {"patients": {"train": [pseudonym("Doe^Jane")]}})
    assert all(b"Doe" not in path.read_bytes() for path in tmp_path.iterdir())
