"""Cohorts of 1, 10, 100, 500 studies in one `complete`: seconds a study, peak memory, open files.

The studies are eight phantoms under as many names as it takes (hard links), each lacking one or two modalities,
completed by the shipped weights. Each cohort runs in a process of its own. What grows with the number leaks.

python benchmarks/long_cohort.py -o runs/long --counts 1 10 100 500
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossmr.completion import complete_cohort
from crossmr.display import Display
from crossmr.phantom import write_cohort
from crossmr.report import report_completion

LACKS = (("t2f",), ("t1c",), ("t1c", "t2f"), ("t2w",))
FORM = {"shape": (48, 56, 40), "spacing_mm": (3.8, 3.8, 4.5)}


class Watch(Display):
    """Notes memory and open files at every tenth of the studies."""

    def __init__(self, count: int):
        super().__init__(quiet=True)
        self.every, self.done = max(1, count // 10), 0
        self.rows: list[dict[str, int]] = []

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator["Watch"]:  # type: ignore[override]
        """Be the task, too."""
        yield self

    def advance(self, note: str = "") -> None:
        """Count one study more."""
        self.done += 1
        if self.done % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = round(pages * resource.getpagesize() / 2**20)
            self.rows.append({"done": self.done, "MiB": resident, "files": len(os.listdir("/proc/self/fd"))})


def many(folder: Path, count: int) -> Path:
    """A cohort of so many names."""
    eight = folder / "eight"
    if not eight.exists():
        write_cohort(eight, 8, seed=3, missing={i: LACKS[i % len(LACKS)] for i in range(8)}, **FORM)
    cases = sorted(path for path in eight.iterdir() if path.is_dir())
    out = folder / f"cohort-{count}"
    shutil.rmtree(out, ignore_errors=True)
    for number in range(count):
        name = f"P{number:04d}"
        (out / name).mkdir(parents=True)
        for path in cases[number % len(cases)].glob("*.nii.gz"):
            os.link(path, out / name / f"{name}-{path.name.rsplit('-', 1)[1]}")
    return out


def measure(cohort: Path, out: Path, count: int, answer: Any) -> None:
    """Complete it, in this process, and say what that took."""
    watch = Watch(count)
    start = time.perf_counter()
    result = complete_cohort(cohort, out, display=watch)
    seconds = time.perf_counter() - start
    report_completion(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"studies": count, "completed": len(result["completed"]), "seconds": round(seconds, 1)}
    row |= {"seconds a study": round(seconds / count, 2), "peak MiB": round(peak)}
    answer.put((row, watch.rows))


def main() -> None:
    """Print a row a cohort, and memory along the longest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 500])
    options = parser.parse_args()
    along: list[dict[str, int]] = []
    for count in options.counts:
        cohort, out = many(options.out, count), options.out / f"out-{count}"
        shutil.rmtree(out, ignore_errors=True)
        context = multiprocessing.get_context("spawn")
        answer = context.SimpleQueue()
        child = context.Process(target=measure, args=(cohort, out, count, answer))
        child.start()
        row, along = answer.get()
        child.join()
        print(json.dumps(row), flush=True)
    for row in along:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
