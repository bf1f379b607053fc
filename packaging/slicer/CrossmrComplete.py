#!/usr/bin/env python-real
"""3D Slicer's module for crossmr: it hands volumes to the installed `crossmr complete`, and its results back.

Slicer runs this file in its own Python, which needs no package beside its standard library; crossmr has an environment
of its own. `--xml` prints the description beside it; the options are those that it lists.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

CONTRASTS = ("t1n", "t1c", "t2w", "t2f")
OF_SLICER = ("PYTHONHOME", "PYTHONPATH", "PYTHONNOUSERSITE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SSL_CERT_FILE")
"""What Slicer's launcher sets for its own Python and libraries, and would break another Python."""
DESCRIPTION = os.path.splitext(os.path.abspath(__file__))[0] + ".xml"
SUFFIX = ".nii.gz"


def options():
    """The options that CrossmrComplete.xml lists, and Slicer's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for contrast in CONTRASTS:
        parser.add_argument(f"--{contrast}", metavar="FILE", help="an acquired volume")
        parser.add_argument(f"--{contrast}_synthetic", metavar="FILE", help="where its synthesis goes")
        parser.add_argument(f"--{contrast}_std", metavar="FILE", help="where the standard deviation goes")
    parser.add_argument("--crossmr", default="", help="the program; by default $CROSSMR, or else the one on the PATH")
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--register", action="store_true")
    parser.add_argument("--returnparameterfile", metavar="FILE", help="where verdict and reasons go")
    parser.add_argument("--xml", action="store_true", help="print the description of the module")
    return parser


def fail(text):
    """Stop, with the one line that Slicer shows as the module's error."""
    sys.exit(f"CrossmrComplete: {text}")


def program(given):
    """The crossmr that is to run."""
    wanted = given or os.environ.get("CROSSMR") or "crossmr"
    found = shutil.which(wanted)
    if found is None:
        fail(f"{wanted} is not found. Name crossmr of its environment under Program, or in the variable CROSSMR.")
    return found


def wished(given):
    """The acquired files and what is asked for, contrast → file, as three dictionaries."""
    files = vars(given)
    acquired, images, stds = (
        {contrast: files[contrast + kind] for contrast in CONTRASTS if files[contrast + kind]}
        for kind in ("", "_synthetic", "_std")
    )
    if not acquired:
        fail("no acquired volume is chosen; choose at least one.")
    if not images and not stds:
        fail("no output is chosen; choose a synthetic volume.")
    if both := sorted(acquired.keys() & (images.keys() | stds.keys())):
        fail(f"{both[0]} is chosen as acquired and as output; an acquired contrast is not synthesised.")
    if wrong := [path for paths in (acquired, images, stds) for path in paths.values() if not path.endswith(SUFFIX)]:
        fail(f"{wrong[0]} is no {SUFFIX} file.")
    return acquired, images, stds


def complete(given, folder, acquired, targets):
    """Run crossmr on copies named after their contrasts; returns the folder of the results and the summary."""
    inputs = []
    for contrast, path in acquired.items():
        inputs.append(os.path.join(folder, f"study-{contrast}{SUFFIX}"))
        shutil.copyfile(path, inputs[-1])
    out = os.path.join(folder, "out")
    command = [program(given.crossmr), "complete", *inputs, "--out", out, "--targets", ",".join(targets), "--json"]
    command += ["--model", given.model] if given.model else []
    command += ["--device", given.device, *(["--register"] if given.register else [])]
    kept = {name: value for name, value in os.environ.items() if name not in OF_SLICER}
    ran = subprocess.run(command, capture_output=True, text=True, env=kept)
    print(ran.stderr)
    try:
        summary = json.loads(ran.stdout)
    except ValueError:
        summary = {"error": (ran.stderr.strip().splitlines() or ["crossmr said nothing"])[-1]}
    if ran.returncode:
        reasons = [*summary.get("failed", {}).values(), *summary.get("reasons", {}).get("study", ())]
        fail(summary.get("error") or " ".join(reasons) or f"crossmr ended with exit code {ran.returncode}.")
    return os.path.join(out, "study"), summary


def main():
    """Print the description, or complete one study."""
    given = options().parse_args()
    if given.xml:
        with open(DESCRIPTION, encoding="utf-8") as file:
            print(file.read())
        return
    acquired, images, stds = wished(given)
    start = time.time()
    say("<filter-start><filter-name>crossmr</filter-name><filter-comment>Synthesising</filter-comment></filter-start>")
    say("<filter-progress>0.1</filter-progress>")
    with tempfile.TemporaryDirectory(prefix="crossmr-slicer-") as folder:
        results, summary = complete(given, folder, acquired, sorted(images.keys() | stds.keys()))
        say("<filter-progress>0.9</filter-progress>")
        for kind, wanted in (("synthetic", images), ("std", stds)):
            for contrast, path in wanted.items():
                made = os.path.join(results, f"study-{contrast}_{kind}{SUFFIX}")
                if not os.path.exists(made):
                    why = summary["not_filled"].get("study", {}).get(contrast, "the model states no deviation")
                    fail(f"{contrast}_{kind} was not made: {why}")
                shutil.move(made, path)
    if given.returnparameterfile:
        reasons = " ".join(summary["reasons"].get("study", ())) or "none"
        with open(given.returnparameterfile, "w", encoding="utf-8") as file:
            file.write(f"verdict = {summary['verdicts']['study']}\nreasons = {reasons}\n")
    say("<filter-progress>1.0</filter-progress>")
    seconds = f"<filter-time>{time.time() - start:.1f}</filter-time>"
    say(f"<filter-end><filter-name>crossmr</filter-name>{seconds}</filter-end>")


def say(text):
    """Print to Slicer at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
