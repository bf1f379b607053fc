"""One encoder for all modalities, one that is told which modality it sees, or one each.

The masked autoencoder with cells (stage 1 of recipes `standard` and `any`) in its three forms, trained alike; what each
loses on held-out patients, and how much of a cell's mean and deviation a ridge regression finds in its eight features
(R², held-out patients). The package has the first form.

python benchmarks/one_encoder.py ../shared/data -o runs/one-encoder --seeds 0 1
"""

import argparse
import json
from pathlib import Path

import torch
from ablation import FORM, Bench, ridge
from einops import rearrange
from tasks import fabric, flipped, in_chunks, load_task
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from crossmr.data.dataset import seeded
from crossmr.display import SILENT
from crossmr.layers import Encoder, convolution, spread
from crossmr.stages.representation import MaskedAutoencoder, RepresentationConfig

CELL = 8
MODALITIES = 4
CONFIG = RepresentationConfig(**FORM, patch_size=4, cell=CELL)


class Told(MaskedAutoencoder):
    """One encoder and one decoder that see, beside the image or its cell, which modality it is."""

    def __init__(self) -> None:
        super().__init__(CONFIG, MODALITIES, 2)
        self.encoder = Encoder(2, 1 + MODALITIES, CONFIG.channels, CONFIG.multipliers, CONFIG.blocks, None)
        self.from_cell = convolution(2, CONFIG.cell_features + MODALITIES, CONFIG.dim, size=1)

    def tell(self, apart: Tensor) -> Tensor:
        """(B·M, C, *S) with a one-hot map of each modality behind its channels."""
        which = torch.eye(MODALITIES).repeat(len(apart) // MODALITIES, 1).to(apart)[:, :, None, None]
        return torch.cat([apart, which.expand(-1, -1, *apart.shape[2:])], 1)

    def _cells(self, image: Tensor) -> Tensor:
        return super()._cells(self.tell(image))

    def forward(self, masked: Tensor) -> Tensor:
        cells = self._cells(rearrange(masked, "b m ... -> (b m) 1 ..."))
        deep = spread(self.from_cell(self.tell(cells)), [side // self.config.stride for side in masked.shape[2:]])
        out: Tensor = self.decoder(deep, [])
        return out.reshape(masked.shape)


class Each(nn.Module):
    """An autoencoder for each modality, the same patches hidden in all."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(MaskedAutoencoder(CONFIG, 1, 2) for _ in range(MODALITIES))

    def loss(self, images: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
        """The mean of theirs."""
        state, losses = generator.get_state(), []
        for i, network in enumerate(self.networks):
            generator.set_state(state)
            losses.append(network.loss(images[:, i : i + 1], present[:, i : i + 1], generator))  # type: ignore[operator]
        return torch.stack(losses).mean()

    def represent(self, images: Tensor) -> Tensor:
        """Their grids, one behind the other."""
        grids = [net.represent(images[:, i : i + 1]) for i, net in enumerate(self.networks)]  # type: ignore[operator]
        return torch.cat(grids, 1)


FORMS = {"shared": lambda: MaskedAutoencoder(CONFIG, MODALITIES, 2), "told": Told, "each": Each}


def measured(bench: Bench, name: str) -> dict[str, object]:
    """Train one form and say what it is worth."""
    train, test = bench.task.train, bench.test

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        return network.loss(flipped(bench.images(train, chosen), flips), train.present[chosen], generator)  # type: ignore[operator, no-any-return]

    network = bench.fit(name, FORMS[name], loss)
    with torch.no_grad():
        parts = [
            network.loss(test.images[i : i + 64].float(), test.present[i : i + 64], seeded("held out", i))  # type: ignore[operator]
            for i in range(0, len(test), 64)
        ]
    some = train.select(torch.arange(0, len(train), 6))
    grids = [
        in_chunks(bench.runner, lambda chosen, s=s: network.represent(bench.images(s, chosen)), len(s))  # type: ignore[operator, misc]
        for s in (some, test)
    ]
    row: dict[str, object] = {"form": name, "seed": bench.seed, "loss": round(float(torch.stack(parts).mean()), 5)}
    features = CONFIG.cell_features
    for index, modality in enumerate((*bench.task.sources, *bench.task.targets)):
        x, x_test = (rearrange(g[:, features * index : features * (index + 1)], "n f h w -> (n h w) f") for g in grids)
        for statistic, (y, y_test) in zip(
            ("mean", "std"), zip(*(_cells(s.images, index) for s in (some, test)), strict=True), strict=True
        ):
            found = ridge(x, y[:, None], 10.0)(x_test)[:, 0]
            unexplained = ((found - y_test) ** 2).sum() / ((y_test - y_test.mean()) ** 2).sum()
            row[f"{modality} {statistic}"] = round(1 - float(unexplained), 3)
    return row


def _cells(images: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every cell of one modality, flat."""
    image = images[:, index : index + 1].float()
    mean = avg_pool2d(image, CELL)
    return mean.flatten(), (avg_pool2d(image**2, CELL) - mean**2).clamp(min=0).sqrt().flatten()


def main() -> None:
    """Train all forms and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/one-encoder"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    task = load_task("cubes-2d", options.data, options.out, SILENT)
    test = task.test.select(torch.arange(0, len(task.test), 3))
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(task, test, folder, fabric("bf16-mixed"), seed, options.steps, 16, SILENT)
        for name in FORMS:
            print(json.dumps(measured(bench, name)), flush=True)


if __name__ == "__main__":
    main()
