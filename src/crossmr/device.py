"""Which processor runs the networks, in which precision, what memory there is, and what goes wrong on a device."""

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from crossmr.errors import ConfigError

Made = TypeVar("Made")

PRECISIONS = ("auto", "bfloat16", "float32")


def choose_device(name: str = "auto") -> torch.device:
    """Turn 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' into a device that is there.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is '{name}'; expected auto, cpu, cuda, cuda:1 or mps.") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        usable = ", ".join(kind for kind, count in there.items() if count)
        raise ConfigError(f"--device is '{name}', but this machine and PyTorch build have only: {usable}.")
    return device


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on whatever device: CUDA has an error of its own for it, others have words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Apple's GPU; cuBLAS, which has no memory for its own start; cuDNN; cuDNN without memory for any algorithm
    words = (
        *("out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
        *("Unable to find a valid cuDNN algorithm", "unable to find an engine to execute this computation"),
    )
    return host_memory_exhausted(error) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def host_memory_exhausted(error: BaseException) -> bool:
    """Whether main memory ran out."""
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def device_lost(error: BaseException) -> bool:
    """Whether an error outlives its call: everything that follows on this device, in this process, fails as well.

    After an illegal access, a failed assertion or a lost card CUDA answers every call with the same error.
    """
    words = ("CUDA error", "HIP error", "CUDNN_STATUS_EXECUTION_FAILED")
    return isinstance(error, RuntimeError) and not out_of_memory(error) and any(word in str(error) for word in words)


def ends_the_run(error: BaseException) -> str | None:
    """What every further case would fail by as well, and what helps; None where an error is one case's own."""
    if host_memory_exhausted(error):
        return "memory ran out; close other programs or give the job more, and run the same command again"
    if device_lost(error):
        return "the device failed, and fails until the process ends; run the same command again, or with --device cpu"
    return None


def in_batches(run: Callable[[slice], Made], count: int, batch: int) -> Iterator[tuple[slice, Made, int]]:
    """Run through `count` samples, `batch` at once, or half as many, and half of these, where memory runs out.

    Yields which samples, what `run` made of them, and how many go at once by now.
    """
    start = 0
    while start < count:
        some = slice(start, min(count, start + batch))
        try:
            made = run(some)
        except (RuntimeError, MemoryError) as error:
            if batch == 1 or not out_of_memory(error):
                raise
            batch = max(1, batch // 2)
            continue
        yield some, made, batch
        start = some.stop


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn 'auto', 'bfloat16' or 'float32' into the type of the networks' matrix products.

    'auto' is bfloat16 where the hardware multiplies it natively, where it is two to three times faster.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"--precision is '{name}'; expected one of {', '.join(PRECISIONS)}.")
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        native = device.type == "cpu" and probe is not None and bool(probe())
    return torch.bfloat16 if native else torch.float32


def set_numerics(device: torch.device, dtype: torch.dtype) -> None:
    """Compute matrix products and convolutions as the precision says: 'float32' never means TF32.

    PyTorch's own defaults let cuDNN round float32 convolutions to TF32's 10 bits.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = dtype is not torch.float32
        torch.backends.cudnn.allow_tf32 = dtype is not torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run the networks within this in a precision that `choose_precision` gave."""
    set_numerics(device, dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        yield


def available_memory() -> int:
    """The bytes of main memory that this process may still take; `sys.maxsize` where nothing is known of it."""
    limits = [*_machine(), *_control_groups(), *_resource_limits()]
    return max(0, min(limits, default=sys.maxsize))


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
