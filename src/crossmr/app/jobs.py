"""One job at a time, in a process of its own: a queue that says the place in it, and a cancel that ends the process.

The process is `worker`. It is started before there is a job, since PyTorch takes seconds to load; after a cancel, or
when it died, there is a new one. It is spoken to in lines of JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LONGEST_LINE = 2**26
"""Bytes of one line of JSON."""
STARTING = {"text": "Starting"}
"""The progress of a job that the process has said nothing of yet."""
State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(eq=False)
class Job:
    """What was asked for, and what became of it."""

    verb: str
    """A function of the worker."""
    arguments: Mapping[str, Any]
    finish: Callable[[Any], object]
    """Called with what the worker returns."""
    state: State = "waiting"
    progress: dict[str, Any] = field(default_factory=dict)
    """What the worker said last: text and, where there are steps, done and total."""
    error: str = ""
    started: float = 0.0
    seconds: float = 0.0
    """How long it took."""

    @property
    def so_far(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started if self.state == "running" else self.seconds

    @property
    def is_open(self) -> bool:
        """Whether it is still to be done."""
        return self.state in ("waiting", "running")


class Queue:
    """The jobs of all pages."""

    def __init__(self, command: Sequence[str]):
        self._command = list(command)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._come = asyncio.Event()

    def submit(self, job: Job) -> Job:
        """Put a job at the end."""
        self._waiting.append(job)
        self._come.set()
        return job

    def place(self, job: Job) -> int:
        """How many jobs are done before this one."""
        if job not in self._waiting:
            return 0
        return self._waiting.index(job) + (self._running is not None and self._running.state == "running")

    async def cancel(self, job: Job) -> None:
        """Take a job from the queue; end the process of one that runs, and wait until it has ended."""
        if not job.is_open:
            return
        job.state = "cancelled"
        if job in self._waiting:
            self._waiting.remove(job)
        elif job is self._running:
            await self._end_process()

    async def _end_process(self) -> None:
        """End the process, and wait until it has ended."""
        self._kill()
        if self._process is not None:
            await self._process.wait()

    async def serve(self) -> None:
        """Do one job after the other, until this is cancelled; the process ends with it."""
        try:
            while True:
                await self._start()
                if not self._waiting:
                    self._come.clear()
                    await self._come.wait()
                    continue
                await self._run(self._waiting.popleft())
        finally:
            await self._end_process()

    async def _start(self) -> None:
        """Start the process, unless it is there."""
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=os.name == "posix",
        )

    async def _run(self, job: Job) -> None:
        """Do a job."""
        self._running, job.state, job.started = job, "running", time.monotonic()
        job.progress = STARTING
        try:
            await self._speak(job)
        except Exception as error:  # what it said makes no sense: the next job has another process
            job.state, job.error = "failed", f"The job's process was not understood ({error}). Run it again."
            await self._end_process()
        finally:
            self._running, job.seconds = None, time.monotonic() - job.started

    async def _speak(self, job: Job, *, again: bool = False) -> None:
        """Send a job to the process, and hear of it until it ends; a process that died idle is replaced once."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(json.dumps({"verb": job.verb, **job.arguments}).encode() + b"\n")
            await process.stdin.drain()
            while line := await process.stdout.readline():
                told = json.loads(line)
                if "text" in told:
                    job.progress = told
                    continue
                if job.state == "running":
                    self._end(job, told)
                return
        code = await process.wait()
        if job.progress is STARTING and not again:
            await self._start()
            if job.state == "running":  # nobody cancelled it meanwhile
                await self._speak(job, again=True)
        elif job.state == "running":
            job.state, job.error = "failed", _why_it_died(code)

    @staticmethod
    def _end(job: Job, told: Mapping[str, Any]) -> None:
        if "error" in told:
            job.state, job.error = "failed", told["error"]
        else:
            job.state = "done"
            job.finish(told["result"])

    def _kill(self) -> None:
        """End the process, and what it has started."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()


def _why_it_died(code: int) -> str:
    """What to say of a process that ended by itself."""
    if code == -9:
        return "The system ended the job, most likely because memory ran out. Close other programs, and run it again."
    return f"The job's process ended (exit code {code}); the terminal may say why. Run it again."
