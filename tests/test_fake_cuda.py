"""The GPU that is not there refuses what a GPU refuses, and computes what the processor computes."""

import copy

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class SmallUNet(nn.Module):
    """One level down and up, with normalisation, attention and a buffer that is written by a mask."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.out = nn.GroupNorm(2, 8), nn.Conv2d(16, 1, 1)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        first = F.silu(self.down(x))
        tokens = self.norm(self.middle(first)).flatten(2).transpose(1, 2)[:, None]
        deep = F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2)
        deep = F.interpolate(deep.reshape(len(x), 8, *(n // 2 for n in x.shape[2:])), scale_factor=2.0)
        self.seen[torch.tensor([True, False, True, False])] = x.detach().mean().expand(2)
        return self.out(torch.cat([first, deep], dim=1))


def trained(device, optimiser=torch.optim.Adam, **settings):
    """The losses and the averaged network of five steps."""
    torch.manual_seed(0)
    network = SmallUNet().to(memory_format=torch.channels_last).to(device)
    averaged = copy.deepcopy(network).requires_grad_(False)
    steps = optimiser(network.parameters(), 1e-2, weight_decay=1e-4, **settings)
    losses = []
    for (image,) in DataLoader([(torch.rand(2, 8, 8),) for _ in range(10)], batch_size=2):
        batch = image.to(device).contiguous(memory_format=torch.channels_last)
        steps.zero_grad()
        loss = (network(batch) - batch.mean(1, keepdim=True)).abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        steps.step()
        torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 0.1)
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), averaged


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"optimiser": torch.optim.AdamW}])
def test_training_gives_the_processors_numbers(settings):
    want, on_cpu = trained("cpu", **settings)
    with fake_cuda():
        got, averaged = trained("cuda", **settings)
        assert averaged.out.weight.is_cuda
        assert averaged.seen.device == torch.device("cuda:0")
        weights = {name: tensor.cpu() for name, tensor in averaged.state_dict().items()}
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)
    for name, tensor in on_cpu.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_values_of_the_processor_are_not_put_into_a_buffer():
    with fake_cuda():
        buffer, mask = torch.zeros(3, device="cuda"), torch.tensor([True, False, True])
        with pytest.raises(RuntimeError, match="device"):
            buffer[mask] = torch.ones(2)
        buffer[mask] = torch.ones(2).to("cuda")
        buffer[1] = 5
        assert buffer.tolist() == [1, 5, 1]
        assert buffer[mask].tolist() == buffer[[0, 2]].tolist() == [1, 1]
        buffer[[0, 2]] = 3
        assert buffer.tolist() == [3, 5, 3]


def test_devices_do_not_mix():
    with fake_cuda():
        x = torch.arange(3.0).to("cuda")
        for mixture in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(3)]),
            lambda: torch.where(torch.tensor([True, False, True]), x, 0.0),
            lambda: torch.ones(3)[x > 0],
            lambda: torch.ones(3)[x.long()],
            lambda: torch.equal(x, torch.ones(3)),
            lambda: nn.Linear(3, 1)(x),
            lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        ):
            with pytest.raises(RuntimeError, match="device"):
                mixture()
        assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3]  # a number may lie anywhere
        assert torch.zeros(3).copy_(x).tolist() == [0, 1, 2]


def test_only_a_copy_on_the_processor_becomes_an_array():
    with fake_cuda():
        x = torch.ones(3, device="cuda")
        for convert in (lambda: x.numpy(), lambda: np.asarray(x)):
            with pytest.raises(TypeError, match=r"Tensor\.cpu"):
                convert()
        assert type(x.cpu()) is torch.Tensor
        assert x.cpu().numpy().sum() == x.sum().item() == 3


def test_double_precision_is_refused_where_asked():
    with fake_cuda():
        assert torch.ones(3, device="cuda").double().dtype == torch.float64
    with fake_cuda(no_float64=True):
        x = torch.ones(3, device="cuda")
        for double in (
            lambda: x.double(),
            lambda: torch.as_tensor(np.ones(3), device="cuda"),
            lambda: torch.zeros(3, dtype=torch.float64, device="cuda"),
            lambda: nn.Linear(1, 1).double().to("cuda"),
        ):
            with pytest.raises(TypeError, match="float64"):
                double()
        assert (x * 2.5).cpu().double().sum() == 7.5


def test_a_module_moves_there_and_back(tmp_path):
    with fake_cuda():
        network = SmallUNet()
        parameters = list(network.parameters())
        assert all(a is b for a, b in zip(parameters, network.to("cuda").parameters(), strict=True))
        assert all(isinstance(p, nn.Parameter) and p.is_cuda and p.requires_grad for p in network.parameters())
        save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w")
        with torch.device("meta"):
            other = SmallUNet()
        assert other.out.weight.is_meta
        other.load_state_dict(load_file(tmp_path / "w"), assign=True)
        other.to("cuda")
        copy.deepcopy(other).load_state_dict(network.state_dict())
        x = torch.rand(1, 2, 8, 8)
        assert torch.equal(other(x.cuda()), network(x.cuda()))
        with pytest.raises(RuntimeError, match="device"):
            network(x)
        assert torch.equal(network.cpu()(x), other.cpu()(x))


def test_autocast_casts_as_on_a_gpu():
    with fake_cuda():
        network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.GroupNorm(1, 2)).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            x = network[0](torch.rand(1, 1, 4, 4, 4, device="cuda"))
            assert (x.dtype, network[1](x).dtype) == (torch.bfloat16, torch.float32)
        assert (torch.cuda.device_count(), torch.cuda.mem_get_info()) == (1, (8 * 2**30, 16 * 2**30))
