"""T1 → T1ce + FLAIR on TCGA low-grade gliomas, at a size that a laptop's processor bears.

python benchmarks/lgg.py ../shared/data -o runs/lgg --minutes 40                   # the default recipe
python benchmarks/lgg.py ../shared/data -o runs/lgg-paper --recipe paper           # the published form, and its twin
"""

import argparse
from pathlib import Path

from crossmr.cohort import complete_cohort
from crossmr.completion import Settings
from crossmr.config import with_settings
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.display import Display
from crossmr.evaluation import evaluate, tables
from crossmr.model import Guidance
from crossmr.recipes import RECIPES
from crossmr.training import train

SETTINGS = {
    "crop": "128,128",
    "representation.channels": "24",
    "representation.multipliers": "1,2,3,4",
    "representation_fit.batch_size": "16",
    "representation_fit.learning_rate": "5e-4",
    "representation_fit.ema_decay": "0.995",
    "distribution_fit.learning_rate": "3e-4",
    "synthesis.channels": "24",
    "synthesis.multipliers": "1,2,3,4",
    "synthesis_fit.batch_size": "8",
    "synthesis_fit.learning_rate": "5e-4",
    "synthesis_fit.ema_decay": "0.995",
}
PUBLISHED = {"distribution.width": "512", "distribution.blocks": "6"}
"""For one vector a volume; a grid of cells has a smaller MDN."""
GUIDANCES: dict[str, tuple[Guidance, ...]] = {
    "standard": ("none", "sample"),
    "paper": ("unconditional", "sample", "none"),
}


def main() -> None:
    """Prepare, train, evaluate, and complete the patients whose sequences were never acquired."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/lgg"))
    parser.add_argument("--recipe", choices=GUIDANCES, default="standard")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, display, paper = options.out, Display(), options.recipe == "paper"
    prepare(
        options.data / "lgg",
        out / "set",
        split=Split.parse("75/5/20"),
        workers=default_workers(),
        display=display,
    )
    model = train(
        out / "set",
        out / "run",
        recipe=with_settings(RECIPES[options.recipe], {**SETTINGS, **(PUBLISHED if paper else {})}),
        sources=("t1n",),
        targets=("t1c", "t2f"),
        twin=paper,
        minutes=options.minutes,
        seed=options.seed,
        display=display,
    )
    result = evaluate(model, out / "set", out / "evaluation", guidances=GUIDANCES[options.recipe], display=display)
    display.print_tables(tables(result["summary"], intervals=display.wide))
    completed = complete_cohort(
        options.data / "lgg_incomplete", out / "completed", model, settings=Settings(), display=display
    )
    for case, modalities in completed["completed"].items():
        display.say(f"{case}: synthesised {', '.join(modalities)}")
    for case, reasons in completed["not_filled"].items():
        display.say(f"{case}: " + "; ".join(f"{m} not filled: {reason}" for m, reason in reasons.items()))


if __name__ == "__main__":
    main()
