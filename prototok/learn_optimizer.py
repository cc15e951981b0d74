"""`import prototok.learn_optimizer` gives the function, of `prototok.fitting.learn_optimizer`."""

from prototok.common.door import open_door
from prototok.fitting.learn_optimizer import learn_optimizer

open_door(__name__, learn_optimizer)
