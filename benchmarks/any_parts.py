"""What neighbouring slices, augmentation and phantoms buy a model of any subset, on its own cohort and on others.

Each arm trains the C-UNet of recipe `any` on LGG alone, same seed and steps; then every modality is synthesised from
the two others, without guidance, in held-out LGG patients and in patients of BraTS, HiNet's BraTS 2018 and openms, of
whom none was trained on (TCGA's own, who may be in LGG, left out).

  standard     three neighbouring slices, augmented sources
  one slice    of context
  plain        no augmentation
  phantoms     standard, with 20 phantoms of random contrasts among the patients

python benchmarks/any_parts.py ../shared/data -o runs/any-parts
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from any_subset import rough
from default_weights import PHANTOMS, RECIPE, SHAPE, SPACING_MM, four_modalities
from tasks import write_rows

from crossmr import metrics
from crossmr.checkpoint import load_bundle, load_checkpoint
from crossmr.completion import Settings
from crossmr.config import with_settings
from crossmr.data.dataset import Case, PreparedSet
from crossmr.data.prepare import PARTS, Split, default_workers, prepare
from crossmr.display import Display
from crossmr.evaluation import measure, patterns, predict_all, subject_from_set
from crossmr.model import CrossConditionedModel
from crossmr.phantom import write_cohort
from crossmr.recipes import Recipe
from crossmr.training import train

MODALITIES = ("t1n", "t1c", "t2f")
SMALL = with_settings(RECIPE, {"synthesis.channels": "16"})
ARMS: Mapping[str, tuple[Recipe, bool]] = {
    "standard": (SMALL, False),
    "one slice": (replace(SMALL, context_slices=1), False),
    "plain": (with_settings(SMALL, {"augmentation.probability": "0"}), False),
    "phantoms": (SMALL, True),
}
"""Recipe, and whether phantoms are trained on."""


def c_unet(prepared: Path, run: Path, recipe: Recipe, steps: int, seed: int, display: Display) -> CrossConditionedModel:
    """A model of which the C-UNet alone is trained."""
    common = {"recipe": recipe, "sources": MODALITIES, "seed": seed, "display": display}
    train(prepared, run, stages=["representation"], steps=1, **common)  # type: ignore[arg-type]
    train(prepared, run, stages=["synthesis"], steps=steps, **common)  # type: ignore[arg-type]
    model = CrossConditionedModel(recipe.model_config(MODALITIES, MODALITIES))
    found = load_checkpoint(run / "stages" / "synthesis")
    assert found is not None
    weights = {key.removeprefix("ema."): value for key, value in found[0].items() if key.startswith("ema.")}
    model.synthesis.load_state_dict(weights)
    model.trivial = load_bundle(run / "stages" / "trivial", "trivial")[0]["trivial"]
    return model.eval().requires_grad_(False)


def scores(model: CrossConditionedModel, cases: Iterable[Case]) -> list[dict[str, object]]:
    """Of each patient and modality from the two others: PSNR and SSIM over the brain, and roughness."""
    rows: list[dict[str, object]] = []
    for case in cases:
        subject = subject_from_set(case)
        subject = replace(subject, volumes={m: subject.volumes[m] for m in MODALITIES})
        inside = subject.head[:-2] & subject.head[1:-1] & subject.head[2:]
        for sources in patterns(model.config, subject):
            made, _ = predict_all(model, subject, sources, ["none"], Settings(guidance="none"))
            for row in measure(subject, sources, made):
                if row["region"] == "brain" and row["predictor"] in ("unguided", "linear mix"):
                    volume, truth = made[row["predictor"]][row["target"]], subject.volumes[row["target"]]
                    row["jitter"] = rough(volume, inside) / rough(np.asarray(truth), inside)
                    rows.append(row)
    return rows


def table(out: Path) -> None:
    """Means over patients, and differences to `standard`; all rows as CSV."""
    found: dict[tuple[str, str], dict[str, dict[str, dict[str, object]]]] = defaultdict(lambda: defaultdict(dict))
    rows = [row for file in sorted(out.glob("*-[0-9].json")) for row in json.loads(file.read_text())]
    write_rows(out / "any_parts.csv", rows)
    for row in rows:
        arm = row["arm"] if row["predictor"] == "unguided" else "linear mix"
        found[row["cohort"], row["target"]][arm][row["case"]] = row
    print("| cohort | target | arm | PSNR | SSIM | jitter | patients |\n|---|---|---|---|---|---|---|")
    for (cohort, target), arms in found.items():
        for arm, cases in arms.items():
            cells = []
            for measured, digits in (("psnr", 2), ("ssim", 3), ("jitter", 2)):
                values = [float(row[measured]) for row in cases.values()]  # type: ignore[arg-type]
                cell = f"{statistics.mean(values):.{digits}f}"
                if arm != "standard":
                    first = [float(arms["standard"][case][measured]) for case in cases]  # type: ignore[arg-type]
                    gain = statistics.mean(a - b for a, b in zip(values, first, strict=True))
                    cell += f" ({gain:+.{digits}f}, p = {metrics.paired_wilcoxon(values, first):.3f})"
                cells.append(cell)
            print(f"| {cohort} | {target} | {arm} | {' | '.join(cells)} | {len(cases)} |")


def main() -> None:
    """Prepare, train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/any-parts"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="measure each n-th patient")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    out, display = options.out, Display()
    write_cohort(out / "phantoms", PHANTOMS, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    form = {"workers": default_workers(), "display": display}
    own, mixed, others = out / "lgg-set", out / "lgg-phantoms-set", out / "others-set"
    prepare(options.data / "lgg", own, split=Split.parse("75/5/20"), **form)
    prepare([options.data / "lgg", out / "phantoms"], mixed, split=Split.parse("75/5/20"), **form)
    prepare(four_modalities(options.data), others, **form)
    people = {
        "LGG": PreparedSet(own).part("test")[:: options.every],
        "others": [case for part in PARTS for case in PreparedSet(others).part(part)][:: options.every],
    }
    for arm in options.arms:
        recipe, phantoms = ARMS[arm]
        name = arm.replace(" ", "-")
        if (out / f"{name}-{options.seed}.json").exists():
            continue
        model = c_unet(
            mixed if phantoms else own, out / f"{name}-{options.seed}", recipe, options.steps, options.seed, display
        )
        rows = []
        for cohort, cases in people.items():
            rows += [{"arm": arm, "cohort": cohort, **row} for row in scores(model, cases)]
        (out / f"{name}-{options.seed}.json").write_text(json.dumps(rows))
    table(out)


if __name__ == "__main__":
    main()
