"""crossmr completes brain MRI: it synthesises a study's missing contrasts from those that were acquired.

Research use only; not a medical device. Everything it writes is labelled synthetic. The public names are listed in
`__init__.pyi`, beside this file.
"""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

__version__ = version("crossmr")

_LIST = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_MODULES = {name.name: node.module for node in _LIST if isinstance(node, ast.ImportFrom) for name in node.names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import crossmr` and the command line start at once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'crossmr' has no attribute '{name}'")
    return getattr(import_module(str(_MODULES[name])), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return ["__doc__", "__file__", "__name__", "__path__", "__version__", *__all__]
