"""Many processes, one cohort, one output: killed at random moments, and started anew, until every study is finished.

Real studies, each with one contrast hidden, are completed once by one process, then by several with --part 1/1, which
share all of them by claims. Every few seconds one of these gets SIGKILL and is started anew. In the end each study
must be finished, once, and every volume must be, byte for byte, what the one process wrote.

python benchmarks/many_workers.py ../shared/data -o runs/many_workers --studies 8 --workers 4 --kills 6
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scans import unpacked

CONTRASTS = ("t1n", "t1c", "t2w", "t2f")


def cohort(data: Path, place: Path, studies: int) -> Path:
    """Whole studies, one contrast of each left out in turn."""
    if not place.exists():
        names = tuple(path.stem for path in sorted((data / "whole").glob("*.npz"))[:: max(1, 67 // studies)][:studies])
        for number, folder in enumerate(sorted(unpacked(data, place.with_name("whole"), names).iterdir())):
            hidden = CONTRASTS[number % 4]
            shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns(f"*{hidden}*", "*seg*"))
    return place


def start(given: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """A process that completes the cohort; its own summary goes nowhere, a killed one has none."""
    command = [sys.executable, "-c", "from crossmr.cli import main; main()", "complete", str(given), "-o", str(out)]
    return subprocess.Popen([*command, "--quiet", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def share(given: Path, out: Path, workers: int, kills: int, seed: int) -> dict[str, object]:
    """Complete with several processes, killing some; what was seen meanwhile."""
    chance, begun = random.Random(seed), time.perf_counter()
    running = [start(given, out, "--part", "1/1") for _ in range(workers)]
    written: dict[str, set[int]] = {}
    killed, died_at_work, next_kill = 0, 0, begun + 15
    while any(process.poll() is None for process in running):
        for path in out.glob("*/manifest.json"):
            with contextlib.suppress(FileNotFoundError):  # just replaced
                written.setdefault(path.parent.name, set()).add(path.stat().st_mtime_ns)
        if killed < kills and time.perf_counter() > next_kill:
            claims = {claim.name: claim.read_text() for claim in (out / ".crossmr" / "claims").glob("*")}
            victim = chance.choice([k for k, process in enumerate(running) if process.poll() is None])
            running[victim].kill()
            running[victim].wait()
            died_at_work += any(f'"process": {running[victim].pid},' in text for text in claims.values())
            running[victim] = start(given, out, "--part", "1/1")
            killed, next_kill = killed + 1, time.perf_counter() + chance.uniform(4, 16)
        time.sleep(0.1)
    return {
        "seconds": round(time.perf_counter() - begun),
        "killed": killed,
        "killed with a study at hand": died_at_work,
        "written more than once": sum(len(times) > 1 for times in written.values()),
        "exit codes": sorted({process.returncode for process in running}),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    studies = cohort(given.data, given.out / "cohort", given.studies)
    alone, together = given.out / "alone", given.out / "together"
    begun = time.perf_counter()
    if not (alone / "report.html").exists():
        start(studies, alone).wait()
    seconds = time.perf_counter() - begun
    shutil.rmtree(together, ignore_errors=True)
    seen = share(studies, together, given.workers, given.kills, given.seed)
    volumes = [path.relative_to(alone) for path in alone.rglob("*.nii.gz")]
    same = sum(
        (together / path).is_file() and (together / path).read_bytes() == (alone / path).read_bytes()
        for path in volumes
    )
    manifest = json.loads((together / "manifest.json").read_text())
    rows = {
        "studies": len(manifest["verdicts"]),
        "failed": len(manifest["failed"]),
        "finished": manifest["finished"],
        "one process, s": round(seconds),
        **seen,
        "volumes the same": f"{same} of {len(volumes)}",
        "volumes too many": len([*together.rglob("*.nii.gz")]) - len(volumes),
        "left of the run": (together / ".crossmr").exists(),
    }
    for name, value in rows.items():
        print(f"{name:28} {value}")
    (given.out / "many_workers.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
