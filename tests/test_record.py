"""What a model keeps of its training."""

import json
from types import SimpleNamespace

from crossmr.networks.trained_on import PatientList, find, names_of, remember
from crossmr.training import record


def test_both_names_of_a_patient_are_remembered_where_a_shared_scan_joins_two(quick_hashes):
    one, joined = (
        SimpleNamespace(patient="A", named="", scans=("a",)),
        SimpleNamespace(patient="A", named="F", scans=()),
    )
    (patients,) = record.patients_of(SimpleNamespace(train=[one, joined], val=[]), None)
    assert find([patients], {who: names_of(who, ()) for who in ("A", "F", "G")}) == {"A": "train", "F": "train"}


def test_all_studies_of_a_patient_are_learnt_from_by_whichever_name_or_scan(quick_hashes):
    def case(name, patient, *scans, named=""):
        return SimpleNamespace(name=name, patient=patient, named=named, scans=scans)

    initial = SimpleNamespace(patients=(remember(names_of("A", ["a"]), names_of("V", ["v"])), PatientList()))
    cases = [case("A1", "A"), case("B1", "B", "a"), case("B2", "B", "b"), case("C1", "C", named="A"), case("V1", "V")]
    assert record.learnt_from(initial, [*cases, case("N1", "N", "n")]) == ["A1", "B1", "B2", "C1"]
    assert not record.knows_its_patients(initial)
    assert record.knows_its_patients(SimpleNamespace(patients=initial.patients[:1]))
    assert not record.knows_its_patients(SimpleNamespace(patients=()))


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
