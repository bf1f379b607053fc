"""The recipes on real scans, end to end: trained for the same minutes, measured beside the baselines, in one table.

A few LGG patients (with skull, no T2) and whole studies are prepared into one set. Each recipe then trains on it in a
process of its own, completes a study of the test split whose targets are hidden, and is evaluated on the whole split.
'paper' and 'standard' learn T1 → T1ce + FLAIR, which all these patients have; 'any' learns every subset of the four
modalities and is measured with each modality hidden in turn, so it has more sources. The networks are small and the
patients few: the table shows what a recipe does in so many minutes, not how good it can get.

python benchmarks/recipes.py ../shared/data -o runs/recipes --minutes 10
python benchmarks/recipes.py ../shared/data -o runs/recipes --minutes 1 --recipes standard --set synthesis.channels=8
"""

import argparse
import math
import multiprocessing
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scans import SMALL, lgg, unpacked

from crossmr.completion.cohort import complete_cohort
from crossmr.config import with_settings
from crossmr.data.dataset import PreparedDataset
from crossmr.data.naming import DISPLAY_NAMES, find_studies
from crossmr.data.prepare import PrepareSettings, default_workers, prepare
from crossmr.data.split import Split
from crossmr.device import choose_device
from crossmr.display import Display
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.tables import BASELINE
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.training.plan import read_plan
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

WHOLE = (
    *("BraTS2021_00002", "BraTS2021_00006", "BraTS-GLI-00027-000", "Brats18_CBICA_ABM_1", "Brats18_TCIA01_201_1"),
    *("BraTS-SSA-00010-000", "BraTS-SSA-00037-000", "BraTS-SSA-00096-000"),
)
SOURCES, TARGETS = ("t1n",), ("t1c", "t2f")
TRAINING = {
    "representation": {"batch_size": "8", "learning_rate": "1e-3", "ema_decay": "0.99"},
    "distribution": {"batch_size": "64", "learning_rate": "1e-3", "ema_decay": "0.99"},
    "synthesis": {"batch_size": "8", "learning_rate": "1e-3", "ema_decay": "0.99"},
    "guidance": {"batch_size": "8", "ema_decay": "0.99"},
}
SETTINGS = SMALL | {f"{stage}_train.{key}": value for stage, how in TRAINING.items() for key, value in how.items()}


def prepare_scans(data: Path, out: Path, patients: int, whole: list[str], display: Display) -> None:
    """Prepare so many LGG patients and these whole studies, 60 % to train, 15 % to validate, 25 % to test."""
    cohorts = [*lgg(data)[:patients], *([unpacked(data, out / "whole", tuple(whole))] if whole else [])]
    wish = PrepareSettings(split=Split(0.6, 0.15, 0.25), workers=default_workers())
    prepare(cohorts, out / "set", wish, display=display)


def with_hidden_targets(data: Path, out: Path) -> Path:
    """A cohort of one study of the test split, a whole one if there is one, without its targets."""
    cases = sorted(PreparedDataset(out / "set").split("test"), key=lambda case: (-len(case.modalities), case.name))
    name, folder = cases[0].name, out / "hidden"
    where = next(path for path in (out / "whole" / name, data / "lgg" / name) if path.exists())
    (files,) = find_studies(where)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    for modality, path in files.images().items():
        if modality not in TARGETS:
            shutil.copyfile(path, folder / name / path.name)
    return folder


def measure(name: str, hidden: Path, out: Path, options: argparse.Namespace, answer: Any) -> None:
    """Train, complete and evaluate one recipe in this process, and answer with its row."""
    display, folder, device = Display(), out / name, choose_device(options.device)
    recipe = with_settings(
        replace(RECIPES[name], by_set=()), SETTINGS | dict(pair.split("=", 1) for pair in options.set)
    )
    task = {} if recipe.any_subset else {"sources": SOURCES, "targets": TARGETS}
    settings = InferenceSettings(device=options.device)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    wish = TrainingSettings(recipe, minutes=options.minutes, device=options.device, seed=options.seed, **task)
    model = train(out / "set", folder / "run", wish, display=display)
    minutes = (time.monotonic() - start) / 60
    start = time.monotonic()
    completed = complete_cohort(hidden, folder / "completed", model, settings=settings, display=display)
    seconds = time.monotonic() - start
    (case,) = hidden.iterdir()
    if set(TARGETS) - set(completed.completed.get(case.name, ())):
        raise SystemExit(f"{name}: {case.name} was not completed: {completed.failed or completed.not_filled}")
    result = evaluate(
        model, out / "set", folder / "evaluation", EvaluationSettings(inference=settings), display=display
    )
    plans = {stage: read_plan(folder / "run", stage) for stage in read_model(model).config.stages}
    cells = [name, ", ".join(f"{stage} {plan.total}" for stage, plan in plans.items() if plan)]
    cells.append(f"{minutes:.1f} of {options.minutes:g}")
    cells += [" / ".join(psnr(result, target, who) for who in (result["own"], BASELINE)) for target in TARGETS]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = f"{peak:.1f}" if device.type != "cuda" else f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} (GPU)"
    answer.put([*cells, f"{seconds:.1f}", memory])


def psnr(result: dict[str, Any], target: str, predictor: str) -> str:
    """Mean PSNR over the brain of a target, from whichever sources, weighted by their patients."""
    own = [e for e in result["summary"] if (e["target"], e["predictor"], e["region"]) == (target, predictor, "brain")]
    pairs = [(entry["psnr"]["mean"], entry["patients"]) for entry in own if entry["psnr"]["mean"] is not None]
    count = sum(patients for _, patients in pairs)
    return f"{sum(mean * patients for mean, patients in pairs) / count if count else math.nan:.2f}"


def main() -> None:
    """Prepare once, then a row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each recipe")
    parser.add_argument("--recipes", nargs="+", default=["paper", "standard", "any"], choices=sorted(RECIPES))
    parser.add_argument("--lgg", type=int, default=12, help="patients of ../shared/data/lgg, by name")
    parser.add_argument("--whole", nargs="*", default=list(WHOLE), help="studies of ../shared/data/whole")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all recipes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare_scans(options.data, options.out, options.lgg, options.whole, Display())
    hidden = with_hidden_targets(options.data, options.out)
    heads = [f"{DISPLAY_NAMES[target]}, PSNR brain, model / linear regression" for target in TARGETS]
    columns = ["recipe", "steps of each stage", "minutes", *heads, "s a study", "peak memory, GiB"]
    rows, context = [columns, ["---"] * len(columns)], multiprocessing.get_context("spawn")
    for name in options.recipes:
        answer = context.SimpleQueue()
        child = context.Process(target=measure, args=(name, hidden, options.out, options, answer))
        child.start()
        child.join()
        rows.append([name, *["failed"] * (len(columns) - 1)] if child.exitcode else answer.get())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (options.out / "table.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
