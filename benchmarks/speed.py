"""Where the time goes when one study is completed, against what the machine could do; and against what else there is.

1. Counted: floating-point operations of each network, and the bytes that its layers read and write one by one; the
   machine's own peaks (a large matrix product in the network's precision, a large copy). The longer of the two
   quotients is the floor.
2. Measured, medians of interleaved rounds: reading, checks, each network, drawing of guidance, writing, pictures; and
   how long a further study takes in a cohort, where one is read while another is synthesised.
3. A training step of each stage, and the preparation of a study.
4. Beside: the published form's pooled guidance; eager float32 and bfloat16, ONNX Runtime, OpenVINO; zlib, isal,
   zlib-ng; MONAI's DiffusionModelUNet of as many parameters, 50 DDIM steps. What is not installed is said.
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

from crossmr.checks import check
from crossmr.cli import keep_memory
from crossmr.cohort import complete_cohort
from crossmr.completion import BATCH, Settings, complete_study, synthesise
from crossmr.data.dataset import as_inputs, seeded
from crossmr.data.naming import find_studies
from crossmr.data.prepare import Split, prepare, prepare_case
from crossmr.data.study import load_study
from crossmr.data.volume import content_sha256, write_volume
from crossmr.device import choose_device, choose_precision
from crossmr.metrics import psnr
from crossmr.model import CrossConditionedModel, load_model
from crossmr.phantom import write_cohort
from crossmr.picture import save_columns
from crossmr.recipes import PAPER, recipe_of
from crossmr.stages.synthesis import mean_where_present
from crossmr.store import find_model
from crossmr.training import train

ALL = ("parts", "training", "preparing", "engines", "peer", "pooled", "compressors", "gpu")
Jobs = Mapping[str, Callable[[], object]]


def interleaved(jobs: Jobs, rounds: int) -> dict[str, float]:
    """Median seconds of each job; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def inferring(call: Callable[[], object], dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """The call as `complete` makes it: without gradients, in this precision."""

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            call()

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

    def count(layer: nn.Module, given: tuple[object, ...], out: object) -> None:
        nonlocal total
        tensors = [*given, out, *layer.parameters()]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    leaves = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in leaves]
    call()
    for hook in hooks:
        hook.remove()
    return float(total)


def parts(folder: Path, target: str, model: CrossConditionedModel, rounds: int) -> None:
    """One study, step by step."""
    (files,) = find_studies(folder)
    paths = {m: path for m, path in files.images().items() if m != target}
    study = load_study(paths)
    settings = Settings(targets=(target,))
    dtype = choose_precision("auto", model.device)
    product, copied = peak(dtype), bandwidth()
    box = study.box()
    sources = {m: study.normalised(m, box) for m in study.volumes}
    head = study.mask[box].sum((1, 2)).tolist()
    slices = [z for z, voxels in enumerate(head) if voxels]
    stacked = torch.from_numpy(
        np.stack([sources.get(m, np.zeros_like(next(iter(sources.values())))) for m in model.config.sources])
    )
    shown = torch.tensor([float(m in sources) for m in model.config.sources])
    arounds = [
        as_inputs(stacked, slices[start : start + BATCH], 2, model.config.divisor, model.config.context_slices)
        for start in range(0, len(slices), BATCH)
    ]

    def read(around: Tensor) -> Tensor:
        return model.inputs(around, shown.expand(len(around), -1))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        pairs = [(given, model.unguided(given)) for given in map(read, arounds)]
        inputs, unguided = pairs[len(pairs) // 2]
        batches = len(slices) / len(inputs)  # of what is drawn for one batch
        cells = model.guide_cells(inputs, unguided, [seeded("speed")]) if model.config.representation.cell else None

    done = complete_study(study, model, settings)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        networks = {
            "C-UNet": lambda: [model.unguided(given) for given, _ in pairs],
            "network of the error": lambda: [model.deviation(*pair) for pair in pairs],
        }
        guided = {}
        if cells is not None:
            guided = {
                "MDN, 50 steps, one sample": lambda: model.guide_cells(inputs, unguided, [seeded("speed")]),
                "C-UNet, guided": lambda: model.synthesis(inputs, cells[0]),
                "C-UNet, unguided": lambda: model.synthesis(inputs),
            }
        jobs: dict[str, Callable[[], object]] = {
            "read, normalise, find the head": lambda: load_study(paths),
            "check the input": lambda: check(study, model.trivial, model.config.modalities),
            "inputs of the networks": inferring(lambda: [read(around) for around in arounds], dtype),
            **{name: inferring(call, dtype) for name, call in {**networks, **guided}.items()},
            "the whole synthesis": lambda: synthesise(model, sources, head, "speed", settings, wanted=[target]),
            "write image and deviation": lambda: [
                write_volume(image, out / f"{k}.nii.gz")
                for k, image in enumerate((done.images[target], done.deviations[target]))
            ],
            "picture": lambda: save_columns(out / "picture.webp", done.columns, done.spacing_mm),
        }
        seconds = interleaved(jobs, rounds)
    print(f"\n{study.reference.data.shape} voxels, {len(slices)} slices with head, from {', '.join(sources)}; {dtype}")
    print(f"peak {product / 1e9:.0f} GFLOP/s, {copied / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print("\n| | s a volume | GFLOP | GB | floor, s | measured / floor |\n|---|---|---|---|---|---|")
    owner = {"C-UNet": model.synthesis, "network of the error": model.uncertainty, "C-UNet, guided": model.synthesis}
    for name, value in seconds.items():
        scale = batches if name in guided else 1.0
        total = value * scale
        if name in {**networks, **guided}:
            call = {**networks, **guided}[name]
            count, size = flops(call) * scale, 0.0
            if (network := owner.get(name)) is not None:
                size = moved(network, inferring(call, dtype)) * scale
            floor = max(count / product, size / copied)
            print(
                f"| {name} | {total:.2f} | {count / 1e9:.0f} | {size / 1e9:.0f} | {floor:.2f} | {total / floor:.1f} |"
            )
        else:
            print(f"| {name} | {total:.2f} | | | | |")
    own = sum(seconds[name] for name in networks)
    files = ("read, normalise, find the head", "check the input", "write image and deviation", "picture")
    around_it = sum(seconds[name] for name in files) + seconds["the whole synthesis"] - own
    print(f"\naround the networks: {around_it:.2f} s, {around_it / own:.0%} of their own {own:.2f} s")
    each = in_a_cohort(paths, model, settings, 2 * rounds)
    print(f"in a cohort, one study read ahead, a further study takes {each:.2f} s: {each / own - 1:.0%} around them")
    if guided:
        share = seconds["MDN, 50 steps, one sample"] * batches / seconds["C-UNet"]
        embedding = seconds["C-UNet, guided"] / seconds["C-UNet, unguided"] - 1
        print(f"guidance: the MDN takes {share:.1%} of the C-UNet's time, the condition layers {embedding:+.1%}")


def in_a_cohort(paths: Mapping[str, Path], model: CrossConditionedModel, settings: Settings, count: int) -> float:
    """Seconds that a further study takes in a cohort of one study under so many names."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "one" / "case").mkdir(parents=True)
        for modality, path in paths.items():
            shutil.copyfile(path, folder / "one" / "case" / f"case-{modality}.nii.gz")
        watch = Watch(count)
        complete_cohort(
            under_names(folder / "one", folder / "cohort", count),
            folder / "out",
            model,
            settings=settings,
            display=watch,
        )
    return (watch.finished[-1] - watch.finished[0]) / (count - 1)


def training(model: CrossConditionedModel, rounds: int) -> None:
    """A step of each stage, as the shipped weights were trained, on phantoms: seconds, and operations against peak."""
    recipe, product = recipe_of(model), peak(torch.bfloat16)
    print(f"\na training step, crops of {recipe.crop}; peak {product / 1e9:.0f} GFLOP/s")
    print("\n| stage | batch | s | GFLOP | floor, s | measured / floor |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_cohort(folder / "cohort", 2, seed=1, shape=(160, 160, 32), spacing_mm=(1.2, 1.2, 5.0))
        prepare(folder / "cohort", folder / "set", split=Split(1, 0, 0))
        train(folder / "set", folder / "run", recipe=recipe, steps=4 * rounds)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        for stage in model.stages():
            counted = []
            for steps in (1, 2):  # what a stage does but once falls out of the difference
                run = folder / f"{stage}-{steps}"
                shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns(stage, "plan.json", "model"))
                plan = json.loads((folder / "run" / "plan.json").read_text())
                (run / "plan.json").write_text(json.dumps({**plan, stage: steps}))
                with FlopCounterMode(display=False) as counter:
                    train(folder / "set", run, recipe=recipe, stages=[stage])
                counted.append(counter.get_total_flops())
            seconds = statistics.median(1 / line["steps_per_second"] for line in lines if line["stage"] == stage)
            count, batch = counted[1] - counted[0], recipe.fit_config(stage).batch_size
            print(
                f"| {stage} | {batch} | {seconds:.3f} | {count / 1e9:.0f} | {count / product:.3f} "
                f"| {seconds * product / count:.1f} |",
                flush=True,
            )


def preparing(folder: Path, rounds: int) -> None:
    """One study into a set."""
    (files,) = find_studies(folder)
    paths = list(files.images().values())
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)

        def whole() -> None:
            shutil.rmtree(out / "cases", ignore_errors=True)
            prepare_case(files, out)

        seconds = interleaved(
            {
                "unpack the files, nothing else": lambda: [gzip.decompress(path.read_bytes()) for path in paths],
                "read, normalise, find the head": lambda: load_study(files),
                "hash the files": lambda: [content_sha256(path) for path in paths],
                "the whole: and crop, hash, write": whole,
            },
            rounds,
        )
        size = sum(path.stat().st_size for path in out.rglob("*.npy"))
    print(f"\n| prepare one study, {size / 1e6:.0f} MB of arrays | s |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")


def gpu(folder: Path, target: str, device: torch.device, rounds: int, batch: int) -> None:
    """Training steps of the published C-UNet against the card's peak, and one study, on a GPU."""
    if device.type != "cuda":
        print(f"\nNo GPU here; what follows is a rehearsal on {device.type}.")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    size = 8192 if device.type == "cuda" else 1024
    a = torch.rand(size, size, device=device, dtype=torch.bfloat16)
    product = 2 * size**3 / interleaved({"product": lambda: [a @ a, wait()]}, 9)["product"]
    model = CrossConditionedModel(PAPER.model_config(("t1n", "t2w"), ("t1c", "t2f"))).to(device)
    images = torch.rand(batch, 2, *PAPER.crop, device=device).contiguous(memory_format=torch.channels_last)
    truth, present = torch.rand_like(images), torch.ones(batch, 2, device=device)
    y_0 = torch.rand(batch, model.representation.dim, device=device)
    network = model.synthesis.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(network.parameters(), 1e-4)

    def step(forward: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = mean_where_present((forward(images, y_0).float() - truth) ** 2, present)
            loss.backward()
            optimiser.step()
            wait()

        return run

    jobs = {"eager": step(network)}
    if device.type == "cuda":
        jobs["torch.compile"] = step(torch.compile(network))
        jobs["torch.compile, CUDA graphs"] = step(torch.compile(network, mode="reduce-overhead"))
    with FlopCounterMode(display=False) as counter:
        jobs["eager"]()
    count = counter.get_total_flops()
    print(f"\npublished C-UNet, {batch} slices of {PAPER.crop}, bfloat16, channels last; {product / 1e12:.1f} TFLOP/s")
    print("\n| training step | s | of the peak |\n|---|---|---|")
    for name, seconds in interleaved(jobs, rounds).items():
        print(f"| {name} | {seconds:.4f} | {count / seconds / product:.1%} |")
    (files,) = find_studies(folder)
    study = load_study({m: path for m, path in files.images().items() if m != target})
    shipped = load_model(find_model(), device)
    seconds = interleaved({"study": lambda: [complete_study(study, shipped, Settings(targets=(target,))), wait()]}, 3)
    print(f"\none study, read beforehand, by the shipped weights: {seconds['study']:.2f} s")
    if device.type == "cuda":
        print(f"peak memory of the card: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def some_slices(folder: Path, target: str, model: CrossConditionedModel) -> tuple[Tensor, Tensor]:
    """Sixteen slices from the middle of a study as the C-UNet reads them, and the true target (16, 1, Y, X)."""
    study = load_study(find_studies(folder)[0])
    box = study.box()
    head = study.mask[box].sum((1, 2)).tolist()
    middle = (len(head) - BATCH) // 2
    chosen = list(range(middle, middle + BATCH))
    given = [study.normalised(m, box) for m in model.config.sources if m in study.volumes]
    stacked = torch.from_numpy(np.stack(given))
    around = as_inputs(stacked, chosen, 2, model.config.divisor, model.config.context_slices)
    shown = torch.tensor([float(m != target) for m in model.config.sources])
    truth = as_inputs(torch.from_numpy(study.normalised(target, box))[None], chosen, 2, model.config.divisor)
    return model.inputs(around, shown.expand(BATCH, -1)), truth


def engines(folder: Path, target: str, model: CrossConditionedModel, rounds: int) -> None:
    """One C-UNet, sixteen slices of a study, on what there is."""
    images, truth = some_slices(folder, target, model)
    images, network = images.contiguous(), model.synthesis.eval()
    index = model.config.targets.index(target)

    def quality(made: Tensor) -> float:
        return float(psnr(made[:, index : index + 1].float().clamp(0, 1), truth, 1.0).mean())

    def eager(dtype: torch.dtype, memory: torch.memory_format) -> Callable[[], Tensor]:
        given = images.contiguous(memory_format=memory)

        def run() -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                return network(given)  # type: ignore[no-any-return]

        return run

    def compiled() -> Callable[[], Tensor]:
        given, faster = images.contiguous(memory_format=torch.channels_last), torch.compile(network)

        def run() -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return faster(given)  # type: ignore[no-any-return]

        return run

    reference = eager(torch.float32, torch.contiguous_format)()
    jobs: dict[str, Callable[[], Tensor]] = {
        "eager float32": eager(torch.float32, torch.contiguous_format),
        "eager bfloat16": eager(torch.bfloat16, torch.contiguous_format),
        "eager bfloat16, channels last": eager(torch.bfloat16, torch.channels_last),
    }
    if shutil.which("g++") is None:
        print("torch.compile needs a compiler")
    else:
        jobs["torch.compile bfloat16, channels last"] = compiled()
    try:
        import openvino

        converted = openvino.convert_model(network, example_input=(images,), input=[tuple(images.shape)])
        for hint in ("f32", "bf16"):
            settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
            request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
            jobs[f"OpenVINO {hint}"] = lambda c=request: torch.from_numpy(c.infer([images.numpy()])[0].copy())  # type: ignore[misc]
    except ImportError:
        print("OpenVINO is not installed")
    try:
        import onnxruntime

        file = io.BytesIO()
        torch.onnx.export(network, (images,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        fed = {session.get_inputs()[0].name: images.numpy()}
        jobs["ONNX Runtime float32"] = lambda: torch.from_numpy(session.run(None, fed)[0])
    except ImportError:
        print("ONNX Runtime is not installed")
    seconds = interleaved(jobs, rounds)
    print(f"\n{BATCH} slices, {target}; against eager bfloat16, channels last, as complete does it")
    print("\n| engine | s | times as fast | largest difference to float32 | PSNR, dB |\n|---|---|---|---|---|")
    for name, job in jobs.items():
        gain, made = seconds["eager bfloat16, channels last"] / seconds[name], job()
        print(
            f"| {name} | {seconds[name]:.3f} | {gain:.2f} | {float((made.float() - reference).abs().max()):.1e} "
            f"| {quality(made):.3f} |"
        )


def peer(model: CrossConditionedModel, rounds: int) -> None:
    """Conditional pixel-space diffusion of as many parameters: one of its 50 steps on the C-UNet's batch."""
    from monai.networks.nets import DiffusionModelUNet

    config = model.config
    count = sum(p.numel() for p in model.synthesis.parameters())
    channels = 8
    while True:
        form = {"num_res_blocks": 1, "attention_levels": (False,) * 4, "norm_num_groups": 2}
        wide = (channels, 2 * channels, 3 * channels, 4 * channels)
        network = DiffusionModelUNet(
            2, config.inputs + len(config.targets), len(config.targets), channels=wide, **form
        ).eval()
        if sum(p.numel() for p in network.parameters()) >= count or channels > 256:
            break
        channels += 2
    images = torch.rand(BATCH, config.inputs + len(config.targets), 184, 144)
    times = torch.full((BATCH,), 500)

    seconds = interleaved(
        {
            "ours": inferring(lambda: model.synthesis(images[:, : config.inputs])),
            "theirs": inferring(lambda: network(images, times)),
        },
        rounds,
    )
    size, times_ours = sum(p.numel() for p in network.parameters()), seconds["theirs"] / seconds["ours"]
    print(
        f"\nDiffusionModelUNet, {size / 1e6:.2f} M parameters (C-UNet {count / 1e6:.2f} M): one step takes "
        f"{times_ours:.2f} times the C-UNet's whole pass, 50 steps {50 * times_ours:.0f} times"
    )


def pooled(rounds: int) -> None:
    """The published form and size, untrained: what its guidance costs beside its C-UNet, on a volume of 146 slices."""
    model = CrossConditionedModel(PAPER.model_config(("t1n", "t2w"), ("t1c", "t2f"))).eval()
    images = torch.rand(4, 2, 184, 144)
    y_0 = torch.rand(1, model.representation.dim)

    seconds = interleaved(
        {
            "MDN": inferring(lambda: model.guide(None, [seeded("speed")], steps=50)),
            "unguided": inferring(lambda: model.synthesis(images, None)),
            "guided": inferring(lambda: model.synthesis(images, y_0.expand(len(images), -1))),
        },
        rounds,
    )
    volume = seconds["unguided"] * 146 / len(images)
    print(
        f"\npaper size: C-UNet {volume:.1f} s a volume; MDN, 50 steps, {seconds['MDN'] / volume:.2%} of that; "
        f"condition embedding {seconds['guided'] / seconds['unguided'] - 1:+.1%}"
    )


def compressors(folder: Path, rounds: int) -> None:
    """One float32 volume of the study, compressed as `.nii.gz`."""
    study = load_study({"t1n": next(folder.glob("*t1n.nii.gz"))})
    content = study.normalised("t1n").tobytes()
    jobs: dict[str, Callable[[], bytes]] = {
        f"zlib, level {n}": lambda n=n: gzip.compress(content, n, mtime=0) for n in (1, 6)
    }  # type: ignore[misc]
    try:
        from isal import igzip

        jobs |= {f"isal, level {n}": lambda n=n: igzip.compress(content, n, mtime=0) for n in (0, 1, 2)}  # type: ignore[misc]
    except ImportError:
        print("isal is not installed")
    try:
        from zlib_ng import gzip_ng

        jobs |= {f"zlib-ng, level {n}": lambda n=n: gzip_ng.compress(content, n, mtime=0) for n in (1, 2)}  # type: ignore[misc]
    except ImportError:
        print("zlib-ng is not installed")
    seconds = interleaved(jobs, rounds)
    print(f"\n| {len(content) / 1e6:.0f} MB of float32 | s | MB |\n|---|---|---|")
    for name, job in jobs.items():
        print(f"| {name} | {seconds[name]:.2f} | {len(job()) / 1e6:.1f} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path("../shared/data/brats/BraTS-GLI-00000-000"))
    parser.add_argument("--target", default="t2f")
    parser.add_argument("--model", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=ALL, nargs="+")
    parser.add_argument("--device", default="auto", help="of the part gpu; the others are for the processor")
    parser.add_argument("--batch", type=int, default=24, help="slices of a training step of the part gpu")
    options = parser.parse_args()
    keep_memory()
    model = load_model(find_model(options.model), choose_device("cpu"))
    wanted = options.only or ALL
    if "parts" in wanted:
        parts(options.study, options.target, model, options.rounds)
    if "training" in wanted:
        training(model, options.rounds)
    if "preparing" in wanted:
        preparing(options.study, options.rounds)
    if "engines" in wanted:
        engines(options.study, options.target, model, options.rounds)
    if "peer" in wanted:
        peer(model, options.rounds)
    if "pooled" in wanted:
        pooled(options.rounds)
    if "compressors" in wanted:
        compressors(options.study, options.rounds)
    device = choose_device(options.device)
    if "gpu" in wanted and (device.type != "cpu" or options.only):
        gpu(options.study, options.target, device, options.rounds, options.batch)


if __name__ == "__main__":
    main()
