"""The processes that train one model together, as torchrun or SLURM's srun started them; usually there is but one.

Rank 0 speaks, and alone reads and writes the run's folder. What it decides (a plan, a stop) the others are told, so no
two processes can disagree. Without the environment variables of torchrun or srun nothing here does anything.
"""

import hashlib
import json
import os
import platform
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from crossmr.errors import ConfigError, Interrupted, RankLost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT = timedelta(seconds=float(os.environ.get("CROSSMR_SECONDS_TO_WAIT_FOR_RANKS", 1800)))
"""How long a process waits for one that is alive but silent: a step, a validation or a checkpoint takes minutes."""
ALONE_AT_MOST = timedelta(days=7)
"""How long rank 0 may work alone, reading the whole set; if it dies meanwhile, the others notice at once."""
PORTS = 20_000
"""First of the ports at which processes that srun started meet, unless MASTER_PORT says otherwise."""


class Shard(NamedTuple):
    """Which samples of a batch one process has."""

    start: int
    stop: int
    whole: int
    """Samples of the batch, over all processes."""

    def of(self, drawn: "Tensor") -> "Tensor":
        """This process's rows of what was drawn for the whole batch."""
        return drawn[self.start : self.stop]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Of several, each calls the same methods in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Of the processes on this machine."""
    local_size: int = 1
    gpu_each: bool = False
    """Whether each process sees no GPU but its own, if it sees one: so SLURM may bind them."""
    broadcast_group: Any = None
    """The process group in which the others wait while rank 0 works alone."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def shard(self, count: int) -> Shard:
        """This process's shard of so many samples: contiguous, and as large as any other's, or smaller by one."""
        return Shard(count * self.rank // self.size, count * (self.rank + 1) // self.size, count)

    def all_reduce(self, *tensors: "Tensor") -> None:
        """Replace each tensor by its sum over the processes, which is the same on all of them, to the bit.

        Raises:
            RankLost: another process ended, or did not answer within `TIMEOUT`.
        """
        if self.size > 1:
            import torch.distributed as dist

            with _noticing():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self.all_gather(int(flag)))

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers, which are not negative."""
        return max(self.all_gather(number))

    def all_gather(self, number: int) -> list[int]:
        """The numbers of all processes, by rank."""
        if self.size == 1:
            return [number]
        import torch

        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        self.all_reduce(numbers)
        return [int(one) for one in numbers]

    def broadcast_numbers(self, *numbers: float) -> tuple[float, ...]:
        """Rank 0's numbers."""
        if self.size == 1:
            return numbers
        import torch

        values = torch.tensor(numbers if self.first else [0.0] * len(numbers), dtype=torch.float64)
        self.all_reduce(values)
        return tuple(values.tolist())

    def broadcast_json(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, alone, as JSON holds it."""
        return self.broadcast(lambda: ({}, make()))[1]

    def broadcast(self, make: Callable[[], tuple[Mapping[str, "Tensor"], Any]]) -> tuple[dict[str, "Tensor"], Any]:
        """The tensors, on the CPU, and JSON data that rank 0 makes, alone.

        Raises:
            RankLost: rank 0, or another process, ended meanwhile.
        """
        if self.size == 1:
            tensors, data = make()
            return dict(tensors), data
        import safetensors.torch

        content = b"", b""
        if self.first:
            tensors, data = make()
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            content = safetensors.torch.save(plain), json.dumps(data).encode()
        packed, text = (self._bytes(part) for part in content)
        return safetensors.torch.load(packed), json.loads(text)

    def _bytes(self, content: bytes) -> bytes:
        """Rank 0's bytes."""
        import torch
        import torch.distributed as dist

        with _noticing():
            length = torch.tensor([len(content)])
            dist.broadcast(length, 0, group=self.broadcast_group)
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
            if not self.first:
                sent = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(sent, 0, group=self.broadcast_group)
        return sent.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def device(self, name: str = "auto") -> "torch.device":
        """The device of this name that this process computes on: of several GPUs on a machine each has its own.

        Raises:
            ConfigError: no such device, or none for this process.
        """
        from crossmr.device import choose_device

        device = choose_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        import torch

        if device.type != "cuda":
            raise ConfigError(
                f"{self.size} processes train on CUDA GPUs or processors, not on '{device}': --device cpu."
            )
        index: int | None = device.index
        if index is not None:
            raise ConfigError(f"--device is '{name}', but each of {self.size} processes has its own: --device cuda.")
        count = torch.cuda.device_count()
        index = 0 if self.gpu_each and count == 1 else self.local_rank
        if index >= count:
            raise ConfigError(
                f"This machine shows {count} GPU(s), but has at least {index + 1} processes of the training. "
                "Start one process for each GPU, or give --device cpu."
            )
        return torch.device("cuda", index)


ALONE = Ranks()


def started(environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process by its environment, as torchrun or srun set it; `ALONE` if neither started several.

    Raises:
        ConfigError: numbers that make no sense.
    """
    torchrun, srun = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    names = torchrun if "WORLD_SIZE" in environment else srun
    if names[1] not in environment:
        return ALONE
    text = [environment.get(name, "") for name in names[:2]] + [environment.get(names[2], "0")]
    if not all(number.isdecimal() for number in text) or not int(text[0]) < int(text[1]):
        said = ", ".join(f"{name}={number}" for name, number in zip(names, text, strict=True))
        raise ConfigError(f"{said}: no process of a training. Start it with torchrun or srun, or unset {names[1]}.")
    rank, size, local = map(int, text)
    return ALONE if size == 1 else Ranks(rank, size, local, gpu_each=names is srun)


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """This process, in touch with the others of its training, as long as the block runs.

    Raises:
        ConfigError: no way to reach them, or no device for it. RankLost: one did not come.
    """
    ranks = started()
    if ranks.size == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigError("This build of PyTorch has no torch.distributed; train with one process.")
    place = ranks.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    for name, value in _meeting_place(os.environ).items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    with _noticing():
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT)
    try:
        _end_by_sigterm()
        ranks = replace(ranks, broadcast_group=dist.new_group(backend="gloo", timeout=ALONE_AT_MOST))
        host = int(hashlib.sha256(platform.node().encode()).hexdigest()[:15], 16)
        yield replace(ranks, local_size=ranks.all_gather(host).count(host))
    finally:
        dist.destroy_process_group()


def _end_by_sigterm() -> None:
    """Make SIGTERM, by which torchrun and srun end a training when one process is lost, an error of one line."""

    def end(number: int, frame: Any) -> None:
        raise Interrupted("Stopped by SIGTERM, as if a process was lost; the same command goes on from there.")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _meeting_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Where processes that srun started meet: on the step's first machine, at a port that follows from the job."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # 'gpu[003-007,9],big1': gpu003
    if match is None:
        raise ConfigError("MASTER_ADDR and MASTER_PORT are not set. Start the training with torchrun or srun.")
    port = PORTS + (int(job) * 16 + int(step)) % 10_000 if (job + step).isdecimal() else PORTS
    return {"MASTER_ADDR": match[1] + (match[2] or ""), "MASTER_PORT": str(port)}


@contextmanager
def _noticing() -> Iterator[None]:
    """Say in one line that another process is gone; PyTorch says it in many."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "Another process of this training ended or does not answer. See what it said, or what torchrun or srun say "
            "of it; the same command goes on from the last checkpoint."
        ) from error
