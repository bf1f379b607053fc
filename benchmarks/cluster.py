"""A cohort on a Ray cluster of three nodes, a worker process and a whole node killed in the middle.

Whole studies without FLAIR are completed by one process, then by `crossmr complete --ray` on three raylets of this
machine. When the first study is written one worker gets SIGKILL, when the third is written the raylet of another node.
Every study must be finished, none written twice, and each volume must be, byte for byte, that of the one process.

python benchmarks/cluster.py -o runs/cluster --studies 6
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster
from scans import unpacked

SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
"""A dead raylet is noticed within ten seconds; by default within some thirty."""
READY = re.compile(r"is ready \(.*process (\d+)\)")


def volumes(out: Path) -> dict[str, bytes]:
    """Name → content of every volume."""
    return {path.name: path.read_bytes() for path in out.rglob("*.nii.gz")}


def command(cohort: Path, out: Path, *more: str) -> list[str]:
    """The command that completes a cohort on the CPU."""
    base = ["crossmr", "complete", str(cohort), "-o", str(out), "--device", "cpu", "--targets", "t2f"]
    return [*base, "--precision", "float32", *more]


class Watch:
    """What happens in an output: how often each study was written; and the kills."""

    def __init__(self, out: Path, lines: list[str], nodes: Cluster, doomed: object) -> None:
        self.written: dict[str, set[int]] = {}
        self.kills: list[str] = []
        self._out, self._lines, self._nodes, self._doomed = out, lines, nodes, doomed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            for path in self._out.glob("*/manifest.json"):
                self.written.setdefault(path.parent.name, set()).add(path.stat().st_ino)
            ready = [int(found[1]) for line in self._lines if (found := READY.search(line))]
            if not self.kills and self.written and ready:
                os.kill(ready[0], signal.SIGKILL)
                self.kills.append(f"worker {ready[0]}")
            elif len(self.kills) == 1 and len(self.written) >= 3:
                self._nodes.remove_node(self._doomed, allow_graceful=False)
                self.kills.append("node")

    def close(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


def on_ray(cohort: Path, out: Path) -> dict[str, object]:
    """Complete on three nodes with both kills; returns what was seen."""
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": SOON}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1)
    doomed, lines, start = nodes.add_node(num_cpus=1), list[str](), time.monotonic()
    process = subprocess.Popen(
        command(cohort, out, "--ray", nodes.address), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = Watch(out, lines, nodes, doomed)
    for line in process.stdout or ():
        lines.append(line)
        sys.stdout.write(line)
    watch.close()
    seconds = time.monotonic() - start
    nodes.shutdown()
    return {
        "seconds": round(seconds),
        "exit code": process.wait(),
        "kills": watch.kills,
        "workers lost": sum(" is gone (" in line for line in lines),
        "written twice": sum(len(inodes) > 1 for inodes in watch.written.values()),
    }


def main() -> None:
    """Complete the cohort both ways and print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/cluster"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--studies", type=int, default=6)
    options = parser.parse_args()
    folder = options.out.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    names = sorted(path.stem for path in (options.data / "whole").glob("Brats18_*.npz"))[: options.studies]
    cohort = unpacked(options.data, folder / "cohort", tuple(names))
    for path in (*cohort.rglob("*flair*"), *cohort.rglob("*t2f*"), *cohort.rglob("*seg*")):
        path.unlink()
    start = time.monotonic()
    subprocess.run(command(cohort, folder / "alone"), check=True, stdout=subprocess.DEVNULL)
    row: dict[str, object] = {"studies": len(names), "one process, s": round(time.monotonic() - start)}
    row |= on_ray(cohort, folder / "ray")
    summary = json.loads((folder / "ray" / "manifest.json").read_text())
    alone, ray = volumes(folder / "alone"), volumes(folder / "ray")
    row |= {"finished": summary["finished"], "studies done": len(summary["completed"])}
    row |= {"volumes": len(alone), "the same bytes": sum(ray.get(name) == content for name, content in alone.items())}
    (folder / "cluster.json").write_text(json.dumps(row, indent=2))
    print(json.dumps(row))
    if ray != alone or row["written twice"] or not summary["finished"]:
        raise SystemExit("the cluster did not do what one process does")


if __name__ == "__main__":
    main()
