"""`import prototok.fast_fit` gives the function; it is in `prototok.fitting.fast_fit`."""

from prototok.common.door import open_door
from prototok.fitting.fast_fit import fast_fit

open_door(__name__, fast_fit)
