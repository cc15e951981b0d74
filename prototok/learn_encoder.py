"""`import prototok.learn_encoder` gives the function, of `prototok.fitting.learn_encoder`."""

from prototok.common.door import open_door
from prototok.fitting.learn_encoder import learn_encoder

open_door(__name__, learn_encoder)
