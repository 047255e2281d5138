"""Tells noise from regression: runs held against a baseline, or against another version of the code."""
