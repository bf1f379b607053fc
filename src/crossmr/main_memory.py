"""What main memory there is, and what is said of a study that takes much of it.

Memory that runs out is no error that can be caught: the kernel kills the process. So what a study takes is estimated.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossmr.errors import StudyError

SHARED = "/dev/shm"
"""Where Linux has what processes hand each other."""
KEPT = 2**30
"""Bytes: freed memory up to this is kept, and blocks up to this come from it."""
KEPT_BY_OLD = 2**25
"""Bytes: the largest blocks for which an older glibc allows that."""


def check_memory(case: str, needed: int) -> str | None:
    """What to say of a study that takes more than half of the available memory; `needed` in bytes.

    Raises:
        StudyError: it takes more than all.
    """
    available = available_memory() + reusable_memory()
    if needed <= available / 2:
        return None
    what = f"{case}: needs about {gigabytes(needed)} of memory, {gigabytes(available)} are available"
    if needed <= available:
        return f"{what}; close other programs"
    raise StudyError(f"{what}. Give the job more, close other programs, or crop the volumes to the head.")


def available_memory() -> int:
    """The bytes of main memory that this process may still take; `sys.maxsize` where nothing is known of it."""
    limits = [*_machine(), *_control_groups(), *_resource_limits()]
    return max(0, min(limits, default=sys.maxsize))


def shared_memory() -> int:
    """The bytes that processes may still hand each other, of which a container may have few; or `sys.maxsize`."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return sys.maxsize


def reusable_memory() -> int:
    """The bytes that were freed and that glibc keeps for this process; 0 of other C libraries.

    To the system they are taken, so `available_memory` does not count them.
    """
    if sys.platform != "linux" or (mallinfo2 := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def keep_memory() -> None:
    """Let glibc keep what is freed: it would map every layer's output anew, and the system clear it page by page.

    All threads share it: what the threads that read a study have freed would be lost to all others.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for option, value in ((-1, KEPT), (-3, KEPT_BY_OLD), (-3, KEPT), (-8, 1)):
            mallopt(option, value)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD twice, where the second may fail, M_ARENA_MAX


def gigabytes(number: float) -> str:
    """Bytes for people to read: '17.3 GB'."""
    return f"{number / 1e9:.1f} GB"


def _machine() -> Iterator[int]:
    """What the machine has left; where it does not say (macOS), half of all it has; nothing on Windows."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        if sys.platform != "win32":
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What is left in each control group of memory above this process, version 1 and 2.

    In a container the path that /proc gives may lie outside of what is mounted: folders that are not there are passed
    over, and the mounted root, which is then the container's own group, is always read.
    """
    try:
        groups = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            mount, limits, usage, cache = root / "memory", ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
        elif not controllers:
            mount, limits, usage, cache = root, ["memory.max", "memory.high"], "memory.current", ""
        else:
            continue
        folder = mount / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(mount) and ".." not in group.parts:
                yield from _left_in(group, limits, usage, f"{cache}inactive_file")


def _left_in(group: Path, limits: Sequence[str], usage: str, cache: str) -> Iterator[int]:
    """A control group's limits less what it uses; files that were read once do not count, the kernel drops them."""
    try:
        used = int((group / usage).read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, number = line.partition(" ")
            used -= int(number) if name == cache else 0
        texts = [(group / name).read_text().strip() for name in limits]
    except (OSError, ValueError):
        return
    yield from (int(text) - used for text in texts if text.isdecimal())  # or 'max'


def _resource_limits() -> Iterator[int]:
    """What is left below this process's own limits (ulimit -v and -d)."""
    if sys.platform == "win32":
        return
    import resource

    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            yield soft - int(used) * resource.getpagesize()
