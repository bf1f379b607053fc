"""The README's picture: a phantom that no training saw, each contrast from the other three, truth above synthesis.

python benchmarks/picture.py -o docs/synthesis.png
"""

import argparse
import tempfile
from pathlib import Path

import crossmr
from crossmr.data.naming import DISPLAY_NAMES, find_studies
from crossmr.data.study import load_study
from crossmr.data.volume import read_volume
from crossmr.networks.inference import InferenceSettings
from crossmr.phantom import write_cohort
from crossmr.picture import save_picture, window, windowed

MODALITIES = ("t1n", "t1c", "t2w", "t2f")


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20_001, help="of the phantom; no training uses it")
    parser.add_argument("--model", type=Path, default=None, help="by default the shipped weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 1, seed=args.seed, shape=(150, 180, 150), spacing_mm=(1, 1, 1), skull=False, lesion=True)
        (files,) = find_studies(Path(folder))
        study = load_study(files)
        if study.labels is None:
            raise SystemExit("the phantom has no lesion")
        z = int((study.labels == 3).sum((1, 2)).argmax())
        y, x = study.box(2)[1:]
        truths, syntheses = [], []
        for target in MODALITIES:
            truth = study.normalised(target)
            others = {m: path for m, path in files.images().items() if m != target}
            result = crossmr.complete(others, model=args.model, settings=InferenceSettings(targets=(target,)))
            synthetic = read_volume(result.images[target]).data
            shown, name = window(truth), DISPLAY_NAMES[target]
            truths.append((f"{name}: truth", windowed(truth[z, y, x], shown)))
            syntheses.append((f"{name} from the other three", windowed(synthetic[z, y, x], shown)))
        save_picture(args.out, [truths, syntheses])


if __name__ == "__main__":
    main()
