"""Killed at any moment: SIGKILL at random times in `prepare`, `train`, `complete` and `evaluate`, which are run again.

Each verb runs once undisturbed. Then, again and again, it is started, killed after a random fraction of that time and
started anew on what it left, until it has been killed five times and may finish. After every kill all that looks
finished is read: volumes, arrays, weights and JSON must be whole. In the end every file must be, byte for byte, what
the undisturbed run wrote, and nothing else may lie there; except for times, for which cases were found finished, and
for a training's checkpoints, whose moments depend on the clock.

python benchmarks/killed.py -o runs/killed --kills 25
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from crossmr.completion.cohort import complete_cohort
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.data.volume import read_volume
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_completion
from crossmr.phantom import write_cohort
from crossmr.training import loop
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

FORM = {"shape": (40, 48, 32), "spacing_mm": (4.5, 4.5, 5.5)}
TINY = RECIPES["tiny"]
_TRAIN = replace(TINY.synthesis_train, batch_size=2)
RECIPE = replace(
    TINY,
    guidance="last",
    crop=(32, 32),
    representation=replace(TINY.representation, channels=4, multipliers=(1, 2)),
    distribution=replace(TINY.distribution, width=16, blocks=1),
    synthesis=replace(TINY.synthesis, channels=4, multipliers=(1, 2)),
    representation_train=_TRAIN,
    distribution_train=_TRAIN,
    synthesis_train=_TRAIN,
    guidance_train=_TRAIN,
)
"""Seconds, most of them for reading and writing."""
BETWEEN = 5
"""Kills before a verb may finish."""
TIMES = re.compile(rb'"(seconds|created|pace|steps_per_second)": [^,\n}]+')
SETTINGS = InferenceSettings(precision="float32", guidance="sample", samples=2)


def verbs(folder: Path) -> dict[str, Callable[[Path], None]]:
    """What is killed, each as a function of its output; inputs are the undisturbed runs' outputs before it."""

    def complete(out: Path) -> None:
        complete_cohort(folder / "incomplete", out, folder / "train" / "reference" / "model", settings=SETTINGS)
        report_completion(out)

    def learn(out: Path) -> None:
        loop.SECONDS_BETWEEN_CHECKPOINTS = 0.3
        task = {"sources": ("t1n", "t2w"), "targets": ("t1c", "t2f")}
        train(folder / "prepare" / "reference", out, TrainingSettings(RECIPE, steps=12, precision="float32", **task))

    def measure(out: Path) -> None:
        wish = EvaluationSettings(inference=SETTINGS)
        evaluate(folder / "train" / "reference" / "model", folder / "prepare" / "reference", out, wish)

    return {
        "prepare": lambda out: void(prepare(folder / "cohort", out, PrepareSettings(split=Split(0.5, 0.25, 0.25)))),
        "train": learn,
        "complete": complete,
        "evaluate": measure,
    }


def void(_: object) -> None:
    """Forget a result."""


def started(work: Callable[[Path], None], out: Path) -> multiprocessing.Process:
    """The work in a child that has everything imported; what goes wrong in it shows in its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work, args=(out,))
    child.start()
    return child


def check_whole(out: Path) -> int:
    """Read all that is not marked as partial; returns the number of files that are."""
    partial = 0
    for path in out.rglob("*"):
        if ".partial" in str(path):
            partial += 1
        elif path.name.endswith(".nii.gz"):
            read_volume(path)
        elif path.suffix == ".npy":
            np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
    return partial


def contents(out: Path) -> dict[str, str]:
    """Relative name → hash of every file, without the times that JSON notes."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.relative_to(out).parts[0] == "stages":
            continue
        if path.suffix in (".json", ".jsonl"):
            content = TIMES.sub(b"", content)
        if path.name == "manifest.json" and "skipped" in (summary := json.loads(path.read_bytes())):
            if not summary["finished"] or summary["failed"]:
                raise SystemExit(f"{path}: not finished")
            content = b" ".join(sorted(case.encode() for case in (*summary["completed"], *summary["skipped"])))
        if path.suffix == ".html":
            content = re.sub(rb"\d{4}-\d\d-\d\dT[0-9:+]+ in [0-9.]+ s", b"", content)
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def killed(work: Callable[[Path], None], reference: Path, seconds: float, kills: int, seed: str) -> dict[str, object]:
    """Kill and restart until `kills` are done; returns counts."""
    wanted, rng = contents(reference), random.Random(seed)
    done = finished_early = partial = rounds = 0
    while done < kills:
        out = reference.with_name("killed")
        shutil.rmtree(out, ignore_errors=True)
        here, rounds = 0, rounds + 1
        while here < BETWEEN and done < kills:
            child = started(work, out)
            child.join(rng.uniform(0, seconds))
            if child.is_alive():
                os.kill(child.pid or 0, signal.SIGKILL)
                child.join()
                here, done = here + 1, done + 1
                partial += check_whole(out) > 0
            elif child.exitcode:
                raise SystemExit(f"{reference.parent.name}: failed on what a kill had left")
            else:
                finished_early += 1
                break
        child = started(work, out)
        child.join()
        if child.exitcode:
            raise SystemExit(f"{reference.parent.name}: failed on what a kill had left")
        found = contents(out)
        different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if different:
            raise SystemExit(f"{reference.parent.name}: differs from the undisturbed run in {different[:8]}")
    return {
        "kills": done,
        "rounds": rounds,
        "finished before the kill": finished_early,
        "left something partial": partial,
    }


def main() -> None:
    """Kill all verbs and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/killed"))
    parser.add_argument("--kills", type=int, default=25, help="of each verb")
    parser.add_argument("--verbs", nargs="+", default=["prepare", "train", "complete", "evaluate"])
    options = parser.parse_args()
    folder = options.out
    shutil.rmtree(folder, ignore_errors=True)
    write_cohort(folder / "cohort", 4, **FORM)
    write_cohort(folder / "incomplete", 4, seed=1, missing=dict.fromkeys(range(4), ("t1c", "t2f")), **FORM)
    for name, work in verbs(folder).items():
        reference = folder / name / "reference"
        start = time.monotonic()
        child = started(work, reference)
        child.join()
        seconds = time.monotonic() - start
        if child.exitcode:
            raise SystemExit(f"{name} fails undisturbed")
        again = started(work, reference.with_name("again"))
        again.join()
        if contents(reference) != contents(reference.with_name("again")):
            raise SystemExit(f"{name}: two undisturbed runs differ")
        if name in options.verbs:
            counts = killed(work, reference, seconds, options.kills, name)
            print(json.dumps({"verb": name, "seconds": round(seconds, 1), **counts}), flush=True)


if __name__ == "__main__":
    main()
