"""Whether every piece that measuring on a GPU takes works there: one check each, which says what it found in a sentence."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from estimator.job.options import JobOptions, build_job
from estimator.predict import predict
from runtime.faults import process_group
from runtime.functional import attention
from runtime.history import AllocatorHistory
from runtime.kernels import loader
from runtime.kernels.activation import activate
from runtime.kernels.norm import layer_norm, rms_norm
from runtime.streams import SideStreams
from validator.devices import catalogue_name, gpu_name
from validator.measure.case import Backend, Case
from validator.measure.device_memory import DeviceMeter
from validator.measure.worker import run_case
from validator.provenance import torch_facts

CHECKS: list[tuple[str, Callable[[], str]]] = []
"""In their order, with the function that does it: what it found, in a sentence. An exception is a failure."""


def _check(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(function: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append((name, function))
        return function

    return add


def _off(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the truth's."""
    truth = truth.detach().double().cpu()
    return float((got.detach().double().cpu() - truth).norm() / truth.norm())


def _require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise AssertionError(otherwise)


# ---- torch on the device ------------------------------------------------------------------------------------------------


@_check("driver")
def _driver() -> str:
    facts = torch_facts()
    gpu = facts["gpu"]
    free, total = torch.cuda.mem_get_info()
    return (
        f"{gpu['name']} (catalogue: {catalogue_name(gpu['name'])}), capability {gpu['capability']}, {gpu['n_sms']} SMs, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {gpu.get('driver_version', 'not told by nvidia-smi')}, "
        f"clocks {gpu.get('clocks.sm', '?')} of {gpu.get('clocks.max.sm', '?')}, torch {facts['torch']}, NCCL {facts['nccl']}"
    )


@_check("product")
def _product() -> str:
    a, b = (torch.randn(256, 256) for _ in range(2))
    worst = {}
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        got = (a.to("cuda", dtype) @ b.to("cuda", dtype)).float().cpu()
        worst[str(dtype).removeprefix("torch.")] = error = _off(got, a @ b)
        _require(error < allowed, f"a product of {dtype} is off by {error:.2g}, where {allowed:g} is allowed")
    return "off by " + ", ".join(f"{error:.1e} in {name}" for name, error in worst.items())


@_check("attention")
def _attention() -> str:
    leaves = [torch.randn(2, 128, 4, 64).to("cuda", torch.bfloat16).requires_grad_() for _ in range(3)]
    out = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    plain = [leaf.detach().cpu().float().requires_grad_() for leaf in leaves]
    right = attention(*plain)
    rights = torch.autograd.grad(right, plain, torch.ones_like(right))
    errors = [_off(got, truth) for got, truth in zip((out, *grads), (right, *rights), strict=True)]
    _require(
        max(errors) < 2e-2, f"flash attention and its gradients are off by {max(errors):.2g}, where 0.02 is allowed"
    )
    return f"flash attention in bf16 is off by {errors[0]:.1e} forward, {max(errors[1:]):.1e} backward"


@_check("memory statistics")
def _statistics() -> str:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = torch.empty(10 << 20, dtype=torch.uint8, device="cuda")
    grown = torch.cuda.max_memory_allocated() - before
    del kept
    _require(grown == 10 << 20, f"10 MiB are counted as {grown} bytes")
    stats = torch.cuda.memory_stats()
    wanted = (
        "requested_bytes.all.peak",
        "reserved_bytes.all.peak",
        "inactive_split_bytes.all.peak",
        "num_alloc_retries",
    )
    lacking = [name for name in wanted if name not in stats]
    _require(not lacking, f"memory_stats lacks {', '.join(lacking)}")
    _require("allocated" in torch.cuda.memory_stats_as_nested_dict()["allocation"]["all"], "no count of allocations")
    return f"10 MiB are counted as such by the {torch.cuda.get_allocator_backend()} allocator"


@_check("allocator history")
def _history() -> str:
    held = torch.cuda.memory_allocated()
    with AllocatorHistory() as history:
        both = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for size in (3, 5)]
        del both
    found = history.attribution()
    grown = found["peak_bytes"] - held
    _require(abs(grown - (8 << 20)) <= held, f"8 MiB are in the history as {grown} bytes")
    told = found["simulated"].get("refused") or f"our simulator moves {found['simulated']['n_moved']} of its requests"
    return f"recorded and replayed, {found['unknown_frees']} unknown releases; {told}"


@_check("NVML")
def _nvml() -> str:
    meter = DeviceMeter()
    torch.cuda.synchronize()
    meter.attach(str(torch.cuda.get_device_properties(0).uuid), torch.cuda.mem_get_info)
    _require(meter.reason is None, meter.reason or "")
    return f"source {meter.source} (a context was there before), {meter.used_bytes() / 2**20:.0f} MiB now"


# ---- streams, copies ----------------------------------------------------------------------------------------------------


@_check("events")
def _events() -> str:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    end.synchronize()
    seconds = begin.elapsed_time(end) / 1e3
    _require(0.005 < seconds < 0.2, f"20 million cycles take {seconds:.4f} s between two events")
    return f"20 million cycles take {1e3 * seconds:.1f} ms, {20e6 / seconds / 1e9:.2f} GHz"


@_check("pinned copies")
def _copies() -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    streams = SideStreams(device)
    source = torch.randn(64 << 18).pin_memory()
    there, back = torch.empty_like(source, device=device), torch.empty_like(source).pin_memory()
    for _ in range(2):  # the first touches the pages
        streams.start_step()
        streams.wait("d2h", streams.copy("h2d", source, there))
        streams.wait("host", streams.copy("d2h", there, back))
    _require(torch.equal(source, back), "64 MiB did not come back as they went")
    rates = {way: source.nbytes / seconds / 1e9 for way, seconds in streams.copy_seconds().items()}
    return "64 MiB there and back: " + ", ".join(f"{way} {rate:.1f} GB/s" for way, rate in rates.items())


# ---- the runtime's kernels -------------------------------------------------------------------------------------------------


@_check("CuPy and NVRTC")
def _compile() -> str:
    started = time.perf_counter()
    cupy = loader.cupy()
    imported_s = time.perf_counter() - started
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    text = f'extern "C" __global__ void probe_{os.getpid()}(long long* out) {{ if (!threadIdx.x) out[0] = {os.getpid()}; }}'
    out = torch.zeros(1, dtype=torch.int64, device="cuda")
    started = time.perf_counter()
    function = cupy.RawModule(code=text, options=("--std=c++17",), backend="nvrtc").get_function(f"probe_{os.getpid()}")
    function((1,), (32,), (out.data_ptr(),))
    compiled_s = time.perf_counter() - started
    torch.cuda.synchronize()
    _require(int(out) == os.getpid(), "the kernel did not write what it should")
    version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return f"CuPy {cupy.__version__} imported in {imported_s:.1f} s, NVRTC {version} compiled for sm_{capability} in {compiled_s:.2f} s"


def _of_cpu(call: Callable[..., Any], shapes: Sequence[tuple[int, ...]], dtype: Any, incoming: int = 0) -> float:
    """Largest relative error (norm over norm) of ``call``'s result and gradients on the GPU against the CPU's in fp64."""
    tensors = [torch.randn(*shape).to(dtype) for shape in (*shapes, shapes[incoming])]
    results = []
    for moved in ([t.double() for t in tensors], [t.cuda() for t in tensors]):
        leaves = [t.requires_grad_() for t in moved[:-1]]
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, moved[-1].view_as(out))])
    right, got = results
    return max(_off(g, r) for r, g in zip(right, got, strict=True))


@_check("a kernel of ours")
def _kernel() -> str:
    started = time.perf_counter()
    with loader.counting() as n_launched:
        error = _of_cpu(lambda x, w: rms_norm(x, w, 1e-5), ((64, 4096), (4096,)), torch.bfloat16)
    _require(n_launched() == 3, f"{n_launched()} kernels were launched, not 3")
    _require(error < 1e-2, f"rms_norm and its gradients are off by {error:.2g}, where 0.01 is allowed")
    taken = loader.cupy().get_default_memory_pool().total_bytes()
    _require(taken == 0, f"CuPy's own pool holds {taken} bytes")
    return f"rms_norm forward and backward off by {error:.1e}, 3 launches in {time.perf_counter() - started:.1f} s with compilation"


@_check("more than 48 KiB of shared memory")
def _shared() -> str:
    width = 16384
    error = _of_cpu(lambda x, w, b: layer_norm(x, w, b, 1e-5), ((32, width), (width,), (width,)), torch.bfloat16)
    _require(error < 1e-2, f"layer_norm and its gradients are off by {error:.2g}, where 0.01 is allowed")
    return f"layer_norm of {width} columns takes 64 KiB in its backward pass, off by {error:.1e}"


@_check("a kernel on a side stream, in a graph")
def _graph() -> str:
    x = torch.randn(1 << 16, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        right = activate(x, "gelu").clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = activate(x, "gelu")
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    error = _off(y, torch.nn.functional.gelu(x.cpu().double()))
    _require(torch.equal(y, right) and error < 1e-2, f"the replayed kernel is off by {error:.2g}")
    return f"captured and replayed, off by {error:.1e}"


# ---- groups and steps ---------------------------------------------------------------------------------------------------


@_check("NCCL")
def _nccl() -> str:
    device = torch.device("cuda", 0)
    started = time.perf_counter()
    with process_group(
        "nccl", timeout_s=20, watch=False, store=dist.HashStore(), rank=0, world_size=1, device_id=device
    ):
        x = torch.arange(8.0, device=device)
        whole, part = torch.empty_like(x), torch.empty_like(x)
        dist.all_reduce(x)
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(part, whole, async_op=True).wait()
        _require(part.tolist() == list(range(8)), f"eight numbers came back as {part.tolist()}")
    return f"a group of one made, three collectives and the end in {time.perf_counter() - started:.1f} s"


def _trained(backend: Backend, **options: Any) -> str:
    """A small job's steps, in the function that a campaign's processes call."""
    name = gpu_name(torch.cuda.get_device_name(), None)
    assert name is not None
    job = build_job(JobOptions(model="smollm-135m", gpu=name, seq_len=512, micro_batch=2, **options))
    seconds: list[float] = []
    report = run_case(Case(job=job, backend=backend, steps=3, warmup=1), {}, lambda _, step_s: seconds.append(step_s))
    assert report is not None
    peak, forecast = report["peak_allocated_bytes"], predict(job).peak_allocated_bytes
    losses = report["provenance"]["losses"]
    _require(all(loss == loss and 0 < loss < 20 for loss in losses), f"the losses are {losses}")
    return (
        f"{job.model.name} took {1e3 * statistics.median(seconds[1:]):.1f} ms a step ({seconds[0]:.1f} s the first), peak "
        f"{peak / 2**20:.0f} MiB, forecast {(forecast or 0) / 2**20:.0f} MiB"
    )


@_check("a training step")
def _step() -> str:
    return _trained("cuda", gpus=1, zero=0)


@_check("a rank of eight, offloaded")
def _virtual() -> str:
    return _trained("cuda-virtual", gpus=8, zero=3, offload="optimizer,param")


@_check("tools")
def _tools() -> str:
    names = ("nvidia-smi", "compute-sanitizer", "ncu", "nvdisasm", "cuobjdump", "nvcc")
    folders = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return ", ".join(f"{name} {'found' if shutil.which(name, path=folders) else 'not found'}" for name in names)
