"""The tree of errors is what its docstring draws."""

import inspect
import re

from crossmr import errors


def test_the_tree_is_drawn_whole():
    drawn = set(re.findall(r"^(?:[├└]── )?(\w+)", errors.__doc__.split("\n\n")[1], flags=re.MULTILINE))
    defined = {name for name, kind in inspect.getmembers(errors, inspect.isclass)}
    assert drawn == defined


def test_every_error_is_caught_by_the_one_base():
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.CrossmrError)
        assert kind is errors.CrossmrError or kind.__bases__ == (errors.CrossmrError,)
