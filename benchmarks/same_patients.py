"""Is a test patient among the training patients under another name, as releases of BraTS repeat patients?

Every two whole studies' T1, laid upon each other by the centres of their brains, averaged to 4 mm, and correlated where
both have brain. One scan in two releases correlates by almost 1, two visits of a patient by .9 where the heads lie
alike.

python benchmarks/same_patients.py runs/default
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from grid import four_contrasts
from scipy import ndimage

from crossmr.data.dataset import Case
from crossmr.evaluation.subjects import Array

SIDE, BOX = 4, (40, 60, 50)
"""Voxels averaged along each axis, and how many of these hold a brain, (Z, Y, X)."""
SHOWN = 5


def small(case: Case) -> Array:
    """The T1 of a study about the centre of its brain, averaged: BOX, 0 where there is nothing."""
    volume = case.volume("t1n").astype(np.float32)
    whole = [SIDE * side for side in BOX]
    padded = np.pad(volume, [(side, side) for side in whole])
    centre = np.round(ndimage.center_of_mass(padded > 0)).astype(int)
    box = padded[tuple(slice(c - side // 2, c + side // 2) for c, side in zip(centre, whole, strict=True))]
    z, y, x = BOX
    averaged: Array = box.reshape(z, SIDE, y, SIDE, x, SIDE).mean((1, 3, 5))
    return averaged


def alike(a: Array, b: Array) -> float:
    """Their correlation where both have brain."""
    both = (a > 0) & (b > 0)
    return float(np.corrcoef(a[both], b[both])[0, 1])


def main() -> None:
    """Print the pairs that are most alike: of all studies, and of test studies with training studies."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", type=Path, help="the output of default_weights.py")
    base = options.parse_args().base
    parts, volumes = dict[str, str](), dict[str, Array]()
    for part in ("train", "val", "test"):
        for case in four_contrasts(base, part):
            parts[case.name], volumes[case.name] = part, small(case)
    pairs = [(alike(volumes[a], volumes[b]), a, b) for a, b in itertools.combinations(sorted(volumes), 2)]
    across = [pair for pair in pairs if {parts[name] for name in pair[1:]} == {"train", "test"}]
    for title, some in {"all": pairs, "test with training": across}.items():
        print(f"\n{title}: {len(some)} pairs")
        for value, a, b in sorted(some, reverse=True)[:SHOWN]:
            print(f"{value:.2f}  {a} ({parts[a]})  {b} ({parts[b]})")


if __name__ == "__main__":
    main()
