"""The main job on the product's own phantom, end to end, offline, on a laptop."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.data.naming import find_studies
from crossmr.data.prepare import PrepareSettings, Split, default_workers, prepare
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.display import SILENT, Display
from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from crossmr.evaluation.tables import tables, uncertainty_table
from crossmr.networks.inference import Settings
from crossmr.output.report import report_completion, report_evaluation
from crossmr.phantom import write_cohort
from crossmr.picture import save_picture
from crossmr.training.recipes import TINY
from crossmr.training.run import TrainingSettings, train

PATIENTS = 12
SHAPE, SPACING_MM = (72, 84, 56), (2.6, 2.6, 3.2)
TARGETS = ("t1c", "t2f")
RECIPE = replace(TINY, crop=(88, 72))
"""The phantom's slices, no wider than they are."""
MINUTES = 2.0
"""Of training, for all stages together."""


def demo(out: Path | str, *, seed: int = 0, minutes: float = MINUTES, display: Display = SILENT) -> Evaluation:
    """Make a phantom cohort, prepare it, train small, complete a study with two missing contrasts, and measure it.

    OUT gets cohort/, incomplete/, set/, run/, completed/, evaluation/ and picture.png. Returns the evaluation.

    Raises:
        OutputError: OUT holds something else, or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "cohort").exists():
        raise OutputError(f"{out} exists and is no earlier demo; name another folder.")
    start, settings = time.monotonic(), Settings(seed=seed)
    display.say(f"1/5 phantom: {PATIENTS} heads with lesions, made in code")
    case = _write_phantoms(out, seed)
    display.say("2/5 prepare")
    prepared = PrepareSettings(split=Split.parse("70/10/20", seed), workers=default_workers())
    prepare(out / "cohort", out / "set", prepared, display=display)
    display.say(f"3/5 train for about {minutes:g} minutes: far too short for good images, long enough to see it work")
    training = TrainingSettings(recipe=RECIPE, sources=("t1n", "t2w"), targets=TARGETS, minutes=minutes, seed=seed)
    model = train(out / "set", out / "run", training, display=display)
    display.say(f"4/5 complete {case}, which lacks {' and '.join(TARGETS)}")
    again = CohortSettings(overwrite=True)
    complete_cohort(out / "incomplete", out / "completed", model, settings, again, display=display)
    display.say("5/5 evaluate on phantoms that training never saw")
    evaluation = EvaluationSettings(inference=settings)
    result = evaluate(model, out / "set", out / "evaluation", evaluation, display=display)
    display.print_tables(tables(result["summary"], intervals=display.wide))
    display.print_tables([uncertainty_table(result["uncertainty"])])
    _picture(out, case)
    pages = " and ".join(
        str(page) for page in (report_completion(out / "completed"), report_evaluation(out / "evaluation"))
    )
    display.say(f"done in {time.monotonic() - start:.0f} s: look at {out / 'picture.png'}, {pages}")
    return result


def _write_phantoms(out: Path, seed: int) -> str:
    """Heads to learn from, one that lacks the targets, and its truth; returns the name of that one."""
    form: dict[str, Any] = {"shape": SHAPE, "spacing_mm": SPACING_MM}
    write_cohort(out / "cohort", PATIENTS, seed=seed, **form)
    (case,) = write_cohort(out / "incomplete", 1, seed=seed + 1, missing={0: TARGETS}, lesion=True, **form)
    write_cohort(out / "truth", 1, seed=seed + 1, lesion=True, **form)
    return case


def _picture(out: Path, case: str) -> None:
    """What was there, what was synthesised, and what it should have been, on the slice with most lesion."""
    (files,) = find_studies(out / "truth")
    study = load_study(files)
    lesion = study.labels if study.labels is not None else np.zeros_like(study.mask, np.uint8)
    z = int(lesion.astype(bool).sum((1, 2)).argmax())
    rows = []
    for target in TARGETS:
        paths = [out / "completed" / case / f"{case}-{target}_{kind}.nii.gz" for kind in ("synthetic", "std")]
        synthetic, std = (read_volume(path).data[z] for path in paths)
        real = study.normalised(target)[z]
        row = [(f"{m} acquired", study.normalised(m)[z]) for m in ("t1n", "t2w")]
        rows.append(
            [
                *row,
                (f"{target} synthetic", synthetic),
                (f"{target} truth", real),
                ("|error|", np.abs(synthetic - real)),
                ("standard deviation x4", np.clip(4 * std, 0, 1)),
            ]
        )
    save_picture(out / "picture.png", rows)
