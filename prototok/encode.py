"""`import prototok.encode` gives the function; it is in `prototok.fitting.encode`."""

from prototok.common.door import open_door
from prototok.fitting.encode import encode

open_door(__name__, encode)
