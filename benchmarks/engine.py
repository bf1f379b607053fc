"""What each choice of the engine is worth: variants of recipe `any`, trained for the same minutes on the same patients.

The set is that of default_weights.py. Each variant changes one thing; it is trained from nothing, and measured on the
validation patients with four contrasts, each contrast from the three others. Variants of the intensity scale change the
volumes before they are prepared, so that all else stays: another scale shows in the training, and the measures, which
are of the truth's own scale or of correlation, do not depend on it. Every finished row is kept in OUT/rows.jsonl; the
same command goes on with the next one, and prints the table.

python benchmarks/engine.py runs/default -o runs/engine --minutes 8
python benchmarks/engine.py runs/default -o runs/engine --minutes 8 --only "as it is" "no lesion weight" --seeds 0 1 2
"""

import argparse
import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from default_weights import VALIDATION, split_as_listed
from scipy import ndimage

from crossmr.config import with_settings
from crossmr.data import study as studies
from crossmr.data.head import HIGHEST, LOWEST, Mask, Normalisation, fit_normalisation
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.display import Display
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.networks.model import load_model
from crossmr.training.plan import read_plan
from crossmr.training.recipes import RECIPES
from crossmr.training.run import TrainingSettings, train

Array = npt.NDArray[np.float32]
VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no lesion weight": {"synthesis.lesion_weight": "0", "lesion_draws": "1"},
    "lesions weigh 5": {"synthesis.lesion_weight": "5"},
    "squared error": {"synthesis.loss": "squared"},
    "no error learnt beside": {"uncertainty": "false"},
    "no augmentation": {"augmentation.probability": "0"},
    "published form, patches of 2": {
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
    "learning rate 2e-3": {"synthesis_train.learning_rate": "2e-3"},
    "learning rate 5e-4": {"synthesis_train.learning_rate": "5e-4"},
    "batches of 16": {"synthesis_train.batch_size": "16"},
    "3D": {
        "spatial_dims": "3",
        "context_slices": "1",
        "crop": "64,96,96",
        "synthesis.channels": "32",
        "synthesis.multipliers": "1,2,4",
        "synthesis_train.batch_size": "2",
    },
}
"""Name → settings of the recipe."""


def z_score(data: Array, mask: Mask) -> Normalisation:
    """Mean and standard deviation in place of median and quartiles."""
    inside, fitted = data[mask], fit_normalisation(data, mask)
    mean, std = float(inside.mean()), max(float(inside.std()), 1e-6)
    return replace(fitted, low=mean + LOWEST * std, high=mean + HIGHEST * std)


def brightest_peak(data: Array, mask: Mask) -> Normalisation:
    """The histogram's highest peak, white matter in most contrasts, in place of the median."""
    fitted = fit_normalisation(data, mask)
    counts, edges = np.histogram(fitted.scale(data[mask]), bins=256, range=(0, 1))
    smooth = ndimage.gaussian_filter1d(counts.astype(float), 4)
    shift = (float(edges[int(smooth.argmax())]) + LOWEST / (HIGHEST - LOWEST)) * (fitted.high - fitted.low)
    return replace(fitted, low=fitted.low + shift, high=fitted.high + shift)


def quarter_is_the_median(data: Array, mask: Mask) -> Normalisation:
    """Air is 0 and the median a quarter: the scale of before."""
    fitted, middle = fit_normalisation(data, mask), float(np.median(data[mask]))
    return replace(fitted, low=fitted.air, high=fitted.air + 4 * (middle - fitted.air))


SCALES: dict[str, Callable[[Array, Mask], Normalisation]] = {
    "z-scores": z_score,
    "median at the peak": brightest_peak,
    "a quarter is the median": quarter_is_the_median,
}
"""Name → how intensities are mapped."""


def prepared(base: Path, out: Path, variant: str, display: Display) -> Path:
    """The set of a variant: that of the default weights, or, of another scale, one prepared anew."""
    if variant not in SCALES:
        return base / "set"
    folder = out / "sets" / variant.replace(" ", "-")
    if not (folder / "split").exists():
        cohorts = [base / "whole"]
        kept, studies.fit_normalisation = studies.fit_normalisation, SCALES[variant]
        try:
            prepare(cohorts, folder, PrepareSettings(workers=1), display=display)
        finally:
            studies.fit_normalisation = kept
        split_as_listed(folder)
        (folder / "split").touch()
    return folder


def row(base: Path, out: Path, variant: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and measure one variant by one seed."""
    display, folder = Display(), out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    place = prepared(base, out, variant, display)
    recipe = with_settings(replace(RECIPES["any"], by_set=()), VARIANTS.get(variant, {}))
    wish = TrainingSettings(recipe=recipe, minutes=options.minutes, device=options.device, seed=seed)
    model = train(place, folder, wish, display=display)
    result = evaluate(model, place, folder / "evaluation", EvaluationSettings(split="val"), display=display)
    plan = read_plan(folder, "synthesis")
    parameters = sum(p.numel() for p in load_model(model).parameters())
    found: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "steps": plan.total if plan else 0,
        "m": parameters / 1e6,
    }
    for entry in result["summary"]:
        if entry["predictor"] == result["own"] and entry["sources"].count("+") == 2 and entry["region"] == "deep":
            found[f"correlation {entry['target']}"] = entry["correlation"]["mean"]
    for contrast in result["contrasts"]:
        if contrast["predictor"] == result["own"] and contrast["structure"] == "lesion":
            found[f"lesion {contrast['target']}"] = contrast["median"]
    return found


def main() -> None:
    """Add the rows that are missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the output of default_weights.py")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/engine"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", default=["as it is", *SCALES, *list(VARIANTS)[1:]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in options.seeds:
        for variant in options.only:
            if not any((found["variant"], found["seed"]) == (variant, seed) for found in rows):
                rows.append(row(options.base, options.out, variant, options, seed))
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, in Markdown."""
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for found in rows:
        by_variant[found["variant"]].append(found)
    heads = sorted({key for found in rows for key in found if key.startswith(("correlation", "lesion"))})
    print(f"\n{len(VALIDATION)} validation studies; correlation deep within the brain, share of lesion contrast kept")
    print("| variant | seeds | steps | M parameters |", " | ".join(heads), "|\n|" + "---|" * (4 + len(heads)))
    for variant, some in by_variant.items():
        cells = [f"{statistics.mean(found[key] for found in some if found.get(key) is not None):.3f}" for key in heads]
        steps = round(statistics.mean(found["steps"] for found in some))
        print(f"| {variant} | {len(some)} | {steps} | {some[0]['m']:.2f} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
