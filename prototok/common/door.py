"""Let `import prototok.NAME` give a function that lives elsewhere in the package."""

from __future__ import annotations

import sys
from collections.abc import Callable


def open_door(module: str, function: Callable) -> None:
    """Put `function` in the place of the module `module`, which is being imported.

    Python binds what `sys.modules` holds, so `import prototok.fast_fit` and
    `from prototok import fast_fit` give the same function. It is its own attribute for
    `from prototok.fast_fit import fast_fit`.
    """
    setattr(function, function.__name__, function)
    sys.modules[module] = function  # type: ignore[assignment]
