"""The version of the package, which no other module has to import."""

__version__ = "0.1.0"
