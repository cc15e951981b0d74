"""What a thread keeps of its last call with a model, so that no two threads write one memory."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary


class PerThread(threading.local):
    """One dictionary a thread, by model; what is kept is let go with the model or the thread."""

    def __init__(self) -> None:
        self.of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
