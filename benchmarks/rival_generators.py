"""The predictors of rivals.py that draw or are judged: pix2pix, pixel diffusion, flow matching in wavelets."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from grid import Predict
from monai.networks.nets import DiffusionModelUNet, PatchDiscriminator
from rival_networks import (
    CHANNELS,
    CONTEXT,
    OURS,
    SOURCES,
    TARGETS,
    VALIDATION,
    DynUNet2D,
    DynUNet3D,
    Images,
    Ours,
    PublishedForm,
    RestormerSmall,
    Rival,
    ThreeAxial,
    ThreeViews,
)
from torch import Tensor, nn
from torch.nn import functional as F

from crossmr.evaluation.subjects import Subject
from crossmr.networks.c_unet import CUNet, synthesis_error
from crossmr.networks.diffusion import Schedule, ddim_sample, q_sample
from crossmr.networks.model import first_weights
from crossmr.networks.scale import RANGE
from crossmr.tensors import seeded


class Pix2Pix(Ours):
    """Our network as the generator of pix2pix (Isola et al. 2017): 100 times L1, and a conditional PatchGAN.

    L1 counts on the paper's scale, from -1 to 1. The discriminator takes its step within the generator's loss.
    """

    name = "pix2pix"
    rates = (2e-4, 6e-4, 2e-3)

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        with first_weights(self.seed, "discriminator"):
            judge = PatchDiscriminator(2, 32, len(SOURCES) + len(TARGETS))
        self.judge = judge.to(self.device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.judge.parameters(), self.rate, betas=(0.5, 0.999))

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """A step of the discriminator, then the generator's loss."""
        inputs, truth, weight = self.draw(step)
        shown = inputs[:, CONTEXT // 2 : -1 : CONTEXT]
        made = network(inputs).float() * weight
        self.optimiser.zero_grad(set_to_none=True)
        real, false = self._error(shown, truth * weight, True), self._error(shown, made.detach(), False)
        ((real + false) / 2).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        total, count = synthesis_error(made, truth, weight, absolute=True)
        return 100 * 2 / RANGE * total / count.clamp(min=1) + self._error(shown, made, True)

    def _error(self, shown: Tensor, image: Tensor, is_real: bool) -> Tensor:
        """Cross-entropy of what the discriminator says of an image beside its sources."""
        says = self.judge(torch.cat([shown, image], 1))[-1].float()
        return F.binary_cross_entropy_with_logits(says, torch.full_like(says, float(is_real)))


class Diffusion(Rival):
    """Pixel diffusion given the sources by concatenation (Saharia et al. 2022), predicting x_0; DDIM, η = 0."""

    name = "diffusion, 50 steps"
    rates = (1e-4, 3e-4, 1e-3)
    slow = True
    steps = 50
    schedule = Schedule()

    def build(self) -> nn.Module:
        """MONAI's denoiser, with attention at the coarsest level."""
        network: nn.Module = DiffusionModelUNet(
            2,
            CHANNELS + len(TARGETS),
            len(TARGETS),
            num_res_blocks=(1, 1, 1, 1),
            channels=(24, 48, 72, 96),
            attention_levels=(False, False, False, True),
            norm_num_groups=8,
            num_head_channels=24,
        )
        return network

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """‖x_0 − x̂_0(x_t, t)‖² at random steps t."""
        inputs, truth, weight = self.draw(step)
        generator = seeded("diffusion", self.seed, step)
        t = torch.randint(self.schedule.steps, (len(truth),), generator=generator)
        noise = torch.randn(truth.shape, generator=generator).to(truth)
        noisy = q_sample(truth, noise, self.schedule.alpha_bar()[t].to(truth))
        made = network(torch.cat([noisy, inputs], 1), t.to(self.device))
        total, count = synthesis_error(made, truth, weight, absolute=False)
        return total / count.clamp(min=1)

    def predict(self, network: nn.Module, inputs: Tensor, steps: int | None = None) -> Tensor:
        """Draw images; every slice starts from the same noise, so that neighbours agree."""

        def clean(noisy: Tensor, t: Tensor) -> Tensor:
            made: Tensor = network(torch.cat([noisy, inputs], 1), t)
            return made.float()

        shape = len(inputs), len(TARGETS), *inputs.shape[2:]
        generators = [seeded("start", self.seed) for _ in inputs]
        steps = steps or self.steps
        return ddim_sample(
            clean, shape, self.schedule, steps=steps, eta=0.0, generator=generators, device=inputs.device
        )

    def validate(self, network: nn.Module, count: int = VALIDATION) -> float:
        """The same, a fifth of the steps, so that comparing rates costs little."""
        usual, self.steps = self.steps, max(1, self.steps // 5)
        try:
            return super().validate(network, count)
        finally:
            self.steps = usual

    def complete(self, predict: Predict, subject: Subject) -> Images:
        """Only the chosen slices: the others stay 0."""
        head = np.zeros_like(subject.head)
        head[self.chosen] = subject.head[self.chosen]
        return super().complete(predict, replace(subject, head=head))


def haar(images: Tensor) -> Tensor:
    """The orthonormal Haar transform of images (B, C, Y, X), as (B, 4·C, Y/2, X/2), in float32."""
    return _of_fours(F.pixel_unshuffle(images, 2))


def inverse_haar(coefficients: Tensor) -> Tensor:
    """The images whose Haar transform this is."""
    return F.pixel_shuffle(_of_fours(coefficients), 2)


def _of_fours(parts: Tensor) -> Tensor:
    """The transform of each four of the channels; it is its own inverse."""
    a, b, c, d = rearrange(parts.float(), "b (c k) y x -> k b c y x", k=4)
    fours = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 2)
    return fours.flatten(1, 2) / 2


class WaveletFlow(Rival):
    """Flow matching of Haar coefficients, from the sources' mean and a little noise to the target (WFM's form).

    The network is ours on coefficients, which are half as many a side as pixels are, instead of on patches.
    """

    name = "wavelet flow"
    steps = 1, 4
    noise = 0.1
    """Standard deviation of what is added to the start."""
    features = 64
    """Of the embedding of t."""

    def build(self) -> nn.Module:
        """Ours without patches, t let into every block."""
        inputs = 4 * (CHANNELS + len(TARGETS))
        return CUNet(replace(OURS, patch=1), inputs, 4 * len(TARGETS), representation_dim=self.features)

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """‖(x_1 − x_0) − v(x_t, t)‖², x_t = (1 − t) x_0 + t x_1 (Lipman et al. 2023)."""
        inputs, truth, weight = self.draw(step)
        generator = seeded("flow", self.seed, step)
        t = torch.rand(len(truth), generator=generator).to(truth)
        given, end, start = haar(inputs), haar(truth), self._start(inputs, [generator] * len(inputs))
        between = torch.lerp(start, end, t[:, None, None, None])
        within = F.max_pool2d(weight, 2).repeat_interleave(4, 1)
        total, count = synthesis_error(self._velocity(network, between, given, t), end - start, within, absolute=False)
        return total / count.clamp(min=1)

    def predict(self, network: nn.Module, inputs: Tensor, steps: int = 1) -> Tensor:
        """Follow the velocity in Euler's steps."""
        given = haar(inputs)
        x = self._start(inputs, [seeded("start", self.seed) for _ in inputs])
        for step in range(steps):
            t = x.new_full((len(x),), step / steps)
            x = x + self._velocity(network, x, given, t) / steps
        return inverse_haar(x)

    def completions(self, network: nn.Module) -> Mapping[str, Callable[[Subject], Images]]:
        """In one step and in four."""
        return {
            f"{self.name}, {steps} step{'s' * (steps > 1)}": partial(
                self.complete, partial(self.predict, network, steps=steps)
            )
            for steps in self.steps
        }

    def _start(self, inputs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The coefficients of the sources' mean, and noise."""
        mean = inputs[:, CONTEXT // 2 : -1 : CONTEXT].mean(1, keepdim=True).expand(-1, len(TARGETS), -1, -1)
        start = haar(mean)
        noise = torch.stack([torch.randn(start.shape[1:], generator=generator) for generator in generators])
        return start + self.noise * noise.to(start)

    def _velocity(self, network: nn.Module, x: Tensor, given: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, math.log(1000), self.features // 2, device=t.device))
        angles = t[:, None] * frequencies
        made: Tensor = network(torch.cat([x, given], 1), torch.cat([angles.sin(), angles.cos()], 1))
        return made.float()


REGRESSIONS = (Ours, PublishedForm, DynUNet2D, DynUNet3D, ThreeViews, ThreeAxial, RestormerSmall)
RIVALS: dict[str, type[Rival]] = {kind.name: kind for kind in (*REGRESSIONS, Pix2Pix, WaveletFlow, Diffusion)}
"""All of them, in the tables' order."""
