"""Augmentation: drawn from a generator alone, alike in all channels, standardised within the head."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_study

from crossmr.data.dataset import PreparedDataset
from crossmr.data.head import DARKEST
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import ConfigError
from crossmr.training.augmentation import Augmentation, AugmentationConfig, deform, draw_deformations
from crossmr.training.batches import Batches, BatchSettings

ALWAYS = AugmentationConfig(probability=1)
NOTHING = AugmentationConfig(probability=1, gamma=1, scale=0, bias_field=0, noise=0, zoom=1, shift=0, angle=0)
CHANGES = {"gamma": 2.0, "scale": 0.3, "bias_field": 0.5, "noise": 0.1, "zoom": 0.3, "shift": 2.0, "angle": 0.1}


def head(dims, channels=3):
    """A ball with a smooth inside, 0 outside."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 24)] * dims, indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.6
    image = (0.5 + 0.3 * torch.sin(5 * axes[0]) * torch.cos(4 * axes[-1])) * inside
    return torch.stack([image] * channels)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def applied(augment, image, generator):
    """The image, changed by what is drawn."""
    return augment.change(image, *augment.draw(generator))


@pytest.mark.parametrize("dims", [2, 3])
def test_low_precision_around_it_changes_nothing(dims):
    augment, image = Augmentation(ALWAYS, dims), head(dims)
    with torch.autocast("cpu", torch.bfloat16):
        changed = applied(augment, image, generator())
    assert torch.equal(changed, applied(augment, image, generator()))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_same_generator_gives_the_same_image_another_another(dims):
    augment, image = Augmentation(ALWAYS, dims), head(dims)
    first = applied(augment, image, generator())
    assert torch.equal(applied(augment, image, generator()), first)
    assert (applied(augment, image, generator(1)) - first).abs().max() > 1e-2
    assert (first - image).abs().max() > 1e-2
    assert (first.shape, first.dtype, type(first)) == (image.shape, torch.float32, torch.Tensor)
    assert 0 <= first.min() <= first.max() <= 1
    assert not first[(slice(None), *[slice(2)] * dims)].any()  # a corner, far from the head


@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_changes_nothing(dims):
    image = head(dims)
    torch.testing.assert_close(applied(Augmentation(NOTHING, dims), image, generator()), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dims", [2, 3])
def test_each_change_does_something_to_all_channels_alike(name, dims):
    augment, image = Augmentation(replace(NOTHING, **{name: CHANGES[name]}), dims), head(dims)
    made = [applied(augment, image, generator(seed)) for seed in range(16)]
    assert max((one - image).abs().max() for one in made) > 0.02
    if name != "noise":
        for one in made:
            torch.testing.assert_close(one[0], one[2], atol=1e-5, rtol=0)


def unmoved(dims, **changes):
    """An augmentation that does not resample: moved by next to nothing, a head has a margin of next to nothing."""
    augment = Augmentation(replace(NOTHING, **changes), dims)
    augment.move.prob = 0.0
    return augment


def within(image, changed):
    """Values of an image, and of what it was changed to, within both heads."""
    both = (image > 0) & (changed > 0)
    return image[both], changed[both]


@pytest.mark.parametrize("name", ["gamma", "bias_field", "noise", "zoom"])
@pytest.mark.parametrize("dims", [2, 3])
def test_mean_and_deviation_within_the_head_come_back(name, dims):
    augment, image = unmoved(dims, **{name: CHANGES[name]}), head(dims)
    changes = []
    for seed in range(8):
        before, after = within(image, applied(augment, image, generator(seed)))
        assert len(after) == (image > 0).sum()
        assert float(after.mean()) == pytest.approx(float(before.mean()), abs=0.01)
        assert float(after.std()) == pytest.approx(float(before.std()), rel=0.06)  # where noise saturates, it is less
        changes.append(float((after - before).abs().max()))
    assert max(changes) > 0.02


def test_the_jitter_is_all_that_moves_the_mean():
    augment, image = unmoved(2, scale=0.3), head(2)
    ratios = []
    for seed in range(40):
        before, after = within(image, applied(augment, image, generator(seed)))
        ratios.append(float(after.mean() / before.mean()))
        if after.max() < 1:
            torch.testing.assert_close(after, before * ratios[-1], atol=1e-4, rtol=0)
    assert 0.7 <= min(ratios) < 0.8
    assert max(ratios) > 1.1
    assert 10 <= sum(abs(ratio - 1) < 1e-5 for ratio in ratios) <= 30  # one in two


def test_gamma_bends_both_ways():
    augment, image = unmoved(2, gamma=2.0), head(2)
    pairs = [within(image, applied(augment, image, generator(seed))) for seed in range(30)]
    skews = torch.tensor([float((after.mean() - after.median()) / after.std()) for _, after in pairs])
    before = pairs[0][0]
    plain = float((before.mean() - before.median()) / before.std())
    assert skews.max() > plain + 0.05
    assert skews.min() < plain - 0.05


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_0_stays_0_and_the_head_stays_above_it(dims):
    image = head(dims)
    still = unmoved(dims, **CHANGES | {"noise": 0.2})
    for seed in range(8):
        changed = applied(still, image, generator(seed))
        assert torch.equal(changed > 0, image > 0)
        assert changed[image > 0].min() >= DARKEST
        assert changed.max() <= 1
    moved = applied(Augmentation(ALWAYS, dims), image, generator())
    assert ((moved == 0) | (moved >= DARKEST)).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_probability_is_of_a_source_to_be_changed_at_all(probability):
    augment, image = Augmentation(AugmentationConfig(probability=probability), 2), head(2)
    draw = generator()
    changed = [bool((applied(augment, image, draw) - image).abs().max() > 1e-5) for _ in range(200)]
    if probability == 0:
        assert not any(changed)
    assert sum(changed) / 200 == pytest.approx(probability, abs=0.08)  # of the changes none may come, too


def test_a_flat_image_stays_finite():
    flat = 0.5 * (head(2) > 0)
    for seed in range(10):
        changed = applied(Augmentation(ALWAYS, 2), flat, generator(seed))
        assert changed.isfinite().all()
        assert changed.max() <= 1
    black = torch.zeros(1, 8, 8)
    assert torch.equal(applied(Augmentation(ALWAYS, 2), black, generator()), black)


def test_nobody_else_s_random_numbers_are_touched():
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    applied(Augmentation(ALWAYS, 2), head(2), generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002


def test_the_sources_of_a_batch_are_augmented_its_images_never(tmp_path):
    for number in range(3):
        write_study(tmp_path / "cohort", f"P-0000{number}-000", seed=number)
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(0.8, 0.1, 0.1)))
    cases = PreparedDataset(tmp_path / "set").cases
    form = {"size": (16, 16), "batch_size": 4, "seed": 0, "context": 3}
    plain = Batches(cases, ("t1n", "t2f"), BatchSettings(**form))
    changed = Batches(cases, ("t1n", "t2f"), BatchSettings(**form, augmentation=ALWAYS))
    for step in (0, 2):
        one, other, again = plain[step], changed[step], changed[step]
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.present, other.present)
        assert torch.equal(other.neighbours, again.neighbours)
        assert one.neighbours.shape == other.neighbours.shape
        assert (one.neighbours - other.neighbours).abs().amax((1, 2, 3)).min() > 1e-2
    assert torch.equal(plain.validation_batch(5).neighbours, changed.validation_batch(5).neighbours)


@pytest.mark.parametrize("wrong", [{"probability": 1.5}, {"zoom": 0}, {"gamma": 0.5}, {"scale": 1}, {"noise": -1}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="augmentation"):
        AugmentationConfig(**wrong)


def test_only_the_sources_of_a_task_are_augmented_and_black_images_stay_black(tmp_path):
    write_study(tmp_path / "cohort", "P-00000-000", ("t1n", "t2f"))
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1, 0, 0)))
    form = {"size": (16, 16), "batch_size": 4, "seed": 0}
    cases, names = PreparedDataset(tmp_path / "set").cases, ("t1n", "t2f", "t1c")
    plain = Batches(cases, names, BatchSettings(**form))[0].neighbours
    one = Batches(cases, names, BatchSettings(**form, augmentation=ALWAYS, augmented=1))[0].neighbours
    every = Batches(cases, names, BatchSettings(**form, augmentation=ALWAYS))[0].neighbours
    assert (one[:, 0] - plain[:, 0]).abs().amax((1, 2)).min() > 1e-2
    assert torch.equal(one[:, 1:], plain[:, 1:])
    assert (every[:, 1] - plain[:, 1]).abs().amax((1, 2)).min() > 1e-2
    assert not every[:, 2].any()  # nobody has it


def sample_of(dims):
    """Two images and a lesion, (3, 2, *S), the lesion's labels last."""
    image = head(dims, channels=2)
    lesion = (image > 0.7).float() * 2
    return torch.stack([image, image.flip(0) * 0.5, lesion])


@pytest.mark.parametrize("dims", [2, 3])
def test_no_deformation_moves_nothing(dims):
    sample = sample_of(dims)
    torch.testing.assert_close(deform(sample, [0.0] + [1.0] * dims, [1.0] * dims), sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_quarter_turn_is_a_quarter_turn_in_the_axial_plane(dims):
    sample = torch.rand(3, 2, *[16] * dims)
    turned = deform(sample, [math.pi / 2] + [1.0] * dims, [1.0] * dims)
    torch.testing.assert_close(turned, sample.rot90(1, (-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_factor_stretches_its_axis_and_turns_keep_lengths(axis):
    image = torch.zeros(2, 1, 64, 48)
    image[..., 28:36, 20:28] = 0.5
    factors = [1.5, 1.0] if axis == -1 else [1.0, 1.5]
    sides = [int((deform(image, [0.0, *factors], (1, 1))[0, 0] > 0).any(1 - k).sum()) for k in (0, 1)]
    assert sides == ([8, 12] if axis == -1 else [12, 8])
    turned = deform(image, [math.pi / 2, 1.0, 1.0], (1, 1))[0, 0] > 0
    assert [int(turned.any(1).sum()), int(turned.any(0).sum())] == [8, 8]  # the grid is no square, the voxels are


def test_a_turn_keeps_lengths_in_mm():
    image = torch.zeros(2, 1, 64, 64)
    image[..., 30:34, 16:48] = 0.5  # 8 mm by 32 mm, in slices of 2 mm
    turned = deform(image, [math.pi / 2, 1.0, 1.0], (2.0, 1.0))[0, 0] > 0
    assert [int(turned.any(1).sum()), int(turned.any(0).sum())] == [16, 8]


def test_nothing_is_not_mixed_into_tissue_and_labels_stay_labels():
    sample = sample_of(2).clamp(min=0)
    sample[0] = torch.where(sample[0] > 0, 0.6, 0.0)
    moved = deform(sample, [0.2, 1.1, 0.9], (1, 1))
    assert all(abs(value - 0.6) < 1e-4 for value in moved[0][moved[0] > 0].tolist())
    assert set(moved[-1].unique().tolist()) == {0.0, 2.0}
    assert (moved[0] - sample[0]).abs().max() > 0.5


def test_as_many_samples_are_deformed_as_is_probable():
    config = AugmentationConfig(deformation=0.3, rotation=0.2, stretch=1.25)
    drawn = draw_deformations(config, 4000, 2, generator())
    moved = drawn[(drawn != torch.tensor([0.0, 1.0, 1.0])).any(1)]
    assert 0.27 < len(moved) / 4000 < 0.33
    assert 0.19 < moved[:, 0].max() <= 0.2
    assert -0.2 <= moved[:, 0].min() < -0.19
    assert 0.8 <= moved[:, 1:].min() < 0.81
    assert 1.24 < moved[:, 1:].max() <= 1.25
    assert torch.equal(drawn, draw_deformations(config, 4000, 2, generator()))


def test_sources_targets_and_lesion_move_together(tmp_path):
    write_study(tmp_path / "cohort", "A", seed=1, lesion=True)
    write_study(tmp_path / "cohort", "B", seed=2, lesion=True)
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1, 0, 0)))
    cases = PreparedDataset(tmp_path / "set").split("train")
    settings = BatchSettings(size=(32, 32), batch_size=4, seed=0, flip=False, context=3)
    plain = Batches(cases, ("t1n", "t2f"), settings)[0]
    config = AugmentationConfig(deformation=1)
    batch = Batches(cases, ("t1n", "t2f"), replace(settings, augmentation=config))[0]
    assert not torch.equal(batch.images, plain.images)
    middle = batch.neighbours.reshape(4, 2, 3, 32, 32)[:, :, 1]
    assert torch.equal(middle, batch.images)  # no source is augmented, so that what moved is the whole sample
    drawn = Batches(cases, ("t1n", "t2f"), replace(settings, augmentation=config))[0]
    assert torch.equal(drawn.images, batch.images)
