"""The autoregressive side: [mem] vectors in front of a text, and KV-cached greedy decoding."""

from prototok.autoregressive.fit import fit, kuratov
from prototok.autoregressive.generate import generate
from prototok.results.mem_fit import MemFit

__all__ = ["MemFit", "fit", "generate", "kuratov"]
