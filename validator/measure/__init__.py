"""Runs one case, on any backend, and makes a ``StepReport`` of it."""
