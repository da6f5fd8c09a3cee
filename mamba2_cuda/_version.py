"""The version, for the package, the build and the compiled modules alike."""

__version__ = "0.1.0"
