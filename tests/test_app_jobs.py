"""The queue: one job at a time, each told its place; a cancel ends the process, and the next job has a new one."""

import asyncio
import os
import sys
import time

import pytest
from conftest import run_async

from crossmr.app.jobs import Job, Queue

WORKER = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job["verb"] == "silent":
        os._exit(9)
    print(json.dumps({"text": "working", "pid": os.getpid()}), flush=True)
    if job["verb"] == "wait":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(json.dumps({"text": "waiting", "pid": os.getpid(), "child": child.pid}), flush=True)
        time.sleep(60)
    if job["verb"] == "die":
        os._exit(7)
    if job["verb"] == "memory":
        os.kill(os.getpid(), 9)
    if job["verb"] == "babble":
        print("no JSON", flush=True)
    if job["verb"] == "fail":
        print(json.dumps({"error": "It is broken."}), flush=True)
    else:
        print(json.dumps({"result": {"pid": os.getpid(), "x": job["x"]}}), flush=True)
"""


def run(play):
    """Let a queue with this worker serve while `play` is played."""

    async def both():
        queue = Queue([sys.executable, "-c", WORKER])
        serving = asyncio.create_task(queue.serve())
        try:
            await asyncio.wait_for(play(queue), 20)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        assert queue._process.returncode is not None

    run_async(both())


def job(verb, x=0):
    made = []
    one = Job(verb, {"x": x}, made.append)
    one.made = made
    return one


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between opening and reading, too
        return False


def test_jobs_are_done_one_after_the_other_in_one_process():
    async def play(queue):
        jobs = [queue.submit(job("x", n)) for n in range(3)]
        assert [queue.place(one) for one in jobs] == [0, 1, 2]
        assert all(one.is_open for one in jobs)
        await until(lambda: jobs[2].state == "done")
        assert [one.made[0]["x"] for one in jobs] == [0, 1, 2]
        assert len({one.made[0]["pid"] for one in jobs}) == 1
        assert not any(one.is_open for one in jobs)
        assert jobs[0].seconds == jobs[0].so_far > 0

    run(play)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process lives")
def test_cancel_ends_the_process_and_what_it_started_and_the_next_job_runs():
    async def play(queue):
        first, second, third = (queue.submit(job(verb)) for verb in ("wait", "x", "x"))
        await until(lambda: "child" in first.progress)
        assert [queue.place(one) for one in (first, second, third)] == [0, 1, 2]
        assert first.state == "running"
        before = first.so_far
        await asyncio.sleep(0.05)
        assert first.so_far > before
        await queue.cancel(second)  # while it waits
        await queue.cancel(first)
        assert (first.state, second.state) == ("cancelled", "cancelled")
        assert queue.place(third) == 0
        await until(lambda: third.state == "done")
        assert third.made[0]["pid"] != first.progress["pid"]
        await until(lambda: not is_alive(first.progress["child"]))
        assert not is_alive(first.progress["pid"])
        assert (first.made, second.made) == ([], [])
        await queue.cancel(third)  # which is done
        assert third.state == "done"

    run(play)


def test_a_job_that_fails_and_a_process_that_dies_are_said_and_the_next_job_runs():
    async def play(queue):
        jobs = [queue.submit(job(verb)) for verb in ("fail", "die", "memory", "babble", "x")]
        await until(lambda: jobs[4].state == "done")
        assert [one.state for one in jobs[:4]] == ["failed"] * 4
        assert jobs[0].error == "It is broken."
        assert "exit code 7" in jobs[1].error
        assert "memory ran out" in jobs[2].error
        assert "was not understood" in jobs[3].error

    run(play)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process lives")
@pytest.mark.parametrize("at_once", [False, True], ids=["noticed before the next job", "not noticed"])
def test_a_process_that_died_while_it_was_idle_is_replaced(at_once):
    async def play(queue):
        first = queue.submit(job("x"))
        await until(lambda: first.state == "done")
        process = first.made[0]["pid"]
        os.kill(process, 9)
        if not at_once:
            await until(lambda: queue._process.returncode is not None)
        while is_alive(process):  # the loop stands still, so the queue cannot notice
            time.sleep(0.01)
        second = queue.submit(job("x"))
        await until(lambda: not second.is_open)
        assert second.state == "done"
        assert second.made[0]["pid"] != process

    run(play)


def test_a_process_that_dies_again_before_it_said_anything_is_not_replaced_for_ever():
    async def play(queue):
        one = queue.submit(job("silent"))
        await until(lambda: not one.is_open)
        assert one.state == "failed"
        assert "exit code 9" in one.error
        after = queue.submit(job("x"))
        await until(lambda: not after.is_open)
        assert after.state == "done"

    run(play)


def test_nothing_waits_without_a_job():
    async def play(queue):
        start = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - start < 0.2

    run(play)
