"""Which of the measured patients a model has seen already, by its list of patients or because the set is its own."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.trained_on import PatientList, find, names_of

LISTED = 8
"""Cases that a warning names."""


class Overlap(TypedDict):
    """Of which cases a model has seen the patient, by name or by a scan."""

    known: bool
    """Whether it is known on whom the model, and each that it started from, was trained: if not, cases may lack."""
    trained_on: list[str]
    validated_on: list[str]
    """Those on whom its training was validated and its standard deviations were calibrated."""


def find_overlap(
    model: CrossConditionedModel,
    patients: Mapping[str, str],
    scans: Mapping[str, Sequence[str]],
    of_set: tuple[str, str] | None = None,
) -> Overlap:
    """Of which cases a model has seen the patient.

    Args:
        model: says on whom it was trained, or does not.
        patients: case → patient.
        scans: case → SHA-256 of the voxels of each volume.
        of_set: fingerprint and split of the prepared dataset that the cases are of, if any.
    """
    studies = {case: names_of(patient, scans.get(case, ())) for case, patient in patients.items()}
    seen: dict[str, str] = {**find(model.patients, studies)}
    training = model.record.get("training", {})
    own_set = of_set is not None and of_set[0] == training.get("set")
    if own_set and of_set is not None and of_set[1] != "test":
        seen |= {case: of_set[1] for case in studies if seen.get(case) != "train"}
    by_part = {part: {patients[case] for case in seen if seen[case] == part} for part in ("train", "val")}
    return Overlap(
        known=_is_known(model.patients, own_set=own_set, started=bool(training.get("initial_model"))),
        trained_on=[case for case, who in patients.items() if who in by_part["train"]],
        validated_on=[case for case, who in patients.items() if who in by_part["val"] - by_part["train"]],
    )


def _is_known(lists: Sequence[PatientList], *, own_set: bool, started: bool) -> bool:
    """Whether each training is known: the model's own by its list or its set, those before it by their lists alone."""
    own, earlier = lists[:1], lists[1:]
    if started and not earlier:
        return False
    return (own_set or any(one.salt for one in own)) and all(one.salt for one in earlier)


def say_overlap(name: str, overlap: Overlap, patients: Mapping[str, str]) -> list[str]:
    """What the numbers of a model, called `name`, do not say of new patients, in sentences."""

    def these(cases: Sequence[str]) -> str:
        count = len({patients[case] for case in cases})
        return f"{count} of these patients ({', '.join(cases[:LISTED])}{', …' if len(cases) > LISTED else ''})"

    said = []
    if cases := overlap["trained_on"]:
        said.append(f"The {name} was trained on {these(cases)}: for them its numbers say nothing about new patients.")
    if cases := overlap["validated_on"]:
        said.append(
            f"The {name} was validated during training, and its standard deviations were calibrated, on "
            f"{these(cases)}: for them its numbers may be better than for new patients."
        )
    if not overlap["known"]:
        said.append(f"The {name} does not say on whom it was trained: these patients may be among them.")
    return said
