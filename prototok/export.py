"""`import prototok.export` gives the function; it is in `prototok.exporting.export`."""

from prototok.common.door import open_door
from prototok.exporting.export import export

open_door(__name__, export)
