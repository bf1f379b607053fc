"""What memory there is, by machine, control group and limits; and what is said of a study that takes much of it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossmr import main_memory
from crossmr.errors import StudyError
from crossmr.main_memory import available_memory, check_memory, keep_memory, reusable_memory


@pytest.mark.parametrize(("needed", "said"), [(5e9, None), (6e9, "; close other programs"), (11e9, "Give the job")])
def test_a_study_is_said_above_half_of_the_memory_and_refused_above_all(needed, said, monkeypatch):
    monkeypatch.setattr(main_memory, "available_memory", lambda: int(9e9))
    monkeypatch.setattr(main_memory, "reusable_memory", lambda: int(1e9))
    if said is None or "Give" not in said:
        expected = said and f"Ann: needs about 6.0 GB of memory, 10.0 GB are available{said}"
        assert check_memory("Ann", int(needed)) == expected
        return
    with pytest.raises(StudyError, match=r"Ann: needs about 11\.0 GB of memory, 10\.0 GB are available\. Give the job"):
        check_memory("Ann", int(needed))


def write_group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_every_group_above_counts_in_version_1(tmp_path):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    proc.write_text("9:name=systemd:/\n4:cpu,memory:/outer/inner\n0::/\n")
    for path, limit, usage, cache in (
        ("", 2**63 - 4096, 9000, 0),
        ("outer", 5000, 4000, 1500),
        ("outer/inner", 4000, 100, 0),
    ):
        files = {
            "memory.limit_in_bytes": limit,
            "memory.usage_in_bytes": usage,
            "memory.stat": f"cache 7\ntotal_inactive_file {cache}",
        }
        write_group(root / "memory" / path, files)
    assert sorted(main_memory._control_groups(proc, root))[:2] == [2500, 3900]


def test_every_group_above_counts_in_version_2(tmp_path):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    proc.write_text("0::/user.slice/job\n")
    write_group(root, {"cgroup.controllers": "memory"})  # the root has no limit
    for path, most, high, usage in (("user.slice", 9000, "max", 3000), ("user.slice/job", "max", 5000, 2000)):
        write_group(
            root / path,
            {"memory.max": most, "memory.high": high, "memory.current": usage, "memory.stat": "inactive_file 500"},
        )
    assert sorted(main_memory._control_groups(proc, root)) == [3500, 6500]


def test_a_containers_own_group_is_what_is_mounted(tmp_path):
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    for text in ("0::/docker/0123\n", "0::/../other\n", "0::/\n"):
        proc.write_text(text)
        write_group(root, {"memory.max": 8000, "memory.high": "max", "memory.current": 1000, "memory.stat": ""})
        assert [*main_memory._control_groups(proc, root)] == [7000]
    assert [*main_memory._control_groups(tmp_path / "none", root)] == []


def test_machines_that_say_little(monkeypatch):
    def refuse(*_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert 0 < available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    monkeypatch.setattr(sys, "platform", "win32")
    assert available_memory() == sys.maxsize


def test_what_the_c_library_keeps_may_be_used_again(monkeypatch):
    command = """if True:
        import numpy as np
        from crossmr.main_memory import keep_memory
        from crossmr.main_memory import reusable_memory
        keep_memory()
        held = np.ones(2**24)
        before = reusable_memory()
        del held
        print(reusable_memory() - before)
    """
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0 or abs(int(done.stdout) - 2**27) < 2**20  # musl and older libraries do not say
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reusable_memory() == 0


@pytest.mark.parametrize("largest", [2**25, 2**30])
def test_an_older_c_library_keeps_what_it_can(monkeypatch, largest):
    """It refuses to serve larger blocks from what it keeps, and has by then stopped to adapt that by itself."""
    options = {}

    def mallopt(option, value):
        if option == -3 and value > largest:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_memory()
    assert options == ({-1: 2**30, -3: largest, -8: 1} if sys.platform == "linux" else {})


def test_shared_memory_is_what_is_free_where_there_is_any(monkeypatch, tmp_path):
    monkeypatch.setattr(main_memory, "SHARED", str(tmp_path))
    monkeypatch.setattr(main_memory.shutil, "disk_usage", lambda place: SimpleNamespace(free=len(place)))
    assert main_memory.shared_memory() == len(str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(main_memory, "SHARED", str(tmp_path / "none"))
    assert main_memory.shared_memory() == sys.maxsize
