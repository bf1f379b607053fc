"""What a training step takes, measured against what is estimated, and what the machine has."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import ModelError
from crossmr.main_memory import available_memory
from crossmr.networks.unet import Decoder, Encoder, UNetShape
from crossmr.phantom import write_cohort
from crossmr.training import memory
from crossmr.training.memory import StepMemory, explain, micro_batches, samples_at_once, step_memory

GIB = 2**30
GROUPS = Path("/sys/fs/cgroup")


class UNet(nn.Module):
    """Images (B, 3, *S) to (B, 1, *S)."""

    def __init__(self, channels: int = 8, dims: int = 2):
        super().__init__()
        form = UNetShape(dims, channels, (1, 2, 2), 1)
        self.encoder, self.decoder = Encoder(form, 3), Decoder(form, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(*self.encoder(x), x)


class Pairs(NamedTuple):
    image: Tensor
    truth: Tensor


@dataclass(frozen=True)
class PairsToo:
    image: Tensor
    truth: Tensor


def pairs(batch_size: int, *size: int, device: str = "meta") -> Pairs:
    return Pairs(*(torch.zeros(batch_size, channels, *size, device=device) for channels in (3, 1)))


def loss(network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
    error = (network(batch.image) - batch.truth).abs()
    return error.sum(), torch.tensor(error.numel())


def network_on_meta(channels: int = 8, dims: int = 2) -> UNet:
    with torch.device("meta"):
        return UNet(channels, dims)


# A step's estimate


def test_two_operations_counted_by_hand():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            return (x * self.weight).sin()

    got = step_memory(Product(), lambda network, x: network(x).sum(), torch.zeros(7, 1000))
    vector = 4000  # bytes
    # Of each sample: x, its product with the weight, the cosine of that and its product with the gradient; where the
    # gradient of the weight is made, x, that product and x times it.
    assert got.per_sample == pytest.approx(memory.WORKSPACE * 4 * vector, abs=100)
    assert 5 * vector <= got.fixed <= 7 * vector


@pytest.mark.parametrize("dims", [2, 3])
def test_it_grows_with_the_samples_alone(dims):
    network, size = network_on_meta(4, dims), (16,) * dims
    got = step_memory(network, loss, pairs(5, *size))
    eight = memory._peak(network, loss, pairs(1, *size), 8, torch.float32)
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert memory.WORKSPACE * eight == pytest.approx(got.fixed - 5 * weights + 8 * got.per_sample, rel=0.1)
    assert got.per_sample > step_memory(network, loss, pairs(5, *(8,) * dims)).per_sample * 1.8**dims
    network.encoder.requires_grad_(False)
    frozen = step_memory(network, loss, pairs(5, *size))
    assert frozen.fixed < got.fixed
    assert frozen.per_sample < got.per_sample


def test_real_networks_and_every_kind_of_batch_count_alike_and_nothing_is_touched():
    network, batch = UNet().eval(), pairs(2, 16, 16, device="cpu")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    other, generator = nn.Conv2d(3, 3, 1).requires_grad_(False), torch.Generator().manual_seed(1)
    states = torch.get_rng_state(), generator.get_state()
    want = step_memory(network_on_meta(), loss, pairs(9, 16, 16))
    assert step_memory(network, loss, batch) == want
    assert step_memory(network, loss, PairsToo(*batch)) == want
    assert step_memory(network, lambda n, b: loss(n, Pairs(*b)), tuple(batch)) == want

    def noisy(network: nn.Module, batch: Pairs) -> Tensor:
        noise = torch.randn(batch.image.shape, generator=generator)
        return loss(network, Pairs(other(batch.image + noise), batch.truth))[0]

    assert want.per_sample <= step_memory(network, noisy, batch).per_sample < 1.2 * want.per_sample
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in [*network.parameters(), *other.parameters()])
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())


def test_bfloat16_takes_less():
    full, half = (step_memory(network_on_meta(), loss, pairs(2, 32, 32), p) for p in (torch.float32, torch.bfloat16))
    assert 0.5 * full.per_sample < half.per_sample < 0.65 * full.per_sample


def test_what_passes_without_gradients_takes_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * GIB)
    assert samples_at_once(4, (16, 16), 1, 16) == 16
    assert samples_at_once(96, (240, 240), 1, 16) == 8  # of 253 MiB each
    assert samples_at_once(96, (240, 240), 3, 16) == 2
    assert samples_at_once(96, (240, 240), 1, 16, processes=2) == 4
    assert samples_at_once(96, (155, 240, 240), 4, 16) == 1


# A step, for real, in a process of its own


def status(key: str) -> int:
    """A number of bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def train(channels: int, size: int, batch_size: int, parts: int, precision: torch.dtype, steps: int = 2) -> None:
    """Steps of Adam with an averaged copy, each batch in so many parts (0: as many as are needed)."""
    network, averaged = UNet(channels), UNet(channels).requires_grad_(False)
    optimiser = torch.optim.Adam(network.parameters())
    if not parts:
        estimate = step_memory(network, loss, pairs(batch_size, size, size), precision)
        parts = micro_batches("synthesis", batch_size, estimate, available_memory())
    batch = pairs(batch_size, size, size, device="cpu")
    for _ in range(steps):
        optimiser.zero_grad()
        for part in zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                total = loss(network, Pairs(*part))[0]
            total.backward()
        optimiser.step()
        torch._foreach_lerp_([*averaged.parameters()], [p.detach() for p in network.parameters()], 0.1)


def run(*arguments: object, group: Path | None = None, limits: dict[int, int] | None = None):
    """Run `main` below in a process of its own, in a control group or under limits of its own."""

    def enter() -> None:
        import resource

        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        for kind, limit in (limits or {}).items():
            resource.setrlimit(kind, (limit, limit))

    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, timeout=600)


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")


@linux
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_estimate_is_near_the_real_peak(precision):
    runs = [run("peak", 32, 96, 3, precision) for _ in range(3)]
    assert not any(done.returncode for done in runs), runs[0].stderr
    estimated, real = sorted((json.loads(done.stdout) for done in runs), key=lambda pair: pair[1])[1]
    # The middle one: gaps between blocks make real peaks differ by an eighth from run to run, and between machines.
    # `micro_batches` takes 0.6 of what is there, so an estimate that is a fifth too low kills nothing.
    assert 0.8 * real < estimated < 1.3 * real


@pytest.fixture
def group(request):
    """A control group of memory that may hold 600 MiB, or as many as the test says."""
    size = getattr(request, "param", 600) * 2**20
    for mount, limit in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        folder = mount / f"crossmr-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(size))
        except OSError:
            folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("this process may not make a control group of memory")


@linux
def test_a_control_groups_limit_is_what_is_available(group):
    done = run("available", group=group)
    assert done.returncode == 0, done.stderr
    assert 100 * 2**20 < int(done.stdout) < 600 * 2**20
    assert available_memory() > int(done.stdout)  # this process is in no such group


@linux
def test_where_a_whole_batch_is_killed_its_parts_are_not(group):
    assert run("train", 16, 128, 24, 1, "float32", group=group).returncode == -signal.SIGKILL
    done = run("train", 16, 128, 24, 0, "float32", group=group)
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.parametrize("group", [2560], indirect=True)
def test_a_step_of_the_largest_recipe_fits_into_memory_that_a_whole_batch_exceeds(group, tmp_path):
    """Crops of 224², 96 channels: a sample takes 1 GB."""
    write_cohort(tmp_path / "cohort", 2, shape=(32, 36, 32), spacing_mm=(6.0, 6.2, 5.6))
    prepare(tmp_path / "cohort", tmp_path / "set", PrepareSettings(split=Split(1, 0, 0)))
    arguments = ["train", tmp_path / "set", "-o", tmp_path / "run", "--recipe", "paper", "--steps", "1"]
    for setting in ("guidance=none", "synthesis_train.batch_size=3"):
        arguments += ["--set", setting]
    command = [sys.executable, "-c", "from crossmr.cli import main; main()", *map(str, arguments)]
    enter = partial((group / "cgroup.procs").write_text, "0")
    done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "synthesis: a batch of 3 needs about" in done.stdout
    assert " parts of " in done.stdout


@linux
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(kind):
    import resource

    done = run("available", limits={getattr(resource, kind): 5 * GIB})
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 5 * GIB


# In how many parts


@pytest.mark.parametrize(
    ("batch_size", "available", "want"),
    [(24, 1000, 1), (24, 58, 1), (24, 57, 2), (24, 34, 2), (24, 33, 3), (24, 13, 24), (5, 19, 2), (1, 13, 1)],
)
def test_as_few_parts_as_fit(batch_size, available, want):
    parts = micro_batches("synthesis", batch_size, StepMemory(2, 10), available, fraction=1.0)
    assert parts == want
    largest = -(-batch_size // parts)
    assert 10 + 2 * largest <= available
    assert parts == 1 or 10 + 2 * -(-batch_size // (parts - 1)) > available


def test_a_part_takes_a_fraction_of_what_is_there_but_one_sample_may_take_all():
    assert micro_batches("synthesis", 8, StepMemory(10, 10), 100) == 2  # 50 of the 60 hold four samples
    assert micro_batches("synthesis", 8, StepMemory(10, 10), 21) == 8
    with pytest.raises(ModelError, match=r"synthesis: one sample needs about 5\.0 GB, 4\.9 GB are available\. Lower"):
        micro_batches("synthesis", 8, StepMemory(2 * 10**9, 3 * 10**9), 49 * 10**8)


def test_the_line_says_what_how_much_and_how():
    step = StepMemory(7 * 10**8, 5 * 10**8)
    want = "synthesis: a batch of 24 needs about 17.3 GB, 6.1 GB are available: in 4 parts of 6"
    assert explain("synthesis", 24, step, 61 * 10**8, 4) == want
    assert explain("synthesis", 24, step, 61 * 10**8, 5).endswith("in 5 parts of up to 5")
    assert explain("synthesis", 24, step, 61 * 10**9, 1).endswith("in one part")


def main(task: str, *arguments: str) -> None:
    """What `run` runs."""
    if task == "available":
        print(available_memory())
        return
    channels, size, batch_size, *more, name = arguments
    precision = getattr(torch, name)
    if task == "train":
        train(int(channels), int(size), int(batch_size), int(more[0]), precision)
        return
    estimate = step_memory(network_on_meta(int(channels)), loss, pairs(1, int(size), int(size)), precision)
    train(8, 16, 1, 1, precision)  # what the first step loads
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(int(channels), int(size), int(batch_size), 1, precision)
    print(json.dumps([estimate.fixed + int(batch_size) * estimate.per_sample, status("VmHWM") - before]))


if __name__ == "__main__":
    main(*sys.argv[1:])
