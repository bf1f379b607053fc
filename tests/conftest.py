"""Tiny heads, written in a few milliseconds: for tests of the data, where a phantom would be too slow."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin against a neighbour's
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the processor

import asyncio
import csv
import gzip
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from crossmr.display import Display

SHAPE = (28, 32, 24)
"""(X, Y, Z) of a tiny head."""
SEMI_AXES = (10.0, 12.0, 9.0)
CONTRASTS = {"t1n": (90, 30), "t1c": (100, 40), "t2w": (60, 80), "t2f": (70, 60)}


def ellipsoid(shape: Sequence[int] = SHAPE, centre: Sequence[float] | None = None) -> np.ndarray:
    """Where the head of `make_head` is: bool (X, Y, Z)."""
    centre = centre or [(n - 1) / 2 for n in shape]
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, SEMI_AXES, strict=True)) <= 1


def make_head(modality: str = "t1n", *, seed: int = 0, air: bool = True, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """A magnitude image, float32 (X, Y, Z): tissue of 60 to 140, not symmetric, in noisy or exactly 0 air."""
    rng = np.random.default_rng([seed, *modality.encode()])
    base, contrast = CONTRASTS[modality]
    x, y, z = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    head = ellipsoid(shape)
    tissue = np.where(head, base + contrast * (x / 2 + y * y / 3 + z / 6) + 10 * (np.sin(9 * x + 5 * y) > 0), 0)
    noisy = np.hypot(tissue + rng.normal(0, 2, shape), rng.normal(0, 2, shape))
    return (noisy if air else np.where(head, noisy, 0)).astype(np.float32)


def image(data: np.ndarray, affine: np.ndarray | None = None, description: str = "") -> nib.Nifti1Image:
    """A NIfTI image of 6 × 6 × 7 mm voxels."""
    made = nib.Nifti1Image(data, np.diag([6.0, 6.0, 7.0, 1.0]) if affine is None else affine)
    made.header["descrip"] = description.encode()
    return made


def write_study(
    folder: Path,
    case: str,
    modalities: Sequence[str] = ("t1n", "t1c", "t2f"),
    *,
    seed: int = 0,
    air: bool = True,
    lesion: bool = False,
    replace: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write FOLDER/CASE/CASE-{modality}.nii.gz of tiny heads, and -seg where a lesion is wanted."""
    (folder / case).mkdir(parents=True, exist_ok=True)
    volumes = {m: make_head(m, seed=seed, air=air) for m in modalities} | dict(replace or {})
    if lesion:
        volumes["seg"] = np.zeros(SHAPE, np.uint8)
        volumes["seg"][12:16, 14:18, 10:13] = 3
    for modality, data in volumes.items():
        nib.save(image(data), folder / case / f"{case}-{modality}.nii.gz")
    return folder / case


def unguided(model, inputs):
    """A model's synthesis (N, T, *S) from inputs (N, inputs, *S), guided by nothing, in [0, 1]."""
    return model.image(model.predict(inputs)[0], inputs)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, with or without a byte order mark."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def save_untrained(
    folder: Path, *, seed: int = 0, guidance: str = "joint", baselines=None, training=None, patients=(), **changes
) -> Path:
    """A model folder whose every layer is random, so that guidance matters, with outputs about the head's median.

    By default its C-UNet is guided by samples of an MDN that is given the sources. `patients` are lists of whom it was
    trained on, see `remember`.
    """
    import torch

    from crossmr.networks.c_unet import SynthesisConfig
    from crossmr.networks.distribution import DistributionConfig
    from crossmr.networks.masked_autoencoder import RepresentationConfig
    from crossmr.networks.model import CrossConditionedModel, ModelConfig, save_model

    settings = {"sources": ("t1n", "t2w"), "targets": ("t1c", "t2f"), "window": (16, 16)} | changes
    conditional = settings.pop("conditional", True)
    config = ModelConfig(
        guidance=guidance,
        representation=RepresentationConfig(channels=4, multipliers=(1, 2), patch_size=4),
        distribution=DistributionConfig(width=16, blocks=1, conditional=conditional),
        synthesis=SynthesisConfig(channels=4, multipliers=(1, 2)),
        **settings,
    )
    model = CrossConditionedModel(config, seed=seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.baselines = baselines or {}
    save_model(folder, model, training or {}, patients)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quick_hashes():
    """Lists of patients are quick to make, and useless against attackers."""
    from crossmr.networks import trained_on

    with pytest.MonkeyPatch.context() as patch:
        usual = trained_on.COST
        patch.setattr(trained_on, "COST", 2)
        yield usual


def judge(package: str, *programs: str | Path) -> str:
    """The path of the first of these programs that is at hand, of Debian's or Python's package.

    Where there is none, the test is skipped; or it fails, where CROSSMR_REQUIRE_JUDGES is set, as `.ci/run` sets it.
    """
    for program in programs:
        if found := shutil.which(program):
            return found
    absent = f"{Path(programs[0]).name} is not on this machine; install {package}"
    if os.environ.get("CROSSMR_REQUIRE_JUDGES"):
        pytest.fail(absent)
    pytest.skip(absent)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium that draws WebGL in software and reaches nothing."""
    from playwright import sync_api

    chromium = judge("chromium", "chromium", "chromium-browser", "google-chrome")
    switches = [
        *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader"),
        "--enable-unsafe-swiftshader",
    ]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=switches)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page that is offline; whatever it complains of, or asks for elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 1366, "height": 800}, offline=True)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url))
    yield opened
    context.close()
    assert not wrong


def in_thread(function, *arguments):
    """What a function returns that runs a loop of asyncio: Playwright keeps one in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def run_async(coroutine):
    """What a coroutine returns."""
    return in_thread(asyncio.run, coroutine)


class Listener(Display):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def say(self, text):
        self.said.append(text)


def header_alone(path, side):
    """A file that announces a volume of side³ voxels, and ends there."""
    header = nib.Nifti1Header()
    header.set_data_shape((side,) * 3)
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(2048)))


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder):
    """Every file under a folder and its content."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_images(folder, case, modalities, *, seed=0, air=True, shape=(26, 28, 22), change=lambda image: image):
    """FOLDER/CASE/CASE-{modality}.nii.gz of tiny heads."""
    (folder / case).mkdir(parents=True, exist_ok=True)
    for modality in modalities:
        head = image(make_head(modality, seed=seed, air=air, shape=shape))
        nib.save(change(head), folder / case / f"{case}-{modality}.nii.gz")
    return folder / case


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder):
    from crossmr.networks.model import read_model

    return read_model(model_folder)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five patients: two to fill, one without a source, one broken, one whole."""
    folder = tmp_path_factory.mktemp("cohort")
    write_images(folder, "Ann", ("t1n", "t2w"), seed=1)
    write_images(folder, "Bob", ("t1n", "t1c", "t2w"), seed=2)
    write_images(folder, "Cem", ("t1n",), seed=3)
    write_images(folder, "Dan", ("t1n", "t2w"), seed=4)
    nib.save(image(make_head("t2w", shape=(24, 28, 22))), folder / "Dan" / "Dan-t2w.nii.gz")
    write_images(folder, "Eve", ("t1n", "t1c", "t2w", "t2f"), seed=5)
    return folder


@pytest.fixture(scope="module")
def completed(cohort, model, tmp_path_factory):
    """The cohort, completed once: the folder and what was returned."""
    from crossmr.completion.cohort import complete_cohort
    from crossmr.networks.inference import InferenceSettings

    out = tmp_path_factory.mktemp("completed")
    return out, complete_cohort(cohort, out, model, InferenceSettings(ddim_steps=3, precision="float32"))


@pytest.fixture
def small(cohort, tmp_path):
    """A cohort of one patient with two gaps."""
    shutil.copytree(cohort / "Ann", tmp_path / "small" / "Ann")
    return tmp_path / "small"
