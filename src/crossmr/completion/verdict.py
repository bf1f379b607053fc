"""Whether what was synthesised of a study can be used: one word, and the reasons in plain words.

use     Nothing was found against it.
look    Something was found that a person should look at before the images are used.
refuse  A contrast that was wanted was not synthesised: a scan that may be it was not used, the model has never learnt
        it from such a head, or the scans contradict one another. settings.targets, which names it, overrules this.

How often each is right is measured in docs/checks.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from crossmr.completion.checks import Finding
from crossmr.data.naming import display_name
from crossmr.networks.trained_on import is_learnt

Verdict = Literal["use", "look", "refuse"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""From the best to the worst."""


def despite(reason: str, modality: str) -> str:
    """A reason not to synthesise a contrast, with the way to have it all the same."""
    shown = display_name(modality)
    return f"{reason} To synthesise {shown} all the same, pass --targets {modality}."


def is_refusal(reason: str, modality: str) -> bool:
    """Whether a reason why a contrast was not synthesised says how to have it all the same."""
    return reason.endswith(despite("", modality))


def refusals(findings: Sequence[Finding], targets: Sequence[str]) -> dict[str, str]:
    """Target → why it is not to be synthesised from scans of which this was found."""
    refused = {}
    for target in targets:
        grave = [one.words for one in findings if one.severity == "refuse" and target in (one.contrasts or (target,))]
        if grave:
            refused[target] = despite(" ".join(grave), target)
    return refused


def unlearnt(
    seen: Mapping[str, Any], sources: Sequence[str], targets: Sequence[str], *, stripped: bool
) -> list[Finding]:
    """Targets and sources that the model never had of such heads, with skull or without; see `count_seen`."""
    heads = "a head without skull" if stripped else "a head with skull"
    other = "" if stripped else " Strip the skull first."
    found = []
    for target in targets:
        if not is_learnt(seen, target, without_skull=stripped):
            elsewhere = is_learnt(seen, target, without_skull=not stripped)
            name = display_name(target)
            words = f"the model has never learnt {name} of {heads}.{other if elsewhere else ''}"
            found.append(Finding("never learnt", "refuse", words, (target,)))
    strange = [display_name(m) for m in sources if not is_learnt(seen, m, without_skull=stripped)]
    if strange:
        found.append(Finding("never learnt", "look", f"The model has never seen {' and '.join(strange)} of {heads}."))
    return found


def undertrained(validation: Mapping[str, Mapping[str, float]] | None, targets: Sequence[str]) -> list[Finding]:
    """Targets of which a model has learnt too little, or nobody knows how much.

    `validation` is target → correlations, as the model's record has them; None where it is older than that.
    """
    if validation is None:
        return []
    said = "On its validation patients this model is no better than a linear regression of the same sources"
    found = []
    for target in [m for m in targets if m in validation]:
        own, linear = validation[target]["correlation"], validation[target]["linear_regression"]
        numbers = f"{display_name(target)}: correlation {own:.2f} against {linear:.2f}"
        if own <= linear:
            found.append(Finding("undertrained", "look", f"{said} ({numbers}): train longer.", (target,)))
    if unknown := [m for m in targets if m not in validation]:
        names = " and ".join(display_name(m) for m in unknown)
        words = f"No validation patient has shown how good this model's {names} is: measure it with crossmr evaluate."
        found.append(Finding("not validated", "look", words, tuple(unknown)))
    return found


def judge(
    findings: Sequence[Finding], refused: Mapping[str, str], synthetic: Sequence[str], gaps: Mapping[str, str]
) -> dict[str, Any]:
    """Verdict and reasons, as the manifest has them.

    Args:
        findings: all that was found of the study.
        refused: target → why it was refused.
        synthetic: what was synthesised.
        gaps: what stays missing, for whatever reason → why.
    """
    reasons = [_reason("refuse", "refused", targets, words) for words, targets in _by_words(refused).items()]
    for one in findings:
        concerned = [m for m in synthetic if m in (one.contrasts or synthetic)]
        if one.severity != "note" and (concerned or not (refused or one.contrasts)):
            reasons.append(_reason("look", one.kind, one.contrasts, one.words))
    if gaps and not synthetic and not refused:
        reasons += [_reason("look", "not synthesised", m, words) for words, m in _by_words(gaps).items()]
    return {"verdict": _worst(reasons), "reasons": reasons, "refused": sorted(refused)}


def verdict_on(target: str, reasons: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on one synthetic contrast, by the reasons of its study."""
    return _worst([r for r in reasons if r["verdict"] == "look" and target in (r["contrasts"] or (target,))])


def _reason(verdict: Verdict, kind: str, contrasts: Sequence[str], text: str) -> dict[str, Any]:
    return {"verdict": verdict, "kind": kind, "contrasts": list(contrasts), "text": text}


def _by_words(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """What is said of contrasts → these."""
    found: dict[str, list[str]] = {}
    for modality, words in reasons.items():
        found.setdefault(words.partition(" To synthesise")[0], []).append(modality)
    return found


def _worst(reasons: Sequence[Mapping[str, Any]]) -> Verdict:
    return max((reason["verdict"] for reason in reasons), key=VERDICTS.index, default="use")
