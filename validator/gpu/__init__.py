"""Checks of a machine with a GPU: ``python -m validator doctor``."""
