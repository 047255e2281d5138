"""CUDA without a GPU, for looking at what torch itself does on one.

A CUDA build of torch is linked against the CUDA runtime, cuBLAS and NCCL. This stub takes their places (``LD_PRELOAD``): device
memory is reserved and never computed on, kernels do nothing, streams are done at once, ranks exchange nothing. Everything above is
real: torch's allocator, its statistics and history, streams and events, its choice of operators with what they keep and their
workspaces, autograd's threads, CuPy's loader with NVRTC's compiler, and every line of this project that only runs on a GPU. So
names, orders of arguments, devices, launches' shapes and bytes of memory can be checked without one; numbers cannot, and seconds
are meaningless. Nothing that it shows is a measurement.

    python -m tests.cuda_stub /path/to/venv/bin/python -m validator campaign --suite smoke --out /tmp/stub

runs that command in an environment that holds a CUDA build of torch, cupy-cuda13x, nvidia-ml-py and nvidia-cuda-crt (headers).
``STUB_GPUS`` (1), ``STUB_GIB`` (139.8), ``STUB_NAME`` ("NVIDIA H200") say what it plays; ``STUB_TRACE=1`` prints every launch through CuPy.
"""
