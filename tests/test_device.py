"""Which device, which precision; the machine is simulated where it has to be another."""

import subprocess
import sys

import pytest
import torch
from fake_cuda import fake_cuda

from crossmr.device import (
    PRECISIONS,
    autocast,
    choose_device,
    choose_precision,
    device_lost,
    ends_the_run,
    host_memory_exhausted,
    in_batches,
    numerics,
    out_of_memory,
)
from crossmr.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has some accelerators."""

    def pretend(*, cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "want"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda"), (1, True, "cuda")]
)
def test_auto_takes_the_best_that_is_there(machine, cuda, mps, want):
    machine(cuda=cuda, mps=mps)
    assert choose_device() == choose_device("auto") == torch.device(want)


def test_a_device_that_is_there_is_taken(machine):
    machine(cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "cpu:1", "meta", "xla"])
def test_a_device_that_is_not_there_is_refused_with_what_is(machine, name):
    machine()
    with pytest.raises(ConfigError, match=rf"--device is '{name}', but .* have only: cpu\.$"):
        choose_device(name)


def test_a_second_gpu_that_is_not_there_is_refused_with_what_is(machine):
    machine(cuda=1)
    with pytest.raises(ConfigError, match=r"'cuda:1', but .* have only: cpu, cuda\.$"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "CPU", "0"])
def test_no_device_at_all_is_refused(machine, name):
    machine(cuda=1)
    with pytest.raises(ConfigError, match=f"--device is '{name}'.* cuda"):
        choose_device(name)


def test_precision_by_name():
    for one in (torch.device("cpu"), torch.device("mps")):
        assert choose_precision("float32", one) is torch.float32
        assert choose_precision("bfloat16", one) is torch.bfloat16


@pytest.mark.parametrize(("native", "want"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_asks_the_hardware(monkeypatch, native, want):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native, raising=False)
    capabilities = {torch.device("cuda:0"): (9, 0), torch.device("cuda:1"): (8, 0) if native else (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert choose_precision("auto", torch.device("cpu")) is want
    assert choose_precision("auto", torch.device("cuda:1")) is want
    assert choose_precision("auto", torch.device("mps")) is torch.float32


def test_an_older_pytorch_that_cannot_tell_means_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_precision("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("name", ["float16", "", "bf16", "double"])
def test_another_precision_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match=f"--precision is '{name}'; expected one of {', '.join(PRECISIONS)}"):
        choose_precision(name, torch.device("cpu"))


@pytest.fixture
def tf32():
    """Whether matrix products and convolutions may round to TF32; PyTorch's own defaults before and after."""

    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = allowed()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    yield allowed
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("dtype", "want"), [(torch.float32, (False, False)), (torch.bfloat16, (True, True))])
def test_float32_on_a_gpu_never_means_tf32(tf32, dtype, want):
    with numerics(torch.device("cpu"), dtype):
        assert tf32() == (False, True)
    with numerics(torch.device("cuda"), dtype):
        assert tf32() == want
    assert tf32() == (False, True)  # the caller's own


CALLERS = """
import torch
from crossmr.device import numerics

gpu, products = torch.device("cuda"), torch.backends.cuda.matmul
products.allow_tf32 = True
with numerics(gpu, torch.float32), numerics(gpu, torch.float32):
    assert not products.allow_tf32
assert products.allow_tf32
if hasattr(products, "fp32_precision"):  # after which PyTorch refuses to read the older setting
    newer = [products, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    for one in newer:
        one.fp32_precision = "tf32"
    products.fp32_precision = "ieee"
    for dtype, inside in ((torch.float32, "ieee"), (torch.bfloat16, "tf32")):
        with numerics(gpu, dtype):
            assert {one.fp32_precision for one in newer} == {inside}
        assert [one.fp32_precision for one in newer] == ["ieee", "tf32", "tf32"]
"""


def test_a_caller_gets_the_own_precision_back():
    """In a process of its own, as PyTorch's older and newer settings do not mix."""
    subprocess.run([sys.executable, "-c", CALLERS], check=True)


@pytest.mark.parametrize(("dtype", "want"), [(torch.float32, (False, False)), (torch.bfloat16, (True, True))])
def test_networks_run_in_the_precision_that_was_chosen(tf32, dtype, want):
    layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    with autocast(torch.device("cpu"), dtype):
        assert layer(x).dtype is dtype
    assert layer(x).dtype is torch.float32
    with fake_cuda():
        layer, x = layer.to("cuda"), x.to("cuda")
        with autocast(torch.device("cuda"), dtype):
            assert tf32() == want
            assert layer(x).dtype is dtype
        assert layer(x).dtype is torch.float32


def test_every_device_says_in_its_own_way_that_memory_ran_out():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ):
        assert out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("error", "lost", "host"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), True, False),
        (torch.AcceleratorError("CUDA error: unspecified launch failure", 719), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, False),
        (RuntimeError("shapes differ"), False, False),
        (ValueError("CUDA error"), False, False),
        (MemoryError(), False, True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), False, True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), False, True),
        (OSError(12, "Cannot allocate memory"), False, True),
        (OSError(28, "No space left on device"), False, False),
    ],
)
def test_errors_that_everything_after_them_would_share_are_known(error, lost, host):
    assert device_lost(error) == lost
    assert host_memory_exhausted(error) == host
    assert (ends_the_run(error) is not None) == (lost or host)


def test_the_processor_without_memory_is_known_by_its_real_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert host_memory_exhausted(caught.value)


def test_batches_shrink_where_memory_runs_out():
    asked = []

    def run(some):
        asked.append(some.stop - some.start)
        if asked[-1] > 3:
            raise RuntimeError("MPS backend out of memory")
        return list(range(some.start, some.stop))

    made = list(in_batches(run, 8, 8))
    assert [n for _, part, _ in made for n in part] == list(range(8))
    assert asked == [8, 4, 2, 2, 2, 2]
    assert [batch for *_, batch in made] == [2] * 4
    assert list(in_batches(run, 0, 8)) == []
    with pytest.raises(RuntimeError, match="another"):
        list(in_batches(lambda _: (_ for _ in ()).throw(RuntimeError("another")), 8, 8))
    with pytest.raises(MemoryError):
        list(in_batches(lambda _: (_ for _ in ()).throw(MemoryError()), 8, 8))
