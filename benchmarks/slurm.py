"""A SLURM array of `complete --part` with tasks that are killed and a node that fails, on a cluster of one node.

munge, slurmctld and slurmd of Debian (`apt-get install slurm-wlm munge`) run in the folder of the results, as root,
with ports and a key of their own, and end with the script; nothing is written to /etc. The array is
`packaging/slurm/complete.sbatch` with its three lines changed. While its tasks run, all at once, one is killed by
`kill -9` and one by `scancel --signal=KILL`, both are requeued, and then the node is taken down, upon which SLURM
requeues whatever ran. In the end every study must be finished, none written twice, and every volume must be, byte for
byte, what one process wrote.

python benchmarks/slurm.py COHORT -o runs/slurm --parts 4
"""

import argparse
import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TEMPLATE = Path(__file__).parents[1] / "packaging" / "slurm" / "complete.sbatch"
CONFIGURATION = """\
ClusterName=crossmr
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort=27817
SlurmdPort=27818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/tasks.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
SchedulerParameters=sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={parts} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
"""A node that claims a processor for each part, so that all run at once."""


def run(*command: str, check: bool = True) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def cluster(folder: Path, parts: int) -> Iterator[None]:
    """A SLURM of one node, as long as it is needed."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host = platform.node()
    text = CONFIGURATION.format(folder=folder, host=host, parts=parts, memory=1024 * parts)
    (folder / "slurm.conf").write_text(text)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    places = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    munged = ["munged", "--force", "--foreground", f"--key-file={key}", *places]
    daemons = [subprocess.Popen(munged, stderr=subprocess.DEVNULL)]
    try:
        wait_for(lambda: (folder / "munge" / "socket").exists(), "munged")
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-c"], stderr=subprocess.DEVNULL))
        daemons.append(subprocess.Popen(["slurmd", "-D", "-c"], stderr=subprocess.DEVNULL))
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%t", check=False), "the node")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        mine = {os.getpid(), *(daemon.pid for daemon in daemons)}
        for process in processes_with(f"SLURM_CONF={folder}/slurm.conf"):  # tasks, and those that watch them
            if process not in mine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, 9)


def wait_for(what, name: str, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise SystemExit(f"Waited {seconds:.0f} s for {name} in vain.")
        time.sleep(0.2)


def crossmr(*words: str) -> str:
    """What a command of crossmr prints; it may exit with 1, as it does where a study is to be looked at."""
    return run("crossmr", *words, check=False)


def script(folder: Path, cohort: Path, out: Path, parts: int) -> Path:
    """The template with its three lines changed."""
    text = TEMPLATE.read_text()
    for old, new in (("=1-100", f"=1-{parts}"), ("/path/to/cohort", str(cohort)), ("/path/to/completed", str(out))):
        text = text.replace(old, new, 1)
    path = folder / "complete.sbatch"
    path.write_text(text)
    return path


def tasks(job: str) -> dict[int, tuple[str, int]]:
    """Task → its state, and how often it was requeued."""
    found = {}
    for block in run("scontrol", "show", "job", job, check=False).split("\n\n"):
        said = dict(re.findall(r"(\w+)=(\S+)", block))
        if said.get("ArrayTaskId", "").isdigit():
            found[int(said["ArrayTaskId"])] = (said["JobState"], int(said["Restarts"]))
    return found


def processes_with(*settings: str) -> list[int]:
    """The processes that have all of these in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (place / "environ").read_bytes().split(b"\0")
            if all(setting.encode() in environment for setting in settings):
                found.append(int(place.name))
    return found


def process_of(folder: Path, job: str, task: int) -> int | None:
    """The process of crossmr that a task runs, if it has begun."""
    own = processes_with(f"SLURM_CONF={folder}/slurm.conf", f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}")
    return next((process for process in own if b"--part" in Path(f"/proc/{process}/cmdline").read_bytes()), None)


def claimed_by(out: Path) -> dict[int, str]:
    """Process → the case that it has claimed."""
    found = {}
    for path in (out / ".crossmr" / "claims").glob("*.[0-9]"):
        with contextlib.suppress(OSError, ValueError):
            found[json.loads(path.read_text())["process"]] = path.name.rpartition(".")[0]
    return found


def manifests(out: Path) -> dict[str, int]:
    """Case → when its manifest was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/manifest.json")}


def volumes(out: Path) -> dict[str, bytes]:
    """Name → content of every volume."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.nii.gz")}


class Array:
    """The array as it runs: what was seen of it."""

    def __init__(self, script: Path, slurm: Path, out: Path, parts: int) -> None:
        self.slurm, self.out, self.parts, self.began = slurm, out, parts, time.monotonic()
        self.job = run("sbatch", "--parsable", "--cpus-per-task=1", "--mem=0", str(script)).strip()
        self.said: list[str] = []
        self.seen: dict[str, set[int]] = {}

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:5.0f} s  {text}"
        self.said.append(line)
        print(line, flush=True)

    def look(self) -> dict[int, tuple[str, int]]:
        for case, written in manifests(self.out).items():
            self.seen.setdefault(case, set()).add(written)
        return tasks(self.job)

    def at_work(self, wanted: int | None = None) -> dict[int, str]:
        """Task → the case that it has claimed, for as many tasks as are wanted."""
        found: dict[int, str] = {}

        def enough() -> bool:
            self.look()
            claims, processes = claimed_by(self.out), {t: process_of(self.slurm, self.job, t) for t in self.numbers}
            found.clear()
            found.update({t: claims[p] for t, p in processes.items() if p in claims})
            return len(found) >= (self.parts if wanted is None else wanted)

        wait_for(enough, "tasks at work", 300)
        return dict(found)

    @property
    def numbers(self) -> Sequence[int]:
        return range(1, self.parts + 1)

    def requeue(self, task: int) -> None:
        run("scontrol", "requeue", f"{self.job}_{task}")
        self.start_now(task)

    def start_now(self, task: int) -> None:
        """SLURM lets a requeued job wait for two minutes."""
        run("scontrol", "update", f"JobId={self.job}_{task}", "StartTime=now", check=False)

    def status(self) -> None:
        for line in crossmr("status", str(self.out)).splitlines():
            self.say(f"status: {line}")


def kill(array: Array) -> None:
    """Kill one task in each of three ways, in the middle of a study, and let it begin again."""
    first, second = 1, 2
    working = array.at_work()
    os.kill(process_of(array.slurm, array.job, first) or 0, 9)
    run("scancel", "--signal=KILL", "--full", f"{array.job}_{second}")
    array.say(f"{len(working)} tasks are at work: {working}")
    array.say(f"task {first} was killed by kill -9, task {second} by scancel --signal=KILL")
    array.status()
    for task in (first, second):
        wait_for(lambda task=task: array.look()[task][0] in ("FAILED", "CANCELLED", "NODE_FAIL"), f"task {task}'s end")
        array.say(f"task {task} is {array.look()[task][0]}")
    for task in (first, second):
        array.requeue(task)
    array.say("both requeued")
    wait_for(lambda: all(array.look()[task][0] == "RUNNING" for task in (first, second)), "the two tasks")
    array.at_work(2)
    node = platform.node()
    run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    array.say("the node is down")
    time.sleep(5)
    array.status()
    run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # which it may do by itself
    wait_for(lambda: "down" not in run("sinfo", "-h", "-o", "%t", check=False), "the node")
    array.say("the node is back")


def finish(array: Array) -> None:
    """Wait until all tasks have ended."""

    def ended() -> bool:
        states = array.look()
        for task in (task for task, (state, restarts) in states.items() if state == "PENDING" and restarts):
            array.start_now(task)
        time.sleep(1)
        return all(state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") for state, _ in states.values())

    wait_for(ended, "the array", 540)
    array.say(f"ended: {array.look()}")
    array.status()


def main() -> None:
    """Run the array, and compare what it left with what one process leaves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/slurm"))
    parser.add_argument("--parts", type=int, default=4)
    wish = parser.parse_args()
    cohort, folder = wish.cohort.resolve(), wish.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"  # as the tasks have: with another number of threads sums are rounded otherwise
    one, many, slurm = folder / "one", folder / "array", folder / "cluster"
    if not (one / "report.html").exists():
        start = time.monotonic()
        crossmr("complete", str(cohort), "-o", str(one))
        print(f"one process: {time.monotonic() - start:.0f} s", flush=True)
    for place in (many, slurm):
        shutil.rmtree(place, ignore_errors=True)
    for log in folder.glob("crossmr-*.log"):
        log.unlink()
    os.chdir(folder)
    with cluster(slurm, wish.parts):
        array = Array(script(folder, cohort, many, wish.parts), slurm, many, wish.parts)
        kill(array)
        finish(array)
    table(array, one, folder)


def table(array: Array, one: Path, folder: Path) -> None:
    """What was seen, as a table, and as JSON."""
    alone, shared = volumes(one), volumes(array.out)
    counts = {
        "studies": len(manifests(one)),
        "finished by the array": len(manifests(array.out)),
        "written more than once": sum(len(times) > 1 for times in array.seen.values()),
        "volumes of one process": len(alone),
        "of these equal, byte for byte": sum(shared.get(name) == content for name, content in alone.items()),
        "volumes that only the array has": len(shared.keys() - alone.keys()),
        "claims and lists left behind": len([*(array.out / ".crossmr").rglob("*")]),
        "report.html and status.csv": sum((array.out / name).exists() for name in ("report.html", "status.csv")),
    }
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    (folder / "slurm.json").write_text(json.dumps({"counts": counts, "said": array.said}, indent=2))


if __name__ == "__main__":
    main()
