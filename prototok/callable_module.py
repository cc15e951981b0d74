"""Let a module be called as its one public function."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType


def make_callable(function: Callable) -> None:
    """Make the module that defines `function` callable: `module(...)` is `function(...)`.

    Importing a submodule binds its name on the package, so `prototok.fast_fit` has to be the module
    once anything imports `prototok.fast_fit`; this way it is the function, too.
    """

    @functools.wraps(function)
    def call(self: ModuleType, *args: object, **kwargs: object) -> object:
        return function(*args, **kwargs)

    module = sys.modules[function.__module__]
    module.__class__ = type("CallableModule", (ModuleType,), {"__call__": call})
