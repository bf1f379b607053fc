"""Which MRM decoder gives the representation that says more of the target: U-Net with skips, or skip-free.

For each form the MRM is trained on the same slices, and then a C-UNet that is shown the true target's representation
(guidance 'truth'). What matters is what the representation is worth to the C-UNet on held-out patients: the PSNR with
the true representation less the PSNR without any. A ridge regression from representation to the target's mean and
deviation a slice says the same thing without a second network.

python benchmarks/representation.py ../shared/data -o runs/representation
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from crossmr import metrics
from crossmr.config import with_settings
from crossmr.data.dataset import Batches, PreparedSet
from crossmr.data.prepare import Split, default_workers, prepare
from crossmr.display import Display
from crossmr.model import CrossConditionedModel, load_model
from crossmr.recipes import TINY
from crossmr.training import train

SIZE = (96, 96)
TARGETS = ("t1c", "t2f")


def main() -> None:
    """Train both forms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/representation"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    out, display, rows = options.out, Display(), []
    prepare(
        options.data / "lgg",
        out / "set",
        split=Split.parse("75/5/20"),
        workers=default_workers(),
        display=display,
    )
    for seed in range(options.seeds):
        for decoder in ("skip-free", "u-net"):
            recipe = replace(TINY, guidance="truth", guidance_dropout=0.15)
            recipe = with_settings(
                recipe,
                {"representation.cell": "0", "representation.decoder": decoder, "distribution.conditional": "false"},
            )
            model = train(
                out / "set",
                out / f"{decoder}-{seed}",
                recipe=recipe,
                sources=("t1n",),
                targets=TARGETS,
                steps=options.steps,
                seed=seed,
                display=display,
            )
            rows.append({"decoder": decoder, "seed": seed, **worth(load_model(model), PreparedSet(out / "set"))})
            display.say(json.dumps(rows[-1]))
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")


@torch.no_grad()
def worth(model: CrossConditionedModel, prepared: PreparedSet) -> dict[str, float]:
    """PSNR (dB, held-out slices) with the true representation and with none; R² of the ridge regression."""
    fit, test = (slices(prepared, part) for part in ("train", "test"))
    y_fit, y_test = (torch.cat([model.representation.represent(x) for x in s[:, 1:].split(16)]) for s in (fit, test))
    result: dict[str, float] = {}
    for name, y_0 in (("truth", y_test), ("none", None)):
        parts = [
            model.synthesis(x[:, :1], None if y_0 is None else y_0[i * 16 : i * 16 + len(x)])
            for i, x in enumerate(test.split(16))
        ]
        predicted = torch.cat(parts).clamp(0, 1)
        for index, target in enumerate(TARGETS):
            result[f"psnr_{target}_{name}"] = round(
                float(metrics.psnr(predicted[:, index], test[:, 1 + index], 1.0).mean()), 3
            )
    for index, target in enumerate(TARGETS):
        result[f"gain_{target}"] = round(result[f"psnr_{target}_truth"] - result[f"psnr_{target}_none"], 3)
        for statistic in ("mean", "std"):
            a, b = (getattr(s[:, 1 + index].flatten(1), statistic)(1).numpy() for s in (fit, test))
            result[f"r2_{target}_{statistic}"] = round(ridge(y_fit.numpy(), a, y_test.numpy(), b), 3)
    return result


def slices(prepared: PreparedSet, part: str) -> torch.Tensor:
    """Up to 400 slices (N, 1 + T, Y, X) spread over a part's patients."""
    reader = Batches(prepared.part(part), ("t1n", *TARGETS), size=SIZE, batch_size=1, seed=0)
    return reader.fixed(400).images


def ridge(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, penalty: float = 1.0) -> float:
    """R² on held-out slices of a ridge regression."""
    centre, mean = x.mean(0), y.mean()
    weights = np.linalg.solve((x - centre).T @ (x - centre) + penalty * np.eye(x.shape[1]), (x - centre).T @ (y - mean))
    residual = y_test - ((x_test - centre) @ weights + mean)
    return float(1 - (residual**2).sum() / ((y_test - y_test.mean()) ** 2).sum())


if __name__ == "__main__":
    main()
