"""What a recipe leaves to the set, the device and the time: crop, neighbouring slices, width and epochs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np

from crossmr.data.dataset import Case
from crossmr.tensors import NEIGHBOURS_MM, PLANES, foreground_slices, neighbours, planes_of
from crossmr.training.batches import times_drawn
from crossmr.training.recipes import BY_SET, STANDARD, Recipe

CLOSE_MM = 2 * NEIGHBOURS_MM
"""Slices that lie closer have neighbours of their own (`tensors.neighbours`)."""
LARGEST_CROP = {2: 256, 3: 128}
"""Voxels of a side, by the number of axes."""
LARGE_ENOUGH = 95
"""Percentile of the heads, per axis, that a crop holds whole."""
WIDTHS = ((10.0, 24), (60.0, 32), (math.inf, 48))
"""On a processor: minutes of training, and the features of the finest level for which they are enough."""
GPU_WIDTH = 64
STEPS = 4_000, 60_000
"""Fewest and most, where neither --steps nor --minutes are given."""


def left_open(recipe: Recipe) -> tuple[str, ...]:
    """What of `recipe.by_set` the set decides: not what a caller changed, and is therefore no default any more.

    A recipe whose by_set is STANDARD's or ANY's own was made from one of them, so that what differs was changed. A
    by_set that a caller wrote leaves open what is as in one of them, or as in a Recipe of which nothing is said.
    """
    defaults = [STANDARD] if set(recipe.by_set) == set(BY_SET) else [STANDARD, Recipe()]
    return tuple(n for n in recipe.by_set if attrgetter(n)(recipe) in [attrgetter(n)(default) for default in defaults])


def choose(recipe: Recipe, cases: Sequence[Case], device: str, minutes: float | None) -> tuple[Recipe, list[str]]:
    """Settle what a recipe leaves open (`left_open`), for these training cases and a device of this type.

    Returns the recipe, which leaves nothing open any more, and a line for each choice.
    """
    recipe, said = replace(recipe, by_set=left_open(recipe)), []
    if "context_slices" in recipe.by_set:
        close = [case for case in cases if len({*neighbours(1, 3, 3, case.spacing_mm[0])}) == 3]
        recipe = replace(recipe, context_slices=3 if 2 * len(close) > len(cases) and recipe.spatial_dims == 2 else 1)
        what = "each slice with its two neighbours" if recipe.context_slices == 3 else "each slice by itself"
        if recipe.spatial_dims == 2:
            said.append(f"{what}, because {len(close)} of {len(cases)} studies have slices of {CLOSE_MM:g} mm or less")
    if "synthesis.channels" in recipe.by_set:
        width = GPU_WIDTH if device != "cpu" else next(width for most, width in WIDTHS if (minutes or math.inf) <= most)
        recipe = replace(recipe, synthesis=replace(recipe.synthesis, channels=width))
        time = "no limit of time" if minutes is None else f"{minutes:g} minutes"
        said.append(f"{width} features at the finest level, for {time} on {device}")
    if "crop" in recipe.by_set:
        crop = _crop(recipe, cases)
        recipe = replace(recipe, crop=crop)
        heads, sides = (" x ".join(map(str, of)) for of in (_sides(recipe, cases), crop))
        said.append(f"crops of {sides} voxels, for heads of up to {heads} ({LARGE_ENOUGH} % along each axis)")
    if "synthesis_train.epochs" in recipe.by_set:
        recipe = replace(recipe, synthesis_train=replace(recipe.synthesis_train, epochs=_epochs(recipe, cases)))
        said.append(f"{recipe.synthesis_train.epochs:g} epochs of the C-UNet, if no time and no steps are given")
    return replace(recipe, by_set=()), said


def _crop(recipe: Recipe, cases: Sequence[Case]) -> tuple[int, ...]:
    """The sides of the heads, up to a multiple of the network's stride."""
    dims, stride = recipe.spatial_dims, recipe.synthesis.stride
    if recipe.guidance != "none":
        stride = math.lcm(stride, recipe.representation.stride)
    sides = _sides(recipe, cases)
    most = LARGEST_CROP[dims] // stride * stride
    return tuple(min(most, math.ceil(side / stride) * stride) for side in sides)


def _sides(recipe: Recipe, cases: Sequence[Case]) -> list[int]:
    """Voxels along each axis that this percentile of the heads does not exceed."""
    heads = [case.shape[-recipe.spatial_dims :] for case in cases]
    for _, rows, columns in [*PLANES.values()][1 : recipe.planes]:
        heads += [(case.shape[rows], case.shape[columns]) for case in cases if planes_of(3, case.spacing_mm[0])[1:]]
    return [int(side) for side in np.percentile(heads, LARGE_ENOUGH, axis=0, method="higher")]


def _epochs(recipe: Recipe, cases: Sequence[Case]) -> float:
    """The recipe's epochs, or those that make the fewest or the most steps; three planes make no more of them."""
    items = cut = 0  # of axial slices alone, and of all planes
    for case in cases:
        drawn = planes = 1
        if recipe.spatial_dims == 2:
            slices = foreground_slices(case.foreground_voxels)
            drawn = sum(times_drawn(case, z, recipe.lesion_draws) for z in slices)
            planes = len(planes_of(recipe.planes, case.spacing_mm[0]))
        items, cut = items + drawn, cut + drawn * planes
    per_epoch = max(1, -(-items // recipe.synthesis_train.batch_size))
    steps = min(max(recipe.synthesis_train.epochs * per_epoch, STEPS[0]), STEPS[1])
    return float(round(steps / per_epoch * items / max(cut, 1), 2))
