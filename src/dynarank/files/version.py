"""The version of the package: ``dynarank.__version__``, and what the build reads."""

__all__ = ["__version__"]

__version__ = "0.1.0"
