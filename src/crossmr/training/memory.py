"""How much memory a training step takes, and in how many parts a batch must go through.

On a processor memory that runs out is no error that can be caught: the kernel kills the process. So a step is estimated
before its first batch, on tensors that have shapes but no values, in no memory. On a GPU it is an error, and the loop
cuts the batch when it comes.
"""

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from crossmr.errors import ModelError
from crossmr.main_memory import available_memory, gigabytes
from crossmr.networks.unet import FEATURES_ALIVE

WORKSPACE = 1.4
"""What the tensors of a sample take in fact, as a factor: kernels' own memory (1.07 measured on the processor) and the
gaps that the allocator leaves between blocks of less than 32 MiB (1.2 to 1.45 in all; 1.08 where blocks are larger)."""
COPIES = 5
"""Of each weight that is learnt: itself, its gradient, Adam's two moments (Kingma & Ba 2015), its average."""


class StepMemory(NamedTuple):
    """The bytes that one step of training takes."""

    per_sample: int
    """For each sample that goes through at once: it, and what the backward pass needs of it at the worst moment."""
    fixed: int
    """For any batch: weights, gradients, moments, the averaged copy, and copies of weights in another precision."""


def step_memory(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], Any],
    batch: Any,
    precision: torch.dtype = torch.float32,
) -> StepMemory:
    """The memory of one step of Adam, estimated on tensors without values (PyTorch's FakeTensorMode).

    Args:
        network: what is trained, on the processor or on 'meta'.
        loss: from such a network and batch to a loss, or a tuple that starts with it; it must not read values
            (`.item()`, boolean indices). Other networks and tensors that it uses may have values and are not counted.
        batch: a tensor (B, ...), or a tuple or dataclass of them, on any device, 'meta' included; only shapes are read.
        precision: bfloat16 runs the loss under autocast.
    """
    learnt = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in network.parameters() if not p.requires_grad)
    one, two = (_peak(network, loss, batch, samples, precision) for samples in (1, 2))
    per_sample = max(two - one, 1)
    return StepMemory(math.ceil(WORKSPACE * per_sample), COPIES * learnt + 2 * frozen + max(0, one - per_sample))


def micro_batches(stage: str, batch_size: int, memory: StepMemory, available: int, fraction: float = 0.6) -> int:
    """The smallest number of parts of a batch whose largest fits into this fraction of the available bytes.

    One sample alone may take all of them.

    Raises:
        ModelError: not even one sample fits.
    """
    if memory.fixed + memory.per_sample > available:
        needed = gigabytes(memory.fixed + memory.per_sample)
        raise ModelError(
            f"{stage}: one sample needs about {needed}, {gigabytes(available)} are available. "
            "Lower --set crop or the network's size, or free memory."
        )
    samples = int((fraction * available - memory.fixed) // memory.per_sample)
    return math.ceil(batch_size / max(1, min(samples, batch_size)))


def samples_at_once(channels: int, sides: Sequence[int], images: int, most: int, processes: int = 1) -> int:
    """How many samples may pass through a U-Net without gradients, in half of the available main memory.

    `channels` are its features of the finest level, `sides` the image's, `images` those of a sample that it sees;
    so many `processes` share the memory.
    """
    per_sample = 4 * FEATURES_ALIVE * channels * images * math.prod(sides)
    return max(1, min(most, available_memory() // 2 // processes // per_sample))


def explain(stage: str, batch_size: int, memory: StepMemory, available: int, parts: int) -> str:
    """One line: 'synthesis: a batch of 24 needs about 17.3 GB, 6.1 GB are available: in 4 parts of 6'."""
    needed = gigabytes(memory.fixed + batch_size * memory.per_sample)
    size = math.ceil(batch_size / parts)
    how = "in one part" if parts == 1 else f"in {parts} parts of {'up to ' * (batch_size % parts > 0)}{size}"
    return f"{stage}: a batch of {batch_size} needs about {needed}, {gigabytes(available)} are available: {how}"


class _Live(TorchDispatchMode):
    """Runs operations on the processor's shapes, wherever they were meant to run, and counts the bytes that are alive.

    A storage counts from the operation that makes it until nothing holds it any more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(self._on_processor, (args, dict(kwargs or {})))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _on_processor(self, value: Any) -> Any:
        """The processor in place of a device, a twin without values in place of a tensor that has some."""
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self.twins:
            self.twins[id(value)] = value, _fake(value)  # the tensor is held, or its id might be given again
        return self.twins[id(value)][1]

    def _forget(self, key: int, number: int) -> None:
        self.known.discard(key)
        self.now -= number


def _peak(network: nn.Module, loss: Callable[..., Any], batch: Any, samples: int, precision: torch.dtype) -> int:
    """The most bytes that are alive at once in one step on so many samples, beyond what `COPIES` counts."""
    tensors = [*network.parameters(), *network.buffers()]
    with FakeTensorMode():
        network = copy.deepcopy(network, {id(tensor): _fake(tensor) for tensor in tensors})
        batch = _with_samples(batch, samples)
        live, learnt = _Live(), [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in learnt:
            parameter.grad = torch.empty_like(parameter)
        with live:
            batch = _map(Tensor.clone, batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                result = loss(network, batch)
            (result[0] if isinstance(result, tuple) else result).backward(inputs=learnt)
    return live.peak


def _fake(tensor: Tensor) -> Tensor:
    """A tensor of the same form on the processor, without values."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _with_samples(batch: Any, samples: int) -> Any:
    """The batch with so many samples, without values."""
    return _map(lambda t: torch.empty((samples, *t.shape[1:]), dtype=t.dtype, device="cpu"), batch)


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch of the same type, each of its tensors changed."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple):
        parts = [_map(function, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = [_map(function, getattr(batch, field.name)) for field in dataclasses.fields(batch)]
        return type(batch)(*parts)
    return batch
