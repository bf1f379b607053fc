"""Training on a set several times larger than the memory allowed.

One phantom under many names (hard links) is prepared: every name's arrays are files of their own. Then recipe `tiny`
is trained on a few of the studies and on all of them, each in a process whose control group allows it `--limit-mib`,
the cached pages of the set included. Needs Linux and the right to make a control group.

python benchmarks/larger_than_memory.py -o runs/larger --studies 80 --limit-mib 1536
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from growth import under_names

from crossmr.data.prepare import PrepareSettings, default_workers, prepare
from crossmr.data.split import Split
from crossmr.display import Display
from crossmr.phantom import write_cohort
from crossmr.training.recipes import RECIPES
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
NAMES = {"limit": ("memory.limit_in_bytes", "memory.max"), "peak": ("memory.max_usage_in_bytes", "memory.peak")}


def cohort(folder: Path, studies: int) -> Path:
    """One phantom of 240 × 240 × 155 voxels under so many names."""
    one = folder / "one"
    if not one.exists():
        write_cohort(one, 1, seed=11, shape=(240, 240, 155), spacing_mm=(0.85, 0.85, 1.1))
    return under_names(one, folder / f"cohort-{studies}", studies)


def forget(folder: Path) -> int:
    """Drop a set's pages, which would be on the preparation's account, from the cache; its bytes."""
    paths = list(folder.rglob("*.npy"))
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(path.stat().st_size for path in paths)


@contextlib.contextmanager
def control_group(limit: int) -> Any:
    """A new control group that allows so many bytes; its folder and the place of its limit and peak files."""
    version = 1 if (ROOTS[1] / "cgroup.controllers").exists() else 0
    group = ROOTS[version] / f"crossmr-{os.getpid()}"
    try:
        group.mkdir()
        (group / NAMES["limit"][version]).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"{group} cannot be made ({error.strerror}); run it as root of a machine.") from error
    try:
        yield group, group / NAMES["peak"][version]
    finally:
        group.rmdir()


def trained(group: Path, prepared: Path, run: Path, steps: int, answer: Any) -> None:
    """Train within the group, and say what that took."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    start = time.perf_counter()
    train(prepared, run, TrainingSettings(RECIPES["tiny"], steps=steps), display=Display(quiet=True))
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    paces = [line["steps_per_second"] for line in lines if line["stage"] == "synthesis" and "steps_per_second" in line]
    answer.put(
        {
            "seconds": round(seconds, 1),
            "synthesis, median steps a second": round(sorted(paces)[len(paces) // 2], 2),
            "own peak, MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    )


def main() -> None:
    """Prepare both sets and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/larger"))
    parser.add_argument("--studies", type=int, default=80)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--limit-mib", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for studies in (options.few, options.studies):
        prepared = options.out / f"set-{studies}"
        wish = PrepareSettings(split=Split(1, 0, 0), workers=default_workers())
        prepare(cohort(options.out, studies), prepared, wish, display=Display())
        size = forget(prepared)
        run = options.out / f"run-{studies}"
        shutil.rmtree(run, ignore_errors=True)
        with control_group(options.limit_mib * 2**20) as (group, peak):
            context = multiprocessing.get_context("spawn")
            answer = context.SimpleQueue()
            child = context.Process(target=trained, args=(group, prepared, run, options.steps, answer))
            child.start()
            while child.is_alive() and answer.empty():
                time.sleep(0.5)
            cost = {} if answer.empty() else answer.get()
            child.join()
            row = {"studies": studies, "set, MiB": round(size / 2**20), "allowed, MiB": options.limit_mib}
            row |= {"peak with cached pages, MiB": round(int(peak.read_text()) / 2**20), "exit": child.exitcode}
            print(json.dumps({**row, **cost}), flush=True)


if __name__ == "__main__":
    main()
