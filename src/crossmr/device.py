"""Which processor runs the networks, in which precision, and what goes wrong on a device."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

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
        # torch.cuda.is_bf16_supported asks the current one
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        native = device.type == "cpu" and probe is not None and bool(probe())
    return torch.bfloat16 if native else torch.float32


@contextmanager
def numerics(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute matrix products and convolutions within this as the precision says: 'float32' never means TF32.

    PyTorch's own defaults let cuDNN round float32 convolutions to TF32's 10 bits. They, or what the caller has instead,
    come back at the end.
    """
    if device.type != "cuda":
        yield
        return
    restore = _allow_tf32(dtype is not torch.float32)
    try:
        yield
    finally:
        restore()


def _allow_tf32(allowed: bool) -> Callable[[], None]:
    """Let matrix products and convolutions round to TF32, or not; returns what brings the caller's settings back.

    PyTorch 2.9 has newer settings for that, and refuses to read the older ones where a caller has used the newer.
    """
    products, convolutions = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    try:
        settings: list[tuple[Any, str, Any]] = [(one, "allow_tf32", one.allow_tf32) for one in (products, convolutions)]
        value: Any = allowed
    except RuntimeError:
        newer = products, convolutions.conv, convolutions.rnn
        settings = [(one, "fp32_precision", cast(Any, one).fp32_precision) for one in newer]
        value = "tf32" if allowed else "ieee"
    for one, name, _ in settings:
        setattr(one, name, value)

    def restore() -> None:
        for one, name, before in settings:
            setattr(one, name, before)

    return restore


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run the networks within this in a precision that `choose_precision` gave."""
    with numerics(device, dtype), torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        yield
