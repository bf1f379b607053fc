"""Where the time goes when one study is completed, against what the machine could do; and against what else there is.

1. Counted: floating-point operations of each network, and the bytes that its layers read and write one by one; the
   machine's own peaks (a large matrix product in the network's precision, a large copy). The longer of the two
   quotients is the floor.
2. Measured, medians of interleaved rounds: reading, checks, each network, guidance, writing, pictures; and how long a
   further study takes in a cohort, where one is read while another is synthesised.
3. A training step of each stage, and the preparation of a study.
4. Beside: the cost of guidance at the published size; eager float32 and bfloat16, ONNX Runtime, OpenVINO; MONAI's
   DiffusionModelUNet of as many parameters, 50 DDIM steps. What is not installed is said.
5. On a GPU, where there is one: training steps of the published C-UNet, eager and compiled, against the card's peak,
   and the time for a study.

python benchmarks/speed.py ../shared/data/brats/BraTS-GLI-00000-000 --target t2f
python benchmarks/speed.py --only gpu
"""

import argparse
import gzip
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from growth import Watch, under_names
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmr.completion.checks import check
from crossmr.completion.cohort import complete_cohort
from crossmr.completion.study import complete_study
from crossmr.data.formats import content_sha256
from crossmr.data.naming import DISPLAY_NAMES, find_studies
from crossmr.data.nifti import write_volume
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.prepared_case import prepare_case
from crossmr.data.split import Split
from crossmr.data.study import Study, load_study
from crossmr.device import autocast, choose_device, choose_precision
from crossmr.main_memory import keep_memory
from crossmr.metrics import psnr
from crossmr.networks.c_unet import synthesis_error
from crossmr.networks.inference import BATCH, HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import CrossConditionedModel, read_model
from crossmr.phantom import write_cohort
from crossmr.picture import Panel, middle, save_panels
from crossmr.registry import find_model
from crossmr.tensors import neighbours, seeded, to_model_input
from crossmr.training.recipes import RECIPES, recipe_of
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings

CPU = torch.device("cpu")
PUBLISHED = ("t1n", "t2w"), ("t1c", "t2f")
Calls = Mapping[str, Callable[[], object]]


def interleaved(calls: Calls, rounds: int) -> dict[str, float]:
    """Median seconds of each call; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def inferring(call: Callable[[], object], dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """The call as `complete` makes it: without gradients, in this precision."""

    def run() -> object:
        with torch.no_grad(), autocast(CPU, dtype):
            return call()

    return run


def flops(call: Callable[[], object]) -> float:
    """Floating-point operations of a call: multiplications and additions of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product."""
    a = torch.rand(2048, 2048).to(dtype)
    return 2 * 2048**3 / interleaved({"product": lambda: a @ a}, 9)["product"]


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.zeros(2**27, dtype=torch.uint8)
    b = torch.zeros_like(a)
    return 2 * a.numel() / interleaved({"copy": lambda: b.copy_(a)}, 9)["copy"]


def moved(network: nn.Module, call: Callable[[], object]) -> float:
    """Bytes that the layers of a network read and write in a call, each by itself: inputs, outputs and weights."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[object, ...], out: object) -> None:
        nonlocal total
        tensors = [*inputs, out, *layer.parameters()]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    leaves = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in leaves]
    call()
    for hook in hooks:
        hook.remove()
    return float(total)


def batches_of(study: Study, target: str, model: CrossConditionedModel) -> tuple[HeadVolumes, list[Tensor]]:
    """The study's sources without the target, and what the C-UNet reads of them, `BATCH` slices at once."""
    box, config = study.box(), model.config
    sources = {m: study.normalised(m, box) for m in study.volumes if m != target}
    head = HeadVolumes.of(sources, study.mask[box], study.reference.spacing_mm)
    nothing = np.zeros_like(next(iter(sources.values())))
    stacked = torch.from_numpy(np.stack([sources.get(m, nothing) for m in config.sources]))
    available = torch.tensor([[float(m in sources) for m in config.sources]])
    slices = [z for z, voxels in enumerate(head.foreground_voxels) if voxels]
    batches = []
    for start in range(0, len(slices), BATCH):
        chosen = slices[start : start + BATCH]
        around = [neighbours(z, config.context_slices, stacked.shape[1], head.spacing_mm) for z in chosen]
        images = to_model_input(stacked, around, 2, config.divisor).contiguous(memory_format=torch.channels_last)
        batches.append(model.network_input(images, available.expand(len(chosen), -1)))
    return head, batches


def parts(folder: Path, target: str, model: CrossConditionedModel, rounds: int) -> None:
    """One study, step by step."""
    (files,) = find_studies(folder)
    paths = {m: path for m, path in files.images().items() if m != target}
    study, settings = load_study(paths), InferenceSettings(targets=(target,))
    dtype = choose_precision("auto", CPU)
    product, copied = peak(dtype), bandwidth()
    head, batches = batches_of(study, target, model)
    networks: dict[str, tuple[nn.Module | None, Callable[[], object]]] = {
        "C-UNet": (model.synthesis, lambda: [model.predict(inputs) for inputs in batches])
    }
    if model.distribution is not None:
        y_0 = model.draw([seeded("speed")])
        networks["MDN, 50 steps, one sample"] = (None, lambda: model.draw([seeded("speed")]))
        networks["C-UNet, guided"] = (
            model.synthesis,
            lambda: [model.synthesis(inputs, y_0.expand(len(inputs), -1)) for inputs in batches],
        )
    done, at = complete_study(study, model, settings), middle(study.mask[study.box()])
    volumes = {**head.volumes, target: done.synthesis.images[0].numpy()} if done.synthesis else head.volumes
    panels = [Panel.of(m, "acquired", volume, at) for m, volume in volumes.items()]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        written = {f"{kind}.nii.gz": of[target] for kind, of in (("image", done.images), ("std", done.stds)) if of}
        around: dict[str, Callable[[], object]] = {
            "read, normalise, find the head": lambda: load_study(paths),
            "check the input": lambda: check(study, model.baselines, model.config.modalities),
            "write image and std": lambda: [write_volume(image, out / name) for name, image in written.items()],
            "picture": lambda: save_panels(out / "picture.webp", panels, study.reference.spacing_mm, DISPLAY_NAMES),
        }
        calls = {name: inferring(call, dtype) for name, (_, call) in networks.items()}
        whole = {
            "inputs of the networks": inferring(lambda: batches_of(study, target, model), dtype),
            "the whole synthesis": lambda: synthesise(model, head, "speed", settings),
        }
        seconds = interleaved({**calls, **whole, **around}, rounds)
    slices = sum(map(len, batches))
    print(f"\n{study.reference.data.shape} voxels, {slices} slices with head, from {', '.join(head.volumes)}; {dtype}")
    print(f"peak {product / 1e9:.0f} GFLOP/s, {copied / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print("\n| | s a volume | GFLOP | GB | floor, s | measured / floor |\n|---|---|---|---|---|---|")
    for name, value in seconds.items():
        cells = [""] * 4
        if name in networks:
            network, call = networks[name]
            count, size = flops(call), 0.0 if network is None else moved(network, inferring(call, dtype))
            floor = max(count / product, size / copied)
            cells = [f"{count / 1e9:.0f}", f"{size / 1e9:.0f}", f"{floor:.2f}", f"{value / floor:.1f}"]
        print(f"| {name} | {value:.2f} | {' | '.join(cells)} |")
    own = seconds["C-UNet"]
    outside = sum(seconds[name] for name in around) + seconds["the whole synthesis"] - own
    print(f"\naround the networks: {outside:.2f} s, {outside / own:.0%} of their own {own:.2f} s")
    each = in_a_cohort(paths, model, settings, 2 * rounds)
    print(f"in a cohort, one study read ahead, a further study takes {each:.2f} s: {each / own - 1:.0%} around them")


def in_a_cohort(
    paths: Mapping[str, Path], model: CrossConditionedModel, settings: InferenceSettings, count: int
) -> float:
    """Seconds that a further study takes in a cohort of one study under so many names."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, watch = Path(temporary), Watch(count)
        (folder / "one" / "case").mkdir(parents=True)
        for modality, path in paths.items():
            shutil.copyfile(path, folder / "one" / "case" / f"case-{modality}.nii.gz")
        cohort = under_names(folder / "one", folder / "cohort", count)
        complete_cohort(cohort, folder / "out", model, settings=settings, display=watch)
    return (watch.finished[-1] - watch.finished[0]) / (count - 1)


def training(model: CrossConditionedModel, rounds: int) -> None:
    """A step of each stage, as the shipped weights were trained, on phantoms: seconds, and operations against peak."""
    recipe, product = recipe_of(model), peak(choose_precision("auto", CPU))
    print(f"\na training step, crops of {recipe.crop}; peak {product / 1e9:.0f} GFLOP/s")
    print("\n| stage | batch | s | GFLOP | floor, s | measured / floor |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_cohort(folder / "cohort", 2, seed=1, shape=(160, 160, 32), spacing_mm=(1.2, 1.2, 5.0))
        prepare(folder / "cohort", folder / "set", PrepareSettings(split=Split(1, 0, 0)))
        train(folder / "set", folder / "run", TrainingSettings(recipe, steps=4 * rounds, device="cpu"))
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for stage in model.config.stages:
            counted = []
            for steps in (1, 2):  # what a stage does but once falls out of the difference
                wish = TrainingSettings(recipe, stages=(stage,), steps=steps, device="cpu")
                with FlopCounterMode(display=False) as counter:
                    train(folder / "set", folder / f"run-{steps}", wish)
                counted.append(counter.get_total_flops())
            seconds = statistics.median(1 / line["steps_per_second"] for line in lines if line["stage"] == stage)
            count, batch = counted[1] - counted[0], recipe.train_config(stage).batch_size
            floor = count / product
            cells = f"{seconds:.3f} | {count / 1e9:.0f} | {floor:.3f} | {seconds / floor:.1f}"
            print(f"| {stage} | {batch} | {cells} |", flush=True)


def preparing(folder: Path, rounds: int) -> None:
    """One study into a set."""
    (files,) = find_studies(folder)
    paths = list(files.images().values())
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)

        def whole() -> None:
            shutil.rmtree(out / "cases", ignore_errors=True)
            prepare_case(files, out)

        calls = {
            "unpack the files, nothing else": lambda: [gzip.decompress(path.read_bytes()) for path in paths],
            "read, normalise, find the head": lambda: load_study(files),
            "hash the files": lambda: [content_sha256(path) for path in paths],
            "the whole: and crop, hash, write": whole,
        }
        seconds = interleaved(calls, rounds)
        size = sum(path.stat().st_size for path in out.rglob("*.npy"))
    print(f"\n| prepare one study, {size / 1e6:.0f} MB of arrays | s |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")


def published(rounds: int) -> None:
    """The published form and size, untrained: what its guidance costs beside its C-UNet, on a volume of 146 slices."""
    model = CrossConditionedModel(RECIPES["paper"].model_config(*PUBLISHED)).eval()
    images, y_0 = torch.rand(4, model.synthesis.in_channels, 184, 144), model.draw([seeded("speed")]).expand(4, -1)
    calls = {
        "MDN": inferring(lambda: model.draw([seeded("speed")])),
        "unguided": inferring(lambda: model.synthesis(images)),
        "guided": inferring(lambda: model.synthesis(images, y_0)),
    }
    seconds = interleaved(calls, rounds)
    volume = seconds["unguided"] * 146 / len(images)
    print(
        f"\npaper size: C-UNet {volume:.1f} s a volume; MDN, 50 steps, {seconds['MDN'] / volume:.2%} of that; "
        f"condition layers {seconds['guided'] / seconds['unguided'] - 1:+.1%}"
    )


def engines(folder: Path, target: str, model: CrossConditionedModel, rounds: int) -> None:
    """The C-UNet on sixteen slices from the middle of a study, on what engines there are."""
    (files,) = find_studies(folder)
    study, network = load_study(files), model.synthesis.eval()
    head, batches = batches_of(study, target, model)
    slices = [z for z, voxels in enumerate(head.foreground_voxels) if voxels]
    middle = len(batches) // 2
    images, chosen = batches[middle].contiguous(), slices[middle * BATCH : (middle + 1) * BATCH]
    whole = torch.from_numpy(study.normalised(target, study.box()))[None]
    truth = to_model_input(whole, [[z] for z in chosen], 2, model.config.divisor)
    index = model.config.targets.index(target)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    as_completed = "eager bfloat16, channels last"
    calls: dict[str, Callable[[], object]] = {
        "eager float32": inferring(lambda: network(images), torch.float32),
        "eager bfloat16": inferring(lambda: network(images)),
        as_completed: inferring(lambda: network(channels_last)),
    }
    if shutil.which("g++") is None:
        print("torch.compile needs a compiler")
    else:
        compiled = torch.compile(network)
        calls["torch.compile bfloat16, channels last"] = inferring(lambda: compiled(channels_last))
    try:
        import openvino

        converted = openvino.convert_model(network, example_input=(images,), input=[tuple(images.shape)])
        for hint in ("f32", "bf16"):
            precision = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
            request = openvino.Core().compile_model(converted, "CPU", precision).create_infer_request()
            calls[f"OpenVINO {hint}"] = lambda r=request: torch.from_numpy(r.infer([images.numpy()])[0].copy())  # type: ignore[misc]
    except ImportError:
        print("OpenVINO is not installed")
    try:
        import onnxruntime

        file = io.BytesIO()
        torch.onnx.export(network, (images,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        fed = {session.get_inputs()[0].name: images.numpy()}
        calls["ONNX Runtime float32"] = lambda: torch.from_numpy(session.run(None, fed)[0])
    except ImportError:
        print("ONNX Runtime is not installed")
    seconds, reference = interleaved(calls, rounds), calls["eager float32"]()
    print(f"\n{len(images)} slices, {target}; against {as_completed}, as complete does it")
    print("\n| engine | s | times as fast | largest difference to float32 | PSNR, dB |\n|---|---|---|---|---|")
    for name, call in calls.items():
        image = call().float()  # type: ignore[attr-defined]
        difference = float((image - reference).abs().max())
        synthetic = model.image(image[:, index : index + 1], images)
        quality = float(psnr(synthetic, truth, 1.0).mean())
        gain = seconds[as_completed] / seconds[name]
        print(f"| {name} | {seconds[name]:.3f} | {gain:.2f} | {difference:.1e} | {quality:.3f} |")


def peer(model: CrossConditionedModel, rounds: int) -> None:
    """Conditional pixel-space diffusion of as many parameters: one of its 50 steps on the C-UNet's batch."""
    from monai.networks.nets import DiffusionModelUNet

    config, form = model.config, {"num_res_blocks": 1, "attention_levels": (False,) * 4, "norm_num_groups": 2}
    count, size, channels = sum(p.numel() for p in model.synthesis.parameters()), 0, 6
    while size < count and channels <= 256:
        channels += 2
        wide = (channels, 2 * channels, 3 * channels, 4 * channels)
        both = config.in_channels + len(config.targets)
        network = DiffusionModelUNet(2, both, len(config.targets), channels=wide, **form).eval()
        size = sum(p.numel() for p in network.parameters())
    images, times = torch.rand(BATCH, both, 184, 144), torch.full((BATCH,), 500)
    calls = {
        "ours": inferring(lambda: model.synthesis(images[:, : config.in_channels])),
        "theirs": inferring(lambda: network(images, times)),
    }
    seconds = interleaved(calls, rounds)
    ratio = seconds["theirs"] / seconds["ours"]
    print(
        f"\nDiffusionModelUNet, {size / 1e6:.2f} M parameters (C-UNet {count / 1e6:.2f} M): one step takes "
        f"{ratio:.2f} times the C-UNet's whole pass, 50 steps {50 * ratio:.0f} times"
    )


def gpu(folder: Path, target: str, device: torch.device, rounds: int, batch: int) -> None:
    """Training steps of the published C-UNet against the card's peak, and one study, on a GPU."""
    if device.type != "cuda":
        print(f"\nNo GPU here; what follows is a rehearsal on {device.type}.")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    side, recipe = 8192 if device.type == "cuda" else 1024, RECIPES["paper"]
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16)
    product = 2 * side**3 / interleaved({"product": lambda: [a @ a, wait()]}, 9)["product"]
    model = CrossConditionedModel(recipe.model_config(*PUBLISHED)).to(device)
    shape = batch, model.config.in_channels, *recipe.crop
    images = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    truth = torch.rand(batch, 2, *recipe.crop, device=device)
    y_0 = torch.rand(batch, 2 * model.config.representation.dim, device=device)
    network = model.synthesis.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(network.parameters(), 1e-4)

    def step(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            with autocast(device, torch.bfloat16):
                total, count = synthesis_error(forward(images, y_0), truth, torch.ones_like(truth), absolute=False)
            (total / count).backward()
            optimiser.step()
            wait()

        return run

    calls = {"eager": step(network)}
    if device.type == "cuda":
        calls["torch.compile"] = step(torch.compile(network))
        calls["torch.compile, CUDA graphs"] = step(torch.compile(network, mode="reduce-overhead"))
    with FlopCounterMode(display=False) as counter:
        calls["eager"]()
    count = counter.get_total_flops()
    print(f"\npublished C-UNet, {batch} slices of {recipe.crop}, bfloat16, channels last; {product / 1e12:.1f} TFLOP/s")
    print("\n| training step | s | of the peak |\n|---|---|---|")
    for name, seconds in interleaved(calls, rounds).items():
        print(f"| {name} | {seconds:.4f} | {count / seconds / product:.1%} |")
    (files,) = find_studies(folder)
    study, shipped = (
        load_study({m: p for m, p in files.images().items() if m != target}),
        read_model(find_model(), device),
    )
    call = {"study": lambda: [complete_study(study, shipped, InferenceSettings(targets=(target,))), wait()]}
    print(f"\none study, read beforehand, by the shipped weights: {interleaved(call, 3)['study']:.2f} s")
    if device.type == "cuda":
        print(f"peak memory of the card: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path("../shared/data/brats/BraTS-GLI-00000-000"))
    parser.add_argument("--target", default="t2f")
    parser.add_argument("--model", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="of the part gpu; the others are for the processor")
    parser.add_argument("--batch", type=int, default=24, help="slices of a training step of the part gpu")
    names = ("parts", "training", "preparing", "published", "engines", "peer", "gpu")
    parser.add_argument("--only", choices=names, nargs="+")
    options = parser.parse_args()
    keep_memory()
    model, device = read_model(find_model(options.model)), choose_device(options.device)
    study, target, rounds = options.study, options.target, options.rounds
    jobs: dict[str, Callable[[], None]] = {
        "parts": lambda: parts(study, target, model, rounds),
        "training": lambda: training(model, rounds),
        "preparing": lambda: preparing(study, rounds),
        "published": lambda: published(rounds),
        "engines": lambda: engines(study, target, model, rounds),
        "peer": lambda: peer(model, rounds),
        "gpu": lambda: gpu(study, target, device, rounds, options.batch),
    }
    for name in options.only or [name for name in jobs if name != "gpu" or device.type != "cpu"]:
        jobs[name]()


if __name__ == "__main__":
    main()
