"""Set what must be set before the first import of triton, by whichever test."""

from __future__ import annotations

import os

# The kernels' tests run on machines without a GPU. Triton's own library functions are decorated
# when it is imported, and transformers may import it: nothing later than this would do.
os.environ.setdefault("TRITON_INTERPRET", "1")
