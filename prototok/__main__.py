"""`python -m prototok` is `prototok`."""

from prototok.cli import main

main()
