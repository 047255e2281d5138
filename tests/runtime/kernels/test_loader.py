"""Names, switches, who does the work, packing of arguments, and what is said where CuPy or the driver is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from runtime.kernels import loader
from runtime.kernels.activation import activate, gated_activate
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.norm import add_layer_norm, layer_norm, rms_norm
from runtime.kernels.registry import ENVIRONMENT, KERNELS, enabled, switched_off
from runtime.kernels.rotary import rotate
from tests.runtime.kernels.checks import Recorder, needs_shim, on_shim

FAMILIES = sorted(path.stem for path in loader.FOLDER.glob("*.cu"))


def call_of(name: str, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Calls the public function of kernel ``name`` on ``x`` ``[2, 4, 3, 8]``."""
    row, table = x[0, 0, 0], x[0, :, 0, :4]
    calls: dict[str, Callable[[], Any]] = {
        "rms_norm": lambda: rms_norm(x, row, 1e-5),
        "layer_norm": lambda: add_layer_norm(x, x, row, row, 1e-5, 0.5),
        "gated_activation": lambda: gated_activate(x, x, "silu"),
        "activation": lambda: activate(x, "gelu", row),
        "rotary": lambda: rotate(x, table, table),
        "dropout_residual": lambda: dropout_residual(x, x, 0.5),
    }
    return calls[name]()


OURS = ("rms_norm", "layer_norm", "gated_activation", "activation", "rotary", "dropout_residual")


def test_sources_are_self_contained() -> None:
    for family in FAMILIES:
        text = loader.source(family)
        assert "#include" not in text and text.count("typedef long long i64;") == 1, family


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(enabled(name) for name in KERNELS)
    monkeypatch.setenv(ENVIRONMENT, "rms_norm, rotary")
    assert [n for n in OURS if not enabled(n)] == ["rms_norm", "rotary"]
    with switched_off("layer_norm"):
        assert not enabled("layer_norm") and not enabled("rotary") and enabled("activation")
    assert enabled("layer_norm")
    monkeypatch.setenv(ENVIRONMENT, "all")
    assert not any(enabled(name) for name in KERNELS)
    monkeypatch.setenv(ENVIRONMENT, "rmsnorm")
    with pytest.raises(InputError, match=r"ZEROCAST_KERNELS_OFF is 'rmsnorm'; .*did you mean 'rms_norm'"):
        enabled("rotary")
    with pytest.raises(InputError, match="kernel is 'rotery'"), switched_off("rotery"):
        pass


@needs_shim
@pytest.mark.parametrize("name", OURS)
def test_each_kernel_runs_unless_switched_off(name: str) -> None:
    x = torch.randn(2, 4, 3, 8)
    with on_shim() as record:
        call_of(name, x)
        assert record.launches
        record.launches.clear()
        with switched_off(name):
            call_of(name, x)
        assert not record.launches


@pytest.mark.parametrize("name", OURS)
def test_cpu_tensors_take_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "launch", None)
    call_of(name, torch.randn(2, 4, 3, 8))


@pytest.mark.parametrize("name", OURS)
def test_meta_tensors_allocate_and_launch_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    x = torch.empty(2, 4, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    record = Recorder()
    with loader.cpu_launcher(record):
        out = call_of(name, x)
    out = out if isinstance(out, tuple) else (out,)
    assert all(o.is_meta and o.shape == x.shape and o.dtype == x.dtype for o in out)
    (grad,) = torch.autograd.grad(out, x, tuple(torch.empty_like(o) for o in out))
    assert grad.shape == x.shape and not record.launches


def test_live_bytes_of_a_norm_on_meta() -> None:
    """What the kernel keeps: its input, the weight and one fp32 per row; no fp32 copy of the input."""
    saved: list[Tensor] = []
    x, weight = (torch.empty(*s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in ((6, 40), (40,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer_norm(x, weight, None, 1e-5)
        assert sorted(t.numel() * t.itemsize for t in saved) == [6 * 4, 6 * 4, 40 * 2, 6 * 40 * 2]


def test_dtype_that_no_kernel_takes() -> None:
    with pytest.raises(InputError, match=r"dtype of the input of rms_norm is torch.float64; allowed: torch.float32"):
        rms_norm(torch.empty(2, 4, device="meta", dtype=torch.float64), torch.empty(4, device="meta"), 1e-5)


def test_pack_widths() -> None:
    room = torch.zeros(64, dtype=torch.bfloat16)
    start = -(room.data_ptr() // 2) % 8
    whole, off1, off4 = room[start : start + 32], room[start + 1 : start + 33], room[start + 4 : start + 28]
    fp32 = torch.zeros(32)
    assert loader.pack_width(whole) == 8
    assert loader.pack_width(whole, fp32) == 8  # two 16-byte accesses for 8 fp32
    assert loader.pack_width(whole, row=12) == 4
    assert loader.pack_width(whole, off1) == 1 and loader.pack_width(whole, off4, None) == 4
    assert loader.pack_width_and_head(whole, whole) == (8, 0)
    assert loader.pack_width_and_head(off1, off1) == (8, 1)
    assert loader.pack_width_and_head(off1, whole) == (1, 0)


def test_sizes_of_a_chip() -> None:
    assert loader.tile_of(89) == loader.tile_of(80) and loader.tile_of(120) == loader.tile_of(100)
    assert loader.tile_of(61) == loader.tile_of(70)
    here = loader.chip(torch.device("meta"))
    assert here.persistent_blocks(256) == here.n_sms * 4 and here.persistent_blocks(2048) == here.n_sms


# ---- CuPy, as far as it can be played here ----------------------------------------------------------------------------


class _CudaError(Exception):
    pass


class _FakeCupy:
    """Remembers what was compiled and launched, and on which stream."""

    def __init__(self, compiles: bool = True) -> None:
        self.compiles, self.streams, self.launched = compiles, [0], []  # type: ignore[var-annotated]
        self.shared_limit = 0
        self.cuda = SimpleNamespace(
            ExternalStream=self._stream, runtime=SimpleNamespace(CUDARuntimeError=_CudaError)
        )  # fmt: skip

    def _stream(self, pointer: int, device: int | None) -> Any:
        owner = self

        class Stream:
            def __enter__(self) -> None:
                owner.streams.append(pointer)

            def __exit__(self, *_: object) -> None:
                owner.streams.pop()

        return Stream()

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        assert backend == "nvrtc" and "#include" not in code
        return SimpleNamespace(get_function=lambda name: _FakeFunction(self, name, options))


class _FakeFunction:
    def __init__(self, owner: _FakeCupy, name: str, options: tuple[str, ...]) -> None:
        self.owner, self.name, self.options = owner, name, options
        self.max_dynamic_shared_size_bytes = 0

    def compile(self) -> None:
        if not self.owner.compiles:
            raise _CudaError("cudaErrorInsufficientDriver")

    def __call__(self, grid: Any, block: Any, arguments: Any, shared_mem: int) -> None:
        limit = self.max_dynamic_shared_size_bytes
        self.owner.launched.append(
            (self.name, self.options, grid, block, arguments, shared_mem, limit, self.owner.streams[-1])
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[_FakeCupy]:
    """CPU tensors are launched as if they were on a GPU whose current stream is number 77."""
    fake = _FakeCupy()
    monkeypatch.setattr(loader, "cupy", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))

    def forget() -> None:
        for cached in (loader._function, loader._module, loader._stream):
            cached.cache_clear()

    forget()
    yield fake
    forget()


def test_launch_through_cupy(gpu: _FakeCupy) -> None:
    x = torch.zeros(4)
    probe = loader.kernel("columns", "sum_columns", OUT_TYPE="f32")
    for shared_bytes in (0, 64 * 1024):
        loader._launch_on_gpu(probe, (3, 2), 128, (x, None, 5, 0.5), shared_bytes, x.device)
    name, options, grid, block, arguments, shared, limit, stream = gpu.launched[0]
    assert (name, grid, block, shared, limit, stream) == ("sum_columns", (3, 2), (128,), 0, 0, 77)
    assert options == ("--std=c++17", "-DOUT_TYPE=f32")
    assert arguments == (x.data_ptr(), 0, 5, 0.5)
    assert [type(a) for a in arguments] == [np.int64, np.int64, np.int64, np.float32]
    assert gpu.launched[1][5:7] == (64 * 1024, 64 * 1024)


def test_driver_missing(gpu: _FakeCupy) -> None:
    gpu.compiles = False
    x = torch.zeros(4)
    probe = loader.kernel("columns", "sum_columns", OUT_TYPE="f32")
    with pytest.raises(
        InputError, match=r"sum_columns cannot run: cudaErrorInsufficientDriver; install zerocast\[gpu\]"
    ):
        loader._launch_on_gpu(probe, (1, 1), 128, (x,), 0, x.device)


def test_cupy_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    loader.cupy.cache_clear()
    with pytest.raises(InputError, match=r"need CuPy, which cannot be imported .* ZEROCAST_KERNELS_OFF=all"):
        loader.cupy()
    loader.cupy.cache_clear()


@needs_shim
@pytest.mark.slow
def test_torch_compile_stops_before_a_launcher() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    weight = torch.ones(8)
    compiled = torch.compile(lambda x: rms_norm(x + 1, weight, 1e-5) * 2, backend=counter)
    x = torch.randn(3, 8, requires_grad=True)
    with on_shim() as record:
        y = compiled(x)
        y.sum().backward()
    assert len(record.launches) == 3 and counter.frame_count == 2
    torch.testing.assert_close(y, rms_norm(x + 1, weight, 1e-5) * 2)
