"""The model folder: what comes back is what was saved, or one clear line."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.config import to_dict
from crossmr.errors import ConfigError, ModelError
from crossmr.files import digest, write_json
from crossmr.model import SHOWN, CrossConditionedModel, ModelConfig, load_model, pseudonym, save_model
from crossmr.stages.distribution import DistributionConfig
from crossmr.stages.representation import RepresentationConfig, z_score
from crossmr.stages.synthesis import SynthesisConfig

FORM = {"channels": 4, "multipliers": (1, 2)}
CELLS = {"patch_size": 2, "cell": 4, "cell_features": 3}


def config(*, conditional=True, guidance="none", **more):
    return ModelConfig(
        sources=("t1n", "t2w"),
        targets=("t1c",),
        window=(8, 8),
        guidance=guidance,
        representation=RepresentationConfig(**FORM, patch_size=2),
        distribution=DistributionConfig(width=8, blocks=1, conditional=conditional),
        synthesis=SynthesisConfig(**FORM),
        **more,
    )


def random_model(*, twin=True, **settings):
    torch.manual_seed(0)
    model = CrossConditionedModel(config(**settings), twin=twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.trivial = {"linear": torch.randn(1, 3), "mean_image": torch.rand(1, 2, 2, 2)}
    return model.eval().requires_grad_(False)


def cell_model(**settings):
    """A random model whose representation is a grid of cells of 4 pixels, for two targets."""
    form = config(guidance="truth")
    settings = {"targets": ("t1c", "t2f"), **settings}
    form = replace(form, representation=RepresentationConfig(**FORM, **CELLS), **settings)
    torch.manual_seed(0)
    model = CrossConditionedModel(form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def generators(count):
    return [torch.Generator().manual_seed(k) for k in range(count)]


def images(count=3, channels=2):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(9))


def outputs(model):
    """What the model says, by every network it has."""
    pooled = model.pool_sources(images()) if model.source_representation is not None else None
    y_0 = model.guide(pooled, generators(3), steps=3)
    said = [
        y_0,
        model.guide(None, generators(3), steps=3),
        model.synthesis(images(), y_0),
        model.synthesis(images()),
    ]
    said += [model.representation(images(channels=1)), model.representation.represent(images(channels=1))]
    if model.twin is not None:
        said.append(model.twin(images()))
    return said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, random_model(), {"steps": 3})
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


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("conditional", [True, False])
def test_a_model_comes_back_bit_for_bit(tmp_path, twin, conditional):
    model = random_model(twin=twin, conditional=conditional)
    save_model(tmp_path, model, {"steps": 3, "note": "é"})
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert set(loaded.networks()) == set(model.networks())
    assert ("twin" in loaded.networks()) == twin
    assert ("source_representation" in loaded.networks()) == conditional
    for mine, theirs in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded.trivial.keys() == model.trivial.keys()
    for name, tensor in model.trivial.items():
        assert torch.equal(loaded.trivial[name], tensor)
    assert loaded.record["training"] == {"steps": 3, "note": "é"}


def test_a_loaded_model_is_ready_for_use(saved):
    model = load_model(str(saved))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.device == torch.device("cpu")


def test_a_model_without_trivial_predictors_loads(tmp_path):
    model = random_model()
    model.trivial = {}
    save_model(tmp_path, model, {})
    assert load_model(tmp_path).trivial == {}


def test_the_record_tells_models_apart(saved, tmp_path):
    model = random_model()
    save_model(tmp_path / "same", model, {"steps": 3})
    with torch.no_grad():
        model.synthesis.decoder.out.bias[0] += 1e-3
    save_model(tmp_path / "other", model, {"steps": 3})
    first, same, other = (load_model(f).record["sha256"] for f in (saved, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first != other


def test_saving_over_a_larger_model_leaves_no_part_of_it(folder):
    model = random_model(twin=False)
    save_model(folder, model, {})
    assert load_model(folder).twin is None


@pytest.mark.parametrize("change", [{"format_version": 1}, {"format_version": None}, {"format": "somebody-else"}])
def test_another_format_is_refused(folder, change):
    resave(folder, lambda _, data: data.update(change))
    refused(folder, "this crossmr reads crossmr-model 6")


@pytest.mark.parametrize("key", ["format", "format_version", "config", "training"])
def test_a_config_that_lacks_a_part_is_refused(folder, key):
    resave(folder, lambda _, data: data.pop(key))
    refused(folder, f"has no '{key}'|this crossmr reads crossmr-model 6")


@pytest.mark.parametrize("name", ["representation", "source_representation", "distribution", "synthesis"])
def test_a_network_that_is_missing_is_refused(folder, name):
    resave(folder, lambda tensors, _: tensors.pop(name))
    refused(folder, f"holds .*; wanted .*{name}")


def test_a_network_too_many_is_refused(folder):
    resave(folder, lambda tensors, _: tensors.update(surprise={"w": torch.zeros(1)}))
    refused(folder, "holds .*surprise.*; wanted")


def test_weights_of_another_shape_are_refused(folder):
    def widen(tensors, _):
        tensors["synthesis"]["decoder.out.weight"] = torch.zeros(2, 4, 3, 3)

    resave(folder, widen)
    refused(folder, r"synthesis\.safetensors does not fit config\.json: .*decoder\.out\.weight")


def test_a_config_of_another_size_is_refused(folder):
    resave(folder, lambda _, data: data["config"]["distribution"].update(width=16))
    refused(folder, r"distribution\.safetensors does not fit")


@pytest.mark.parametrize("change", ["lack", "surplus"])
def test_weights_by_other_names_are_refused(folder, change):
    def rename(tensors, _):
        weight = tensors["twin"].pop("decoder.out.bias")
        if change == "surplus":
            tensors["twin"].update({"decoder.out.bias": weight, "decoder.out.surplus": weight.clone()})

    resave(folder, rename)
    refused(folder, r"twin\.safetensors does not fit config\.json: .*decoder\.out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["representation", "twin"])
def test_weights_that_are_no_numbers_are_refused(folder, name, value):
    def spoil(tensors, _):
        tensors[name]["encoder.stem.weight"][0, 0, 0, 0] = value

    resave(folder, spoil)
    refused(folder, rf"{name}\.safetensors holds NaN or infinite")


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


def test_a_version_1_folder_is_laid_out_as_ever(saved):
    """What is on people's disks looks like this."""
    body = json.loads((saved / "config.json").read_text())
    assert set(body) == {"format", "format_version", "config", "training", "files", "sha256"}
    names = ["representation", "source_representation", "distribution", "synthesis", "twin", "trivial"]
    assert sorted(p.name for p in saved.iterdir()) == sorted(["config.json", *(f"{n}.safetensors" for n in names)])
    assert body["config"] == json.loads(json.dumps(to_dict(config())))
    sha256 = body.pop("sha256")
    assert sha256 == digest(body)
    for file, want in body["files"].items():
        assert digest((saved / file).read_bytes()) == want
    tensors, _ = load_bundle(saved, "config")
    assert {"encoder.stem.weight", "decoder.out.bias", "condition.no_guidance"} <= set(tensors["synthesis"])
    assert {"inwards.weight", "no_condition", "embed_condition.weight"} <= set(tensors["distribution"])


def test_settings_that_a_later_crossmr_added_take_their_defaults(folder):
    body = json.loads((folder / "config.json").read_text())
    body.pop("sha256")
    del body["config"]["representation"]["decoder"]
    write_json(folder / "config.json", {**body, "sha256": digest(body)})
    assert load_model(folder).config == config()


def test_a_guide_depends_on_its_generator_alone():
    model = random_model()
    pooled = model.pool_sources(images())
    first, again = (model.guide(pooled, generators(2), steps=3) for _ in range(2))
    assert first.shape == (2, model.config.representation.dim)
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    torch.testing.assert_close(model.guide(pooled, generators(1), steps=3), first[:1])


def test_a_guide_with_sources_is_another_than_without():
    model = random_model()
    told = model.guide(model.pool_sources(images()), generators(2), steps=3)
    other = model.guide(model.pool_sources(1 - images()), generators(2), steps=3)
    nothing = model.guide(None, generators(2), steps=3)
    assert (told - nothing).abs().amax(1).min() > 1e-3
    assert (told - other).abs().amax(1).min() > 1e-3


def test_a_guides_condition_is_the_scored_mean_over_the_volume():
    model = random_model()
    pooled = model.pool_sources(images())
    want = model.distribution.sample(generators(2), z_score(pooled.mean(0, keepdim=True)).expand(2, -1), steps=3)
    torch.testing.assert_close(model.guide(pooled, generators(2), steps=3), want)
    torch.testing.assert_close(model.guide(pooled.flip(0), generators(2), steps=3), want)


def test_a_model_that_knows_no_condition_says_so():
    with pytest.raises(ConfigError, match="unconditional"):
        random_model(conditional=False).pool_sources(images())
    with pytest.raises(ConfigError, match="conditional = true"):
        config(conditional=False, guidance="sample")


def test_a_model_of_volumes_works_alike():
    torch.manual_seed(0)
    model = CrossConditionedModel(
        ModelConfig(
            sources=("t1n",),
            targets=("t1c", "t2f"),
            spatial_dims=3,
            window=(4, 8, 8),
            guidance="sample",
            representation=RepresentationConfig(**FORM),
            distribution=DistributionConfig(width=8, blocks=1),
            synthesis=SynthesisConfig(**FORM),
        )
    )
    sources = torch.rand(1, 1, 4, 8, 8)
    y_0 = model.guide(model.pool_sources(sources), generators(1), steps=2)
    assert model.synthesis(sources, y_0).shape == (1, 2, 4, 8, 8)


def test_the_divisor_is_the_largest_stride():
    more = {"sources": ("t1n",), "targets": ("t1c",), "window": (16, 16)}
    deep, flat = (1, 1, 1, 1), (1, 1)
    for one, other in ((deep, flat), (flat, deep)):
        form = ModelConfig(
            **more,
            representation=RepresentationConfig(multipliers=one),
            synthesis=SynthesisConfig(multipliers=other),
        )
        assert form.divisor == 8


def test_pseudonyms_are_stable_and_hide_the_name():
    assert pseudonym("Müller") == digest("crossmr patient Müller".encode())[:16]
    made = {pseudonym(name) for name in ("a", "A", "a ", "", "Müller", "M\udcfcller")}
    assert len(made) == 6
    assert all(set(p) <= set("0123456789abcdef") and len(p) == 16 for p in made)


def test_no_patient_is_named_in_the_folder(tmp_path):
    save_model(tmp_path, random_model(), {"patients": [pseudonym("Doe^Jane")]})
    assert all(b"Doe" not in path.read_bytes() for path in tmp_path.iterdir())


# A grid of cells


def test_the_stages_are_in_the_order_of_their_training():
    pooled = ("representation", "source_representation", "distribution", "synthesis", "twin")
    assert config().stages == pooled
    assert config(conditional=False).stages == ("representation", "distribution", "synthesis", "twin")
    model = cell_model()
    assert tuple(model.stages()) == ("representation", "synthesis", "guidance", "distribution", "uncertainty")
    assert model.stages()["guidance"] is model.stages()["synthesis"] is model.synthesis
    for one in (random_model(), random_model(conditional=False)):
        assert tuple(one.stages()) == one.config.stages
        assert one.stages() == one.networks()
    assert "twin" not in random_model(twin=False).stages()


def test_a_model_of_cells_comes_back_bit_for_bit(tmp_path):
    model = cell_model()
    model.distribution.standardise(7 + 3 * torch.randn(9, 6, 2, 2))
    model.calibration = {"variance": torch.tensor([[3.0, 0.01], [0.5, 0.0]])}
    save_model(tmp_path, model, {})
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.calibration["variance"], model.calibration["variance"])
    first, again = (m.guide_cells(images(), images(), generators(2), steps=3) for m in (model, loaded))
    assert torch.equal(first, again)
    assert torch.equal(model.synthesis(images(), first[1]), loaded.synthesis(images(), again[1]))
    with pytest.raises(ConfigError, match="unconditional"):
        loaded.pool_sources(images())


def test_a_model_of_cells_needs_the_truth_a_condition_and_images_of_whole_cells():
    cells = {"representation": RepresentationConfig(**FORM, **CELLS)}
    for wrong in ({"guidance": "sample"}, {"guidance": "none"}, {"guidance": "truth", "conditional": False}):
        with pytest.raises(ConfigError, match=r"needs guidance 'truth' and distribution\.conditional = true"):
            replace(config(**wrong), **cells)
    assert replace(cell_model().config, window=(4, 12)).divisor == 4
    with pytest.raises(ConfigError, match="multiples of 4"):
        replace(cell_model().config, window=(8, 10))


@pytest.mark.parametrize("told", [True, False])
def test_slices_share_one_noise(told):
    model = cell_model()
    unguided = images(1).expand(3, -1, -1, -1).clone()
    unguided[2] = images(3)[2]
    drawn, second = model.guide_cells(unguided, unguided, generators(2), told=told, steps=3)
    assert drawn.shape == (3, 6, 2, 2)
    assert torch.equal(drawn[0], drawn[1])
    assert (not torch.allclose(drawn[0], drawn[2], atol=1e-3)) == told
    alone = model.guide_cells(unguided[2:], unguided[2:], generators(2)[1:], told=told, steps=3)
    torch.testing.assert_close(alone[0], second[2:])
    assert (drawn - second).flatten(1).abs().amax(1).min() > 1e-3


def test_the_condition_of_a_grid_is_the_unguided_synthesis_clipped():
    model = cell_model()
    noise, condition = [generators(1)[0] for _ in range(3)], model.representation.represent(images())
    want = model.distribution.sample(noise, condition, grid=(2, 2), steps=3)
    torch.testing.assert_close(model.guide_cells(images(), images(), generators(1), steps=3)[0], want)
    beyond = torch.where(images() > 0.5, 2 * images(), images() - 0.5)
    drawn = [model.guide_cells(x, x, generators(1), steps=3) for x in (beyond, beyond.clamp(0, 1))]
    assert torch.equal(*drawn)


def test_deviations_are_calibrated_target_by_target():
    model = cell_model()
    raw = model.deviation(images(), images(3))
    torch.testing.assert_close(raw, (0.5 * model.log_variance(images(), images(3))).exp())
    assert raw.shape == (3, 2, 8, 8)
    model.calibration = {"variance": torch.tensor([[4.0, 0.0], [0.0, 0.09]])}
    scaled = model.deviation(images(), images(3))
    torch.testing.assert_close(scaled[:, 0], 2 * raw[:, 0])
    torch.testing.assert_close(scaled[:, 1], torch.full_like(raw[:, 1], 0.3))


def test_the_network_of_the_error_is_half_as_wide_and_sees_sources_and_synthesis():
    model = cell_model()
    assert model.uncertainty.encoder.stem.weight.shape[:2] == (FORM["channels"] // 2, 2 + 2)
    assert model.uncertainty.condition is None
    other = images(3).flip(-1)
    assert (model.log_variance(images(), images(3)) - model.log_variance(images(), other)).abs().max() > 1e-3
    assert random_model().uncertainty is None


@pytest.mark.parametrize("variance", [[[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [float("nan"), 0.0]]])
def test_a_calibration_that_fits_nothing_is_refused(tmp_path, variance):
    model = cell_model()
    model.calibration = {"variance": torch.tensor(variance)}
    save_model(tmp_path, model, {})
    refused(tmp_path, r"calibration\.safetensors does not fit")


# Any subset


def any_model(**changes):
    """A random model of any subset of three modalities, from three slices, with a grid of cells of 4 pixels."""
    modalities = ("t1n", "t1c", "t2f")
    return cell_model(sources=modalities, targets=modalities, context_slices=3, **changes)


def any_inputs(model, shown=(1.0, 0.0, 1.0), seed=0):
    around = torch.rand(2, 9, 8, 8, generator=torch.Generator().manual_seed(seed))
    return around, model.inputs(around, torch.tensor([shown, shown]))


def test_any_subset_is_every_modality_read_and_synthesised():
    form = any_model().config
    assert form.any_subset
    assert form.modalities == form.sources == form.targets
    assert form.inputs == 3 * 3 + 3
    assert not config().any_subset
    assert config().modalities == ("t1n", "t2w", "t1c")
    for wrong, match in (
        ({"targets": ("t1n", "t1c")}, "none twice"),
        ({"sources": ("t1n",), "targets": ("t1n",)}, "two or more"),
        ({"representation": RepresentationConfig(**FORM, patch_size=2)}, "need a grid of cells"),
        ({"context_slices": 2}, "wanted 1, 3 or 5"),
        ({"spatial_dims": 3, "window": (8, 8, 8)}, "and 1 in 3D"),
    ):
        with pytest.raises(ConfigError, match=match):
            replace(form, **wrong)


def test_what_is_not_shown_is_not_read():
    model = any_model()
    around, inputs = any_inputs(model)
    assert inputs.shape == (2, 12, 8, 8)
    assert torch.equal(inputs[:, :3], around[:, :3])
    assert torch.equal(inputs[:, 6:9], around[:, 6:9])
    assert not inputs[:, 3:6].any()
    for extreme in (inputs[:, 9:].amax((2, 3)), inputs[:, 9:].amin((2, 3))):
        torch.testing.assert_close(extreme, SHOWN * torch.tensor([[1.0, 0, 1]] * 2))
    changed = around.clone()
    changed[:, 3:6] = 7
    assert torch.equal(model.inputs(changed, torch.tensor([[1.0, 0, 1]] * 2)), inputs)


def test_a_black_slice_of_a_source_was_not_acquired_there():
    model = any_model()
    around, _ = any_inputs(model)
    around[1, 7] = 0  # the middle slice of the last source
    inputs = model.inputs(around, torch.ones(2, 3))
    assert model.shown(inputs).tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not inputs[1, 6:9].any()


def test_the_mdn_is_told_what_is_there_and_what_was_synthesised_of_the_rest():
    model = any_model()
    around, inputs = any_inputs(model)
    unguided = images(3)[:2]
    unguided = torch.cat([unguided, unguided[:, :1].flip(-1)], 1)[:, :3]
    told = model.told(inputs, unguided)
    assert told.shape == (2, 9 + 3, 2, 2)
    middle = around[:, 1::3]
    for index, want in enumerate((middle, unguided, middle)):
        cells = model.representation.represent(want)[:, 3 * index : 3 * index + 3]
        torch.testing.assert_close(told[:, 3 * index : 3 * index + 3], cells)
    assert torch.equal(told[:, 9:].amax((2, 3)), torch.tensor([[1.0, 0, 1]] * 2))


def test_grids_are_drawn_for_what_is_missing_alone():
    model = any_model()
    _, inputs = any_inputs(model)
    unguided = model.unguided(inputs)
    drawn = model.guide_cells(inputs, unguided, generators(2), steps=3)
    assert drawn.shape == (2, 2, 9, 2, 2)
    assert not drawn[:, :, :3].any()
    assert not drawn[:, :, 6:].any()
    assert drawn[:, :, 3:6].abs().min() > 0
    other = unguided.clone()
    other[:, [0, 2]] = 0.5  # what it makes of a source that is there
    assert torch.equal(model.guide_cells(inputs, other, generators(2), steps=3), drawn)
    truth = torch.rand(2, 3, 8, 8)
    guidance = model.guidance_of(truth, torch.tensor([[0.0, 1, 0], [0, 0, 1]]))
    want = model.representation.represent(truth)
    assert torch.equal(guidance[0, 3:6], want[0, 3:6])
    assert torch.equal(guidance[1, 6:], want[1, 6:])
    assert not guidance[0, :3].any()
    assert not guidance[1, :6].any()
