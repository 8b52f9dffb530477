"""The version of the package, for files that it writes."""

__version__ = "0.1.0"
