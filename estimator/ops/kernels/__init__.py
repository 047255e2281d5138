"""The runtime's CUDA kernels as the estimator sees them: bytes, FLOPs and launches of a call, and the sizes of launches on
which its memory depends. One module per family, named as in ``runtime.kernels``, which reads the same functions.
"""
