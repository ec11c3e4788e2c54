"""The Python API of the README."""
