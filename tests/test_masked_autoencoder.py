"""Stage 1: masks, the loss over them, and the representation."""

import pytest
import torch
from torch.nn import functional as F

from crossmr.errors import ConfigError
from crossmr.networks.masked_autoencoder import (
    MaskedAutoencoder,
    RepresentationConfig,
    masked_squared_error,
    random_mask,
    z_score,
)

SMALL = {"channels": 4, "multipliers": (1, 2), "patch_size": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(count=4, modalities=2, side=16):
    """Random images without detail, in [0, 1]."""
    coarse = torch.rand(count, modalities, 3, 3, generator=seeded(7))
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


def random_network(dims=2, **changes):
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(**SMALL, **changes), dims)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.requires_grad_(False)


@pytest.mark.parametrize("decoder", ["u-net", "skip-free"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 13), (5, 6, 7)])
def test_images_of_any_size_come_out_at_that_size(size, decoder):
    network = random_network(len(size), decoder=decoder)
    images = torch.randn(2, 3, *size, generator=seeded())
    made = network(images)
    assert made.shape == images.shape
    index = [torch.arange(-(-side // 2) * 2).clamp(max=side - 1) for side in size]
    repeated = images[(..., *torch.meshgrid(*index, indexing="ij"))]
    torch.testing.assert_close(made, network(repeated)[(..., *(slice(side) for side in size))])
    assert network.pooled(images).shape == (2, 3, network.dim)
    for read in (network, network.pooled):
        with pytest.raises(ValueError, match="images are"):
            read(images[0])


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "hidden"),
    [
        ((32, 32), 8, 0.75, 12),
        ((32, 48), 16, 0.5, 3),
        ((16, 16, 16), 8, 0.75, 6),
        ((224, 224), 16, 0.75, 147),
    ],
)
def test_the_fraction_hidden_is_exact_in_each_sample(size, patch, ratio, hidden):
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


def a_loss():
    """Prediction, image (2, 2, 8, 8) and mask."""
    prediction, image = (torch.rand(2, 2, 8, 8, generator=seeded(seed)) for seed in (0, 1))
    return prediction, image, random_mask((2, 8, 8), 4, 0.5, seeded(2))


def test_only_masked_patches_count():
    prediction, image, mask = a_loss()
    total, count = masked_squared_error(prediction, image, mask, torch.ones(2, 2))
    errors = ((prediction - image) ** 2)[mask.expand_as(image) > 0]
    torch.testing.assert_close(total, errors.sum())
    assert count == len(errors)
    changed = masked_squared_error(prediction, image + 9 * (1 - mask), mask, torch.ones(2, 2))
    assert changed == (total, count)
    assert masked_squared_error(prediction, image + 9 * mask, mask, torch.ones(2, 2))[0] > total + count


def test_absent_modalities_carry_no_loss_and_no_gradient():
    prediction, image, mask = a_loss()
    present = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    prediction.requires_grad_()
    total, count = masked_squared_error(prediction, image, mask, present)
    total.backward()
    assert prediction.grad[0, 1].abs().max() == 0
    assert prediction.grad[0, 0].abs().max() > 0
    changed = image.clone()
    changed[0, 1] += 5
    assert masked_squared_error(prediction, changed, mask, present) == (total, count)
    kept = (mask * present[..., None, None]) > 0
    torch.testing.assert_close(total, ((prediction - image) ** 2)[kept].sum())
    assert count == kept.sum()


@pytest.mark.parametrize("parts", [(1, 1), (2, 0)])
def test_a_batchs_loss_is_the_sum_of_its_parts(parts):
    prediction, image, mask = a_loss()
    present = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    whole = torch.stack(masked_squared_error(prediction, image, mask, present))
    each = [
        torch.stack(masked_squared_error(*part))
        for part in zip(*(x.split(parts) for x in (prediction, image, mask, present)), strict=True)
    ]
    torch.testing.assert_close(sum(each), whole, atol=1e-6, rtol=1e-6)


def test_a_batch_with_nothing_present_has_no_loss():
    x = torch.ones(1, 1, 4, 4)
    assert masked_squared_error(x, 0 * x, x, torch.zeros(1, 1)) == (0, 0)


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
    assert (config.dim, config.stride) == (192, 8)
    assert config.decoder == "u-net"
    with torch.device("meta"):
        network = MaskedAutoencoder(config)
    assert network.encoder.stem.conv.weight.shape == (96, 1, 3, 3)
    assert network.encoder.middle_2.conv_2.weight.shape == (192, 192, 3, 3)
    assert network.decoder.out.out.weight.shape == (1, 96, 3, 3)


@pytest.mark.parametrize("size", [(8, 16), (4, 8, 8)])
def test_pooled_features_are_the_spatial_mean_of_each_image_by_itself(size):
    network = random_network(len(size))
    images = torch.rand(3, 2, *size, generator=seeded())
    pooled = network.pooled(images)
    assert pooled.shape == (3, 2, network.config.dim)
    for modality in (0, 1):
        features, _ = network.encoder(images[:, modality, None])
        torch.testing.assert_close(pooled[:, modality], features.flatten(2).mean(-1))


def test_a_representation_speaks_of_its_own_modality_and_sample_alone():
    network, images = random_network(), torch.rand(3, 2, 8, 12, generator=seeded())
    pooled = network.pooled(images)
    changed = images.clone()
    changed[1, 1] = 1 - changed[1, 1]
    moved = (network.pooled(changed) - pooled).abs().amax(2) > 1e-3
    assert moved.tolist() == [[False, False], [False, True], [False, False]]
    torch.testing.assert_close(network.pooled(images.flip(1)).flip(1), pooled)  # one encoder for all


def test_pooled_features_are_averaged_in_full_precision():
    network, images = random_network(), torch.rand(3, 2, 8, 12, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        pooled = network.pooled(images)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, network.pooled(images), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("decoder", ["skip-free", "u-net"])
def test_each_modality_is_reconstructed_from_its_own_image(decoder):
    network, images = random_network(decoder=decoder), torch.rand(3, 2, 8, 12, generator=seeded())
    made = network(images)
    assert made.shape == images.shape
    torch.testing.assert_close(made[:, 1:], network(images[:, 1:]))
    changed = images.clone()
    changed[1, 1] = 1 - changed[1, 1]
    moved = (network(changed) - made).abs().amax((2, 3)) > 1e-4
    assert moved.tolist() == [[False, False], [False, True], [False, False]]


def test_only_the_published_decoder_sees_past_the_bottleneck():
    images = torch.rand(3, 2, 8, 12, generator=seeded())
    for decoder, sees in (("skip-free", False), ("u-net", True)):
        network = random_network(decoder=decoder)
        single = images.flatten(0, 1)[:, None]
        deep, skips = network.encoder(single)
        made = network.decoder(deep, [torch.zeros_like(skip) for skip in skips], single)
        assert torch.allclose(made.reshape(images.shape), network(images), atol=1e-5) != sees


@pytest.mark.parametrize("decoder", ["skip-free", "u-net"])
def test_the_loss_falls_on_a_handful_of_images(decoder):
    torch.manual_seed(0)
    network = MaskedAutoencoder(RepresentationConfig(channels=8, multipliers=(1, 2), decoder=decoder))
    images, present = smooth_images(2), torch.ones(2, 2)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)

    def loss(seed):
        mask = random_mask((2, 16, 16), 4, 0.5, seeded(seed))
        total, count = masked_squared_error(network(images * (1 - mask)), images, mask, present)
        return total / count

    for step in range(60):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    with torch.no_grad():
        last = sum(float(loss(100 + k)) for k in range(4)) / 4
    assert last < 0.8 * float(images.var())  # it says more than the mean


@pytest.mark.parametrize(
    "wrong",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"channels": 0}, {"multipliers": ()}, {"patch_size": 0}, {"blocks": 0}],
)
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RepresentationConfig(**wrong)


@pytest.mark.parametrize(("multipliers", "stride", "dim"), [((1,), 1, 4), ((1, 2), 2, 8), ((1, 1, 2, 3), 8, 12)])
def test_stride_and_length_follow_from_the_levels(multipliers, stride, dim):
    config = RepresentationConfig(channels=4, multipliers=multipliers)
    assert (config.stride, config.dim) == (stride, dim)
    network = MaskedAutoencoder(config)
    assert network.encoder(torch.zeros(1, 1, 16, 16))[0].shape == (1, dim, 16 // stride, 16 // stride)
