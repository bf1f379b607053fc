"""Whom a model has seen already: by its list, by its set, and in which words that is said."""

from types import SimpleNamespace

import pytest

from crossmr.evaluation.overlap import find_overlap, say_overlap
from crossmr.networks.trained_on import PatientList, names_of, remember

PATIENTS = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
SCANS = {case: (f"scan of {case}",) for case in PATIENTS}


def model(lists=(), **training):
    return SimpleNamespace(patients=lists, record={"training": training})


def overlap(trained_on=(), validated_on=(), known=True):
    return {"known": known, "trained_on": [*trained_on], "validated_on": [*validated_on]}


@pytest.mark.parametrize(
    ("train", "val", "found"),
    [
        (names_of("A", ()), names_of("B", ()), overlap(["A1", "A2"], ["B1"])),
        (names_of("X", ["scan of A2"]), (), overlap(["A1", "A2"])),  # and so with all visits of that patient
        (names_of("X", ["scan of B1"]), names_of("B", ()), overlap(["B1"])),
        (names_of("A", ["scan of X"]), names_of("X", ["scan of A1"]), overlap(["A1", "A2"])),
        (names_of("X", ()), (), overlap()),
    ],
)
def test_patients_are_known_by_name_or_by_scan(train, val, found):
    assert find_overlap(model([remember(train, val)]), PATIENTS, SCANS) == found


@pytest.mark.parametrize(
    ("split", "found"),
    [("train", overlap(PATIENTS)), ("val", overlap((), PATIENTS)), ("test", overlap())],
)
def test_the_splits_of_the_model_s_own_set_are_known_without_a_list(split, found):
    assert find_overlap(model(set="own"), PATIENTS, SCANS, ("own", split)) == found
    assert find_overlap(model(set="own"), PATIENTS, SCANS, ("other", split)) == overlap(known=False)
    assert find_overlap(SimpleNamespace(patients=(), record={}), PATIENTS, SCANS) == overlap(known=False)


def test_validated_on_the_model_s_own_set_and_trained_on_by_the_model_it_started_from():
    lists = [remember((), ()), remember(names_of("A", ()), ())]
    assert find_overlap(model(lists, set="own"), PATIENTS, SCANS, ("own", "val")) == overlap(["A1", "A2"], ["B1", "C1"])
    unknown = find_overlap(model([*lists, PatientList()]), PATIENTS, SCANS)
    assert unknown == overlap(["A1", "A2"], known=False)


def test_the_model_s_own_set_says_nothing_of_those_whom_the_initial_model_learnt_from():
    """Its set stands for its own list alone."""
    own, earlier = remember((), ()), remember(names_of("A", ()), ())
    for lists, known in (
        ((own, PatientList()), False),  # of the initial model nobody knows
        ((PatientList(), earlier), True),  # here the set is the list
        ((own, earlier), True),
        ((own,), False),
        ((), False),  # the whole file was lost
    ):
        found = find_overlap(model(lists, set="own", initial_model="abc"), PATIENTS, SCANS, ("own", "test"))
        assert found["known"] is known, lists
    assert not find_overlap(model((), initial_model="abc"), PATIENTS, SCANS)["known"]


def test_it_is_said_of_how_many_patients():
    trained, validated = say_overlap("model", overlap(["A1", "A2", "B1"], ["C1"]), PATIENTS)
    assert trained.startswith("The model was trained on 2 of these patients (A1, A2, B1): for them")
    assert "its standard deviations were calibrated, on 1 of these patients (C1): for them" in validated
    (unknown,) = say_overlap("second model", overlap(known=False), PATIENTS)
    assert unknown == "The second model does not say on whom it was trained: these patients may be among them."
    many = {f"P{k}": f"P{k}" for k in range(20)}
    assert "20 of these patients (P0, P1, P2, P3, P4, P5, P6, P7, …)" in say_overlap("model", overlap(many), many)[0]
