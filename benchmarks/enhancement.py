"""How often two T1 of one patient, compared by their voxels alone, are told apart rightly: enhanced or not.

Every study with T1 and T1ce, as it is and with one of the two degraded, and as controls the same volume twice, and T1
or T1ce beside T2 and FLAIR. One study of a patient counts. The threshold is chosen without the cohort that it is
applied to. OUT holds the scores of every study; those that are there are not computed again.

python benchmarks/enhancement.py ../shared/data -o runs/enhancement
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scans import COHORTS, IN_WHOLE, cohort_of, lgg, unpacked
from scipy import ndimage

from crossmr.completion.checks import SUSPECT
from crossmr.data.enhancement import (
    THRESHOLD,
    Comparison,
    common_grid,
    compare_arrays,
    resampled,
    together,
    within_skull,
)
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.data.volume import read_volume
from crossmr.files import write_json

AGAIN = ("BraTS-SSA-00121", "BraTS-SSA-00081", "BraTSReg_002_01")
"""Second studies of patients."""
CONTROLS_WRONG = 0.01
"""Fraction of the controls that may be taken for a pair, where a threshold is chosen."""
IN_BRATS = "LGG, also in BraTS"
"""The LGG patients, with skull, who are stripped in BraTS; nothing was chosen on these."""
Array = np.ndarray
Scores = Mapping[str, Sequence[float]]


def degraded(
    volume: Array, head: Array, spacing_mm: Sequence[float], rng: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    """(what was done, the volume)."""
    y, x = spacing_mm[1:]
    level = float(np.median(volume[head]))
    across = np.linspace(-1, 1, volume.shape[2], dtype=np.float32)
    noise = rng.normal(0, 0.05 * level, volume.shape).astype(np.float32)
    yield "noise of 5 %", volume + noise
    yield "a bias field of ±20 %", volume * (1 + 0.2 * across)
    yield "in-plane blur of 3 mm", ndimage.gaussian_filter(volume, (0, 1.3 / y, 1.3 / x))
    yield "sagittal slices of 5 mm", ndimage.uniform_filter1d(volume, max(1, round(5 / x)), axis=2)
    yield "a voxel's displacement", np.roll(volume, 1, 1)
    yield "a turn by 4°", ndimage.rotate(volume, 4, (1, 2), reshape=False, order=1)
    yield "another grey scale (exponent 1.4)", np.maximum(volume / level, 0) ** np.float32(1.4)
    yield "all of these but the turn", _all(volume / level, (y, x), noise / level, across)


def _all(volume: Array, sides: tuple[float, float], noise: Array, across: Array) -> Array:
    y, x = sides
    moved = np.roll(np.maximum(volume, 0) ** np.float32(1.4) * (1 + 0.2 * across), 1, 2)
    return ndimage.gaussian_filter(moved, (0, 1.3 / y, 1.3 / x)) + noise


def scores(folder: Path) -> dict[str, list[float]]:
    """What was compared → score and correlation."""
    paths = {m: folder / f"{folder.name}-{m}.nii.gz" for m in ("t1n", "t1c", "t2w", "t2f")}
    volumes = {m: read_volume(path) for m, path in paths.items() if path.exists()}
    plain, enhanced, head, spacing, stripped = together(volumes["t1n"], volumes["t1c"])
    rng = np.random.default_rng(sum(map(ord, folder.name)))
    found: dict[str, list[float]] = {}

    def add(what: str, first: Array, second: Array) -> None:
        result = compare_arrays(first, second, head, spacing, stripped)
        found[what] = [result.score, result.correlation]

    add("pair: as they are", plain, enhanced)
    for what, made in degraded(enhanced, head, spacing, rng):
        add(f"pair: T1ce with {what}", plain, made)
    for what, made in degraded(plain, head, spacing, rng):
        add(f"twice: T1, once with {what}", plain, made)
        if "blur" in what or "sagittal" in what or "all" in what:
            add(f"pair: T1 with {what}", made, enhanced)
    for what, made in degraded(enhanced, head, spacing, rng):
        if "noise" in what or "blur" in what or "all" in what:
            add(f"twice: T1ce, once with {what}", enhanced, made)
    for other in ("t2w", "t2f"):
        if other in volumes:
            image = resampled(volumes[other], volumes[other].data, *common_grid(volumes["t1n"], volumes["t1c"]))
            add(f"other: T1 and {DISPLAY_NAMES[other]}", plain, image)
            add(f"other: T1ce and {DISPLAY_NAMES[other]}", enhanced, image)
    for name, volume in (("T1", plain), ("T1ce", enhanced)):
        found[f"alone: {name}"] = [_tail(volume, head, spacing, stripped), 1.0]
    return found


def _tail(volume: Array, head: Array, spacing: tuple[float, float, float], stripped: bool) -> float:
    """How far a volume's brightest voxels lie above the brain's median, in robust standard deviations."""
    brain = ndimage.binary_erosion(head, iterations=2) if stripped else within_skull(volume, volume, head, spacing)
    if not brain.any():
        return 0.0
    low, median, high, brightest = np.percentile(volume[brain], (25, 50, 75, 99.5))
    return float((brightest - median) / max((high - low) / 1.349, 1e-6))


def answers(studies: Sequence[Scores], what: str, limit: float) -> list[str]:
    """What was said of each study that has it, at a threshold."""
    said = []
    for found in studies:
        if what in found:
            said.append(Comparison(*found[what]).at(limit))
    return said


def cell(studies: Sequence[Scores], what: str, limit: float = THRESHOLD) -> str:
    """Right / undecided / wrong; of controls, how many were taken for a pair."""
    said = answers(studies, what, limit)
    if not said:
        return "–"
    if what.startswith("pair"):
        return f"{said.count('second')} / {said.count('neither')} / {said.count('first')}"
    return f"{len(said) - said.count('neither')} of {len(said)}"


def threshold(studies: Sequence[Scores]) -> float:
    """The lowest at which so few controls as `CONTROLS_WRONG` are taken for a pair."""
    kinds = sorted({what for found in studies for what in found if what.startswith("twice")})
    scores = [abs(found[what][0]) for found in studies for what in kinds if what in found]
    return float(np.quantile(scores, 1 - CONTROLS_WRONG))


def show(by_cohort: Mapping[str, Sequence[Scores]]) -> None:
    """Print the tables."""
    cohorts = list(by_cohort)
    every = [found for studies in by_cohort.values() for found in studies]
    kinds = dict.fromkeys(what for found in every for what in found if not what.startswith("alone"))
    print(f"| compared | {' | '.join(cohorts)} |\n|---|{'---|' * len(cohorts)}")
    for what in sorted(kinds, key=lambda kind: ("pair", "twic", "othe").index(kind[:4])):
        cells = " | ".join(cell(by_cohort[cohort], what) for cohort in cohorts)
        print(f"| {what.split(': ')[1]} | {cells} |")
    warned = " | ".join(cell(by_cohort[cohort], "pair: as they are", SUSPECT) for cohort in cohorts)
    print(f"| as they are, exchanged: warned of / not / warned of though right | {warned} |")
    print("\n| without the cohort | threshold | T1 and T1ce as they are | all pairs | controls taken for a pair |")
    print("|---|---|---|---|---|")
    for cohort in cohorts:
        limit = threshold([found for other in cohorts if other != cohort for found in by_cohort[other]])
        pairs, twice = (
            [said for what in kinds if what.startswith(kind) for said in answers(by_cohort[cohort], what, limit)]
            for kind in ("pair", "twice")
        )
        counts = " / ".join(str(pairs.count(said)) for said in ("second", "neither", "first"))
        taken = f"{len(twice) - twice.count('neither')} of {len(twice)}"
        print(
            f"| {cohort} | {limit:.2f} | {cell(by_cohort[cohort], 'pair: as they are', limit)} | {counts} | {taken} |"
        )
    print("\n| score, either sign | right | wrong |\n|---|---|---|")
    scores = [found[what][0] for found in every for what in kinds if what.startswith("pair") and what in found]
    for low, high in itertools.pairwise((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, np.inf)):
        within = [score for score in scores if low <= abs(score) < high]
        print(f"| {low:g} to {high:g} | {sum(s > 0 for s in within)} | {sum(s < 0 for s in within)} |")
    for cohort in cohorts:
        one, other = ([found[f"alone: {name}"][0] for found in by_cohort[cohort]] for name in ("T1", "T1ce"))
        area = np.mean([(b > a) + 0.5 * (b == a) for a in one for b in other])
        limit = _best(
            *([f[f"alone: {m}"][0] for c in cohorts if c != cohort for f in by_cohort[c]] for m in ("T1", "T1ce"))
        )
        right = sum(a < limit for a in one) + sum(b >= limit for b in other)
        print(f"alone, {cohort}: area under the curve {area:.2f}, {right} of {2 * len(one)} right")


def _best(plain: Sequence[float], enhanced: Sequence[float]) -> float:
    """The limit that tells most right."""
    right = {t: sum(a < t for a in plain) + sum(b >= t for b in enhanced) for t in (*plain, *enhanced)}
    return max(right, key=lambda t: right[t])


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/enhancement"))
    options = parser.parse_args()
    whole = unpacked(options.data, options.out / "whole")
    folders = [*sorted(whole.iterdir()), *(f for name in ("brats", "openms") for f in (options.data / name).iterdir())]
    folders += [*lgg(options.data), *(options.data / "lgg" / name for name in IN_WHOLE)]
    by_cohort: dict[str, list[Scores]] = defaultdict(list)
    for folder in folders:
        if folder.name.startswith(AGAIN) or not folder.is_dir():
            continue
        path = options.out / "scores" / folder.parent.name / f"{folder.name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, scores(folder))
            print(folder.name, flush=True)
        again = folder.parent.name == "lgg" and folder.name in IN_WHOLE
        by_cohort[IN_BRATS if again else cohort_of(folder.name)].append(json.loads(path.read_text()))
    show({cohort: by_cohort[cohort] for cohort in (*COHORTS, IN_BRATS) if by_cohort[cohort]})


if __name__ == "__main__":
    main()
