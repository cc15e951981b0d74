"""The version of prototok, as pyproject.toml has it."""

VERSION = "0.1.0"
