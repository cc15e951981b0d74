"""`import prototok.decode` gives the function; it is in `prototok.decoding.decode`."""

from prototok.common.door import open_door
from prototok.decoding.decode import decode

open_door(__name__, decode)
