"""Stage 1: masks, the loss over them, and the representation."""

import pytest
import torch
from torch.nn import functional as F

from crossmr.errors import ConfigError
from crossmr.stages.representation import (
    MaskedAutoencoder,
    RepresentationConfig,
    masked_l2,
    random_mask,
    z_score,
)

SMALL = {"channels": 8, "multipliers": (1, 2), "patch_size": 4}
CELLS = RepresentationConfig(**SMALL, cell=4, cell_features=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(count=4, modalities=2, side=16):
    """Random images without detail, in [0, 1]."""
    coarse = torch.rand(count, modalities, 3, 3, generator=seeded(7))
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "hidden"),
    [
        ((32, 32), 8, 0.75, 12),
        ((32, 48), 16, 0.5, 3),
        ((16, 16, 16), 8, 0.75, 6),
        ((224, 224), 16, 0.75, 147),
    ],
)
def test_the_share_hidden_is_exact_in_each_sample(size, patch, ratio, hidden):
    mask = random_mask((5, *size), patch, ratio, seeded())
    assert mask.shape == (5, 1, *size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.flatten(1).sum(1).tolist() == [hidden * patch ** len(size)] * 5


def test_the_mask_is_made_of_whole_patches_differing_by_sample():
    mask = random_mask((4, 32, 48), 8, 0.75, seeded())
    patches = mask[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)  # (B, 4, 6, 64)
    assert torch.equal(patches.amin(-1), patches.amax(-1))
    assert len({tuple(sample.flatten().tolist()) for sample in mask}) == 4


def test_patches_cut_by_the_border_count_whole():
    mask = random_mask((3, 20, 20), 16, 0.75, seeded())
    corners = torch.stack([mask[:, 0, y, x] for y in (0, 16) for x in (0, 16)])
    assert corners.sum(0).tolist() == [3.0] * 3
    assert torch.equal(mask[:, 0, :16, :16].amin((1, 2)), mask[:, 0, 0, 0])
    assert torch.equal(mask[:, 0, 16:, 16:].amax((1, 2)), mask[:, 0, 16, 16])


@pytest.mark.parametrize(("ratio", "hidden"), [(0.01, 1), (0.99, 15)])
def test_something_is_hidden_and_something_is_left(ratio, hidden):
    assert random_mask((2, 16, 16), 4, ratio, seeded()).flatten(1).sum(1).tolist() == [hidden * 16.0] * 2


def test_masks_are_drawn_from_their_generator():
    first, again, other = (random_mask((2, 32, 32), 8, 0.5, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_patch_is_hidden_as_often():
    mask = random_mask((4000, 4, 4), 2, 0.75, seeded())[:, 0, ::2, ::2]
    assert (mask.mean(0) - 0.75).abs().max() < 0.03  # four standard errors


def test_only_masked_patches_count():
    image, prediction = (
        torch.rand(2, 2, 8, 8, generator=seeded()),
        torch.rand(2, 2, 8, 8, generator=seeded(1)),
    )
    mask, present = random_mask((2, 8, 8), 4, 0.5, seeded(2)), torch.ones(2, 2)
    before = masked_l2(prediction, image, mask, present)
    assert masked_l2(prediction, image + 9 * (1 - mask), mask, present) == before
    assert masked_l2(prediction, image + 9 * mask, mask, present) > before + 1
    errors = ((prediction - image) ** 2)[mask.expand_as(image) > 0]
    torch.testing.assert_close(before, errors.mean())


def test_absent_modalities_carry_no_loss_and_no_gradient():
    image = torch.rand(2, 2, 8, 8, generator=seeded())
    prediction = torch.rand(2, 2, 8, 8, generator=seeded(1)).requires_grad_()
    mask, present = random_mask((2, 8, 8), 4, 0.5, seeded(2)), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss = masked_l2(prediction, image, mask, present)
    loss.backward()
    assert prediction.grad[0, 1].abs().max() == 0
    assert prediction.grad[0, 0].abs().max() > 0
    changed = image.clone()
    changed[0, 1] += 5
    assert masked_l2(prediction, changed, mask, present) == loss
    kept = (mask * present[..., None, None]) > 0
    torch.testing.assert_close(loss, ((prediction - image) ** 2)[kept].mean())


def test_a_batch_with_nothing_present_has_loss_zero():
    x = torch.ones(1, 1, 4, 4)
    assert masked_l2(x, 0 * x, x, torch.zeros(1, 1)) == 0


def test_z_score_normalises_each_sample():
    features = 100 * torch.randn(5, 64, generator=seeded()) + torch.arange(5.0)[:, None]
    scored = z_score(features)
    assert scored.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(scored.std(-1, unbiased=False), torch.ones(5))
    torch.testing.assert_close(z_score(features[2:3]), scored[2:3])
    torch.testing.assert_close(z_score(3 * features + 7), scored, atol=1e-4, rtol=1e-4)


def test_z_score_of_constant_features_is_finite():
    assert z_score(torch.full((2, 8), 4.0)).abs().max() == 0


def test_the_published_size_represents_in_192_numbers():
    config = RepresentationConfig()
    assert config.dim == 192
    with torch.device("meta"):
        network = MaskedAutoencoder(config, 2)
        assert network.represent(torch.zeros(3, 2, 224, 224)).shape == (3, 192)
        assert network.encoder(torch.zeros(3, 2, 224, 224))[0].shape == (3, 192, 28, 28)


@pytest.mark.parametrize("size", [(8, 16), (4, 8, 8)])
def test_the_representation_is_the_scored_spatial_mean(size):
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(**SMALL), 2, len(size))
    image = torch.rand(3, 2, *size, generator=seeded())
    features, _ = network.encoder(image)
    torch.testing.assert_close(network.pooled(image), features.flatten(2).mean(-1))
    torch.testing.assert_close(network.represent(image), z_score(features.flatten(2).mean(-1)))
    assert network.represent(image).shape == (3, network.config.dim)


@pytest.mark.parametrize("decoder", ["skip-free", "u-net"])
def test_the_network_never_sees_what_is_hidden(decoder):
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(**SMALL, decoder=decoder), 2)
    seen = []
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = 1 + smooth_images()
    network.loss(image, torch.ones(4, 2), seeded(3))
    mask = random_mask((4, 16, 16), 4, 0.75, seeded(3))
    assert torch.equal(seen[0], image * (1 - mask))


@pytest.mark.parametrize("decoder", ["skip-free", "u-net"])
def test_the_loss_falls_on_a_handful_of_images(decoder):
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(**SMALL, decoder=decoder, mask_ratio=0.5), 2)
    images, present = smooth_images(), torch.ones(4, 2)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)

    def measured():
        with torch.no_grad():
            return sum(float(network.loss(images, present, seeded(100 + k))) for k in range(8)) / 8

    first = measured()
    for step in range(100):
        optimiser.zero_grad()
        network.loss(images, present, seeded(step)).backward()
        optimiser.step()
    grey = float(((images - images.mean()) ** 2).mean())
    last = measured()
    assert last < 0.2 * first
    assert last < 0.7 * grey  # it says more than the mean


def test_the_loss_of_an_absent_modality_reaches_no_weight():
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(**SMALL), 2)
    image, present = smooth_images(), torch.tensor([[1.0, 0.0]] * 4)
    network.loss(image * present[..., None, None], present, seeded()).backward()
    assert network.decoder.out.weight.grad[1].abs().max() == 0
    assert network.decoder.out.weight.grad[0].abs().max() > 0


@pytest.mark.parametrize(
    "wrong",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"channels": 0}, {"multipliers": ()}, {"patch_size": 0}],
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RepresentationConfig(**wrong)


# A grid of cells


def cell_network(modalities=2, dims=2):
    torch.manual_seed(0)
    return MaskedAutoencoder(CELLS, modalities, dims).requires_grad_(False)


@pytest.mark.parametrize(("size", "grid"), [((8, 20), (2, 5)), ((4, 8, 12), (1, 2, 3))])
def test_a_grid_is_scored_by_cell_and_modality(size, grid):
    network = cell_network(2, len(size))
    grids = network.represent(torch.rand(3, 2, *size, generator=seeded()))
    assert grids.shape == (3, network.dim, *grid)
    assert network.dim == 2 * 3
    apart = grids.unflatten(1, (2, 3))  # (B, M, F, *G)
    assert apart.mean(2).abs().max() < 1e-5
    torch.testing.assert_close(apart.std(2, unbiased=False), torch.ones(3, 2, *grid), atol=1e-3, rtol=0)
    assert apart.flatten(3).std(-1).min() > 1e-3  # the cells of an image differ


def test_a_grid_speaks_of_its_own_modality_and_sample_alone():
    network, image = cell_network(), torch.rand(3, 2, 8, 12, generator=seeded())
    grids = network.represent(image)
    changed = image.clone()
    changed[1, 1] = 1 - changed[1, 1]
    moved = (network.represent(changed) - grids).abs().unflatten(1, (2, 3)).amax((2, 3, 4)) > 1e-3
    assert moved.tolist() == [[False, False], [False, True], [False, False]]
    swapped = network.represent(image.flip(1)).unflatten(1, (2, 3)).flip(1).flatten(1, 2)
    torch.testing.assert_close(swapped, grids)  # one encoder for all


def test_the_decoder_paints_from_the_grid_alone():
    network, image = cell_network(), torch.rand(3, 2, 8, 12, generator=seeded())
    shown = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: shown.append(inputs))
    painted = network(image)
    assert painted.shape == image.shape
    (deep, skips), *_ = shown
    assert skips == []
    cells = network.represent(image).unflatten(1, (2, 3)).flatten(0, 1)  # (B·M, F, *G)
    torch.testing.assert_close(deep, network.from_cell(cells).repeat_interleave(2, -1).repeat_interleave(2, -2))
    changed = image.clone()
    changed[:, 1] = 1 - changed[:, 1]
    torch.testing.assert_close(network(changed)[:, 0], painted[:, 0])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"cell": 3}, "cell is 3.*multiple of 2"),
        ({"cell": -4}, "cell is -4"),
        ({"cell": 4, "cell_features": 1}, "at least 2 features"),
        ({"cell": 4, "decoder": "u-net"}, "skip-free"),
    ],
)
def test_senseless_cells_are_refused(wrong, match):
    with pytest.raises(ConfigError, match=match):
        RepresentationConfig(**SMALL, **wrong)
