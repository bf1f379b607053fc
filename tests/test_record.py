"""What a model keeps of its training."""

import json
from types import SimpleNamespace

from crossmr.networks.trained_on import find, names_of
from crossmr.training import record


def test_both_names_of_a_patient_are_remembered_where_a_shared_scan_joins_two(quick_hashes):
    one, joined = (
        SimpleNamespace(patient="A", named="", scans=("a",)),
        SimpleNamespace(patient="A", named="F", scans=()),
    )
    (patients,) = record.patients_of(SimpleNamespace(train=[one, joined], val=[]), None)
    assert find([patients], {who: names_of(who, ()) for who in ("A", "F", "G")}) == {"A": "train", "F": "train"}


def test_the_last_validation_of_the_synthesis_counts_and_only_beside_the_regression(tmp_path):
    lines = (
        {
            "stage": "synthesis",
            "val_correlation_t1c": 0.2,
            "regression_correlation_t1c": 0.1,
            "val_correlation_t2f": 0.5,
        },
        {"stage": "synthesis", "val_correlation_t1c": 0.6},
        {"stage": "distribution", "val_correlation_t1c": 0.9},
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = SimpleNamespace(folder=tmp_path, config=SimpleNamespace(targets=("t1c", "t2f")))
    assert record._validated(training) == {"t1c": {"correlation": 0.6, "linear_regression": 0.1}}
