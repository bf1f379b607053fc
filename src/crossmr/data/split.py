"""Which patients are for training, validation and test: shares of them, by a seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from crossmr.config import read_whole
from crossmr.data.patients import SPLITS
from crossmr.errors import ConfigError
from crossmr.files import digest


@dataclass(frozen=True)
class Split:
    """Which fraction of the patients goes where, or percent; all studies of a patient go together."""

    train: float = 0.7
    """Fraction of patients that the networks learn from."""
    val: float = 0.1
    """Fraction that validates during training."""
    test: float = 0.2
    """Fraction that training never reads."""
    seed: int = 0
    """Seed of the hash that orders the patients."""

    def __post_init__(self) -> None:
        shares = self.shares
        total = sum(shares) if all(isinstance(share, Real) for share in shares) else math.nan
        whole = 100 if abs(total - 100) <= 1e-4 else 1
        if not (abs(total - whole) <= 1e-6 * whole and min(shares) >= 0 and self.train > 0):  # NaN fails too
            raise ConfigError(
                f"--split is {shares}; expected train/val/test fractions that sum to 1, or percent, such as 70/10/20."
            )
        for name, share in zip(SPLITS, shares, strict=True):
            object.__setattr__(self, name, share / whole)
        read_whole(self, "seed")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Those of train, val and test."""
        return self.train, self.val, self.test

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Split":
        """Read '70/10/20'."""
        try:
            numbers = [float(part) for part in text.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or sum(numbers) <= 0:
            raise ConfigError(f"--split is '{text}'; expected train/val/test in percent, such as 70/10/20.")
        train, val, test = (number / sum(numbers) for number in numbers)
        return cls(train, val, test, seed)


def assign_splits(patients: Sequence[str], split: Split, fixed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Assign each patient to a split, so that the shares are met to rounding: patient → 'train', 'val' or 'test'.

    Patients in `fixed` go where it says. The others, in the order of a hash of seed and name, fill up what is then
    short of its share: train, val, test. No split with a share above 0 stays empty if there are enough of them.
    """
    order = sorted(set(patients), key=lambda patient: digest(f"{split.seed}:{patient}"))
    splits = {patient: fixed[patient] for patient in order if patient in fixed} if fixed else {}
    free = [patient for patient in order if patient not in splits]
    counts = {part: [*splits.values()].count(part) for part in SPLITS}
    wanted, new = _wanted(counts, len(free), split), dict.fromkeys(SPLITS, 0)
    for _ in free:
        short = {part: round(number - counts[part] - new[part], 6) for part, number in wanted.items()}
        empty = [part for part in wanted if not counts[part] + new[part]]
        new[empty[0] if empty else max(short, key=lambda part: short[part])] += 1
    splits |= zip(free, (part for part in SPLITS for _ in range(new[part])), strict=True)
    return {patient: splits[patient] for patient in order}


def _wanted(counts: Mapping[str, int], free: int, split: Split) -> dict[str, float]:
    """How many patients are wanted in the splits that are short of their share, where as many are free.

    Splits that have more than their share leave less to the others, which are reduced alike.
    """
    shares = {part: share for part, share in zip(SPLITS, split.shares, strict=True) if share > 0}
    while True:
        left, whole = free + sum(counts[part] for part in shares), sum(shares.values())
        wanted = {part: left * share / whole for part, share in shares.items()}
        if not any(counts[part] > wanted[part] + 1e-6 for part in shares):
            return wanted
        shares = {part: share for part, share in shares.items() if counts[part] <= wanted[part] + 1e-6}
