"""A plan for cohorts and clusters that nobody has here: `complete --part` simulated, from what was measured here.

Every worker completes its part of the studies, one after the other, while the next is read. Workers share one disk,
which serves so many operations and so many megabytes a second. They die at random moments, lose the studies in hand and
begin again; what they had claimed is theirs again once the claim is old. The first worker lists the cohort before
anybody begins; whoever finishes last writes the tables and the report. ASSUMPTIONS says what was measured and what was
assumed; docs/scale.md has the table.

python benchmarks/scale.py -o runs/scale          needs simpy: pip install -e ".[dev]"
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import simpy

BLOCKS = 20_000
"""Studies are simulated one by one up to so many, and in blocks above, per run."""


@dataclass(frozen=True)
class Machine:
    """What one worker is."""

    name: str
    seconds: float
    """Of a study, while the next one is read."""
    cores: int
    spread: float = 0.3
    """Half the width of the distribution of a study's seconds, as a fraction."""
    start: float = 10.0
    """Seconds until the first study is read: interpreter, PyTorch, weights."""


@dataclass(frozen=True)
class Disk:
    """What all workers share."""

    name: str
    operations: float
    """That it serves in a second."""
    megabytes: float
    """That it moves in a second."""
    latency: float
    """Seconds of one operation, of those that wait for one another."""


@dataclass(frozen=True)
class Costs:
    """What a study costs beside its synthesis."""

    operations: float = 190
    """On the shared disk, of one study completed."""
    megabytes: float = 14
    """Read and written."""
    listing: float = 0.0009
    """Processor seconds of the one process that lists."""
    listing_operations: float = 5
    """One after the other."""
    listing_kib: float = 9.5
    """Memory of that process."""
    line_bytes: float = 8
    """That every other process reads of the list, for each study of the cohort."""
    finish: float = 0.0006
    """Processor seconds of tables and report."""
    finish_operations: float = 12
    """One after the other."""


@dataclass(frozen=True)
class Failures:
    """How workers die."""

    per_hour: float = 0.0
    """Of each worker."""
    requeue: float = 120.0
    """Seconds until the scheduler starts the part again."""
    stale: float = 300.0
    """Seconds after which the claim of another machine is old."""
    in_hand: int = 2
    """Studies that a worker has claimed: one that is completed, one that is read."""


@dataclass
class Outcome:
    """What a run came to."""

    hours: float = 0.0
    core_hours: float = 0.0
    done: int = 0
    """Studies that were finished."""
    redone: int = 0
    """Studies that were begun and lost."""
    deaths: int = 0
    listing_minutes: float = 0.0
    listing_gib: float = 0.0
    finish_minutes: float = 0.0
    disk: float = 0.0
    """How busy the disk was while studies were completed, from 0 to 1."""
    parts: list[int] = field(default_factory=list)
    """Studies that each part finished."""

    @property
    def limit(self) -> str:
        """What most of the time went to."""
        if self.disk > 0.9:
            return "disk"
        return "listing, report" if (self.listing_minutes + self.finish_minutes) / 60 > self.hours / 2 else "workers"


class Run:
    """One run, as SimPy sees it."""

    def __init__(
        self, studies: int, workers: int, machine: Machine, disk: Disk, costs: Costs, failures: Failures, seed: int = 0
    ) -> None:
        self.environment = simpy.Environment()
        self.queue = simpy.Resource(self.environment)
        self.machine, self.disk, self.costs, self.failures = machine, disk, costs, failures
        self.studies, self.workers, self.random = studies, workers, random.Random(seed)
        self.block = max(1, studies // BLOCKS)
        self.outcome = Outcome(parts=[0] * workers)
        self.busy = 0.0

    def go(self) -> Outcome:
        """Simulate it."""
        costs, disk, outcome = self.costs, self.disk, self.outcome
        listing = self.studies * (costs.listing + costs.listing_operations * disk.latency)
        finish = self.studies * (costs.finish + costs.finish_operations * disk.latency)
        shares = [len(range(k, self.studies, self.workers)) for k in range(self.workers)]
        parts = [self.environment.process(self._part(k, share)) for k, share in enumerate(shares)]
        self.environment.run(self.environment.all_of(parts))
        seconds = self.environment.now
        outcome.done = sum(outcome.parts)
        outcome.hours = (listing + seconds + finish) / 3600
        outcome.core_hours += (
            self.machine.cores * (listing * self.workers + finish) / 3600
        )  # the others wait for the list
        outcome.listing_minutes, outcome.finish_minutes = listing / 60, finish / 60
        outcome.listing_gib = 0.35 + costs.listing_kib * self.studies / 1024**2
        outcome.disk = self.busy / seconds if seconds else 0.0
        return outcome

    def _part(self, number: int, left: int) -> Iterator[Any]:
        """A worker's life, or lives: it joins, completes studies, dies and begins again."""
        env, free_at = self.environment, 0.0
        while left:
            began = env.now
            dies = began + self._life()
            yield env.timeout(self.machine.start)
            yield env.process(self._use(1, self.costs.line_bytes * self.studies / 1e6))
            while left and env.now < dies:
                if left <= self.failures.in_hand and env.now < free_at:  # claimed by the life before
                    yield env.timeout(free_at - env.now)
                block = min(self.block, left)
                finished = yield from self._complete(block, dies)
                left -= finished
                self.outcome.parts[number] += finished
            self.outcome.core_hours += self.machine.cores * (env.now - began) / 3600
            if left:
                self.outcome.deaths += 1
                self.outcome.redone += min(left, self.failures.in_hand)
                free_at = env.now + self.failures.stale
                yield env.timeout(self.failures.requeue)

    def _complete(self, block: int, dies: float) -> Iterator[Any]:
        """Complete so many studies, as far as the worker's life goes; how many were finished."""
        env, began = self.environment, self.environment.now
        per_study = self.machine.seconds * (1 + self.machine.spread * self.random.uniform(-1, 1) / math.sqrt(block))
        reading = env.process(self._use(block * self.costs.operations, block * self.costs.megabytes))
        if began + block * per_study > dies:
            yield env.timeout(max(0.0, dies - began))
            return int((dies - began) / per_study) if per_study else 0
        yield env.timeout(block * per_study) & reading
        return block

    def _use(self, operations: float, megabytes: float) -> Iterator[Any]:
        """Keep the disk busy."""
        seconds = max(operations / self.disk.operations, megabytes / self.disk.megabytes)
        with self.queue.request() as turn:
            yield turn
            yield self.environment.timeout(seconds)
        self.busy += seconds

    def _life(self) -> float:
        return self.random.expovariate(self.failures.per_hour / 3600) if self.failures.per_hour else math.inf


CPU = Machine("CPU", seconds=2.7, cores=2)
GPU = Machine("GPU", seconds=1.2, cores=4)
NFS = Disk("NFS", operations=20_000, megabytes=1_000, latency=0.0005)
PARALLEL = Disk("parallel", operations=100_000, megabytes=20_000, latency=0.0005)
ASSUMPTIONS = {
    "CPU": "a worker of two threads, 2.7 s a study with the next one read meanwhile: measured (docs/performance.md)",
    "GPU": "1.2 s a study: the 1.15 s of processor time around the networks, measured, and the networks' time beside "
    "it, assumed to be less; four cores",
    "file operations": "190 on the shared disk, counted with strace, and 14 MB of a study of 240 × 240 × 155",
    "listing": "0.9 ms of processor time and 5 operations a study, 9.5 KiB of memory: measured with 10⁵ studies",
    "joining": "8 bytes a study of the cohort: the list of where lines begin",
    "end": "0.6 ms of processor time and 12 operations a study for tables and report: measured with 10⁵ studies",
    "NFS": "20,000 operations and 1,000 MB a second, 0.5 ms an operation: assumed, of one server",
    "parallel": "100,000 operations and 20,000 MB a second, 0.5 ms an operation: assumed, of a parallel file system",
    "death": "each worker once in 100 hours; two minutes until its part begins again, 10 s until it reads: assumed; "
    "five minutes until a claim of another machine is old, two studies begun again: so it is written",
    "studies": "all alike, their seconds spread by ± 30 %; none fails",
}


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def main() -> None:
    """Simulate, print the table and keep every number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--studies", type=int, nargs="+", default=[10**3, 10**5, 10**6])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--deaths", type=float, default=0.01, help="per worker and hour")
    wish = parser.parse_args()
    wish.out.mkdir(parents=True, exist_ok=True)
    kept = []
    print(
        "| disk | workers | studies | hours | core-hours | deaths | studies begun again | disk busy | listing, min "
        "| limit |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for disk in (NFS, PARALLEL):
        for machine in (CPU, GPU):
            for studies in wish.studies:
                for workers in wish.workers:
                    found = Run(studies, workers, machine, disk, Costs(), Failures(wish.deaths)).go()
                    told = f"{_short(found.hours)} | {_short(found.core_hours)} | {found.deaths} | {found.redone}"
                    told += f" | {100 * found.disk:.0f} % | {_short(found.listing_minutes)} | {found.limit}"
                    print(f"| {disk.name} | {workers:,} {machine.name} | {studies:,} | {told} |", flush=True)
                    body = {**asdict(found), "limit": found.limit, "parts": None}
                    kept.append(
                        {"disk": disk.name, "machine": machine.name, "workers": workers, "studies": studies, **body}
                    )
    (wish.out / "scale.json").write_text(json.dumps({"assumptions": ASSUMPTIONS, "runs": kept}, indent=2))


if __name__ == "__main__":
    main()
