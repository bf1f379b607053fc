"""Parts and claims: every item is one process's, also when processes die, hang or lie on machines of other clocks."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crossmr import parts
from crossmr.errors import ConfigError, OutputError
from crossmr.parts import STALE_SECONDS, ClaimLost, Claims, Part, me


@pytest.mark.parametrize("of", [1, 3, 100])
def test_parts_are_disjoint_and_leave_nothing_out(of):
    items = list(range(31))
    taken = [item for number in range(1, of + 1) for item in Part.parse(f"{number}/{of}").take(items)]
    assert sorted(taken) == items
    assert max(len(Part(k, of).take(items)) for k in range(1, of + 1)) <= -(-31 // of)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "1/2/3", "-1/4", "1.0/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="expected K/N"):
        Part.parse(text)


def test_an_item_is_claimed_once_until_it_is_given_back(tmp_path):
    one, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    claim = one.take("a.b")
    assert claim is not None
    assert claim.attempt == 0
    assert other.take("a.b") is None
    assert other.take("c").item == "c"
    (first, second) = one.holders()
    assert (first.item, first.process, first.alive) == ("a.b", os.getpid(), True)
    assert second.item == "c"
    claim.check()
    one.give_back(claim)
    assert other.take("a.b").attempt == 0
    other.close()
    assert os.listdir(tmp_path) == []


HOLD = (
    "import sys, time; from pathlib import Path; from crossmr.parts import Claims\n"
    "assert Claims(Path(sys.argv[1])).take('case'); print('held', flush=True); time.sleep(60)"
)


def test_a_claim_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path):
    claims = Claims(tmp_path)
    for attempt in range(2):
        with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"held\n"
            (holder,) = claims.holders()
            assert (holder.process, holder.alive) == (process.pid, True)
            assert claims.take("case") is None
            process.kill()
        (holder,) = claims.holders()
        assert not holder.alive
        assert sorted(os.listdir(tmp_path)) == [f"case.{k}" for k in range(attempt + 1)]
    claim = claims.take("case")
    assert claim.attempt == 2
    claims.give_back(claim)
    assert os.listdir(tmp_path) == []


def test_a_process_that_has_stopped_to_run_still_has_its_claim(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGSTOP)
        assert Claims(tmp_path).take("case") is None
        process.send_signal(signal.SIGCONT)
        process.kill()


def of_another_machine(claim, age):
    """Make a claim look as if a process of another machine held it, last heard of `age` seconds ago."""
    said = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**said, "host": "node17", "where": "elsewhere", "process": 1}))
    then = time.time() - age
    os.utime(claim.path, (then, then))


def test_a_claim_of_another_machine_is_taken_over_when_nothing_was_heard_of_it(tmp_path):
    hung, other = Claims(tmp_path), Claims(tmp_path)
    claim = hung.take("case")
    of_another_machine(claim, STALE_SECONDS - 30)
    assert other.take("case") is None
    assert other.holders()[0].host == "node17"
    claim.check()
    of_another_machine(claim, STALE_SECONDS + 1)
    taken = other.take("case")
    assert taken.attempt == 1
    with pytest.raises(ClaimLost, match="case: another process has taken it over"):
        claim.check()
    taken.check()
    hung.give_back(claim)
    taken.check()
    of_another_machine(taken, STALE_SECONDS + 1)
    assert os.listdir(tmp_path) == ["case.1"]
    assert Claims(tmp_path).take("case").attempt == 2


def test_a_process_that_is_known_to_be_dead_is_not_waited_for(tmp_path):
    dead, here = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    for item in ("a", "a[1]", "other's"):
        of_another_machine(dead.take(item), 0)
    said = json.loads((tmp_path / "claims" / "a.0").read_text())
    whose = {name: said[name] for name in me()}
    (tmp_path / "claims" / "other's.0").write_text(json.dumps({**said, "process": 2}))
    here.disown(["a", "a[1]", "other's", "gone"], whose)
    assert here.take("a").attempt == 1
    assert here.take("a[1]").attempt == 1
    assert here.take("other's") is None


def test_what_another_holds_is_judged_by_the_clock_of_the_files(tmp_path, monkeypatch):
    """The clock of this machine may be wrong by hours."""
    claim = Claims(tmp_path).take("case")
    of_another_machine(claim, 10)
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert Claims(tmp_path).take("case") is None


def test_a_claim_is_touched_while_its_holder_works(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BEAT_SECONDS", 0.02)
    claims = Claims(tmp_path)
    claim = claims.take("case")
    said = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**said, "made": said["made"] - 3600}))
    os.utime(claim.path, (0, 0))
    end = time.monotonic() + 10
    while claim.path.stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    (holder,) = claims.holders()
    assert 3600 <= holder.seconds < 3700  # since it was made, not since it was touched
    claims.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}'])
def test_a_claim_that_is_just_being_written_is_held(tmp_path, content):
    (tmp_path / "case.0").write_bytes(content)
    assert Claims(tmp_path).take("case") is None
    then = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / "case.0", (then, then))
    assert Claims(tmp_path).take("case").attempt == 1


def test_a_claim_that_may_not_be_read_is_held_until_it_is_stale(tmp_path, monkeypatch):
    """Of another user whose umask lets nobody read it; `take` returned never."""
    (tmp_path / "case.0").write_bytes(b"{}")
    usual = Path.read_bytes

    def read_bytes(path):
        if path.name == "case.0":
            raise PermissionError(13, "Permission denied")
        return usual(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    taken = []
    asking = threading.Thread(target=lambda: taken.append(Claims(tmp_path).take("case")), daemon=True)
    asking.start()
    asking.join(5)
    assert taken == [None]
    then = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / "case.0", (then, then))
    assert Claims(tmp_path).take("case").attempt == 1


FULL = (
    "import resource, signal, sys; from pathlib import Path; from crossmr.parts import Claims\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    "Claims(Path(sys.argv[1])).take('case')"
)


def test_a_full_disk_leaves_no_claim(tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=False)
    assert "OutputError: " in ran.stderr.splitlines()[-1]
    assert "case.0 could not be written: " in ran.stderr
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"case\.0 could not be written"):
        Claims(tmp_path / "file").take("case")


def take_all(folder, start, taken):
    claims = Claims(folder)
    start.wait()
    for item in range(60):
        if claims.take(str(item)) is not None:
            taken.put(item)
    start.wait()  # so that nobody is dead before all have looked


def test_of_processes_that_race_one_gets_each_item(tmp_path):
    context = multiprocessing.get_context("fork")
    start, taken = context.Barrier(4), context.Queue()
    racers = [context.Process(target=take_all, args=(tmp_path, start, taken)) for _ in range(4)]
    for racer in racers:
        racer.start()
    items = sorted(taken.get(timeout=30) for _ in range(60))
    for racer in racers:
        racer.join(30)
    assert items == list(range(60))
    assert taken.empty()
