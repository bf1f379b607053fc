"""Patients into splits: the shares, the seed, those whose part is fixed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmr.data.patients import SPLITS
from crossmr.data.split import Split, assign_splits
from crossmr.errors import ConfigError


def everyone(count: int) -> list[str]:
    return [f"BraTS-GLI-{number:05d}" for number in range(count)]


def test_splits_are_fixed_for_whom_they_are_said_to_be():
    patients = everyone(40)
    fixed = {patients[k]: ("train", "val", "test")[k % 3] for k in range(12)}
    splits = assign_splits(patients, Split(), fixed)
    assert splits == splits | fixed
    assert Counter(splits.values()) == {"train": 28, "val": 4, "test": 8}
    many = dict.fromkeys(patients[:20], "val")  # more than its share: the others share the rest
    assert Counter(assign_splits(patients, Split(), many).values()) == {"train": 16, "val": 20, "test": 4}
    nobody_left = assign_splits(patients[:3], Split(), dict.fromkeys(patients[:3], "test"))
    assert set(nobody_left.values()) == {"test"}
    assert set(assign_splits(patients[:3], Split(), {patients[0]: "val"}).values()) == set(SPLITS)


def test_the_fractions_are_kept_and_the_seed_matters():
    splits = assign_splits(everyone(3000), Split())
    assert Counter(splits.values()) == {"train": 2100, "val": 300, "test": 600}
    other = assign_splits(everyone(3000), Split(seed=1))
    moved = sum(splits[p] != other[p] for p in splits)
    assert moved / 3000 == pytest.approx(1 - (0.49 + 0.01 + 0.04), abs=0.04)  # as two independent draws


def test_the_split_depends_on_nothing_but_seed_and_names():
    patients = everyone(50)
    splits = assign_splits(patients, Split(seed=3))
    shuffled = [patients[i] for i in np.random.default_rng(0).permutation(50)]
    assert assign_splits([*shuffled, *shuffled], Split(seed=3)) == splits
    first = " ".join(splits[patient][:2] for patient in patients[:20])
    assert first == "tr tr tr va te tr tr tr tr va va tr tr tr te tr tr te tr tr"  # for ever


@pytest.mark.parametrize(
    ("count", "text", "counts"),
    [
        (10, "50/25/25", (5, 3, 2)),
        (30, "70/10/20", (21, 3, 6)),
        (4, "70/10/20", (2, 1, 1)),
        (2, "70/10/20", (1, 1, 0)),
        (1, "10/0/90", (1, 0, 0)),
        (7, "1/1/1", (3, 2, 2)),
    ],
)
def test_the_shares_are_those_that_were_asked_for(count, text, counts):
    for seed in range(5):
        splits = [*assign_splits(everyone(count), Split.parse(text, seed)).values()]
        assert tuple(splits.count(part) for part in SPLITS) == counts


@given(counts=st.lists(st.integers(10, 60), min_size=2, max_size=4), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_those_who_join_fill_up_the_shares_and_nobody_moves(counts, seed):
    known: dict[str, str] = {}
    for count in sorted(counts):
        grown = assign_splits(everyone(count), Split(seed=seed), known)
        assert grown == grown | known
        numbers = Counter(grown.values())
        assert all(abs(numbers[part] - share * count) < 1 for part, share in zip(SPLITS, Split().shares, strict=True))
        known = grown


@given(count=st.integers(3, 12), seed=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_split_with_a_fraction_is_empty(count, seed):
    splits = assign_splits(everyone(count), Split(seed=seed))
    assert set(splits) == set(everyone(count))
    assert set(splits.values()) == set(SPLITS)


@given(count=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_split_without_a_fraction_stays_empty(count, seed):
    assert set(assign_splits(everyone(count), Split(0.8, 0.2, 0, seed)).values()) == {"train", "val"}
    assert set(assign_splits(everyone(count), Split(1, 0, 0, seed)).values()) == {"train"}


def test_fractions_are_read_from_text():
    assert Split.parse("70/10/20") == Split(0.7, 0.1, 0.2)
    assert Split.parse("8/1/1", seed=4) == Split(0.8, 0.1, 0.1, seed=4)
    assert Split.parse("100/0/0") == Split(1, 0, 0)
    assert Split.parse(" 37.5 / 12.5 / 50 ") == Split(0.375, 0.125, 0.5)


@pytest.mark.parametrize(
    "text",
    ["", "70", "70/30", "70/10/10/10", "a/b/c", "70-10-20", "0/0/0", "0/50/50", "-10/60/50", "nan/1/1", "inf/1/1"],
)
def test_fractions_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match=r"--split is .* such as 70/10/20\."):
        Split.parse(text)


@pytest.mark.parametrize(
    "fractions", [(0.7, 0.1, 0.1), (70, 10, 10), (0, 0.5, 0.5), (1.2, -0.2, 0), (float("nan"), 0, 1), ("7", "1", "2")]
)
def test_a_split_that_makes_no_sense_is_refused(fractions):
    with pytest.raises(ConfigError, match=r"--split is .* sum to 1"):
        Split(*fractions)
