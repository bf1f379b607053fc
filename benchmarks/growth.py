"""How the cost of `complete` grows: with the number of studies, and with their voxels; and whether anything leaks.

The studies are a few phantoms under as many names as it takes (hard links), each lacking one or two modalities,
completed by the shipped weights. Each cohort runs in a process of its own. What grows with the number leaks; time
should be linear in both.

python benchmarks/growth.py -o runs/growth --counts 1 10 100 1000 --sizes 0.25 0.5 0.75 1 1.25
python benchmarks/growth.py -o runs/growth --counts --sizes --head 512 512 200   # one study of so many voxels, then two
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from crossmr.completion.cohort import complete_cohort
from crossmr.display import Display
from crossmr.main_memory import keep_memory
from crossmr.networks.inference import InferenceSettings
from crossmr.output.report import report_completion
from crossmr.phantom import write_cohort

LACKS = (("t2f",), ("t1c",), ("t1c", "t2f"), ("t2w",))
FORM = {"shape": (48, 56, 40), "spacing_mm": (3.8, 3.8, 4.5)}
WHOLE = (182, 218, 182)
"""Voxels of a phantom of size 1, of 1 mm."""


class Watch(Display):
    """Notes memory and open files at every tenth of the studies, and when each study was finished."""

    def __init__(self, count: int):
        super().__init__(quiet=True)
        self.every, self.done = max(1, count // 10), 0
        self.rows: list[dict[str, int]] = []
        self.finished: list[float] = []

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator["Watch"]:  # type: ignore[override]
        """Be the task, too."""
        yield self

    def advance(self, note: str = "") -> None:
        """Count one study more."""
        self.done += 1
        self.finished.append(time.perf_counter())
        if self.done % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = round(pages * resource.getpagesize() / 2**20)
            self.rows.append({"done": self.done, "MiB": resident, "files": len(os.listdir("/proc/self/fd"))})


def many(folder: Path, count: int) -> Path:
    """A cohort of so many names."""
    eight = folder / "eight"
    if not eight.exists():
        write_cohort(eight, 8, seed=3, missing={i: LACKS[i % len(LACKS)] for i in range(8)}, **FORM)
    return under_names(eight, folder / f"cohort-{count}", count)


def under_names(phantoms: Path, out: Path, count: int) -> Path:
    """Phantoms in turn under so many names, as hard links."""
    cases = sorted(path for path in phantoms.iterdir() if path.is_dir())
    shutil.rmtree(out, ignore_errors=True)
    for number in range(count):
        name = f"P{number:04d}"
        (out / name).mkdir(parents=True)
        for path in cases[number % len(cases)].glob("*.nii.gz"):
            os.link(path, out / name / f"{name}-{path.name.rsplit('-', 1)[1]}")
    return out


def large(folder: Path, size: float) -> Path:
    """Four phantoms without FLAIR of `size` times WHOLE in each direction."""
    out = folder / f"size-{size:g}"
    if not out.exists():
        shape = tuple(round(size * voxels) for voxels in WHOLE)
        write_cohort(out, 4, seed=5, missing={i: ["t2f"] for i in range(4)}, shape=shape, spacing_mm=(1 / size,) * 3)
    return out


def fine(folder: Path, voxels: Sequence[int]) -> Path:
    """A phantom without FLAIR, 256 × 256 × 180 mm, of so many voxels (X, Y, Z): of half as many, each repeated."""
    out = folder / "-".join(map(str, voxels))
    if not out.exists():
        shape = tuple(side // 2 for side in voxels)
        spacing = tuple(mm / side for mm, side in zip((256, 256, 180), shape, strict=True))
        write_cohort(out, 1, seed=5, missing={0: ["t2f"]}, shape=shape, spacing_mm=spacing)
        for path in out.rglob("*.nii.gz"):
            image = nib.load(path)
            stored = np.asarray(image.dataobj)
            for axis in range(3):
                stored = stored.repeat(2, axis)
            nib.save(nib.Nifti1Image(stored, image.affine @ np.diag([0.5, 0.5, 0.5, 1])), path)
    return out


def measure(cohort: Path, out: Path, count: int, answer: Any) -> None:
    """Complete it, in this process, as the command would, and say what that took."""
    keep_memory()
    watch = Watch(count)
    start = time.perf_counter()
    # T2 of a head with skull is refused unless it is named
    named = InferenceSettings(targets=("t1n", "t1c", "t2w", "t2f"))
    summary = complete_cohort(cohort, out, settings=named, display=watch)
    seconds = time.perf_counter() - start
    report_completion(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"studies": count, "completed": len(summary.completed), "seconds": round(seconds, 1)}
    row |= {"seconds a study": round(seconds / count, 2), "peak MiB": round(peak)}
    if len(watch.finished) > 2:  # the first pays for what is built once
        row["seconds a further study"] = round((watch.finished[-1] - watch.finished[0]) / (len(watch.finished) - 1), 2)
    answer.put((row, watch.rows))


def completed(cohort: Path, out: Path, count: int) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """What `measure` says, from a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    child = context.Process(target=measure, args=(cohort, out, count, answer))
    child.start()
    cost: tuple[dict[str, Any], list[dict[str, int]]] = answer.get()
    child.join()
    return cost


def main() -> None:
    """Print a row a cohort, and memory along the longest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/growth"))
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0, 1.25])
    parser.add_argument("--head", type=int, nargs=3, metavar=("X", "Y", "Z"))
    options = parser.parse_args()
    log = options.out / "growth.json"
    rows: list[dict[str, Any]] = []
    along: list[dict[str, int]] = []
    for count in options.counts:
        row, along = completed(many(options.out, count), options.out / f"out-{count}", count)
        rows.append(row)
        print(json.dumps(row), flush=True)
    for noted in along:
        print(json.dumps(noted))
    for size in options.sizes:
        row, _ = completed(large(options.out, size), options.out / f"out-size-{size:g}", 4)
        rows.append({"voxels": math.prod(round(size * voxels) for voxels in WHOLE), **row})
        print(json.dumps(rows[-1]), flush=True)
    for count in (1, 2) if options.head else ():
        cohort = under_names(fine(options.out, options.head), options.out / f"fine-{count}", count)
        row, _ = completed(cohort, options.out / f"out-fine-{count}", count)
        print(json.dumps({"voxels": math.prod(options.head), **row}), flush=True)
    log.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
