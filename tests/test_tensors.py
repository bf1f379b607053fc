"""Cropping and padding undo one another; slices come with their neighbours; seeds never change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmr.tensors import crop_or_pad, foreground_slices, neighbours, pad_to_multiple, seeded, to_model_input

MIDDLE = [0.5] * 3


def test_foreground_slices():
    assert foreground_slices([0, 9, 10, 50, 100, 30, 5, 0]) == [2, 3, 4, 5]
    assert foreground_slices([0, 1, 3, 0]) == [1, 2]
    assert foreground_slices([0, 0]) == foreground_slices([]) == []


def test_crop_or_pad_crops_and_pads():
    image = torch.arange(1.0, 11).reshape(1, 2, 5)
    assert crop_or_pad(image, (2, 3), (0, 0))[0].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert crop_or_pad(image, (2, 3), (0, 0.5))[0].tolist() == [[2, 3, 4], [7, 8, 9]]
    assert crop_or_pad(image, (1, 3), (0.999, 0.999))[0].tolist() == [[8, 9, 10]]
    assert crop_or_pad(image, (4, 3), (0.9, 0.4))[0].tolist() == [[0] * 3, [2, 3, 4], [7, 8, 9], [0] * 3]
    assert crop_or_pad(image, (2, 5), (0.9, 0.9)) is image
    padded = crop_or_pad(image, (2, 8), (0, 0))
    assert padded.sum() == image.sum()
    assert padded.shape == (1, 2, 8)


@given(sides=st.lists(st.integers(1, 21), min_size=2, max_size=3), divisor=st.sampled_from([1, 2, 4, 5, 8, 16]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_crop_or_pad_undoes_pad_to_multiple(sides, divisor):
    image = torch.rand((2, *sides), generator=seeded("test", *sides)) + 0.1
    padded = pad_to_multiple(image, len(sides), divisor)
    assert all(
        have % divisor == 0 and 0 <= have - side < divisor for have, side in zip(padded.shape[1:], sides, strict=True)
    )
    assert (padded > 0).sum() == image.numel()
    assert torch.equal(crop_or_pad(padded, sides, [0.5] * len(sides)), image)
    for axis, side in enumerate(sides, start=1):  # the image is in the middle
        used = padded.movedim(axis, 0).flatten(1).any(1).nonzero()
        before, after = int(used[0]), padded.shape[axis] - 1 - int(used[-1])
        assert abs(before - after) <= 1
        assert int(used[-1]) - int(used[0]) == side - 1


def test_inputs_of_the_networks_and_back():
    volume = torch.rand((3, 5, 7, 9), generator=seeded("test"))
    slices = [0, 2, 3]
    planes = to_model_input(volume, [[z] for z in slices], 2, 4)
    assert planes.shape == (3, 3, 8, 12)
    assert torch.equal(crop_or_pad(planes, (7, 9), MIDDLE[:2]).transpose(0, 1), volume[:, slices])
    whole = to_model_input(volume, (), 3, 4)
    assert whole.shape == (1, 3, 8, 8, 12)
    assert torch.equal(crop_or_pad(whole[0], (5, 7, 9), MIDDLE), volume)


def test_seeds_never_change():
    """A model's results depend on them: they must not change with a version of crossmr, or of anything else."""
    assert seeded("batch", 0, 1).initial_seed() == 94858423089692736
    assert seeded("case", 7, "BraTS-GLI-00000-000").initial_seed() == 824398798850860276
    assert torch.randint(2**31, (2,), generator=seeded("batch", 0, 1)).tolist() == [614543456, 1278740487]


def test_seeds_are_independent():
    torch.manual_seed(1)
    first = torch.rand(4, generator=seeded("case", 0, "P1"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(4, generator=seeded("case", 0, "P1")), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [seeded("case", 0, "P2"), seeded("case", 1, "P1"), seeded("batch", 0, "P1"), seeded("case", 0)]
    assert not any(torch.equal(torch.rand(4, generator=other), first) for other in others)


def test_neighbouring_slices_come_along():
    assert neighbours(0, 3, 5, 1.0) == [0, 0, 1]
    assert neighbours(4, 5, 5, 1.0) == [2, 3, 4, 4, 4]
    assert neighbours(2, 1, 5, 1.0) == [2]
    volume = torch.rand(2, 6, 8, 8)
    planes = to_model_input(volume, [neighbours(z, 3, 6, 1.0) for z in (0, 3)], 2, 4)
    assert planes.shape == (2, 6, 8, 8)
    for row, chosen in enumerate(([0, 0, 1], [2, 3, 4])):
        for modality in (0, 1):
            assert torch.equal(planes[row, 3 * modality : 3 * modality + 3], volume[modality, chosen])


@pytest.mark.parametrize(
    ("spacing_mm", "wanted"),
    [
        (0.4, [5, 7, 10, 13, 15]),
        (0.5, [6, 8, 10, 12, 14]),
        (1.0, [8, 9, 10, 11, 12]),
        (1.5, [9, 9, 10, 11, 11]),
        (2.0, [9, 9, 10, 11, 11]),
        (2.5, [9, 10, 10, 10, 11]),
        (5.0, [10] * 5),
    ],
)
def test_neighbours_are_a_millimetre_apart_and_thick_slices_repeat_themselves(spacing_mm, wanted):
    assert neighbours(10, 5, 21, spacing_mm) == wanted
    assert neighbours(10, 3, 21, spacing_mm) == wanted[1:4]
    assert [20 - z for z in reversed(wanted)] == wanted  # as far above as below
