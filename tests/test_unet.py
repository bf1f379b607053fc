"""The U-Net skeleton: shapes, the identity at the start, and what reaches what."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from crossmr.networks.unet import (
    Decoder,
    Encoder,
    LightDecoder,
    LightEncoder,
    PatchEmbed,
    PatchExpand,
    ResidualBlock,
    SelfAttention,
    UNetShape,
    group_norm,
    zero_init,
)

FORM = UNetShape(2, 4, (1, 2, 3), 1)
HALVES = {"published": (Encoder, Decoder), "light": (LightEncoder, LightDecoder)}
both_forms = pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(module):
    """Give every parameter a value, those that start at zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def conditioned(module, dim=5):
    """Give every residual block a condition layer."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            block.add_condition(dim)
    return module


def conditioned_block(dims=2, inputs=4, outputs=4):
    return conditioned(ResidualBlock(dims, inputs, outputs))


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
    block = conditioned_block(dims, inputs, outputs)
    x, c = torch.randn(2, inputs, *[6] * dims), torch.randn(2, 5)
    assert torch.equal(block(x, c), block.shortcut(x))
    assert torch.equal(block(x, c), x) == (inputs == outputs)
    assert not torch.allclose(awake(block)(x, c), block.shortcut(x), atol=1e-2)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_adds_a_linear_layer_of_silu_of_the_condition_after_its_first_convolution(dims):
    block, convolve = awake(conditioned_block(dims, 8, 4)), {2: F.conv2d, 3: F.conv3d}[dims]
    x, c = torch.randn(3, 8, *[5] * dims), torch.randn(3, 5)
    weights = block.state_dict()

    def silu(values):
        return values * torch.sigmoid(values)

    def norm(values, number, groups):
        return F.group_norm(values, groups, weights[f"norm_{number}.weight"], weights[f"norm_{number}.bias"])

    added = silu(c) @ weights["condition.weight"].T + weights["condition.bias"]
    h = convolve(silu(norm(x, 1, 2)), weights["conv_1.weight"], weights["conv_1.bias"], padding=1)
    h = h + added[(...,) + (None,) * dims]
    h = convolve(silu(norm(h, 2, 1)), weights["conv_2.weight"], weights["conv_2.bias"], padding=1)
    want = convolve(x, weights["shortcut.weight"], weights["shortcut.bias"]) + h
    torch.testing.assert_close(block(x, c), want, atol=1e-5, rtol=1e-5)
    without_silu = c @ weights["condition.weight"].T + weights["condition.bias"]
    assert (added - without_silu).abs().amax(1).min() > 0.1


def test_a_block_is_diffusers_residual_block():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import
        from diffusers.models.resnet import ResnetBlock2D
    block = awake(conditioned_block(2, 8, 16))
    theirs = ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=5, groups=2, groups_out=4, eps=1e-5, dropout=0.0
    )
    names = {"condition": "time_emb_proj", "shortcut": "conv_shortcut"}
    names |= {"norm_1": "norm1", "norm_2": "norm2", "conv_1": "conv1", "conv_2": "conv2"}
    theirs.load_state_dict({f"{names[n.split('.')[0]]}.{n.split('.')[1]}": w for n, w in block.state_dict().items()})
    x, c = torch.randn(3, 8, 6, 7), torch.randn(3, 5)
    torch.testing.assert_close(block(x, c), theirs(x, c), atol=1e-5, rtol=1e-5)


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
    block = awake(conditioned_block())
    x, c = torch.randn(1, 4, 6, 6).expand(2, -1, -1, -1), torch.randn(2, 5)
    both = block(x, c)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    torch.testing.assert_close(both[1:], block(x[1:], c[1:]))
    assert not torch.allclose(both, block(x, None), atol=1e-3)


def test_a_block_without_a_condition_is_one_whose_layer_is_zero():
    block = awake(conditioned_block())
    x, c = torch.randn(2, 4, 6, 6), torch.randn(2, 5)
    plain = block(x, None)
    zero_init(block.condition)
    assert torch.equal(block(x, c), plain)
    block.condition = None
    assert torch.equal(block(x, c), plain)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 36), (4, 8, 12)])
@pytest.mark.parametrize("form", ["published", "skip-free", "light"])
def test_any_multiple_of_the_stride_fits(size, blocks, form):
    shared = UNetShape(len(size), 4, (1, 2, 3), blocks)
    skip = {"skips": False} if form == "skip-free" else {}
    encode, decode = HALVES["light" if form == "light" else "published"]
    encoder, decoder = conditioned(encode(shared, 3)), conditioned(decode(shared, 3, 2, **skip))
    images, c = torch.randn(2, 3, *size), torch.randn(2, 5)
    features, passed = encoder(images, c)
    assert features.shape == (2, 12, *[side // 4 for side in size])
    assert passed[0].shape == (2, 4, *size)
    given = len(passed)
    assert decoder(features, passed, images, c).shape == (2, 2, *size)
    assert len(passed) == given  # the caller's list is not eaten


@both_forms
def test_a_single_level_is_a_network_too(halves):
    form, images = UNetShape(2, 4, (1,), 1), torch.randn(1, 1, 5, 7)
    features, skips = halves[0](form, 1)(images)
    assert features.shape == (1, 4, 5, 7)
    assert halves[1](form, 1, 1)(features, skips, images).shape == (1, 1, 5, 7)


def test_attention_is_at_the_deepest_level_and_in_the_middle_of_the_published_form_alone():
    encoder, decoder = Encoder(FORM, 1), Decoder(FORM, 1, 1)
    of_level = [[isinstance(a, SelfAttention) for a in level.attentions] for level in encoder.levels]
    assert of_level == [[False], [False], [True]]
    assert [[isinstance(a, SelfAttention) for a in level.attentions] for level in decoder.levels] == [
        [True, True],
        [False, False],
        [False, False],
    ]
    assert isinstance(encoder.middle_attention, SelfAttention)
    light = [*LightEncoder(FORM, 1).modules(), *LightDecoder(FORM, 1, 1).modules()]
    assert not any(isinstance(module, SelfAttention) for module in light)


@both_forms
def test_a_condition_changes_every_output(halves):
    encoder, decoder = awake(conditioned(halves[0](FORM, 1))), awake(conditioned(halves[1](FORM, 1, 1)))
    x, c = torch.randn(1, 1, 8, 8), torch.randn(2, 5)
    deep = [encoder(x, row[None]) for row in c]
    assert not torch.allclose(deep[0][0], deep[1][0], atol=1e-3)
    images = [decoder(*deep[0], x, row[None]) for row in c]
    assert not torch.allclose(images[0], images[1], atol=1e-3)


@both_forms
def test_without_a_condition_nothing_is_conditioned(halves):
    encoder, decoder = halves[0](FORM, 1), halves[1](FORM, 1, 1)
    assert not [n for net in (encoder, decoder) for n, _ in net.named_parameters() if "condition" in n]
    awake(encoder)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(encoder(x, None)[0], encoder(x, torch.randn(1, 5))[0])


def test_only_a_decoder_with_skips_sees_past_the_bottleneck():
    encoder = awake(Encoder(FORM, 1))
    images = torch.randn(1, 1, 8, 8)
    features, skips = encoder(images)
    _, others = encoder(torch.randn(1, 1, 8, 8))
    free, u_net = awake(Decoder(FORM, 1, 1, skips=False)), awake(Decoder(FORM, 1, 1))
    assert torch.equal(free(features, skips, images), free(features, others, images))
    assert torch.equal(free(features, skips, images), free(features, [], 0 * images))
    assert not torch.allclose(u_net(features, skips, images), u_net(features, others, images), atol=1e-3)
    assert not torch.allclose(free(features, skips, images), free(2 * features, skips, images), atol=1e-3)


@both_forms
@pytest.mark.parametrize("patch", [1, 2])
def test_every_skip_is_used_and_every_parameter_learns(halves, patch):
    form = UNetShape(2, 4, (1, 2, 3), 2, patch)
    encoder, decoder = awake(conditioned(halves[0](form, 1))), awake(conditioned(halves[1](form, 1, 1)))
    c, images = torch.randn(2, 5), torch.randn(2, 1, 8 * patch, 8 * patch)
    features, skips = encoder(images, c)
    for skip in skips:
        skip.retain_grad()
    decoder(features, skips, images, c).square().mean().backward()
    assert all(skip.grad.abs().max() > 0 for skip in skips)
    for name, parameter in (*encoder.named_parameters(), *decoder.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# The light form


def test_the_light_form_has_a_skip_per_level_but_the_deepest_at_its_resolution():
    features, skips = LightEncoder(UNetShape(2, 4, (1, 2, 3), 2), 1)(torch.randn(1, 1, 16, 8))
    assert features.shape == (1, 12, 4, 2)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(4, 16, 8), (8, 8, 4)]


def test_a_light_decoder_narrows_doubles_and_joins():
    decoder, images = awake(LightDecoder(FORM, 1, 1)), torch.randn(1, 1, 8, 8)
    features, skips = awake(LightEncoder(FORM, 1))(images)
    x = features
    for number, skip in enumerate(reversed(skips)):
        narrow = F.conv2d(x, decoder.ups[number].weight, decoder.ups[number].bias)
        doubled = narrow.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = decoder.levels[number](torch.cat([doubled, skip], 1), None)
    torch.testing.assert_close(decoder(features, skips, images), decoder.out(x, images))


def test_the_light_form_costs_less_than_the_published_one_per_pixel():
    def multiplications(encode, decode):
        total, images = [0], torch.randn(1, 3, 32, 32)

        def count(layer, _, out):
            total[0] += layer.weight[0].numel() * out.numel()

        form = UNetShape(2, 16, (1, 2, 4, 6), 1)
        encoder, decoder = encode(form, 3), decode(form, 3, 1)
        for layer in (*encoder.modules(), *decoder.modules()):
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(count)
        decoder(*encoder(images), images)
        return total[0]

    assert multiplications(*HALVES["light"]) < 0.6 * multiplications(*HALVES["published"])


# Patches


@both_forms
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_divides_every_resolution_and_the_image_comes_back_whole(halves, patch, dims):
    form, side = UNetShape(dims, 4, (1, 2), 1, patch), 2 * patch
    encoder, decoder = awake(halves[0](form, 3)), awake(halves[1](form, 3, 2))
    images = torch.randn(2, 3, *[2 * side] * (dims - 1), side)
    features, skips = encoder(images)
    assert features.shape == (2, 8, *[2] * (dims - 1), 1)
    assert skips[0].shape == (2, 4, *[4] * (dims - 1), 2)
    assert decoder(features, skips, images).shape == (2, 2, *images.shape[2:])


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_gathered_patches_overlap_and_are_centred(patch, dims):
    """One pixel reaches the patches within half a patch of it, and flipped images give flipped features."""
    embed = PatchEmbed(UNetShape(dims, 1, (1,), 1, patch), 1)
    with torch.no_grad():
        embed.conv.weight.fill_(1)
        embed.conv.bias.zero_()
    images = torch.randn(1, 1, *[6 * patch] * dims)
    features = embed(images)
    assert features.shape == (1, 1, *[6] * dims)
    torch.testing.assert_close(embed(images.flip(-1)).flip(-1), features, atol=1e-5, rtol=1e-5)
    reach = 3 if patch == 1 else 2 * patch
    start = 2 * patch - (1 if patch == 1 else patch // 2)
    window = images[(0, 0, *[slice(start, start + reach)] * dims)]
    torch.testing.assert_close(features[(0, 0, *[2] * dims)], window.sum(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_pixels_of_a_patch_lie_where_they_belong(dims):
    """The correction starts at zero, so what is known of each of 2 x 2 pixels comes out as it is."""
    patch, expand = 2, PatchExpand(UNetShape(dims, 4, (1,), 1, 2), 1, 3)
    torch.nn.init.zeros_(expand.out.weight)
    known = torch.arange(3.0 * patch**dims)
    with torch.no_grad():
        expand.out.bias.copy_(known)
    made = expand(torch.randn(1, 4, *[2] * dims), torch.randn(1, 1, *[4] * dims))
    assert made.shape == (1, 3, *[4] * dims)
    for feature in (0, 2):
        block = made[(0, feature, *[slice(2, 4)] * dims)]
        assert torch.equal(block.flatten(), known[feature * patch**dims : (feature + 1) * patch**dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_leave_the_sources_detail_within_reach(dims):
    """The features being fixed, one pixel of the images moves its neighbours alone."""
    form = UNetShape(dims, 4, (1, 2), 1, 2)
    encoder, decoder = awake(LightEncoder(form, 1)), awake(LightDecoder(form, 1, 1))
    images = torch.randn(1, 1, *[8] * dims)
    changed = images.clone()
    changed[(0, 0, *[4] * dims)] += 3
    features, skips = encoder(images)
    moved = (decoder(features, skips, changed) - decoder(features, skips, images)).abs()[0, 0] > 1e-6
    assert moved[(4,) * dims]
    assert not moved[(0,) * dims]
    assert moved.sum() <= 5**dims
    plain = Decoder(UNetShape(dims, 4, (1, 2), 1), 1, 1)
    assert not [name for name, _ in plain.named_parameters() if "correct" in name]
