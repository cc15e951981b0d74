"""`import prototok.capacity` gives the function; it is in `prototok.fitting.capacity`."""

from prototok.common.door import open_door
from prototok.fitting.capacity import capacity

open_door(__name__, capacity)
