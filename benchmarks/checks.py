"""How often the checks of a study's input are right: on studies as they are, and after each thing they look for.

How often T1 and T1ce are told apart, enhancement.py measures. The set is that of default_weights.py, its training
patients included: the linear regressions were fitted on these.

python benchmarks/checks.py runs/default/set src/crossmr/weights/default
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scans import COHORTS, cohort_of

from crossmr.completion import checks
from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.networks.model import CrossConditionedModel, read_model


def checked(case: Case, model: CrossConditionedModel) -> Iterator[tuple[str, str, bool]]:
    """(what was done to the study, the check, whether it warned)."""
    head = np.asarray(case.masks())[:, 0] > 0
    volumes = {m: case.volume(m) for m in case.modalities}
    baselines, known = model.baselines, model.config.modalities
    voxels, sides = checks.thinning(case.spacing_mm)
    thinned = {m: volume[voxels] for m, volume in volumes.items()}
    yield "as it is", "shift", bool(checks.shifts(thinned, sides))
    yield "as it is", "swap", bool(checks.swaps(volumes, head, baselines, known))
    yield "as it is", "same", bool(checks.same_images(volumes, head))
    yield "as it is", "missing slices", any(checks.missing_slices(m, v, head) for m, v in volumes.items())
    _, _, across = case.spacing_mm
    for mm in (4, 6, 10):
        moved = np.roll(volumes["t1c"], round(mm / across), 2)
        yield f"T1ce moved by {mm} mm", "shift", bool(checks.shifts(thinned | {"t1c": moved[voxels]}, sides))
    for a, b in itertools.combinations(case.modalities, 2):
        change, changed = (
            f"{DISPLAY_NAMES[a]} and {DISPLAY_NAMES[b]} exchanged",
            volumes | {a: volumes[b], b: volumes[a]},
        )
        yield change, "swap", bool(checks.swaps(changed, head, baselines, known))
    for a, b in itertools.combinations(case.modalities, 2):
        if "t2w" in (a, b):
            pair, names = {a: volumes[a], b: volumes[b]}, f"{DISPLAY_NAMES[a]} and {DISPLAY_NAMES[b]} alone"
            yield names, "swap", bool(checks.swaps(pair, head, baselines, known))
            exchanged = {a: volumes[b], b: volumes[a]}
            yield f"{names}, exchanged", "swap", bool(checks.swaps(exchanged, head, baselines, known))
    yield "T1 given as T1ce, too", "same", bool(checks.same_images(volumes | {"t1c": volumes["t1n"] * 0.9}, head))


def main() -> None:
    """Print a table: what was done, which check, and how many studies it warned of, by cohort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    model = read_model(options.model)
    counts: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case in PreparedDataset(options.set).cases:
        for change, check, warned in checked(case, model):
            counts[change, check][cohort_of(case.name)].append(warned)
    print(f"| the study | check | {' | '.join(COHORTS)} |\n|---|---|{'---|' * len(COHORTS)}")
    for (change, check), by_cohort in counts.items():
        cells = [f"{sum(warned)} of {len(warned)}" if (warned := by_cohort[name]) else "–" for name in COHORTS]
        print(f"| {change} | {check} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
