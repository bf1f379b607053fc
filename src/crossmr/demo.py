"""The main job on the product's own phantom, end to end, offline, on a laptop."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossmr.completion.cohort import CohortSettings, complete_cohort
from crossmr.data.naming import DISPLAY_NAMES, find_studies
from crossmr.data.prepare import PrepareSettings, default_workers, prepare
from crossmr.data.split import Split
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.display import SILENT, Display
from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from crossmr.evaluation.tables import tables, uncertainty_table
from crossmr.files import LOCK, is_record, locked, refuse_foreign, write_json
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_completion, report_evaluation
from crossmr.phantom import write_cohort
from crossmr.picture import BRIGHTEST, is_picture, save_picture, window, windowed
from crossmr.training.recipes import TINY
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

PATIENTS = 16
HEAD: dict[str, Any] = {"shape": (96, 112, 36), "spacing_mm": (1.6, 1.6, 4.0), "skull": False}
"""Without skull: the shipped weights learnt T2 of heads with skull from phantoms alone."""
SOURCES, TARGETS = ("t1n", "t2w"), ("t1c", "t2f")
RECIPE = replace(TINY, crop=(112, 96))
"""The phantom's slices, up to a multiple of the network's stride."""
MINUTES = 2.0
"""Of training."""
FORMAT = "crossmr-demo"
PICTURES = ("shipped", "trained")
"""What was completed with the shipped weights, and with those trained here."""
LOOK = "as in truth, FLAIR should show the lesion bright and fluid dark; T1 and T2 do not tell what enhances in T1ce"
"""What to see in the pictures."""


def demo(out: Path | str, *, seed: int = 0, minutes: float = MINUTES, display: Display = SILENT) -> Evaluation:
    """Complete a phantom that lacks two contrasts, with the shipped weights; then train own ones, complete, measure.

    OUT, which is new, empty or an earlier demo's, gets demo.json, which says that it is a demo's; cohort/, incomplete/,
    truth/, completed/ and shipped.png from the shipped weights; then set/, run/, trained/, evaluation/ and trained.png.
    Returns the evaluation.

    Raises:
        OutputError: OUT holds something else, or cannot be written.
    """
    with locked(Path(out)):
        return _demo(_claimed(Path(out)), seed, minutes, display)


def _claimed(out: Path) -> Path:
    """The folder, after a mark in it that says that it is a demo's.

    Raises:
        OutputError: it is neither empty nor an earlier demo's, or a file in it has a picture's name.
    """
    path = out / "demo.json"
    if {path.name for path in out.iterdir()} - {LOCK} and not (path.is_file() and is_record(path, FORMAT)):
        raise OutputError(f"{out} is neither empty nor an earlier demo's; name another folder.")
    for name in PICTURES:
        refuse_foreign(out / f"{name}.png", is_picture)
    write_json(path, {"format": FORMAT})
    return out


def _demo(out: Path, seed: int, minutes: float, display: Display) -> Evaluation:
    """The demo, in a folder of its own."""
    start, settings, again = time.monotonic(), InferenceSettings(seed=seed), CohortSettings(overwrite=True)
    display.say(f"1/6 phantom: {PATIENTS + 1} heads with lesions, made in code")
    case = _write_phantoms(out, seed)
    missing = " and ".join(DISPLAY_NAMES[target] for target in TARGETS)
    display.say(f"2/6 complete {case}, which lacks {missing}, with the shipped weights")
    complete_cohort(out / "incomplete", out / "completed", None, settings, again, display=display)
    _picture(out, case, "completed", PICTURES[0])
    display.say(f"look at {out / 'shipped.png'}, acquired, synthetic and true: {LOOK}")
    display.say("3/6 prepare a cohort to train on")
    prepared = PrepareSettings(split=Split.parse("75/5/20", seed), workers=default_workers())
    prepare(out / "cohort", out / "set", prepared, display=display)
    display.say(f"4/6 train a small network for {minutes:g} minutes")
    training = TrainingSettings(recipe=RECIPE, sources=SOURCES, targets=TARGETS, minutes=minutes, seed=seed)
    model = train(out / "set", out / "run", training, display=display)
    display.say(f"5/6 complete {case} with it")
    complete_cohort(out / "incomplete", out / "trained", model, settings, again, display=display)
    _picture(out, case, "trained", PICTURES[1])
    display.say("6/6 evaluate on phantoms that training never saw")
    result = evaluate(model, out / "set", out / "evaluation", EvaluationSettings(inference=settings), display=display)
    display.print_tables(tables(result["summary"], result["contrasts"], intervals=display.wide))
    display.print_tables([uncertainty_table(result["uncertainty_by_target"])])
    pages = report_completion(out / "completed"), report_evaluation(out / "evaluation")
    display.say(
        f"done in {time.monotonic() - start:.0f} s: look at {out / 'trained.png'}, {' and '.join(map(str, pages))}"
    )
    return result


def _write_phantoms(out: Path, seed: int) -> str:
    """Heads to learn from, one that lacks the targets, and its truth; returns the name of that one."""
    write_cohort(out / "cohort", PATIENTS, seed=seed, **HEAD)
    (case,) = write_cohort(out / "incomplete", 1, seed=seed + 1, missing={0: TARGETS}, lesion=True, **HEAD)
    write_cohort(out / "truth", 1, seed=seed + 1, lesion=True, **HEAD)
    return case


def _picture(out: Path, case: str, completed: str, name: str) -> None:
    """What was there, what was synthesised, and what it should have been, on the slice with most lesion."""
    (files,) = find_studies(out / "truth")
    study = load_study(files)
    lesion = study.labels if study.labels is not None else np.zeros_like(study.mask, np.uint8)
    z = int(lesion.astype(bool).sum((1, 2)).argmax())
    volumes = {m: study.normalised(m) for m in (*SOURCES, *TARGETS)}
    shown = {m: window(volume) for m, volume in volumes.items()}
    acquired = [(f"{DISPLAY_NAMES[m]} acquired", windowed(volumes[m][z], shown[m])) for m in SOURCES]
    rows = []
    for target in TARGETS:
        paths = [out / completed / case / f"{case}-{target}_{kind}.nii.gz" for kind in ("synthetic", "std")]
        synthetic, std = (read_volume(path).data[z] for path in paths)
        error = np.abs(synthetic - volumes[target][z]) / BRIGHTEST
        rows.append(
            [
                *acquired,
                (f"{DISPLAY_NAMES[target]} synthetic", windowed(synthetic, shown[target])),
                (f"{DISPLAY_NAMES[target]} truth", windowed(volumes[target][z], shown[target])),
                ("absolute error", error),
                ("standard deviation", std / BRIGHTEST),
            ]
        )
    save_picture(out / f"{name}.png", rows)
