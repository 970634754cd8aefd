"""The version of this package, the one place that states it: files that it writes name it, pyproject.toml reads it."""

__version__ = "0.1.0"
