"""Sizes that calibration measures, the most telling first: a small budget leaves out what stands last."""

from __future__ import annotations

from estimator.units import GIB, KIB, MIB

Shapes = tuple[tuple[int, ...], ...]
Layouts = tuple[tuple[str, int, int, int], ...]

CPU_SHAPES: Shapes = (
    (512, 512, 512), (1024, 1024, 1024), (64, 256, 256), (1024, 512, 2048), (1024, 2048, 512), (512, 512, 1024),
    (256, 512, 512), (2048, 512, 1024), (4096, 256, 256), (256, 256, 4096), (1024, 4096, 512), (4096, 512, 1024),
    (128, 1024, 1024), (512, 1536, 384), (1024, 384, 1536), (128, 128, 128), (2048, 1024, 1024), (512, 4096, 256),
    (1024, 1024, 4096), (4096, 1024, 512), (64, 4096, 4096), (2048, 2048, 2048),
)  # fmt: skip
"""m, n, k as transformer layers have them: tokens x width x width forward, width x width x tokens for weight gradients."""

CPU_LAYOUTS: Layouts = (
    ("nn", 512, 512, 512), ("tn", 512, 512, 512), ("nn", 256, 2048, 512), ("tn", 512, 2048, 256), ("nn", 512, 512, 2048),
    ("tn", 2048, 512, 512), ("nn", 128, 512, 512), ("tn", 512, 512, 128), ("nn", 1024, 1024, 1024), ("tn", 1024, 1024, 1024),
    ("nn", 1024, 1536, 384), ("tn", 384, 1536, 1024), ("nn", 2048, 256, 1024), ("tn", 1000, 768, 333),
)  # fmt: skip
"""Layout, m, n, k: gradients of inputs (nn) and of weights (tn), whose operands lie otherwise."""

CPU_ODD: Layouts = (("nt", 509, 1021, 251), ("nt", 1, 1024, 1024))
"""Skinny and odd products."""

CUDA_SHAPES: Shapes = (
    (4096, 4096, 4096), (1024, 1024, 1024), (2048, 2048, 2048), (8192, 8192, 8192), (4096, 14336, 4096),
    (4096, 4096, 14336), (14336, 4096, 4096), (8192, 4096, 4096), (2048, 4096, 4096), (512, 4096, 4096),
    (4096, 1024, 4096), (16384, 4096, 4096), (8192, 6144, 4096), (8192, 28672, 8192), (8192, 8192, 1024),
    (1024, 8192, 8192), (4096, 128256, 4096), (256, 256, 256),
)  # fmt: skip

CUDA_LAYOUTS: Layouts = (
    ("nn", 4096, 4096, 4096), ("tn", 4096, 4096, 4096), ("nn", 4096, 4096, 14336), ("tn", 14336, 4096, 4096),
    ("nt", 4096, 50257, 768), ("nn", 8192, 4096, 1024), ("tn", 4096, 4096, 16384), ("nt", 4097, 4095, 4099),
    ("nn", 4096, 14336, 4096), ("tn", 1024, 1024, 8192), ("nt", 16, 4096, 4096), ("nt", 1000, 3000, 1000),
    ("nn", 2048, 2048, 8192), ("tn", 4096, 14336, 2048), ("nt", 4096, 64, 4096), ("nn", 4096, 768, 50257),
    ("tn", 50257, 768, 4096), ("nt", 130, 4096, 4096), ("nt", 2000, 5120, 1920),
)  # fmt: skip

CPU_ATTENTION: Shapes = (
    (256, 8, 8, 64), (1024, 8, 8, 64), (128, 8, 8, 64), (512, 8, 8, 64), (256, 8, 2, 64), (1024, 8, 8, 128),
    (512, 16, 4, 32), (2048, 8, 1, 64),
)  # fmt: skip
"""Sequence, query heads, key/value heads, head size."""

CUDA_ATTENTION: Shapes = (
    (2048, 16, 16, 128), (8192, 16, 16, 128), (512, 16, 16, 128), (4096, 32, 8, 128), (2048, 16, 16, 64),
    (16384, 16, 16, 128), (8192, 32, 8, 128), (4096, 16, 16, 128), (512, 16, 16, 64), (8192, 16, 16, 64),
    (1024, 32, 8, 128), (2048, 64, 8, 128), (16384, 16, 16, 64), (4096, 8, 8, 256), (4096, 12, 12, 96),
    (32768, 32, 8, 128), (2048, 64, 1, 128), (4096, 25, 25, 64),
)  # fmt: skip

QUICK_ATTENTION: Shapes = ((128, 8, 8, 64), (128, 8, 2, 64))

MAIN_KERNELS = (
    ("add", False), ("accumulate_grad", False), ("gelu_tanh", False), ("gelu_tanh", True), ("layer_norm", False),
    ("layer_norm", True), ("rms_norm", False), ("rms_norm", True), ("cross_entropy", False), ("cross_entropy", True),
    ("swiglu", False), ("swiglu", True), ("embedding", False), ("embedding", True), ("rotary", False), ("rotary", True),
    ("optimizer_step", False), ("grad_norm", False),
)  # fmt: skip
"""Of ``validator.kernels.table``: what forecasts look up, forward and backward."""
GPU_KERNELS = (
    ("gelu", False), ("gelu", True), ("add_rms_norm", False), ("add_rms_norm", True), ("add_layer_norm", False),
    ("add_layer_norm", True), ("sgd", False),
)  # fmt: skip
"""And on a GPU, where these are kernels of their own."""
UNUSED_KERNELS = (
    "linear_cross_entropy", "lion", "adagrad", "lamb", "adamw8", "quantize_int8", "dequantize_int8",
)  # fmt: skip
"""Kernels of the table that no forecast asks for; the head and its loss are products and ``cross_entropy``."""
CPU_UNUSED_KERNELS = (*UNUSED_KERNELS, "sgd")
"""On a CPU steps are forecast by the rate of fused Adam."""

STREAMING_KERNELS = ("add", "accumulate_grad")

QUICK_BYTES = (64 * KIB, MIB)
CPU_BYTES = (MIB, 16 * MIB, 64 * KIB)
BIG_BYTES = 64 * MIB
"""Beyond a CPU's caches."""
CUDA_BYTES = (64 * MIB, MIB, 512 * MIB, 8 * MIB)
COPY_BYTES = (64 * MIB, MIB, 512 * MIB, 64 * KIB, 8 * MIB)

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
QUICK_MESSAGES = (64 * KIB, 8 * MIB)
CPU_MESSAGES = (4 * KIB, 16 * MIB, MIB, 64 * KIB, 4 * MIB, 64 * MIB, 512 * KIB)
CUDA_MESSAGES = (64 * MIB, 64 * KIB, 512 * MIB, MIB, 8 * MIB, GIB, 256 * KIB, 128 * MIB)

OPTIMIZER_NUMEL = 1 << 24
"""One chunk of the runtime's own step."""

ALLOC_BYTES = (64 * KIB, 16 * MIB)
SEGMENT_BYTES = (32 * MIB, 512 * MIB)
"""Multiples of 2 MiB above 10 MiB: torch's allocator asks the driver for exactly these."""

BLOCKS = (MIB, 16 * MIB, 128 * KIB, 4 * KIB)
QUEUES = (1, 4, 16)
QUICK_BLOCKS, QUICK_QUEUES = (128 * KIB,), (1, 2)
FILE_BYTES = 512 * MIB
QUICK_FILE_BYTES = 8 * MIB
