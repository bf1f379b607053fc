"""The weights that crossmr ships: one model of any subset of T1, T1ce, T2 and FLAIR, from whatever data is at hand.

LGG (three modalities, with skull), BraTS, HiNet's BraTS 2018 and openms (four), and phantoms. Two BraTS cases are left
out: their patients occur, or may occur, in LGG. The split is by patient; its seed was taken by names alone, so that
each cohort has patients who are never trained on.

python benchmarks/default_weights.py ../shared/data -o runs/default --minutes 240
python benchmarks/default_weights.py ../shared/data -o runs/default --measure   # every subset, the model card's tables
python benchmarks/default_weights.py ../shared/data -o runs/default --ship      # into src/crossmr/weights
"""

import argparse
import shutil
from pathlib import Path

from crossmr.completion import complete_cohort
from crossmr.config import with_settings
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.display import Display
from crossmr.evaluation import evaluate, sureness_table, tables
from crossmr.model import load_model
from crossmr.phantom import write_cohort
from crossmr.recipes import ANY
from crossmr.training import train

LEFT_OUT = ("TCGA-DU-7294", "TCGA-FG-6692")
SPLIT = Split.parse("75/7/18", 451)
PHANTOMS = 20
SHAPE, SPACING_MM = (104, 124, 44), (1.875, 1.875, 4.0)
SETTINGS = {
    "crop": "128,128",
    "augmentation.probability": "0.3",
    "representation.channels": "12",
    "representation.multipliers": "1,2,3,4",
    "representation.patch_size": "8",
    "representation_fit.batch_size": "8",
    "representation_fit.learning_rate": "1e-3",
    "representation_fit.ema_decay": "0.99",
    "distribution.width": "64",
    "distribution_fit.learning_rate": "1e-3",
    "distribution_fit.batch_size": "64",
    "distribution_fit.ema_decay": "0.99",
    "synthesis.channels": "24",
    "synthesis.multipliers": "1,2,3,4",
    "synthesis_fit.batch_size": "8",
    "synthesis_fit.learning_rate": "1e-3",
    "synthesis_fit.ema_decay": "0.998",
    "guidance_fit.batch_size": "8",
    "guidance_fit.share": "0.1",
    "uncertainty_fit.batch_size": "8",
    "uncertainty_fit.share": "0.1",
}
RECIPE = with_settings(ANY, SETTINGS)
WEIGHTS = Path(__file__).parents[1] / "src" / "crossmr" / "weights" / "default"
LARGEST_MIB = 16.0


def cohorts(data: Path, out: Path) -> list[Path]:
    """The folders that are prepared together; phantoms are made under `out`."""
    write_cohort(out / "phantoms", PHANTOMS, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    brats = sorted(study for study in (data / "brats").iterdir() if study.is_dir() and study.name not in LEFT_OUT)
    return [data / "lgg", *brats, data / "hinet_brats18", data / "openms", out / "phantoms"]


def measure(model: Path, data: Path, out: Path, display: Display) -> None:
    """Every subset of the held-out patients, and the patients whose sequences were never acquired."""
    result = evaluate(model, out / "set", out / "evaluation", every_subset=True, display=display)
    display.print_tables(tables(result["summary"]))
    display.print_tables([sureness_table(result["uncertainty"])])
    completed = complete_cohort(data / "lgg_incomplete", out / "completed", model, overwrite=True, display=display)
    for case, modalities in completed["completed"].items():
        display.say(f"{case}: synthesised {', '.join(modalities)}")


def ship(model: Path, display: Display) -> None:
    """Put a finished model into the package, if it is small enough."""
    record = load_model(model).record
    size = sum(path.stat().st_size for path in model.iterdir()) / 2**20
    if size > LARGEST_MIB:
        raise SystemExit(f"{model} has {size:.1f} MiB; wanted at most {LARGEST_MIB:g}.")
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    shutil.copytree(model, WEIGHTS)
    display.say(f"{WEIGHTS}: {record['sha256'][:12]}, {size:.1f} MiB")


def main() -> None:
    """Prepare and train, or measure, or ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args()
    out, display = options.out, Display()
    model = out / "run" / "model"
    if not options.measure and not options.ship:
        folders = cohorts(options.data, out)
        prepare(folders, out / "set", split=SPLIT, workers=default_workers(), display=display)
        form = {"minutes": options.minutes, "device": options.device, "seed": options.seed}
        train(out / "set", out / "run", recipe=RECIPE, display=display, **form)
    if options.measure:
        measure(model, options.data, out, display)
    if options.ship:
        ship(model, display)


if __name__ == "__main__":
    main()
