"""The U-Net skeleton: shapes, the identity at the start, and what reaches what."""

import pytest
import torch

from crossmr.layers import Decoder, Encoder, ResidualBlock, SelfAttention, group_norm, spread

FORM = (4, (1, 2, 3), 1)  # channels, multipliers, blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(module):
    """Give every parameter a value, those that start at zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 12, 16, 48, 96, 100, 192, 1024])
def test_group_norm_has_few_groups_of_four_channels_or_more(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4
    assert norm.weight.shape == (channels,)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (8, 2), (96, 24), (192, 32)])
def test_group_norm_has_as_many_groups_as_that_allows(channels, groups):
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 8)])
def test_a_residual_branch_starts_as_the_identity(dims, inputs, outputs):
    block = ResidualBlock(dims, inputs, outputs, 5)
    x, c = torch.randn(2, inputs, *[6] * dims), torch.randn(2, 5)
    assert torch.equal(block(x, c), block.shortcut(x))
    assert torch.equal(block(x, c), x) == (inputs == outputs)
    assert not torch.allclose(awake(block)(x, c), block.shortcut(x), atol=1e-2)


def test_attention_starts_as_the_identity_and_then_sees_everywhere():
    attention = SelfAttention(2, 8)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(attention(x), x)
    awake(attention)
    changed = x.clone()
    changed[0, 0, 0, 0] += 5
    difference = (attention(changed) - attention(x)).abs().amax(1)
    assert difference[0, 3, 3] > 1e-4
    assert difference[1].max() == 0


@pytest.mark.parametrize("channels", [4, 32, 64, 80, 100, 112, 192])
def test_attention_takes_any_number_of_channels(channels):
    attention = awake(SelfAttention(2, channels))
    assert channels % attention.heads == 0
    assert attention(torch.randn(1, channels, 3, 2)).shape == (1, channels, 3, 2)


@pytest.mark.parametrize(("channels", "heads"), [(16, 1), (64, 2), (192, 6)])
def test_attention_heads_hold_32_channels_where_they_can(channels, heads):
    assert SelfAttention(2, channels).heads == heads


def test_the_condition_moves_each_sample_by_its_own():
    block = awake(ResidualBlock(2, 4, 4, 5))
    x, c = torch.randn(1, 4, 6, 6).expand(2, -1, -1, -1), torch.randn(2, 5)
    both = block(x, c)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    torch.testing.assert_close(both[1:], block(x[1:], c[1:]))
    assert not torch.allclose(both, block(x, None), atol=1e-3)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 36), (4, 8, 12)])
def test_any_multiple_of_the_stride_fits(size, blocks, skips):
    dims = len(size)
    encoder = Encoder(dims, 3, 4, (1, 2, 3), blocks, 5)
    decoder = Decoder(dims, 2, 4, (1, 2, 3), blocks, 5, skips=skips)
    features, passed = encoder(torch.randn(2, 3, *size), torch.randn(2, 5))
    assert features.shape == (2, 12, *[side // 4 for side in size])
    assert passed[0].shape == (2, 4, *size)
    given = len(passed)
    assert decoder(features, passed, torch.randn(2, 5)).shape == (2, 2, *size)
    assert len(passed) == given  # the caller's list is not eaten


def test_a_single_level_is_a_network_too():
    features, skips = Encoder(2, 1, 4, (1,), 1, None)(torch.randn(1, 1, 5, 7))
    assert features.shape == (1, 4, 5, 7)
    assert Decoder(2, 1, 4, (1,), 1, None)(features, skips).shape == (1, 1, 5, 7)


def test_a_condition_changes_every_output():
    encoder, decoder = awake(Encoder(2, 1, *FORM, 5)), awake(Decoder(2, 1, *FORM, 5))
    x, c = torch.randn(1, 1, 8, 8), torch.randn(2, 5)
    deep = [encoder(x, row[None]) for row in c]
    assert not torch.allclose(deep[0][0], deep[1][0], atol=1e-3)
    images = [decoder(*deep[0], row[None]) for row in c]
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_without_a_condition_nothing_is_conditioned():
    encoder, decoder = Encoder(2, 1, *FORM, None), Decoder(2, 1, *FORM, None)
    assert not [n for net in (encoder, decoder) for n, _ in net.named_parameters() if "condition" in n]
    awake(encoder)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(encoder(x, None)[0], encoder(x, torch.randn(1, 5))[0])


def test_only_a_decoder_with_skips_sees_past_the_bottleneck():
    encoder = awake(Encoder(2, 1, *FORM, None))
    features, skips = encoder(torch.randn(1, 1, 8, 8))
    _, others = encoder(torch.randn(1, 1, 8, 8))
    free, u_net = awake(Decoder(2, 1, *FORM, None, skips=False)), awake(Decoder(2, 1, *FORM, None))
    assert torch.equal(free(features, skips), free(features, others))
    assert torch.equal(free(features, skips), free(features, []))
    assert not torch.allclose(u_net(features, skips), u_net(features, others), atol=1e-3)
    assert not torch.allclose(free(features, skips), free(2 * features, skips), atol=1e-3)


def test_every_skip_is_used_and_every_parameter_learns():
    encoder, decoder = awake(Encoder(2, 1, *FORM, 5)), awake(Decoder(2, 1, *FORM, 5))
    c = torch.randn(2, 5)
    features, skips = encoder(torch.randn(2, 1, 8, 8), c)
    for skip in skips:
        skip.retain_grad()
    decoder(features, skips, c).square().mean().backward()
    assert all(skip.grad.abs().max() > 0 for skip in skips)
    for name, parameter in (*encoder.named_parameters(), *decoder.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_grid_is_spread_by_repeating_each_cell():
    grid = torch.arange(12.0).reshape(1, 2, 2, 3)
    assert torch.equal(spread(grid, (4, 9)), grid.repeat_interleave(2, 2).repeat_interleave(3, 3))
    assert torch.equal(spread(grid, (2, 3)), grid)
    volume = torch.arange(16.0).reshape(1, 2, 2, 2, 2)
    assert torch.equal(spread(volume, (2, 4, 6)), volume.repeat_interleave(2, 3).repeat_interleave(3, 4))
    vector = torch.randn(3, 2)
    assert torch.equal(spread(vector, (8, 8, 8)), vector[:, :, None, None, None])


@pytest.mark.parametrize("size", [(12, 8), (4, 12, 8)])
def test_a_grid_moves_what_is_under_its_cell(size):
    block = awake(ResidualBlock(len(size), 4, 4, 5))
    x, c = torch.randn(3, 4, *size), torch.randn(3, 5)
    grid = c[(...,) + (None,) * len(size)].expand(3, 5, *[side // 4 for side in size]).clone()
    torch.testing.assert_close(block(x, grid), block(x, c))  # a grid of equal cells is a vector
    before = block(x, grid)
    grid[1, :, ..., -1, 0] += 3
    moved = (block(x, grid) - before).abs().amax(1)
    assert moved[[0, 2]].max() == 0
    under, far = moved[1, ..., 8:, :4], moved[1, ..., :7, 5:]  # a pixel off, for the second convolution
    assert under.mean() > 4 * far.mean()  # far: by the normalisation alone
