"""CUDA kernels of the runtime: one ``.cu`` file, one launcher with its plain-torch reference per family.

How a kernel is written here: docs/kernels.md.
"""
