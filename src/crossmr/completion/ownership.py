"""What `complete` replaces or deletes is its own: whatever else has such a name stops it before its first write.

And what it keeps is of these scans: an earlier result of the same name that was made of others is no result of theirs.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crossmr.completion import private, status
from crossmr.completion.layout import BIDS_HEAD, EXPECTED, FORMAT, PROFILES, Layout, is_generated
from crossmr.data.formats import content_sha256, stamp
from crossmr.data.nifti import is_synthetic
from crossmr.dicom.folders import is_derived
from crossmr.errors import OutputError
from crossmr.files import LOCK, REPORT, is_page, is_record, read_json, refuse_foreign
from crossmr.parts import WORK
from crossmr.picture import is_picture

is_manifest = partial(is_record, kind=FORMAT)
"""Whether a file is the manifest of a completed case or cohort."""


def check_profile(layout: Layout) -> None:
    """Refuse an output folder that has the records of another profile: its cases would not be found among ours.

    Raises:
        OutputError: it has.
    """
    for profile in PROFILES:
        records = Layout(layout.out, profile).records
        manifest = read_json(path, OutputError) if is_manifest(path := records / "manifest.json") else {}
        written = manifest.get("profile", layout.profile)
        if written != layout.profile and profile in (written, layout.profile):
            raise OutputError(
                f"{records} holds the records of --profile {written}, and this is --profile {layout.profile}. "
                f"Go on with --profile {written}, or name another folder with -o."
            )


def check_output_is_ours(layout: Layout, scans: Path) -> None:
    """Refuse an output folder that is another's.

    Raises:
        OutputError: the manifest, report, status.csv or private file in it is not crossmr's; with 'challenge' the
            folder of the records holds something else; with 'bids' OUT is another's dataset, is or holds the input, or
            lies in it outside its derivatives.
    """
    refuse_foreign(layout.records / "manifest.json", is_manifest)
    refuse_foreign(layout.records / REPORT, is_page)
    refuse_foreign(layout.records / status.NAME, status.is_status)
    refuse_foreign(layout.records / private.NAME, partial(is_record, kind=private.FORMAT))
    if layout.profile == "challenge":
        names = {path.name for path in layout.records.glob("*")} - {LOCK, WORK}
        if names and "manifest.json" not in names:
            raise OutputError(
                f"{layout.records} holds {min(names)}, which is not crossmr's; the records of this output go there. "
                "Name another folder with -o."
            )
    if layout.profile == "bids":
        _check_bids(layout.out, scans)


def _check_bids(out: Path, scans: Path) -> None:
    place, dataset = out.resolve(), scans.resolve()
    if place.is_relative_to(dataset) and (dataset / "derivatives") not in place.parents:
        where = "is" if place == dataset else "lies in"
    elif dataset.is_relative_to(place):
        where = "holds"
    else:
        where = ""
    if where:
        raise OutputError(
            f"{out} {where} the input {scans}, and a BIDS derivative is a dataset of its own. "
            f"Name another folder, such as {scans / 'derivatives' / 'crossmr'}."
        )
    refuse_foreign(out / "dataset_description.json", is_generated)
    if not (out / "dataset_description.json").exists():
        for name in BIDS_HEAD:
            refuse_foreign(out / name, lambda path: path.read_bytes() == BIDS_HEAD[path.name])


def check_case(layout: Layout, case: str, targets: Sequence[str], requested: Sequence[str], *, overwrite: bool) -> None:
    """Refuse a case in whose place there is something that is not crossmr's.

    Args:
        layout: where the case is written.
        case: its name.
        targets: what the model can synthesise.
        requested: what it will synthesise; an acquired scan that has the name of another one stays.
        overwrite: whether a finished case is completed again, or left as it is.

    Raises:
        OutputError: the file or folder, by name.
    """
    manifest = layout.folder(case) / "manifest.json"
    refuse_foreign(manifest, is_manifest)
    if manifest.exists() and not overwrite:
        return
    places: list[tuple[Path, Callable[[Path], bool]]] = [(layout.picture(case), is_picture)]
    for modality in dict.fromkeys((*EXPECTED, *targets)):
        places += [(layout.dicom(case, modality, kind), is_derived) for kind in ("", "std")]
    for modality in requested:
        for path in filter(None, (layout.image(case, modality), layout.std(case, modality))):
            places.append((path, is_synthetic))
            if layout.profile == "bids":
                places.append((layout.sidecar(path), is_generated))
    _refuse_each(places)


def _refuse_each(places: Iterable[tuple[Path, Callable[[Path], bool]]]) -> None:
    """As `refuse_foreign`; of what is not there the folder is looked at once, as a shared disk answers slowly."""
    seen: set[Path] = set()
    for path, recognise in places:
        if path.parent not in seen or os.path.lexists(path):
            refuse_foreign(path, recognise)
            seen.add(path.parent)


def earlier_files(layout: Layout, case: str, targets: Sequence[str]) -> list[Path]:
    """What was synthesised here before, which must not outlive its manifest; nothing that is not crossmr's."""
    modalities = dict.fromkeys((*EXPECTED, *targets))
    folders = [layout.dicom(case, modality, kind) for modality in modalities for kind in ("", "std")]
    places = [place(case, modality) for modality in modalities for place in (layout.image, layout.std)]
    volumes = [path for path in places if path is not None and not path.is_symlink() and is_synthetic(path)]
    sidecars = [layout.sidecar(path) for path in volumes] if layout.profile == "bids" else []
    return [
        *(folder for folder in folders if os.path.lexists(folder) and not folder.is_symlink() and is_derived(folder)),
        *volumes,
        *(path for path in sidecars if path.is_file() and is_generated(path)),
    ]


def other_scans(manifest: Mapping[str, Any], images: Mapping[str, Path]) -> list[str]:
    """The contrasts whose scans are not those that a case was completed from; all where it has none of these."""
    both = [m for m in images if m in manifest.get("acquired", ())]
    return [m for m in both if is_another(manifest, m, images[m])] if both else [*images]


def is_another(manifest: Mapping[str, Any], modality: str, image: Path) -> bool:
    """Whether a scan is not the file that a case was completed from; it is read only if size or time has changed."""
    given, stamps = (manifest.get(name, {}).get(modality) for name in ("given", "stamps"))
    return given is None or (stamps != stamp(image) and content_sha256(image) != given["sha256"])


def arrived(manifest: Mapping[str, Any], images: Mapping[str, Path]) -> list[str]:
    """The contrasts that a case has synthesised, and of which there is a scan now."""
    synthetic = manifest.get("synthetic", {})
    return [m for m in images if m in synthetic and is_another(manifest, m, images[m]) and not is_synthetic(images[m])]


@dataclass(frozen=True)
class Now:
    """What there is of a case that was finished before, beside its manifest."""

    acquired: Sequence[str]
    """Contrasts that have a scan."""
    others: Sequence[str]
    """Those whose scan is not the one that the case was completed from."""
    come: Mapping[str, str]
    """Those that it has synthesised → the scan that is there now, or may be."""
    doubted: Sequence[str]
    """Contrasts that a file may be which is not read."""
    gone: Sequence[str]
    """Files and folders that were written of it, and are not there any more."""
    targets: Sequence[str] | None
    """Contrasts that are asked for by name; None for all that the model makes."""
    makes: Sequence[str]
    """Contrasts that the model makes."""
    settings: Mapping[str, Any]
    """'model_sha256' and 'register'."""
    chosen: Sequence[str] = ()
    """Contrasts for which a person's table of the series says otherwise now."""


def redo_reason(manifest: Mapping[str, Any], now: Now) -> str:
    """Why a case that was finished before is not any more: a scan of what was synthesised has come, or may have come.

    Or a person has chosen other series of the same study. Or something that was written of it is gone. Or what was not
    filled, because of a file that may be it, is no longer in doubt; or nothing could be synthesised of the scans that
    there were, or by that model. Empty where it stays as it is, or is refused because its scans are others.
    """
    refused = manifest.get("refused", ())
    nothing = bool(manifest.get("not_filled")) and not manifest.get("synthetic")
    if now.chosen:
        return f"the table of the series says otherwise now ({', '.join(now.chosen)})"
    if now.others:  # which is refused, unless a user mends what was refused
        mended = refused and any(m in now.acquired and m not in now.others for m in manifest["acquired"])
        return f"{', '.join(refused)} was refused, with other scans" if mended else ""
    if now.come:
        listed = ", ".join(f"{m} ({name})" for m, name in now.come.items())
        return f"{listed} was synthesised and has arrived since, so the synthetic one goes"
    if now.gone:
        return say_gone(now.gone)
    if refused or nothing:
        before = manifest.get("settings", {})
        names = {"model": "model_sha256", "--register": "register"}
        changed = [name for name, key in names.items() if before.get(key) != now.settings[key]]
        changed += ["scans"] if {*manifest.get("given", ())} != {*now.acquired} else []
        asked = [m for m in refused if m in (now.targets or ())]
        changed += [f"--targets {','.join(asked)}"] if asked else []
        if changed:
            what = f"{', '.join(refused)} was refused" if refused else "nothing was synthesised"
            return f"{what}, with other {' and '.join(changed)}"
    if added := _asked_for_since(manifest, now):
        return f"{', '.join(added)} was not asked for then"
    settled = [m for m in manifest.get("unread", {}) if m not in now.doubted]
    wanted = [m for m in settled if now.targets is None or m in now.targets]
    return f"{', '.join(wanted)} is no longer in doubt" if wanted else ""


def _asked_for_since(manifest: Mapping[str, Any], now: Now) -> list[str]:
    """Contrasts that are asked for now beside all that a case has synthesised by the same model, and were not then."""
    asked = now.makes if now.targets is None else now.targets
    known = {*manifest.get("synthetic", {}), *manifest.get("not_filled", {}), *manifest.get("acquired", ())}
    same = manifest.get("settings", {}).get("model_sha256") == now.settings["model_sha256"]
    covered = {*manifest.get("synthetic", {})} <= {*asked}
    return [m for m in asked if m not in known and m not in now.acquired] if same and covered else []


def say_gone(names: Sequence[str]) -> str:
    """What to say of files of a case that are not there any more."""
    return f"{names[0]} is gone" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are gone"


def why_not_kept(case: str, changed: Sequence[str]) -> str:
    """What to say of a case whose result in OUT was made of other scans."""
    return (
        f"{case}: the output holds what was made of other scans of this name ({', '.join(changed)} "
        f"{'is' if len(changed) == 1 else 'are'} not the same), which may be another patient's; it stays. "
        "Name another folder with -o, or replace it with --overwrite."
    )


def why_not_undone(case: str, modalities: Sequence[str]) -> str:
    """What to say of a finished case that would lose what a person chose."""
    return (
        f"{case}: a person chose its series ({', '.join(modalities)}) when it was made, and no table says so now; it "
        "stays. Give that table by --series-table, or replace it with --overwrite."
    )
