"""Many machines through Ray: every study is finished, none twice, and the results are those of one process."""

import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from types import SimpleNamespace

import dicoms
import pytest
from conftest import Listener, write_images

from crossmr.completion import case as cases
from crossmr.completion import cluster, cohort, study
from crossmr.completion.cluster import MEMORY, Outcome, Pool, Queue, Room, Share, Worker, complete_on_ray, shares
from crossmr.completion.cohort import CohortSettings, CohortSummary, Job, complete_cohort
from crossmr.completion.inputs import find_inputs
from crossmr.completion.work import find_run, read_progress
from crossmr.errors import ConfigError, CrossmrError, ModelError, OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.parts import Part

SETTINGS = InferenceSettings(ddim_steps=1, precision="float32", device="cpu")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'crossmr[cluster]'"
)


@pytest.fixture
def patients(tmp_path):
    for number in range(8):
        write_images(tmp_path / "cohort", f"P{number}", ("t1n", "t2w"), seed=number)
    return tmp_path / "cohort"


def volumes(out):
    return {path.name: path.read_bytes() for path in out.rglob("*.nii.gz")}


class ClaimLost(Exception):
    """As Ray tells that an actor died."""


class Task(ClaimLost):
    """As Ray tells that an actor's method raised."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """An actor in threads of this process; a killed one finishes nothing."""

    def __init__(self, ray, node):
        self.ray, self.node, self.dead = ray, node, False
        self.worker, self.threads = ray.workers(node), ThreadPoolExecutor(4)
        self.open, self.complete, self.close = (
            SimpleNamespace(remote=lambda *given, name=name: self.call(name, *given))
            for name in ("open", "complete", "close")
        )

    def call(self, name, *given):
        self.ray.calls.append((self, name, given))
        future = self.threads.submit(getattr(self.worker, name), *given)
        future.actor = self
        return future


class FakeRay:
    """What the driver uses of Ray, on threads: nodes that a test adds and kills."""

    exceptions = SimpleNamespace(RayTaskError=Task, RayError=ClaimLost)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    )

    def __init__(self, workers, nodes=("a", "b")):
        self.workers, self.alive, self.calls, self.actors, self.killed = workers, [*nodes], [], [], []

    def nodes(self):
        return [
            {"NodeID": n, "Alive": True, "NodeManagerHostname": f"host {n}", "Resources": {"CPU": 2.0}}
            for n in self.alive
        ]

    def remote(self, kind):
        def options(*, scheduling_strategy, **_):
            actor = Actor(self, scheduling_strategy)
            self.actors.append(actor)
            return SimpleNamespace(remote=lambda: actor)

        return SimpleNamespace(options=options)

    def wait(self, references, *, num_returns, timeout):
        due = time.monotonic() + timeout
        while sum(r.done() or r.actor.dead for r in references) < num_returns and time.monotonic() < due:
            time.sleep(0.001)
        done = [r for r in references if r.done() or r.actor.dead]
        return done, [r for r in references if r not in done]

    def get(self, reference):
        if reference.actor.dead:
            raise ClaimLost
        try:
            return reference.result()
        except CrossmrError as error:
            raise Task(error) from error

    def kill(self, actor):
        self.killed.append(actor)
        actor.dead = True


SAID = {"device": "cpu", "precision": "float32", "model": "1"}


class Fake:
    """A worker that makes nothing, and dies or waits where a test says so."""

    def __init__(self, node, behave=lambda node, case: None, settings=None, refuse=None):
        self.node, self.behave, self.settings, self.refuse = node, behave, settings or SAID, refuse

    def open(self, job, root):
        if self.refuse:
            raise self.refuse
        return {"me": {"process": 1, "node": self.node}, "settings": self.settings}

    def complete(self, inputs):
        (case,) = inputs.cases
        self.behave(self.node, case)
        return Outcome(CohortSummary(completed={case: ["t1c"]}, verdicts={case: "use"}), [])

    def close(self):
        """Nothing is claimed."""


@pytest.fixture
def pool(monkeypatch, patients, tmp_path):
    """Make the driver's pool on a fake Ray; returns it, its run, who listens, and what is disowned."""
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.01)

    def pool(ray):
        listener, disowned = Listener(), []
        claims = SimpleNamespace(disown=lambda items, whose: disowned.append(([*items], whose["node"])))
        run = SimpleNamespace(inputs=find_inputs([patients]), display=listener, work=SimpleNamespace(claims=claims))
        job = Job(patients, tmp_path / "out", None, SETTINGS, CohortSettings(part=Part(1, 1)))
        return Pool(ray, job, run, listener), run, listener, disowned

    return pool


@pytest.fixture
def drive(pool):
    """Run the driver on a fake Ray; returns its summary, who listened, and what was disowned."""

    def drive(ray):
        made, run, listener, disowned = pool(ray)
        return cluster._complete_all(made, run, listener), listener, disowned

    return drive


def test_a_worker_has_few_studies_at_once_and_all_are_done(drive):
    under_way, most, guard = dict.fromkeys("ab", 0), [], threading.Lock()

    def behave(node, case):
        with guard:
            under_way[node] += 1
            most.append(under_way[node])
        time.sleep(0.02)
        with guard:
            under_way[node] -= 1

    ray = FakeRay(lambda node: Fake(node, behave))
    summary, listener, disowned = drive(ray)
    assert [*summary.completed] == [*dict.fromkeys(summary.completed)]
    assert sorted(summary.completed) == [f"P{n}" for n in range(8)]
    assert max(most) <= cluster.UNDER_WAY
    assert disowned == []
    assert {actor.node for actor in ray.killed} == {"a", "b"}  # in the end
    assert any("8/8" in line and "studies an hour" in line for line in listener.said)


def test_what_a_dead_node_had_is_done_by_others_each_beside_nothing_else(drive):
    inside, beside = set(), {}

    def behave(node, case):
        if node == "b":
            ray.alive = ["a"]
            ray.actors[1].dead = True
            time.sleep(0.2)
            return
        inside.add(case)
        time.sleep(0.03)
        beside[case] = inside - {case}
        inside.remove(case)

    ray = FakeRay(lambda node: Fake(node, behave))
    summary, listener, disowned = drive(ray)
    ((lost, node),) = disowned
    assert node == "b"
    assert 1 <= len(lost) <= cluster.UNDER_WAY
    assert sorted(summary.completed) == [f"P{n}" for n in range(8)]
    assert not any(beside[case] for case in lost)
    assert any(beside.values())
    assert any(line.startswith("A worker on host b is gone") for line in listener.said)


def test_a_suspect_is_alone_with_its_worker_until_it_is_done(pool):
    ray = FakeRay(lambda node: Fake(node), nodes=("a",))
    made, *_ = pool(ray)
    queue = Queue(deque(["P0", "P1"]), deque(["P2"]))
    made.grow()
    while not made.ready:
        assert [*made.gather(queue)] == []
    given = []
    for _ in range(2):
        made.feed(queue)
        given.append([call[2][0].cases for call in ray.calls if call[1] == "complete"])
        while made.busy:
            [*made.gather(queue)]
    assert given == [[["P2"]], [["P2"], ["P0"], ["P1"]]]


def test_a_node_that_comes_later_gets_a_worker(drive):
    def behave(node, case):
        ray.alive = ["a", "late"]
        time.sleep(0.05)

    ray = FakeRay(lambda node: Fake(node, behave), nodes=("a",))
    drive(ray)
    assert [actor.node for actor in ray.actors] == ["a", "late"]


def test_a_worker_that_would_make_other_voxels_is_not_used(drive):
    other = {**SAID, "precision": "bfloat16"}
    ray = FakeRay(lambda node: Fake(node, lambda *_: time.sleep(0.05), other if node == "b" else None))
    ray.alive = ["a"]
    original = ray.workers
    ray.workers = lambda node: (ray.alive.append("b") if node == "a" else None, original(node))[1]
    summary, listener, _ = drive(ray)
    assert len(summary.completed) == 8
    refused = [line for line in listener.said if "other voxels" in line]
    assert len(refused) == 1
    assert "precision bfloat16, elsewhere float32" in refused[0]
    assert not [call for call in ray.calls if call[0].node == "b" and call[1] == "complete"]


def test_a_machine_without_the_model_is_not_used_and_without_any_the_reason_is_told(drive):
    with pytest.raises(ConfigError, match=r"No machine of the cluster can be used: host a: no model here"):
        drive(FakeRay(lambda node: Fake(node, refuse=ModelError("no model here")), nodes=("a",)))


def test_a_node_where_workers_die_and_die_is_given_up(drive):
    def behave(node, case):
        if node == "b":
            next(actor for actor in ray.actors if actor.node == "b" and not actor.dead).dead = True
        time.sleep(0.05)

    ray = FakeRay(lambda node: Fake(node, behave))
    summary, _, _ = drive(ray)
    assert len(summary.completed) == 8
    assert 1 <= sum(actor.node == "b" for actor in ray.actors) <= cluster.DEATHS


def test_a_disk_that_is_full_ends_the_run_and_the_workers(drive):
    def behave(node, case):
        raise OutputError("no space left")

    ray = FakeRay(lambda node: Fake(node, behave))
    with pytest.raises(OutputError, match="no space left"):
        drive(ray)
    assert {*ray.killed} == {*ray.actors}


def test_the_workers_of_a_node():
    assert shares({"GPU": 4, "CPU": 64}, gpus=True) == 4 * [Share(1, 16, cluster.MOST_UNDER_WAY)]
    assert shares({"GPU": 1, "CPU": 0}, gpus=True) == [Share(1, 0, cluster.UNDER_WAY)]
    assert shares({"CPU": 64}, gpus=True) == []
    assert shares({"CPU": 0}, gpus=False) == []
    assert shares({"CPU": 2}, gpus=False) == [Share(0, 2, 3)]
    assert shares({"CPU": 10}, gpus=False) == 2 * [Share(0, 5, 3)]
    assert shares({"CPU": 64, "memory": 3 * MEMORY}, gpus=False) == 3 * [Share(0, 21, 3)]


def test_suspects_are_for_the_idle():
    queue = Queue(deque(["a"]), deque(["s"]))
    assert queue.take(idle=False) == ("a", False)
    assert queue.take(idle=False) is None
    assert queue
    assert queue.take(idle=True) == ("s", True)
    assert not queue


def test_studies_that_do_not_fit_side_by_side_wait(monkeypatch):
    monkeypatch.setattr(cluster, "available_memory", lambda: 10)
    monkeypatch.setattr(cluster, "reusable_memory", lambda: 0)
    room, inside, most = Room(), [], []

    def use(needed):
        with room.of(needed):
            inside.append(needed)
            most.append(sum(inside))
            time.sleep(0.02)
            inside.remove(needed)

    with ThreadPoolExecutor(4) as pool:
        wait_for([pool.submit(use, needed) for needed in (4, 4, 4, 6, 20)])
    assert len(most) == 5
    assert max(most) == 20  # which never fits, and is alone
    assert max(total for total in most if total != 20) <= 10


def opened(patients, out, model_folder):
    """The job of an output whose run has begun, and its inputs."""
    job = Job([patients], out, model_folder, SETTINGS, CohortSettings(part=Part(1, 1)))
    with cohort.closing(job.work()) as own, job.layout.locked(shared=True):
        return job, cohort.with_studies(cohort.open_run(job, own, Listener()), [patients]).inputs


def test_a_worker_completes_several_studies_at_once_as_one_process_does(
    patients, model_folder, model, tmp_path, monkeypatch
):
    usual, device, most = study.synthesise, [], []

    def synthesise(*given):
        device.append(1)
        most.append(len(device))
        time.sleep(0.02)
        device.pop()
        return usual(*given)

    monkeypatch.setattr(study, "synthesise", synthesise)
    job, inputs = opened(patients, tmp_path / "out", model_folder)
    worker = Worker()
    try:
        assert worker.open(job, inputs.root)["settings"]["precision"] == "float32"
        with ThreadPoolExecutor(3) as threads:
            outcomes = [*threads.map(worker.complete, [inputs.only(name) for name in inputs.cases])]
        assert [[*outcome.summary.completed] for outcome in outcomes] == [[f"P{n}"] for n in range(8)]
        assert read_progress(tmp_path / "out").done == 8
        assert max(most) == 1  # the device has one at a time
        complete_cohort(patients, tmp_path / "alone", model, SETTINGS)
        assert volumes(tmp_path / "out") == volumes(tmp_path / "alone")
    finally:
        worker.close()


def test_a_worker_completes_dicom_as_one_process_does(model_folder, model, tmp_path):
    for number in (1, 2):
        dicoms.write(tmp_path / "in" / f"p{number}", ("t1n", "t2w"), patient=f"MRN-{number}")
    job, inputs = opened(tmp_path / "in", tmp_path / "out", model_folder)
    job = replace(job, settings=replace(SETTINGS, register="if needed"))
    worker = Worker()
    try:
        worker.open(job, inputs.root)
        with ThreadPoolExecutor(2) as threads:
            outcomes = [*threads.map(worker.complete, pickle.loads(pickle.dumps([*map(inputs.only, inputs.cases)])))]
        assert [[*outcome.summary.completed] for outcome in outcomes] == [[case] for case in inputs.cases]
        complete_cohort(tmp_path / "in", tmp_path / "alone", model, SETTINGS)
        assert volumes(tmp_path / "out") == volumes(tmp_path / "alone")
        assert len([*(tmp_path / "out").glob("*/*_dicom")]) == 4
    finally:
        worker.close()


def test_a_worker_keeps_what_goes_wrong_and_ends_where_memory_does(patients, model_folder, tmp_path, monkeypatch):
    job, inputs = opened(patients, tmp_path / "out", model_folder)
    worker = Worker()
    worker.open(job, inputs.root)
    try:
        monkeypatch.setattr(cases, "complete_study", lambda *_: 1 / 0)
        outcome = worker.complete(inputs.only("P0"))
        assert "ZeroDivisionError" in outcome.summary.failed["P0"]
        assert "Traceback" in (tmp_path / "out" / "crossmr.log").read_text()

        def exhausted(*_):
            raise MemoryError

        monkeypatch.setattr(cases, "complete_study", exhausted)
        monkeypatch.setattr(cluster.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit):
            worker.complete(inputs.only("P1"))
        assert [*read_progress(tmp_path / "out").failed] == ["P0"]  # P1 is tried by another
    finally:
        worker.close()


def test_a_machine_that_does_not_see_the_folders_is_refused(patients, model_folder, tmp_path):
    job, inputs = opened(patients, tmp_path / "out", model_folder)
    with pytest.raises(OutputError, match="elsewhere is not there as it is where crossmr was started"):
        Worker().open(job, tmp_path / "elsewhere")
    unseen = Job(job.cohort, tmp_path / "unseen", job.model, job.settings, job.options)
    (tmp_path / "unseen").mkdir()
    with pytest.raises(OutputError, match="unseen is not there as it is"):
        Worker().open(unseen, inputs.root)
    assert [*(tmp_path / "unseen").iterdir()] == []


def test_without_ray_the_way_to_get_it_is_said(patients, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    job = Job(patients, tmp_path / "out", None, SETTINGS, CohortSettings())
    with pytest.raises(ConfigError, match=r'pip install "crossmr\[cluster\]"'):
        complete_on_ray(job, "auto", Listener())
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_ray(patients, tmp_path):
    for settings, options, why in (
        (SETTINGS, CohortSettings(part=Part(1, 2)), "leave --part and --share away"),
        (InferenceSettings(device="cuda:1"), CohortSettings(), "auto, cpu or cuda"),
    ):
        with pytest.raises(ConfigError, match=why):
            complete_on_ray(Job(patients, tmp_path / "out", None, settings, options), "auto", Listener())


@needs_ray
@pytest.mark.filterwarnings("default")
def test_a_worker_and_a_node_are_killed_in_the_middle(patients, model_folder, model, tmp_path):
    from ray.cluster_utils import Cluster

    out, listener = tmp_path / "out", Listener()
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 8}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        doomed = nodes.add_node(num_cpus=1)
        job = Job(patients, out, model_folder, SETTINGS, CohortSettings())
        written = {}

        def disturb():
            killed = removed = False
            while not over.wait(0.01):
                for path in out.glob("P*/manifest.json"):
                    written.setdefault(path.parent.name, set()).add(path.stat().st_ino)
                ready = [line for line in listener.said if " is ready (" in line]
                if not killed and ready and len(written) >= 1:
                    os.kill(int(ready[0].partition("process ")[2].partition(")")[0]), signal.SIGKILL)
                    killed = True
                elif killed and not removed and len(written) >= 3:
                    nodes.remove_node(doomed, allow_graceful=False)
                    removed = True

        over = threading.Event()
        (watch := threading.Thread(target=disturb)).start()
        summary = complete_on_ray(job, nodes.address, listener)
        over.set()
        watch.join()
    finally:
        nodes.shutdown()
    assert sorted(summary.verdicts) == [f"P{n}" for n in range(8)]
    assert summary.failed == {}
    assert any(" is gone (" in line for line in listener.said)
    assert find_run(out) is None
    assert all(len(inodes) == 1 for inodes in written.values())
    complete_cohort(patients, tmp_path / "alone", model, SETTINGS)
    assert volumes(out) == volumes(tmp_path / "alone")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
