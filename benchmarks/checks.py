"""How often the checks of a study's input are right: on studies as they are, and after each thing they look for.

The set is that of default_weights.py, its training patients included: the linear mixes were fitted on these.

python benchmarks/checks.py runs/default/set src/crossmr/weights/default
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from default_weights import COHORTS

from crossmr import checks
from crossmr.data.dataset import Case, PreparedSet
from crossmr.data.naming import SPOKEN
from crossmr.model import CrossConditionedModel, load_model


def asked(case: Case, model: CrossConditionedModel) -> Iterator[tuple[str, str, bool]]:
    """(what was done to the study, the check, whether it warned)."""
    head = np.asarray(case.masks())[:, 0] > 0
    volumes = {m: case.volume(m) for m in case.modalities}
    trivial, known = model.trivial, model.config.modalities
    yield "as it is", "shift", bool(checks.shifts(volumes, case.spacing_mm))
    yield "as it is", "swap", bool(checks.swaps(volumes, head, trivial, known))
    yield "as it is", "same", bool(checks.same_images(volumes, head))
    yield "as it is", "missing slices", any(checks.missing_slices(m, v, head) for m, v in volumes.items())
    if case.masked_background:
        yield "as it is", "unenhanced", bool(checks.unenhanced(volumes["t1n"], volumes["t1c"], head, case.spacing_mm))
    _, _, across = case.spacing_mm
    for mm in (4, 6, 10):
        moved = np.roll(volumes["t1c"], round(mm / across), 2)
        yield f"T1ce moved by {mm} mm", "shift", bool(checks.shifts(volumes | {"t1c": moved}, case.spacing_mm))
    for a, b in itertools.combinations(case.modalities, 2):
        done, changed = f"{SPOKEN[a]} and {SPOKEN[b]} exchanged", volumes | {a: volumes[b], b: volumes[a]}
        yield done, "swap", bool(checks.swaps(changed, head, trivial, known))
        if (a, b) == ("t1n", "t1c") and case.masked_background:
            yield done, "unenhanced", bool(checks.unenhanced(changed["t1n"], changed["t1c"], head, case.spacing_mm))
    yield "T1 given as T1ce, too", "same", bool(checks.same_images(volumes | {"t1c": volumes["t1n"] * 0.9}, head))


def main() -> None:
    """Print a table: what was done, which check, and the share of studies it warned of, by cohort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    counts: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case in PreparedSet(options.set).cases:
        cohort = next(name for name, starts in COHORTS.items() if case.name.startswith(starts))
        for done, check, said in asked(case, model):
            counts[done, check][cohort].append(said)
    print(f"| the study | check | {' | '.join(COHORTS)} |\n|---|---|{'---|' * len(COHORTS)}")
    for (done, check), by_cohort in counts.items():
        cells = [f"{sum(found)} of {len(found)}" if (found := by_cohort[name]) else "–" for name in COHORTS]
        print(f"| {done} | {check} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
