"""What is measured: a list of small tasks, the indispensable ones first. Sizes are in ``validator.calibrate.sizes``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from estimator.schedule.nvme import IO_BLOCK_BYTES, IO_QUEUE
from estimator.time.profile import COMMIT
from estimator.units import format_bytes
from validator.calibrate import sizes as of

Device = Literal["cpu", "cuda"]
Effort = Literal["full", "quick"]

DTYPES = ("fp32", "bf16", "fp16")
DEFAULT_DTYPES: dict[str, tuple[str, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}


class Task(NamedTuple):
    """One point to measure. ``sizes`` depends on ``kind``."""

    kind: str
    """``matmul`` (m, n, k); ``attention`` (seq_len, heads, key/value heads, head_dim); ``bandwidth``, ``collective``,
    ``copy`` (bytes,); ``optimizer`` (threads, elements); ``file`` (block bytes, queue, file bytes); ``overhead`` (bytes,); ``host``, ``step`` ()."""
    name: str
    """Layout of a product; ``forward``/``backward`` of attention; a kernel of ``validator.kernels``; a collective; the
    direction of a copy or file, ``checksum`` of its blocks, ``commit`` of a version; what a host figure or overhead is of; a job of ``validator.calibrate.steps``."""
    dtype: str
    sizes: tuple[int, ...] = ()
    backward: bool = False
    pinned: bool = True
    essential: bool = False
    """Measured even when the budget is spent: without it there is no usable profile."""

    def key(self, workers: int) -> str:
        """Identity in the file of points done so far."""
        return json.dumps([workers, *self[:-1]])

    def label(self, workers: int) -> str:
        """For people."""
        if self.kind in ("bandwidth", "copy", "collective", "overhead", "file"):
            size = format_bytes(self.sizes[0]) if self.sizes[0] else ""
            size += f" x {self.sizes[1]}" if self.kind == "file" else ""
        else:
            size = "x".join(map(str, self.sizes))
        pinned = "pageable" if self.kind == "copy" and not self.pinned else ""
        direction = "backward" if self.backward and self.name != "backward" else ""
        at_once = f"({workers} at once)" if workers > 1 else ""
        dtype = "" if self.kind in ("copy", "file", "overhead", "host", "step") else self.dtype
        return " ".join(x for x in (self.kind, self.name, direction, pinned, size, dtype, at_once) if x)


def task_of(key: str) -> tuple[int, Task]:
    """Inverse of ``Task.key``: workers and the task."""
    workers, kind, name, dtype, size, backward, pinned = json.loads(key)
    return workers, Task(kind, name, dtype, tuple(size), backward, pinned)


def tasks_for(
    device: Device, workers: int, dtypes: tuple[str, ...], effort: Effort, *, cores: int = 1, files: bool = False,
    steps: bool = True,
) -> list[Task]:  # fmt: skip
    """Tasks of one round, in which ``workers`` processes run each task at once.

    On a GPU only collectives have more than one worker. ``cores`` bounds the threads of optimizer steps; ``files``
    says whether there is a folder to read and write in, ``steps`` whether small jobs are trained.
    """
    quick, cuda = effort == "quick", device == "cuda"
    collectives = _collectives(device, dtypes, quick) if workers > 1 else []
    if cuda and workers > 1:
        return [t._replace(essential=i < 12) for i, t in enumerate(collectives)]
    matmul = _matmul(device, workers, dtypes, quick)
    attention = _attention(device, workers, dtypes, quick)
    bandwidth = _bandwidth(device, workers, dtypes, quick)
    copies = _copies(device, quick)
    host = [Task("host", name, "fp32") for name in ("op", "autograd_op", "adam")]
    host += [Task("host", "memory", "fp32")] if cuda else []
    host += [Task("host", name, "fp32") for name in ("arithmetic", "all_reduce", "both")] if collectives else []
    alone = workers == 1
    optimizer = _optimizer(cores, quick) if alone else []
    overheads = _overheads(device) if alone else []
    file_tasks = _files(quick) if alone and files else []
    first = [
        matmul[: 2 * len(dtypes)], attention[: 2 * len(dtypes)], host, bandwidth[: 2 * len(dtypes)], copies[:2],
        collectives[:12],
    ]  # fmt: skip
    essential = list(dict.fromkeys(task for group in first for task in group))
    trained = _steps(device, dtypes, quick) if steps else []
    groups = (matmul, bandwidth, attention, collectives, copies, optimizer, overheads, file_tasks)
    rest = [task for task in _interleaved(groups, trained) if task not in set(essential)]
    return [t._replace(essential=True) for t in essential] + rest


def _steps(device: str, dtypes: tuple[str, ...], quick: bool) -> list[Task]:
    from validator.calibrate.steps import QUICK, jobs_of

    found = [Task("step", name, job.dtype) for name, job in jobs_of(device).items() if job.dtype in dtypes]
    return found[: QUICK if quick else None]


def _interleaved(groups: Sequence[list[Task]], soon: Sequence[Task] = ()) -> list[Task]:
    """Evenly mixed, so that a spent budget thins out every kind alike; ``soon`` over the first half."""
    ordered = [(i / len(group), j, task) for j, group in enumerate(groups) for i, task in enumerate(group)]
    ordered += [(i / len(soon) / 2, len(groups), task) for i, task in enumerate(soon)]
    return [task for _, _, task in sorted(ordered)]


def _matmul(device: str, workers: int, dtypes: tuple[str, ...], quick: bool) -> list[Task]:
    """Layer shapes in every dtype and layout; odd shapes and dtypes that only products have, where one runs alone."""
    shapes = of.CPU_SHAPES if device == "cpu" else of.CUDA_SHAPES
    others = (of.CPU_LAYOUTS if workers > 1 else of.CPU_LAYOUTS + of.CPU_ODD) if device == "cpu" else of.CUDA_LAYOUTS
    if quick:
        shapes = tuple((m // 2, n // 2, k // 2) for m, n, k in shapes[:3])
        others = tuple((layout, m // 2, n // 2, k // 2) for layout, m, n, k in others[:3])
    plain = [Task("matmul", "nt", d, shape) for shape in shapes for d in dtypes]
    laid_out = [Task("matmul", layout, d, (m, n, k)) for layout, m, n, k in others for d in dtypes if d != "fp16"]
    found = _interleaved([plain, laid_out]) if device == "cpu" else plain + laid_out
    if device == "cuda":
        found += [Task("matmul", "nt", "tf32", shape) for shape in shapes[:10]]
        found += [Task("matmul", "nt", "fp8", shape) for shape in shapes[:12]]
    return found


def _attention(device: str, workers: int, dtypes: tuple[str, ...], quick: bool) -> list[Task]:
    shapes = of.QUICK_ATTENTION if quick else of.CPU_ATTENTION if device == "cpu" else of.CUDA_ATTENTION
    if workers > 1:  # the plain shapes tell how processes slow each other
        shapes = shapes[:4]
    return [
        Task("attention", direction, d, shape, direction == "backward")
        for i, shape in enumerate(shapes)
        for direction in ("forward", "backward")
        for d in dtypes
        if device == "cpu" or d == "bf16" or i < 6
    ]


def _bandwidth(device: str, workers: int, dtypes: tuple[str, ...], quick: bool) -> list[Task]:
    """Kernels that forecasts ask for over every size, then those of the same family at the largest."""
    from validator.kernels.table import KERNELS

    byte_sizes = of.QUICK_BYTES if quick else of.CPU_BYTES if device == "cpu" else of.CUDA_BYTES
    unused = of.CPU_UNUSED_KERNELS if device == "cpu" else of.UNUSED_KERNELS
    named = {(k.name, k.backward): k for k in KERNELS if k.name not in unused}
    first = of.MAIN_KERNELS if device == "cpu" else of.MAIN_KERNELS + of.GPU_KERNELS
    main = [named[which] for which in first[: 6 if quick else None]]
    found = [
        Task("bandwidth", k.name, d, (size,), k.backward)
        for size in byte_sizes
        for k in main
        for d in dtypes
        if d in k.dtypes
    ]
    if device == "cpu" and not quick:  # beyond the caches
        found[:0] = [Task("bandwidth", name, d, (of.BIG_BYTES,)) for name in of.STREAMING_KERNELS for d in dtypes]
    if workers > 1 or quick:
        return found
    others = [k for which, k in named.items() if which not in first]
    return found + [
        Task("bandwidth", k.name, d, (size,), k.backward)
        for size in byte_sizes[:2]
        for k in others
        for d in dtypes
        if d in k.dtypes and (d != "fp16" or device == "cpu")
    ]


def _copies(device: str, quick: bool) -> list[Task]:
    if device == "cpu":
        found = of.QUICK_BYTES if quick else of.CPU_BYTES
        return [Task("copy", direction, "fp32", (size,)) for size in found for direction in ("h2d", "d2h")]
    return [
        Task("copy", direction, "fp32", (size,), pinned=pinned)
        for size in (of.QUICK_BYTES if quick else of.COPY_BYTES)
        for pinned in (True, False)
        for direction in ("h2d", "d2h", "both", "d2d")
        if pinned or direction != "d2d"
    ]


def _collectives(device: str, dtypes: tuple[str, ...], quick: bool) -> list[Task]:
    byte_sizes = of.QUICK_MESSAGES if quick else of.CPU_MESSAGES if device == "cpu" else of.CUDA_MESSAGES
    names = of.COLLECTIVES[: 3 if device == "cpu" else None]
    return [Task("collective", op, d, (size,)) for size in byte_sizes for op in names for d in dtypes if d != "fp16"]


def _optimizer(cores: int, quick: bool) -> list[Task]:
    """Every power of two of threads up to all cores."""
    counts = sorted({cores, *(1 << i for i in range(cores.bit_length()) if 1 << i <= cores)})
    numel = of.OPTIMIZER_NUMEL >> (4 if quick else 0)
    found = [Task("optimizer", "step", "bf16", (threads, numel)) for threads in counts]
    return [*found, Task("optimizer", "step", "fp32", (cores, numel))]


def _overheads(device: str) -> list[Task]:
    found = [Task("overhead", "cached_alloc", "fp32", (size,)) for size in of.ALLOC_BYTES]
    if device == "cuda":
        found[:0] = [Task("overhead", name, "fp32", (0,)) for name in ("launch", "kernel")]
        found += [Task("overhead", "segment_alloc", "fp32", (size,)) for size in of.SEGMENT_BYTES]
    return found


def _files(quick: bool) -> list[Task]:
    blocks, queues = (of.QUICK_BLOCKS, of.QUICK_QUEUES) if quick else (of.BLOCKS, of.QUEUES)
    size = of.QUICK_FILE_BYTES if quick else of.FILE_BYTES
    moved = [Task("file", way, "fp32", (b, q, size)) for q in queues for b in blocks for way in ("read", "write")]
    sums = [Task("file", "checksum", "fp32", (IO_BLOCK_BYTES, q, size)) for q in (1, IO_QUEUE)]
    return [*moved, *sums, Task("file", COMMIT, "fp32", (IO_BLOCK_BYTES, 1, size))]
