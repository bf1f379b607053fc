"""What a cohort of many studies costs `complete --part` beside the synthesis: listing, joining, skipping, reporting.

The cohort is one tiny phantom, linked under as many names as studies: a folder and four files each. Every step is the
command that a user runs, in a process of its own:

list     the first process of a run: it lists all studies, and completes the one study of its part
join     a second process: it reads the list, and completes one study
skip     a process whose part is a tenth of the cohort, all of it finished before (manifests copied from a real one)
status   crossmr status
finish   manifest.json and status.csv of all, as whoever finishes last writes them
report   the report's pages

For each: seconds, seconds of processor time (which tell more where a machine is shared), the largest resident memory,
and, with --calls (needs strace), the system calls. `start` is the same for a cohort of one study.

python benchmarks/many_studies.py -o runs/many --counts 1000 10000 100000 --calls
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from crossmr.phantom import write_cohort

LINKS = 40_000
"""Names of one file at most; ext4 allows 65,000."""
FINISH = (
    "import sys; from pathlib import Path; from crossmr.completion.cohort import finish_cohort;"
    "from crossmr.completion.layout import Layout; finish_cohort(Layout(Path(sys.argv[1])))"
)
REPORT = (
    "import sys; from pathlib import Path; from crossmr.output.report import report_completion;"
    "report_completion(Path(sys.argv[1]))"
)
CROSSMR = "import sys; from crossmr.cli import main; sys.argv[0] = 'crossmr'; sys.exit(main())"


def make_cohort(folder: Path, studies: int) -> Path:
    """One phantom under many names: T1, T1ce, T2 and a segmentation each."""
    cohort, source = folder / "cohort", folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(cohort, ignore_errors=True)
    write_cohort(source, 1, shape=(40, 48, 32), spacing_mm=(4.5, 4.5, 5.5))
    files = {m: next(source.rglob(f"*-{m}.nii.gz")) for m in ("t1n", "t1c", "t2w", "seg")}
    for number in range(studies):
        case = f"SITE{number % 20:02d}-{number:06d}-000"
        place = cohort / case
        place.mkdir(parents=True)
        for modality, path in files.items():
            if number and number % LINKS == 0:
                copy = path.with_name(f"{number}-{path.name.rpartition('/')[2]}")
                shutil.copy(path, copy)
                files[modality] = path = copy
            os.link(path, place / f"{case}-{modality}.nii.gz")
    return cohort


def measure(code: str, *words: str, calls: bool) -> dict[str, float]:
    """Seconds, processor seconds, MiB at most and system calls of a process."""
    command = [sys.executable, "-c", code, *words]
    usage = _usage(command)
    if calls:
        usage["calls"] = _calls(command)
    return usage


def _calls(command: Sequence[str]) -> float:
    """The system calls of a process, its threads and its children."""
    with tempfile.NamedTemporaryFile("r") as table:
        subprocess.run(["strace", "-f", "-c", "-o", table.name, *command], capture_output=True, check=False)
        total = re.search(r"^100\.00\s+\S+\s+(?:\S+\s+)?(\d+)\s", table.read(), re.M)
    return float(total[1]) if total else float("nan")


def _usage(command: Sequence[str]) -> dict[str, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read() if process.stderr else b""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise SystemExit(f"{command}: {process.returncode}\n{said.decode()[-2000:]}")
    seconds = time.perf_counter() - start
    return {"s": seconds, "processor": used.ru_utime + used.ru_stime, "MiB": used.ru_maxrss / 1024}


def fabricate(out: Path, cohort: Path) -> None:
    """A manifest for each case that has none, copied from one that has."""
    real = next(out.glob("*/manifest.json"))
    text, name = real.read_text(), real.parent.name
    for case in os.listdir(cohort):
        path = out / case / "manifest.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace(name, case))


def steps(folder: Path, studies: int, *, calls: bool) -> dict[str, dict[str, float]]:
    """Every step with a cohort of so many studies; `calls` doubles those that can be done again."""
    cohort, out = make_cohort(folder, studies), folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, code: str, *words: str) -> None:
        found[name] = measure(code, *words, calls=calls and name != "list")
        told = ", ".join(f"{value:.1f} {unit}" for unit, value in found[name].items())
        print(f"{studies} studies, {name}: {told}", flush=True)

    complete = ("complete", str(cohort), "-o", str(out), "--part")
    if calls:  # which begins the run: counted first, and begun anew for the clock
        begun = _calls([sys.executable, "-c", CROSSMR, *complete, f"1/{studies}"])
        shutil.rmtree(out)
    note("list", CROSSMR, *complete, f"1/{studies}")
    if calls:
        found["list"]["calls"] = begun
        print(f"{studies} studies, list: {begun:.0f} calls", flush=True)
    if studies > 1:
        note("join", CROSSMR, *complete, f"2/{studies}")
        fabricate(out, cohort)
        note("skip", CROSSMR, *complete, "1/10")
        note("status", CROSSMR, "status", str(out))
        note("finish", FINISH, str(out))
        note("report", REPORT, str(out))
    shutil.rmtree(out)
    shutil.rmtree(cohort)
    return found


def main() -> None:
    """Measure cohorts of the sizes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/many"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--calls", action="store_true")
    wish = parser.parse_args()
    wish.out.mkdir(parents=True, exist_ok=True)
    found = {count: steps(wish.out, count, calls=wish.calls) for count in (1, *wish.counts)}
    (wish.out / "many_studies.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
