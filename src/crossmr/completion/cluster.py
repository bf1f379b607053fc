"""A cohort completed on a Ray cluster: a worker a device, each with the model in memory and several studies under way.

The driver lists the studies, gives them to workers and sums up. A worker is a Ray actor. It reads and writes on the
processors of its node while the device synthesises; it is given few studies at a time, so little waits in memory.
Studies do not pass through Ray: every machine sees the cohort and OUT under the same path. What a dead worker had is
given to another one. That none is done twice is the claims' business, as it is with --part.
"""

import contextvars
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crossmr.completion.case import Run, images_of
from crossmr.completion.cohort import (
    CohortSummary,
    Job,
    complete_studies,
    finish_cohort,
    open_run,
    paths_of,
    with_studies,
)
from crossmr.completion.inputs import Inputs
from crossmr.completion.study import memory_needed
from crossmr.completion.work import find_run
from crossmr.display import LOG, Display
from crossmr.errors import ConfigError, CrossmrError, OutputError
from crossmr.main_memory import available_memory, keep_memory, reusable_memory
from crossmr.parts import Part, me

CPUS = 4
"""A worker of a node without a GPU has so many processors, or all if there are fewer."""
MEMORY = 4_000_000_000
"""Bytes of main memory for each of them, by which their number is limited, too."""
UNDER_WAY = 3
"""Studies that a worker has at once: one is read, one synthesised, one written."""
MOST_UNDER_WAY = 8
"""With a GPU, which is faster than one reader, there may be one for each processor, up to this."""
DEATHS = 3
"""A node on which so many workers died, none of which finished a study, is not used any more."""
SECONDS_BETWEEN_LOOKS = 2.0
"""How often the nodes are looked at: new ones get workers, too."""
SECONDS_WITHOUT_WORKERS = 600.0
"""How long the driver waits while no worker is ready, for one to start or a node to come."""
SECONDS_TO_STOP = 5.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
"""Nothing is reported to Ray's makers; none of Ray's own lines is printed among these."""
INSTALL = 'Ray is not installed. Install it on every machine: pip install "crossmr[cluster]"'


class RecordingDisplay(Display):
    """Lines that a worker says: kept in the log by itself, printed by the driver."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep one line."""
        self.lines.append(text)
        self._keep(text)


@dataclass(frozen=True)
class Outcome:
    """What became of one study."""

    summary: CohortSummary
    lines: list[str]


class Room:
    """Main memory of one process for several studies: those that do not fit beside others wait for them."""

    def __init__(self) -> None:
        self._taken: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def of(self, needed: int) -> Iterator[None]:
        """Wait until there are so many bytes, or nobody else has any."""
        with self._changed:
            while self._taken and sum(self._taken) + needed > available_memory() + reusable_memory():
                self._changed.wait(timeout=1)
            self._taken.append(needed)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(needed)
                self._changed.notify_all()


class Worker:
    """The model on one device; it completes the studies that it is given, several at once, in a thread each."""

    def __init__(self) -> None:
        keep_memory()
        self._room, self._held = Room(), ExitStack()

    def open(self, job: Job, root: Path) -> dict[str, Any]:
        """Load the model and open the output; returns who this is, and what decides the voxels.

        Raises:
            CrossmrError: this machine does not see the same folders, or cannot use the model.
        """
        self._context = contextvars.copy_context()  # which will have the lock, for all threads
        return self._context.run(self._open, job, root)

    def _open(self, job: Job, root: Path) -> dict[str, Any]:
        for path in (root, job.layout.records):
            if not path.exists() or (path != root and find_run(job.out) is None):
                raise OutputError(f"{path} is not there as it is where crossmr was started. Share it between machines.")
        self._held.enter_context(job.layout.locked(shared=True))
        work = self._held.enter_context(closing(job.work()))
        self._run = open_run(job, work, Display(quiet=True))
        return {"me": me(), "settings": {**self._run.record, "crossmr": version("crossmr")}}

    def complete(self, inputs: Inputs) -> Outcome:
        """Complete the one study of `inputs`; what goes wrong with it is in the outcome.

        The process ends where the device or the memory failed, and whatever follows would fail by as well.
        """
        return self._context.copy().run(self._complete, inputs)

    def _complete(self, inputs: Inputs) -> Outcome:
        heard, summary = RecordingDisplay(), CohortSummary()
        run = replace(self._run, inputs=inputs, display=heard.log_to(self._run.layout.records / LOG))
        (case,) = inputs.cases
        needed = (memory_needed(images_of(files), run.model, run.settings) for files in inputs.studies)
        with self._room.of(next(needed, MEMORY)):  # of DICOM nobody knows yet
            if not complete_studies(run, summary, lambda case: None):
                run.work.forget_failure(case)
                os._exit(1)
        return Outcome(summary, heard.lines)

    def close(self) -> None:
        """Give back what is claimed, and the lock; whatever is under way is not written."""
        self._context.run(self._held.close)


@dataclass(frozen=True)
class Share:
    """What a worker takes of a node."""

    gpus: int
    cpus: int
    under_way: int


def shares(resources: Mapping[str, float], *, gpus: bool) -> list[Share]:
    """The workers of a node with these resources, by Ray's names; with `gpus`, one for each GPU and none without."""
    cpus = int(resources.get("CPU", 0))
    if gpus:
        count = int(resources.get("GPU", 0))
        each = cpus // count if count else 0
        return count * [Share(1, each, max(UNDER_WAY, min(MOST_UNDER_WAY, each)))]
    if not cpus:
        return []
    count = max(1, min(cpus // CPUS, int(resources.get("memory", MEMORY * cpus) // MEMORY)))
    return count * [Share(0, min(cpus, max(CPUS, cpus // count)), UNDER_WAY)]


@dataclass(eq=False)
class _Member:
    """A worker, as the driver sees it."""

    actor: Any
    node: str
    host: str
    under_way: int
    me: Mapping[str, Any] | None = None
    """Who it is; None until it has loaded the model."""
    cases: list[str] = field(default_factory=list)
    """What it has been given."""
    alone: bool = False
    """Whether it has a study with which another worker died, and is given no other one meanwhile."""

    @property
    def free(self) -> bool:
        return self.me is not None and not self.alone and len(self.cases) < self.under_way


@dataclass
class Queue:
    """The studies that no worker has."""

    fresh: deque[str]
    suspects: deque[str] = field(default_factory=deque)
    """Those with which a worker died: each is given to one that has nothing else."""

    def take(self, *, idle: bool) -> tuple[str, bool] | None:
        """The next one for a worker, and whether it is a suspect."""
        if idle and self.suspects:
            return self.suspects.popleft(), True
        return (self.fresh.popleft(), False) if self.fresh else None

    def __bool__(self) -> bool:
        return bool(self.fresh or self.suspects)


class Pool:
    """The workers of a cluster: on every node that is alive, as many as it has room for."""

    def __init__(self, ray: Any, job: Job, run: Run, display: Display) -> None:
        self._ray, self._job, self._run, self._display = ray, job, run, display
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._gpus = job.settings.device != "cpu" and any(node["Resources"].get("GPU") for node in nodes)
        self._members: list[_Member] = []
        self._waiting: dict[Any, tuple[_Member, str]] = {}
        """What Ray has been asked for → of which worker, and the study; '' of its start."""
        self._deaths: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._settings: Mapping[str, Any] | None = None
        self._looked, self._seen = 0.0, time.monotonic()

    @property
    def ready(self) -> int:
        """Workers that have loaded the model."""
        return sum(member.me is not None for member in self._members)

    @property
    def busy(self) -> bool:
        """Whether any study is under way."""
        return any(member.cases for member in self._members)

    def grow(self) -> None:
        """Start the workers that are missing.

        Raises:
            ConfigError: no node can be used, or none has room for a worker.
        """
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        for node in (node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._refused):
            wanted = shares(node["Resources"], gpus=self._gpus)
            here = sum(member.node == node["NodeID"] for member in self._members)
            for share in wanted[here:]:
                self._start(node, share)
        if self.ready:
            self._seen = now
        elif self._refused and not self._members:
            raise ConfigError(f"No machine of the cluster can be used: {next(iter(self._refused.values()))}")
        elif now - self._seen > SECONDS_WITHOUT_WORKERS:
            raise ConfigError(
                f"No worker has started for {SECONDS_WITHOUT_WORKERS:.0f} s: the cluster has no free GPU, or no free "
                "processors. The same command goes on where it stopped."
            )

    def _start(self, node: Mapping[str, Any], share: Share) -> None:
        on_node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                max_concurrency=share.under_way + 1,  # and `close`
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=on_node(node["NodeID"], soft=False),
            )
            .remote()
        )
        member = _Member(actor, node["NodeID"], node["NodeManagerHostname"], share.under_way)
        self._members.append(member)
        self._waiting[actor.open.remote(self._job, self._run.inputs.root)] = member, ""

    def feed(self, queue: Queue) -> None:
        """Give studies to all workers that can take one, first to those that have least."""
        while queue and (free := [member for member in self._members if member.free]):
            member = min(free, key=lambda one: len(one.cases))
            if (given := queue.take(idle=not member.cases)) is None:
                return
            case, member.alone = given
            member.cases.append(case)
            self._waiting[member.actor.complete.remote(self._run.inputs.only(case))] = member, case

    def gather(self, queue: Queue) -> Iterator[tuple[str, Outcome]]:
        """What has become of studies by now; those of dead workers go back into the queue.

        Raises:
            CrossmrError: a worker cannot write any more.
        """
        if not self._waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS / 10)
            return
        errors = self._ray.exceptions
        self._ray.wait([*self._waiting], num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        done, _ = self._ray.wait([*self._waiting], num_returns=len(self._waiting), timeout=0)
        for reference in done:
            if (known := self._waiting.pop(reference, None)) is None:  # of a worker that died
                continue
            member, case = known
            try:
                said = self._ray.get(reference)
            except errors.RayTaskError as error:
                self._went_wrong(member, case, error)
            except errors.RayError as error:
                self._died(member, queue, type(error).__name__)
            else:
                if not case:
                    self._has_joined(member, said)
                    continue
                member.cases.remove(case)
                member.alone = False
                self._deaths.pop(member.node, None)
                yield case, said

    def _has_joined(self, member: _Member, said: Mapping[str, Any]) -> None:
        self._settings = self._settings or said["settings"]
        other = [name for name, value in said["settings"].items() if value != self._settings[name]]
        if other:
            what = ", ".join(f"{name} {said['settings'][name]}, elsewhere {self._settings[name]}" for name in other)
            self._refuse(member, f"{member.host} would make other voxels ({what}); use one version, or --precision")
            return
        member.me = said["me"]
        what = f"{self._settings['device']}, {self._settings['precision']}, process {member.me['process']}"
        self._display.say(f"A worker on {member.host} is ready ({what}); {self.ready} in all.")

    def _went_wrong(self, member: _Member, case: str, error: Any) -> None:
        cause = error.cause if isinstance(error.cause, CrossmrError) else OutputError(f"A worker failed: {error}")
        if case:
            raise cause from error
        self._refuse(member, f"{member.host}: {cause}")

    def _refuse(self, member: _Member, why: str) -> None:
        self._display.say(f"Not used: {why}")
        self._refused[member.node] = why
        self._members.remove(member)
        self._ray.kill(member.actor)

    def _died(self, member: _Member, queue: Queue, why: str) -> None:
        """Give what a dead worker had to others."""
        if member not in self._members:
            return
        self._members.remove(member)
        self._ray.kill(member.actor)  # which may only be out of reach
        self._waiting = {reference: known for reference, known in self._waiting.items() if known[0] is not member}
        queue.suspects.extend(member.cases)
        if member.me is not None:
            self._run.work.claims.disown(member.cases, member.me)
        had = f"; others get {', '.join(member.cases)}" if member.cases else ""
        self._display.say(f"A worker on {member.host} is gone ({why}){had}.")
        self._deaths[member.node] = self._deaths.get(member.node, 0) + 1
        if self._deaths[member.node] >= DEATHS:
            self._refused[member.node] = f"{member.host}: {DEATHS} workers died there, one after the other"
            self._display.say(f"Not used: {self._refused[member.node]}")

    def close(self) -> None:
        """End all workers; what they have claimed is given back."""
        closing = [member.actor.close.remote() for member in self._members if member.me is not None]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=SECONDS_TO_STOP)
        for member in self._members:
            self._ray.kill(member.actor)


def complete_on_ray(job: Job, address: str, display: Display) -> CohortSummary:
    """Complete a cohort on a Ray cluster; see `complete_cohort`.

    Args:
        job: what is completed, and with what; its model is a name or a folder.
        address: 'auto' (the cluster that runs here, or that of RAY_ADDRESS), HOST:PORT, or 'local' (a new one
            of this machine alone).
        display: where messages and progress go.

    Raises:
        CrossmrError: as `complete_cohort`; ConfigError: no Ray, or no such cluster.
    """
    job = _for_workers(job)
    layout = job.layout
    with _connected(address, display) as ray, layout.locked(shared=True), closing(job.work()) as work:
        here = replace(job, settings=replace(job.settings, device="cpu"))
        run = with_studies(open_run(here, work, display), job.cohort)
        with display.logged(layout.records / LOG) as logging:
            job = replace(job, settings=replace(job.settings, register=run.settings.register))  # always of DICOM
            summary = _complete_all(Pool(ray, job, run, logging), replace(run, display=logging), display)
        if work.is_last():
            finish_cohort(layout)
    return summary


def _complete_all(pool: Pool, run: Run, unlogged: Display) -> CohortSummary:
    """Give all studies to workers until each has an outcome; what workers say is in the log already."""
    summary, queue, start, count = CohortSummary(), Queue(deque(run.inputs.cases)), 0.0, 0
    try:
        with run.display.task("complete", len(queue.fresh)) as task:
            while queue or pool.busy:
                pool.grow()
                pool.feed(queue)
                start = start or (time.monotonic() if pool.ready else 0.0)
                for case, outcome in pool.gather(queue):
                    summary.merge(outcome.summary)
                    for line in outcome.lines:
                        unlogged.say(line)
                    count += case not in outcome.summary.skipped
                    per_hour = 3600 * count / max(1e-9, time.monotonic() - start)
                    task.advance(f"{case}; {pool.ready} workers, {per_hour:.3g} studies an hour")
    finally:
        pool.close()
    return summary


@contextmanager
def _connected(address: str, display: Display) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started for it ends with it.

    Raises:
        ConfigError: no Ray, or no such cluster.
    """
    local = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nobody else here gives it work
    for name, value in {**QUIET, **(local if address == "local" else {})}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(INSTALL) from error
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--ray {address}: no such Ray cluster ({why}). Name HOST:PORT or auto for one that runs; local starts one."
        ) from error
    try:
        nodes, has = [node for node in ray.nodes() if node["Alive"]], ray.cluster_resources()
        what = f"{len(nodes)} nodes, {has.get('CPU', 0):.0f} processors, {has.get('GPU', 0):.0f} GPUs"
        display.say(f"Ray {ray.__version__}: {what}")
        yield ray
    finally:
        ray.shutdown()


def _for_workers(job: Job) -> Job:
    """The job with absolute paths, as workers have another folder to start from, and shared with them.

    Raises:
        ConfigError: a part, or a certain device, which workers do not choose.
    """
    settings, options, model = job.settings, job.options, job.model
    if options.part is not None or options.share:
        raise ConfigError("--ray shares a cohort by itself; leave --part and --share away.")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is '{settings.device}'; with --ray it is auto, cpu or cuda.")
    if isinstance(model, (str, Path)) and os.path.exists(model):
        model = Path(model).absolute()
    reference = settings.reference and Path(settings.reference).absolute()
    return Job(
        [path.absolute() for path in paths_of(job.cohort)],
        job.out.absolute(),
        model,
        replace(settings, reference=reference),
        replace(options, part=Part(1, 1)),
    )
