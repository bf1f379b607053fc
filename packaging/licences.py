"""The licences of all packages as one page: python licences.py RUN.json ALL.json, both as pip-licenses writes them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HEAD = """# Licences

crossmr is under the Apache License 2.0. The wheel holds one work of others, [NiiVue](https://github.com/niivue/niivue), under the BSD 2-Clause License: `crossmr/output/pages/niivue.LICENSE`, which every page that shows volumes repeats.

`bash packaging/release.sh FOLDER` made these tables from the packages' own metadata. Nothing that crossmr needs is under a copyleft licence, except that the wheels of numpy and scipy carry GCC's Fortran runtime, whose exception to the GPL allows it; Ray's certifi, and some packages that the tests need, are under the MPL. On Linux PyPI's PyTorch also brings NVIDIA's CUDA libraries, under NVIDIA's licences; the build for the CPU, listed here, does not.
"""  # noqa: E501
IN_OWN_WORDS = {"dcm2niix": "BSD-2-Clause; parts of it MIT, BSD, zlib or in the public domain"}
"""Packages whose metadata hold a text in place of a name."""

Packages = dict[str, tuple[str, str]]
"""Name → version and licence."""


def read(path: str) -> Packages:
    """The packages of an environment.

    Raises:
        SystemExit: one of them does not name its licence.
    """
    found = {}
    for entry in json.loads(Path(path).read_text()):
        licence = IN_OWN_WORDS.get(entry["Name"], entry["License"])
        if "\n" in licence or licence in ("", "UNKNOWN"):
            sys.exit(
                f"{entry['Name']} names no licence: look it up, and add it to IN_OWN_WORDS of packaging/licences.py."
            )
        found[entry["Name"]] = (entry["Version"], licence)
    return found


def table(title: str, packages: Packages) -> Iterator[str]:
    """A section with one line for each package."""
    yield from ("", f"## {title}", "", "| package | version | licence |", "|---|---|---|")
    yield from (f"| {name} | {' | '.join(packages[name])} |" for name in sorted(packages, key=str.lower))


def main() -> None:
    """Print the page."""
    run, everything = map(read, sys.argv[1:])
    rest = {name: of for name, of in everything.items() if name not in run}
    print(HEAD, end="")
    print(*table("What crossmr and its extras need", run), *table("What the tests need beside it", rest), sep="\n")


if __name__ == "__main__":
    main()
