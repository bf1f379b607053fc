"""From arrays to arrays: what guides a head's synthesis, and that neither batch nor order changes it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unguided
from fake_cuda import fake_cuda

from crossmr.data.head import DARKEST
from crossmr.errors import ConfigError
from crossmr.networks import inference
from crossmr.networks.c_unet import SynthesisConfig
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.inference import (
    HeadVolumes,
    InferenceSettings,
    check_settings,
    chosen_guidance,
    passing_memory,
    samples_drawn,
    slices_at_once,
    synthesise,
    watching,
)
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import GUIDANCES, CrossConditionedModel, ModelConfig
from crossmr.tensors import PLANES, crop_or_pad, pad_to_multiple, seeded

FORM = {"channels": 4, "multipliers": (1, 2)}
SHAPE = (6, 10, 13)
VOXELS = (0, 3, 60, 50, 40, 0)
"""Of the six slices two have no head, and one has too little to represent it."""
ALL = ("t1n", "t1c", "t2w", "t2f")
FAST = {"ddim_steps": 2, "precision": "float32"}


def random_model(*, conditional=True, seed=0, **changes):
    """A model whose every layer is random, from t1n and t2w to t1c and t2f."""
    settings = {"sources": ("t1n", "t2w"), "targets": ("t1c", "t2f"), "window": (16, 16), "guidance": "last"} | changes
    config = ModelConfig(
        representation=RepresentationConfig(**FORM, patch_size=4),
        distribution=DistributionConfig(width=16, blocks=1, conditional=conditional),
        synthesis=SynthesisConfig(**FORM),
        **settings,
    )
    model = CrossConditionedModel(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def any_model(**changes):
    """A random model of any subset of four modalities, from three slices."""
    return random_model(**{"sources": ALL, "targets": ALL, "context_slices": 3} | changes)


def volume_model(**changes):
    return random_model(**{"spatial_dims": 3, "window": (16, 16, 16)} | changes)


def a_head(modalities=("t1n", "t2w"), seed=0, shape=SHAPE, voxels=VOXELS, spacing_mm=1.0):
    """Volumes of noise, black within a margin of one voxel."""
    volumes = {m: np.random.default_rng([seed, *m.encode()]).random(shape, np.float32) for m in modalities}
    for volume in volumes.values():
        volume[:, [0, -1]], volume[:, :, [0, -1]] = 0, 0
    return HeadVolumes(volumes, voxels, spacing_mm)


def settings(**changes):
    if changes.get("guidance") == "reference":
        changes["reference"] = Path("another")
    return InferenceSettings(**FAST | changes)


def as_tensor(head, modalities):
    return torch.stack([torch.from_numpy(head.volumes.get(m, np.zeros(SHAPE, np.float32))) for m in modalities])


def padded_slices(head, modalities, slices):
    """What the networks read of these slices, (N, M, 16, 16)."""
    return pad_to_multiple(as_tensor(head, modalities)[:, slices].transpose(0, 1), 2, 16)


def whole_inputs(model, head, slices=(1, 2, 3, 4)):
    """What the C-UNet reads of these slices where t1n and t2w are all it needs."""
    sources = padded_slices(head, ("t1n", "t2w"), list(slices))
    return model.network_input(sources, torch.ones(len(sources), 2))


def as_volume(channels):
    """Padded slices (N, W, 16, 16) as the volumes (W, N, Y, X) that a synthesis holds."""
    return crop_or_pad(channels, SHAPE[1:], [0.5] * 2).transpose(0, 1)


def guided_by(model, head, case="A", reference=None, **changes):
    """The vectors (K, T·D) that a synthesis is guided by; each must be that of every slice."""
    given = []
    hook = model.synthesis.register_forward_pre_hook(lambda _, arguments: given.extend(arguments[1:]))
    synthesise(model, head, case, settings(**changes), reference)
    hook.remove()
    for vectors in given:
        assert torch.equal(vectors, vectors[:1].expand_as(vectors))
    return torch.cat([vectors[:1] for vectors in given])


# Images


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize(
    ("make", "acquired"),
    [(random_model, ("t1n", "t2w")), (any_model, ("t1n", "t2f")), (volume_model, ("t1n", "t2w"))],
)
def test_every_model_synthesises_by_every_guidance(make, acquired, guidance):
    model = make()
    head, reference = a_head(acquired), a_head(model.config.targets, seed=5)
    result, again = (synthesise(model, head, "A", settings(guidance=guidance), reference) for _ in range(2))
    assert result.targets == model.config.targets
    assert result.images.shape == (len(result.targets), *SHAPE)
    assert result.images.dtype == torch.float32
    assert result.images.amin() >= 0
    assert result.images.amax() <= 1
    assert result.images[:, 1:5].flatten(1).std(1).min() > 1e-3
    assert not result.images[:, [0, 5]].any()  # no head
    assert result.stds is None
    assert torch.equal(result.images, again.images)
    plain = synthesise(model, head, "A", settings(guidance="none"))
    assert torch.equal(result.images, plain.images) == (guidance == "none")


def test_a_slice_is_what_the_network_makes_of_it():
    model, head = random_model(), a_head()
    want = as_volume(unguided(model, whole_inputs(model, head)))
    result = synthesise(model, head, "A", settings(guidance="none"))
    torch.testing.assert_close(result.images[:, 1:5], want, atol=1e-5, rtol=1e-5)


def test_a_volume_is_what_the_network_makes_of_it():
    model, head = volume_model(), a_head()
    whole = pad_to_multiple(as_tensor(head, ("t1n", "t2w"))[None], 3, 16)
    want = crop_or_pad(unguided(model, model.network_input(whole, torch.ones(1, 2)))[0], SHAPE, [0.5] * 3)
    result = synthesise(model, head, "A", settings(guidance="none"))
    torch.testing.assert_close(result.images[:, 1:5], want[:, 1:5], atol=1e-5, rtol=1e-5)
    assert result.batch == 1


def test_a_volume_larger_than_the_window_is_completed_window_by_window():
    model, head = volume_model(window=(8, 8, 8)), a_head()
    seen = []
    hook = model.synthesis.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    result = synthesise(model, head, "A", settings(guidance="unconditional"))
    hook.remove()
    assert set(seen) == {(1, 2 + 1, 8, 8, 8)}
    assert len(seen) > 8  # they overlap
    assert result.images[:, 1:5].flatten(1).std(1).min() > 1e-3


def test_where_memory_runs_out_windows_are_halved():
    model, head = volume_model(window=(16, 16, 16)), a_head()
    usual = synthesise(model, head, "A", settings(guidance="none"))
    assert usual.window == (16, 16, 16)
    seen = []

    def short_of_memory(_, arguments):
        seen.append(tuple(arguments[0].shape[2:]))
        if max(seen[-1]) > 8:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    hook = model.synthesis.register_forward_pre_hook(short_of_memory)
    result = synthesise(model, head, "A", settings(guidance="none"))
    hook.remove()
    assert set(seen) == {(16, 16, 16), (8, 8, 8)}
    assert result.window == (8, 8, 8)
    assert result.images[:, 1:5].flatten(1).std(1).min() > 1e-3
    smaller = synthesise(volume_model(window=(8, 8, 8)), head, "A", settings(guidance="none"))
    torch.testing.assert_close(result.images, smaller.images)


def test_memory_that_suffices_for_no_window_is_an_error():
    model, head, seen = volume_model(window=(16, 16, 16)), a_head(), []

    def no_memory(_, arguments):
        seen.append(tuple(arguments[0].shape[2:]))
        raise MemoryError

    model.synthesis.register_forward_pre_hook(no_memory)
    with pytest.raises(MemoryError):
        synthesise(model, head, "A", settings(guidance="none"))
    assert seen[0] == (16, 16, 16)
    assert len(seen) == len(set(seen)) > 2  # every size once


def test_a_guided_image_is_the_mean_over_the_samples():
    model, head = random_model(), a_head()
    vectors = guided_by(model, head, guidance="sample", samples=3)
    inputs = whole_inputs(model, head)
    each = torch.stack([model.image(model.predict(inputs, y_0.expand(4, -1))[0], inputs) for y_0 in vectors])
    result = synthesise(model, head, "A", settings(guidance="sample", samples=3))
    for made, want in ((result.images, each.mean(0)), (result.stds, each.std(0))):
        torch.testing.assert_close(made[:, 1:5], as_volume(want), atol=1e-5, rtol=1e-4)
    assert not result.stds[:, [0, 5]].any()


def test_targets_come_in_the_order_requested():
    model, head = random_model(uncertainty=True), a_head()
    everything = synthesise(model, head, "A", settings(guidance="sample"))
    for targets in (("t2f", "t1c"), ("t2f",), ("t1c", "t2f")):
        result = synthesise(model, head, "A", settings(guidance="sample", targets=targets))
        assert result.targets == targets
        for index, target in enumerate(targets):
            number = model.config.targets.index(target)
            assert torch.equal(result.images[index], everything.images[number])
            assert torch.equal(result.stds[index], everything.stds[number])


def test_what_is_missing_of_any_subset_is_not_read_and_what_is_no_source_neither():
    model, one = any_model(), random_model()
    head = a_head(("t1n", "t2f"))
    with_zeros = replace(head, volumes=dict(head.volumes) | {"pd": np.ones(SHAPE, np.float32)})
    assert torch.equal(
        synthesise(model, head, "A", settings()).images, synthesise(model, with_zeros, "A", settings()).images
    )
    more = a_head(("t2f", "t2w", "t1c", "t1n"))
    assert torch.equal(synthesise(one, more, "A", settings()).images, synthesise(one, a_head(), "A", settings()).images)
    assert not torch.equal(
        synthesise(model, head, "A", settings()).images, synthesise(model, more, "A", settings()).images
    )


@pytest.mark.parametrize(
    ("spacing_mm", "reached"),
    [(0.5, [2]), (1.0, [3, 4]), (1.5, [3, 4]), (2.5, [4]), (7.0, [4])],
)
def test_a_slice_is_made_from_its_neighbours_a_millimetre_away(spacing_mm, reached):
    """Slices 2 to 4 and, half a millimetre apart, every other one; of thick slices none but itself."""
    model, head = any_model(), a_head(("t1n", "t2f"), spacing_mm=spacing_mm)
    before = synthesise(model, head, "A", settings()).images
    head.volumes["t1n"][4] *= 0.3
    moved = (synthesise(model, head, "A", settings()).images - before).abs().amax((0, 2, 3)) > 1e-5
    assert [z for z in range(6) if moved[z]] == sorted({*reached, 4})


@pytest.mark.parametrize("guidance", ["none", "sample"])
@pytest.mark.parametrize("make", [random_model, any_model, volume_model])
def test_nothing_outside_the_head_is_synthetic_and_everything_within_is(make, guidance):
    model, head = make(), a_head(("t1n", "t2w"))
    head.volumes["t1n"][2, 4:6, 4:8] = 1 / 3  # the median, which standardised is 0, as black is
    head.volumes["t2w"][2, 4:6, 4:8] = 1 / 3
    inside = np.logical_or(head.volumes["t1n"] > 0, head.volumes["t2w"] > 0)
    images = synthesise(model, head, "A", settings(guidance=guidance)).images.numpy()
    for z in range(6):
        if not VOXELS[z]:
            assert not images[:, z].any()
        else:
            assert (images[:, z][:, ~inside[z]] == 0).all()
            assert (images[:, z][:, inside[z]] >= DARKEST * 0.999).all()


# What guides


def test_a_sample_is_drawn_for_the_case_from_what_its_sources_represent():
    model, head = random_model(), a_head()
    pooled = model.pooled(padded_slices(head, ("t1n", "t2w"), [2, 3, 4])).mean(0, keepdim=True)
    condition = model.condition(pooled, torch.ones(1, 2))
    for guidance, given in (("sample", condition), ("unconditional", None)):
        generators = [seeded("case", 7, "A"), seeded("case", 7, "A", 1)]
        want = model.draw(generators, given, torch.ones(1, 2), steps=2)
        vectors = guided_by(model, head, guidance=guidance, seed=7, samples=2)
        torch.testing.assert_close(vectors, want, atol=1e-5, rtol=1e-5)


def test_one_sample_is_the_first_of_many():
    model, head = random_model(), a_head()
    one, three = (guided_by(model, head, guidance="sample", samples=samples) for samples in (None, 3))
    torch.testing.assert_close(three[:1], one)
    assert torch.cdist(three, three)[[0, 0, 1], [1, 2, 2]].min() > 1e-3


@pytest.mark.parametrize("guidance", ["sample", "unconditional"])
def test_each_case_and_seed_has_a_vector_of_its_own(guidance):
    model, head = random_model(), a_head()
    vector = guided_by(model, head, guidance=guidance)
    assert torch.equal(vector, guided_by(model, head, guidance=guidance))
    for other in (
        guided_by(model, head, "B", guidance=guidance),
        guided_by(model, head, guidance=guidance, seed=1),
        guided_by(model, head, guidance=guidance, ddim_steps=3),
    ):
        assert (vector - other).abs().max() > 1e-3


@pytest.mark.parametrize("make", [random_model, any_model, volume_model])
def test_only_a_sample_depends_on_the_sources(make):
    model = make()
    head, other = a_head(), a_head(seed=1)
    for guidance, depends in (("sample", True), ("unconditional", False)):
        one, two = (guided_by(model, each, guidance=guidance) for each in (head, other))
        assert bool((one - two).abs().max() > 1e-4) == depends
        assert torch.equal(one, two) != depends


def test_of_any_subset_what_is_missing_alone_is_drawn():
    model, head = any_model(), a_head(("t1n", "t2f"))
    for guidance in ("sample", "unconditional"):
        (vector,) = guided_by(model, head, guidance=guidance).unflatten(1, (4, 8))
        assert vector.any(1).tolist() == [False, True, True, False]
    pooled = model.pooled(padded_slices(head, ALL, [2, 3, 4])).mean(0, keepdim=True)
    available = torch.tensor([[1.0, 0, 0, 1]])
    want = model.draw([seeded("case", 0, "A")], model.condition(pooled, available), 1 - available, steps=2)
    torch.testing.assert_close(guided_by(model, head, guidance="sample"), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "acquired", "real", "guided"),
    [
        (random_model, ("t1n", "t2w"), ("t1c", "t2f"), ("t1c", "t2f")),
        (random_model, ("t1n", "t2w"), ("t2f",), ("t2f",)),
        (random_model, ("t1n", "t2w"), ("t1n", "t2f"), ("t2f",)),
        (any_model, ("t1n",), ("t1n", "t1c", "t2f"), ("t1c", "t2f")),
    ],
)
def test_a_reference_represents_what_it_has_of_what_is_missing(make, acquired, real, guided):
    model, head, reference = make(), a_head(acquired), a_head(real, seed=5)
    targets = model.config.targets
    pooled = model.pooled(padded_slices(reference, targets, [2, 3, 4])).mean(0, keepdim=True)
    want = model.y_0(pooled, torch.tensor([[float(target in guided) for target in targets]]))
    vector = guided_by(model, head, reference=reference, guidance="reference")
    torch.testing.assert_close(vector, want, atol=1e-5, rtol=1e-5)
    assert vector.unflatten(1, (-1, 8)).any(2)[0].tolist() == [target in guided for target in targets]
    assert torch.equal(vector, guided_by(model, head, "B", reference, guidance="reference", seed=3))


def test_a_reference_of_another_size_guides_too():
    model = random_model()
    reference = a_head(("t1c", "t2f"), 5, (4, 20, 9), (5, 50, 60, 50))
    assert guided_by(model, a_head(), reference=reference, guidance="reference").any()


def test_a_reference_has_to_be_given():
    with pytest.raises(ConfigError, match="needs real scans"):
        synthesise(random_model(), a_head(), "A", settings(guidance="reference"))


def test_unguided_nothing_is_represented_or_drawn():
    model = random_model()
    model.representation.encoder.register_forward_pre_hook(lambda *_: pytest.fail("represented"))
    model.distribution.denoise = lambda *_: pytest.fail("drawn")
    synthesise(model, a_head(), "A", settings())
    synthesise(random_model(guidance="none"), a_head(), "A", settings())


def test_a_joint_model_is_guided_unless_something_else_is_asked_for():
    model, head = random_model(guidance="joint"), a_head()
    assert torch.equal(guided_by(model, head), guided_by(model, head, guidance="sample"))
    model = random_model(guidance="joint", conditional=False)
    assert torch.equal(guided_by(model, head), guided_by(model, head, guidance="unconditional"))


# Standard deviations


def within(head):
    """Where any source of the head is more than 0, in the slices that have head."""
    return torch.from_numpy(np.logical_or.reduce([volume > 0 for volume in head.volumes.values()])[1:5])


@pytest.mark.parametrize("guidance", ["none", "sample", "reference"])
@pytest.mark.parametrize("make", [random_model, volume_model])
def test_a_learnt_standard_deviation_is_that_of_the_unguided_image(make, guidance):
    model, head = make(uncertainty=True), a_head()
    there = within(head)
    reference = a_head(("t1c", "t2f"), seed=5)
    result = synthesise(model, head, "A", settings(guidance=guidance), reference)
    if make is random_model:
        want = as_volume(model.std(model.predict(whole_inputs(model, head))[1]))
        torch.testing.assert_close(result.stds[:, 1:5], want * there, atol=1e-5, rtol=1e-4)
    assert result.stds.shape == result.images.shape
    assert torch.equal(result.stds[:, 1:5] > 0, there.expand_as(result.stds[:, 1:5]))
    assert not result.stds[:, [0, 5]].any()
    torch.testing.assert_close(result.stds, synthesise(model, head, "A", settings(guidance="none")).stds)


def test_a_learnt_standard_deviation_goes_before_that_of_samples():
    model, head = random_model(uncertainty=True), a_head()
    one, many = (synthesise(model, head, "A", settings(guidance="sample", samples=k)).stds for k in (1, 3))
    torch.testing.assert_close(one, many)
    model.calibration = {"variance": torch.tensor([[0.0, 0.04], [0.0, 0.25]])}
    stds = synthesise(model, head, "A", settings(guidance="sample")).stds[:, 1:5]
    want = torch.tensor([0.2, 0.5])[:, None, None, None] / 15 * within(head)
    torch.testing.assert_close(stds, want.expand_as(stds))


# The same whatever the batch, the memory, the machine


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("guidance", ["none", "sample"])
@pytest.mark.parametrize("make", [random_model, any_model])
def test_no_batch_changes_a_slice(monkeypatch, make, guidance, batch):
    model, head = make(uncertainty=True), a_head()
    want = synthesise(model, head, "A", settings(guidance=guidance))
    assert want.batch == 16
    monkeypatch.setattr(inference, "BATCH", batch)
    result = synthesise(model, head, "A", settings(guidance=guidance))
    torch.testing.assert_close(result.images, want.images, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result.stds, want.stds, atol=1e-6, rtol=1e-5)
    assert result.batch == batch


def test_who_watches_is_told_of_the_slices_that_are_done(monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 4)
    model, told = random_model(), []
    head = a_head(shape=(10, 10, 13), voxels=[0, *[50] * 9])
    with watching(lambda done, total: told.append((done, total))):
        synthesise(model, head, "A", settings(guidance="none"))
    assert told == [(4, 9), (8, 9), (9, 9)]
    synthesise(model, head, "A", settings(guidance="none"))
    assert len(told) == 3


def test_where_memory_runs_out_fewer_slices_go_at_once_and_nothing_changes():
    model = random_model(uncertainty=True)
    head = a_head(shape=(20, 10, 13), voxels=[50] * 20)
    want = synthesise(model, head, "A", settings(guidance="sample", samples=2))
    tried = {}

    def short_of_memory(module, arguments):
        sizes = tried.setdefault(module, [])
        sizes.append(len(arguments[0]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.synthesis.register_forward_pre_hook(short_of_memory)
    model.representation.encoder.register_forward_pre_hook(short_of_memory)
    result = synthesise(model, head, "A", settings(guidance="sample", samples=2))
    assert (want.batch, result.batch) == (16, 4)
    assert tried[model.synthesis] == [16, 8, *[4] * 15]  # unguided and two samples of five batches
    assert tried[model.representation.encoder] == [32, 16, 8, *[4] * 10]  # images of two modalities
    torch.testing.assert_close(result.images, want.images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.stds, want.stds, atol=1e-5, rtol=1e-4)


def test_where_not_even_one_slice_fits_the_error_is_passed_on():
    model = random_model()

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.synthesis.register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        synthesise(model, a_head(), "A", settings())


def test_a_gpu_makes_what_the_processor_makes():
    model, head, reference = random_model(uncertainty=True), a_head(), a_head(("t1c", "t2f"), seed=5)

    def make():
        return [
            synthesise(model, head, "A", settings(guidance=guidance), reference) for guidance in ("sample", "reference")
        ]

    want = make()
    with fake_cuda():
        model.to("cuda")
        made = make()
        assert all(type(image) is torch.Tensor for result in made for image in (result.images, result.stds))
    for mine, theirs in zip(made, want, strict=True):
        torch.testing.assert_close(mine.images, theirs.images, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.stds, theirs.stds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [random_model, volume_model])
def test_mixed_precision_is_near(make):
    model, head = make(uncertainty=True), a_head()
    full = synthesise(model, head, "A", settings(guidance="sample"))
    mixed = synthesise(model, head, "A", settings(guidance="sample", precision="bfloat16"))
    assert mixed.images.dtype == mixed.stds.dtype == torch.float32
    assert not torch.equal(mixed.images, full.images)
    assert (mixed.images - full.images).abs().mean() < 0.02


def test_a_synthesis_changes_neither_its_arguments_nor_the_random_state():
    model, head = any_model(uncertainty=True), a_head()
    before, state = {m: volume.copy() for m, volume in head.volumes.items()}, torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for guidance in ("sample", "none"):
        result = synthesise(model.requires_grad_(True), head, "A", settings(guidance=guidance))
        assert not result.images.requires_grad
    assert all(np.array_equal(head.volumes[m], before[m]) for m in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# Settings


@pytest.mark.parametrize(
    ("model", "wrong", "match"),
    [
        ({}, {"targets": ("t1c", "t1n")}, "cannot synthesise t1n; it was trained for t1c, t2f"),
        ({"guidance": "joint"}, {"guidance": "none"}, "always guided in training.*--against"),
        ({"guidance": "none"}, {"guidance": "sample"}, "so --guidance sample means nothing to it; use guidance 'none'"),
        ({"guidance": "none"}, {"guidance": "unconditional"}, "trained without guidance"),
        ({"guidance": "none"}, {"guidance": "reference"}, "trained without guidance"),
        ({"conditional": False}, {"guidance": "sample"}, "without a condition; use guidance 'unconditional'"),
        ({}, {"samples": 3}, "guidance 'none' draws none"),
        ({}, {"samples": 1, "guidance": "reference"}, "guidance 'reference' draws none"),
        ({}, {"ddim_steps": 0}, "choose 1 to 1000"),
        ({}, {"ddim_steps": 1001}, "choose 1 to 1000"),
        ({}, {"precision": "half"}, "--precision is 'half'"),
    ],
)
def test_what_a_model_cannot_do_is_refused(model, wrong, match):
    with pytest.raises(ConfigError, match=match):
        check_settings(random_model(**model), settings(**wrong))


@pytest.mark.parametrize(
    ("model", "fine"),
    [
        ({}, {}),
        ({}, {"targets": ("t2f",)}),
        ({"guidance": "joint"}, {"samples": 3}),
        ({"guidance": "joint", "conditional": False}, {"samples": 3}),
        ({"guidance": "joint", "conditional": False}, {"guidance": "reference"}),
        ({}, {"guidance": "sample", "samples": 3, "ddim_steps": 1000}),
        ({"guidance": "none"}, {"guidance": "none"}),
    ],
)
def test_what_a_model_can_do_is_not(model, fine):
    check_settings(random_model(**model), settings(**fine))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"guidance": "mean"}, "--guidance is 'mean'; expected one of sample, unconditional, reference, none"),
        ({"samples": 0}, "--samples is 0"),
        ({"guidance": "reference"}, "--reference STUDY go together"),
        ({"reference": Path("another")}, "--reference STUDY go together"),
        ({"reference": Path("another"), "guidance": "sample"}, "--reference STUDY go together"),
        ({"reference": 5, "guidance": "reference"}, "reference is 5; expected text such as 'earlier/visit'"),
        ({"register": "yes"}, "register is 'yes'; expected one of never, if needed, always"),
        ({"seed": "1"}, "seed is '1'; expected a whole number"),
        ({"ddim_steps": 2.5}, "ddim_steps is 2.5; expected a whole number"),
        ({"planes": True}, "planes is True; expected a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, match):
    with pytest.raises(ConfigError, match=match):
        InferenceSettings(**wrong)


def test_settings_are_understood_as_the_command_line_gives_them():
    assert InferenceSettings(register=True).register == "always"
    assert InferenceSettings(register=False, seed=np.int64(3)) == InferenceSettings(seed=3)
    assert InferenceSettings(guidance="reference", reference="another").reference == Path("another")


@pytest.mark.parametrize(
    ("model", "chosen", "guidance", "drawn"),
    [
        ({"guidance": "joint"}, {}, "sample", 1),
        ({"guidance": "joint", "conditional": False}, {}, "unconditional", 1),
        ({"guidance": "joint"}, {"guidance": "unconditional", "samples": 4}, "unconditional", 4),
        ({"guidance": "joint"}, {"guidance": "reference"}, "reference", 0),
        ({}, {}, "none", 0),
        ({}, {"guidance": "sample"}, "sample", 1),
        ({"guidance": "none"}, {}, "none", 0),
    ],
)
def test_the_guidance_is_the_one_asked_for_or_the_one_trained_with(model, chosen, guidance, drawn):
    model, chosen = random_model(**model), settings(**chosen)
    assert chosen_guidance(model, chosen) == guidance
    assert samples_drawn(model, chosen) == drawn


@pytest.mark.parametrize(("pixels", "slices"), [(1, 16), (256 * 256, 16), (512 * 512, 4), (2**30, 1), (0, 16)])
def test_of_large_slices_fewer_pass_at_once(pixels, slices):
    assert slices_at_once(pixels) == slices


def test_features_that_pass_at_once_do_not_grow_beyond_a_size_of_slices():
    config = random_model().config
    sizes = [passing_memory(config, (side, side, 200)) for side in (64, 256, 512, 1024)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


# Three planes


def turned(head, plane):
    """A head whose axial slices are those of another plane."""
    slices, rows, columns = PLANES[plane]
    volumes = {m: np.ascontiguousarray(volume.transpose(PLANES[plane])) for m, volume in head.volumes.items()}
    counts = (np.stack([*volumes.values()]) > 0).any(0).sum((1, 2)).tolist()
    sides = (head.spacing_mm, *head.in_plane_mm)
    return HeadVolumes(volumes, counts, sides[slices], (sides[rows], sides[columns]))


def test_three_planes_are_the_mean_of_each_by_itself():
    model = any_model(guidance="none", uncertainty=True, planes=3)
    head, shape = a_head(("t1n", "t2w", "t2f")), np.shape(a_head().volumes["t1n"])
    together = synthesise(model, head, "A", settings(targets=("t1c", "t2f")))
    images, variances = np.zeros((3, 2, *shape)), np.zeros((3, 2, *shape))
    for i, (plane, order) in enumerate(PLANES.items()):
        view = turned(head, plane) if plane != "axial" else head
        alone = synthesise(model, view, "A", settings(targets=("t1c", "t2f"), planes=1))
        images[i] = alone.images.numpy().transpose(0, *(1 + axis for axis in order))
        variances[i] = alone.stds.numpy().transpose(0, *(1 + axis for axis in order)) ** 2
    everywhere = (1, 2, 3)
    share = 1 - images.var(0).sum(everywhere) / variances.mean(0).sum(everywhere)
    stds = np.sqrt(variances.mean(0) * share.clip(1 / 3)[:, None, None, None])
    mean = images.mean(0)
    mean[:, [0, 5]] = stds[:, [0, 5]] = 0  # axial slices without head
    np.testing.assert_allclose(together.images, mean, atol=1e-5)
    np.testing.assert_allclose(together.stds, stds, atol=1e-5)
    assert not np.allclose(together.images, synthesise(model, head, "A", settings(planes=1)).images[[1, 3]], atol=1e-3)


def test_thick_slices_and_planes_1_are_completed_in_axial_slices_alone():
    model, seen = any_model(guidance="none", uncertainty=True, planes=3), []
    axial = any_model(guidance="none", uncertainty=True)
    axial.load_state_dict(model.state_dict())
    thick, thin = a_head(spacing_mm=4.0), a_head()
    with watching(lambda done, total: seen.append((done, total))):
        for one, other in (
            (synthesise(model, thick, "A", settings()), synthesise(axial, thick, "A", settings())),
            (synthesise(model, thin, "A", settings(planes=1)), synthesise(axial, thin, "A", settings())),
        ):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.stds, other.stds)
    assert {total for _, total in seen} == {4}
    seen.clear()
    with watching(lambda done, total: seen.append((done, total))):
        synthesise(model, thin, "A", settings())
    depth, height, width = thin.volumes["t1n"].shape
    total = (depth - 2) + (height - 2) + (width - 2)
    assert (seen[-1], {of for _, of in seen}) == ((total, total), {total})
    with pytest.raises(ConfigError, match="--planes is 3; this model has learnt 1, so give that, or 1"):
        check_settings(axial, settings(planes=3))
    check_settings(model, settings(planes=3))


def test_neighbours_are_those_of_the_plane_a_millimetre_apart():
    """Rows half a millimetre apart have the second next ones as neighbours."""
    model, given = any_model(guidance="none", uncertainty=True, planes=3), []
    hook = model.synthesis.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    fine = replace(a_head(("t1n", "t2w", "t2f")), in_plane_mm=(0.5, 1.0))
    synthesise(model, fine, "A", settings())
    hook.remove()
    (coronal,) = [inputs for inputs in given if len(inputs) == SHAPE[1] - 2]
    channel = 3 * model.config.sources.index("t1n")
    middle, after = coronal[:, channel + 1], coronal[:, channel + 2]
    torch.testing.assert_close(after[:-2], middle[2:])
    assert not torch.equal(after[:-1], middle[1:])
