"""What each choice of the engine is worth: variants of recipe `any`, trained alike and from nothing.

Variants of form, loss and training change one thing of the recipe, train for the same processor time on the set of the
default weights (OMP_NUM_THREADS=1: then it is the time on one core, whatever the other cores do), and are measured on
its validation patients. Variants of the intensity scale train for the same steps on the same studies, whose stored
intensities are mapped anew; BraTS-Africa is left out of their training, so that they are measured on patients of
sources seen, of a source left out, and on LGG with skull. Each contrast is made from all others of a study. Correlation
is with the truth, 5 mm and more from the brain's rim; that of scales is Spearman's, which no scale changes by itself.
So short a training shows what speeds the first steps up: what only pays later, such as augmentation, needs a longer
one, in another OUT.

python benchmarks/engine.py runs/default -o runs/evidence --minutes 8
python benchmarks/engine.py runs/default -o runs/evidence --minutes 8 --only "as it is" "squared error" --seeds 1 2
python benchmarks/engine.py runs/default -o runs/evidence --scales --steps 500
python benchmarks/engine.py runs/default -o runs/evidence --true-contrasts    # of FLAIR's lesions, on each scale
"""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from grid import (
    Kept,
    Row,
    arguments,
    by_predictor,
    column,
    kept_share,
    light_measures,
    parser,
    patients_in,
    split_set,
    synthesised,
)
from scans import cohort_of
from scipy import ndimage, stats
from torch import Tensor

from crossmr.config import with_settings
from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.head import HIGHEST, LOWEST
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.display import Display
from crossmr.evaluation.subjects import patterns, subject_of_case
from crossmr.networks.model import CrossConditionedModel, read_model
from crossmr.training.plan import read_plan
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

Array = npt.NDArray[np.float32]
VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no lesion weight, lesions drawn once": {"synthesis.lesion_weight": "0", "lesion_draws": "1"},
    "lesions weigh 0.5 more": {"synthesis.lesion_weight": "0.5"},
    "squared error": {"synthesis.loss": "squared"},
    "with the error's gradient": {},
    "no error learnt beside": {"uncertainty": "false"},
    "no augmentation": {"augmentation.probability": "0"},
    "heads deformed": {"augmentation.deformation": "0.7"},
    "heads deformed, sources changed twice as often": {
        "augmentation.deformation": "0.7",
        "augmentation.probability": "0.3",
    },
    "published form, patches of 2, as many parameters": {
        "synthesis.form": "published",
        "synthesis.channels": "40",
        "synthesis.multipliers": "1,2,3,4",
    },
    "published form, no patches": {
        "synthesis.form": "published",
        "synthesis.channels": "16",
        "synthesis.multipliers": "1,2,3,4",
        "synthesis.patch": "1",
    },
    "patches of 4, 96 features": {"synthesis.patch": "4", "synthesis.channels": "96", "synthesis.multipliers": "1,2,3"},
    "72 features": {"synthesis.channels": "72"},
    "32 features": {"synthesis.channels": "32"},
    "one slice": {"context_slices": "1"},
    "five slices": {"context_slices": "5"},
    "three planes": {"planes": "3"},
    "3D": {
        "spatial_dims": "3",
        "context_slices": "1",
        "crop": "64,96,96",
        "synthesis.channels": "32",
        "synthesis.multipliers": "1,2,4",
        "synthesis_train.batch_size": "2",
    },
    "learning rate 2e-3": {"synthesis_train.learning_rate": "2e-3"},
    "learning rate 5e-4": {"synthesis_train.learning_rate": "5e-4"},
}
"""Name → settings of the recipe."""
AS_IT_IS = {False: "as it is", True: "median and quartiles"}
"""What variants, and scales, are compared with."""
AFRICA = "BraTS-Africa"
RANKED = 5
"""One voxel in so many enters the rank correlation."""
LANDMARKS = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
"""Percentiles (Nyúl & Udupa 1999; Nyúl et al. 2000)."""


def absolute_with_gradient(
    prediction: Tensor, truth: Tensor, weight: Tensor, *, absolute: bool
) -> tuple[Tensor, Tensor]:
    """The absolute error, and that of the differences between neighbouring pixels, of images (B, T, Y, X)."""
    error = prediction.float() - truth
    total = (error.abs() * weight).sum()
    for axis in (-1, -2):
        both = weight.narrow(axis, 1, weight.shape[axis] - 1) * (weight.narrow(axis, 0, weight.shape[axis] - 1) > 0)
        total = total + (error.diff(dim=axis).abs() * both).sum()
    return total, weight.sum()


PATCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "with the error's gradient": lambda: mock.patch(
        "crossmr.training.stages.synthesis_error", new=absolute_with_gradient
    ),
}
"""Name → what it replaces in the product while it trains."""


def same(z: Array, air: float, landmarks: Array) -> Array:
    """Median and quartiles: the product's own scale."""
    return z


def z_score(z: Array, air: float, landmarks: Array) -> Array:
    """Mean and standard deviation in place of median and quartiles."""
    scaled: Array = (z - z.mean()) / max(float(z.std()), 1e-6)
    return scaled


def peak(z: Array, air: float, landmarks: Array) -> Array:
    """The histogram's highest peak, white matter in most contrasts, in place of the median."""
    counts, edges = np.histogram(z, bins=256, range=(LOWEST, HIGHEST))
    return z - np.float32(edges[int(ndimage.gaussian_filter1d(counts.astype(float), 4).argmax())])


def quarter_is_the_median(z: Array, air: float, landmarks: Array) -> Array:
    """On [0, 1] air is 0 and the median a quarter: the scale before the present one."""
    return LOWEST + (HIGHEST - LOWEST) * np.float32(0.25) * (z - np.float32(air)) / np.float32(max(-air, 1e-3))


def nyul(z: Array, air: float, landmarks: Array) -> Array:
    """Piecewise linear, so that percentiles come to lie where they do in the mean training study."""
    own = np.percentile(z, LANDMARKS) + np.arange(len(LANDMARKS)) * 1e-6
    inside = np.interp(z, own, landmarks)
    return np.where(z < own[0], landmarks[0] + z - own[0], np.where(z > own[-1], landmarks[-1] + z - own[-1], inside))


SCALES: dict[str, Callable[[Array, float, Array], Array]] = {
    "median and quartiles": same,
    "mean and standard deviation": z_score,
    "histogram's peak and quartiles": peak,
    "landmarks (Nyúl)": nyul,
    "a quarter is the median": quarter_is_the_median,
}
"""Name → map of a volume's intensities within the head, in robust standard deviations about the median."""


def part_of(case: str, before: str) -> str | None:
    """The base set's LGG and whole studies; BraTS-Africa is for the test alone."""
    if cohort_of(case) == "phantoms":
        return None
    return "test" if cohort_of(case) == AFRICA or before == "val" else "train" if before == "train" else None


def landmarks_of(dataset: PreparedDataset) -> dict[str, Array]:
    """Modality → the percentiles of the mean training study."""
    return {
        m: np.mean([np.percentile(inside(case, m), LANDMARKS) for case in some], 0)
        for m in dataset.modalities
        if (some := [case for case in dataset.split("train") if m in case.modalities])
    }


def scaled_set(base: Path, folder: Path, name: str) -> PreparedDataset:
    """A set of the same studies with intensities mapped anew."""
    landmarks = landmarks_of(split_set(base / "set", folder, part_of))

    def change(case: Case, modality: str, stored: Array) -> Array:
        changed = np.zeros_like(stored)
        changed[stored > 0] = on_scale(name, case, modality, stored[stored > 0], landmarks[modality])
        return changed

    return split_set(base / "set", folder, part_of, change)


def on_scale(name: str, case: Case, modality: str, stored: Array, landmarks: Array) -> Array:
    """Stored intensities of a volume's head, mapped anew, on [0, 1]."""
    z = stored * (HIGHEST - LOWEST) + LOWEST
    air = case.air[modality] * (HIGHEST - LOWEST) + LOWEST
    mapped: Array = np.clip((SCALES[name](z, air, landmarks) - LOWEST) / (HIGHEST - LOWEST), 1e-3, 1)
    return mapped


def true_contrasts(base: Path, folder: Path) -> None:
    """Print, for each scale, the contrast that FLAIR's lesions have in the scans of BraTS-Africa."""
    dataset = split_set(base / "set", folder, part_of)
    landmarks = landmarks_of(dataset)["t2f"]
    cases = [case for case in dataset.split("test") if cohort_of(case.name) == AFRICA and case.has_labels]
    print("| | studies | mean contrast | standard deviation / mean | correlation with the lesion's size |")
    print("|---|---|---|---|---|")
    for name in SCALES:
        found = []
        for case in cases:
            stored, lesion = case.volume("t2f"), case.masks()[:, 1] > 0
            lesion = lesion[stored > 0]
            volume = on_scale(name, case, "t2f", stored[stored > 0], landmarks)
            low, median, high = np.percentile(volume[~lesion], (25, 50, 75))
            found.append([(volume[lesion].mean() - median) / (high - low), lesion.mean()])
        contrast, size = np.array(found).T
        spread, same = contrast.std() / contrast.mean(), np.corrcoef(contrast, size)[0, 1]
        print(f"| {name} | {len(cases)} | {contrast.mean():.2f} | {spread:.2f} | {same:.2f} |")


def inside(case: Case, modality: str) -> Array:
    """A volume's intensities within the head, in robust standard deviations about the median."""
    stored = case.volume(modality)
    values: Array = stored[stored > 0][::7] * (HIGHEST - LOWEST) + LOWEST
    return values


def measured(model: CrossConditionedModel, cases: Sequence[Case], **facts: Any) -> list[Row]:
    """Rows of each contrast from all others of these studies."""
    rows = []
    for case in cases:
        subject = subject_of_case(case)
        for sources in patterns(model.config, subject):
            targets = tuple(m for m in case.modalities if m not in sources)
            images = synthesised(model, subject, sources, targets)
            rows += light_measures(subject, sources, images, {"rank_deep": rank_correlation}, **facts)
    return rows


def rank_correlation(image: Array, truth: Array) -> float:
    """Spearman's, of some of the voxels."""
    return float(stats.spearmanr(image[::RANKED], truth[::RANKED]).statistic)


def trained(place: Path, out: Path, wish: TrainingSettings, how: AbstractContextManager[Any]) -> tuple[Any, Row]:
    """A model and what its training took; minutes are those of the processor."""
    shutil.rmtree(out, ignore_errors=True)
    before = time.process_time()
    clock = mock.patch("crossmr.training.plan.time", new=SimpleNamespace(monotonic=time.process_time))
    with how, clock:
        model = read_model(train(place, out, wish, display=Display()), "cpu")
    plan = read_plan(out, "synthesis")
    return model, {
        "steps": plan.total if plan else 0,
        "millions": sum(p.numel() for p in model.parameters()) / 1e6,
        "minutes": (time.process_time() - before) / 60,
    }


def main() -> None:
    """Add the rows that are missing, and print all."""
    own = parser(__doc__)
    own.add_argument("--minutes", type=float, default=8.0, help="of each variant's training, on the processor")
    own.add_argument("--scales", action="store_true", help="compare intensity scales")
    own.add_argument(
        "--true-contrasts", action="store_true", help="of FLAIR's lesions on each scale; nothing is trained"
    )
    own.add_argument("--steps", type=int, default=500, help="of each scale's training")
    own.add_argument("--only", nargs="+", choices=[*VARIANTS, *SCALES])
    options = arguments(own)
    if options.true_contrasts:
        true_contrasts(options.base, options.out / "work" / "contrasts")
        return
    kept = Kept(options.out, "scales" if options.scales else "engine")
    for seed in options.seeds if not options.table else ():
        for name in options.only or (SCALES if options.scales else VARIANTS):
            if kept.has(predictor=name, seed=seed):
                continue
            place, work = options.base / "set", options.out / "work"
            if options.scales:
                dataset = scaled_set(options.base, work / "set", name)
                place, cases = dataset.folder, dataset.split("test")
                limit: dict[str, Any] = {"steps": 3 if options.tiny else options.steps}
            else:
                cases = PreparedDataset(place).split("val")
                limit = {"steps": 3} if options.tiny else {"minutes": options.minutes}
            recipe = with_settings(replace(RECIPES["any"], by_set=()), VARIANTS.get(name, {}))
            wish = TrainingSettings(recipe=recipe, device=options.device, seed=seed, **limit)
            model, cost = trained(place, work / "run", wish, PATCHES.get(name, nullcontext)())
            kept.add(measured(model, cases[:1] if options.tiny else cases, predictor=name, seed=seed, **cost))
            shutil.rmtree(work)
    print_table(kept.of(options.shown), "rank_deep" if options.scales else "correlation_deep", AS_IT_IS[options.scales])


def print_table(rows: Sequence[Row], value: str, first: str) -> None:
    """Markdown: means over patients, and what each change makes of them; of scales by the source of the patients."""
    targets, cohorts = (sorted({row[key] for row in rows}) for key in ("target", "cohort"))
    for group in [[cohort] for cohort in cohorts] if value == "rank_deep" else [cohorts]:
        here = by_predictor(row for row in rows if row["cohort"] in group)
        patients = patients_in(row for own in here.values() for row in own)
        print(f"\n**{', '.join(group)}**, {patients} patients; below the first line differences to it, in pairs\n")
        heads = ["", "seeds", "steps", "M parameters", "minutes", *(DISPLAY_NAMES[target] for target in targets)]
        print(f"| {' | '.join(heads)} | FLAIR lesions kept |\n{'|---' * (len(heads) + 1)}|")
        columns = [
            column(
                {name: [row for row in own if row["target"] == target] for name, own in here.items()},
                first,
                value,
                3,
                differences=True,
            )
            for target in targets
        ]
        for name, own in here.items():
            cells = [str(len({row["seed"] for row in own}))]
            for key, digits in {"steps": 0, "millions": 2, "minutes": 1}.items():
                cells.append(f"{statistics.mean(row[key] for row in own):.{digits}f}")
            cells += [one[name] for one in columns]
            print(f"| {name} | {' | '.join(cells)} | {kept_share(row for row in own if row['target'] == 't2f')} |")


if __name__ == "__main__":
    main()
