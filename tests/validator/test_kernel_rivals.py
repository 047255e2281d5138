"""Implementations that our kernels are held against: they are what they say, and compute the same."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from estimator.errors import InputError  # noqa: E402
from runtime.kernels import loader  # noqa: E402
from tests.runtime.kernels.checks import needs_shim, on_shim  # noqa: E402
from validator.kernels import calls, functions, implementation, libraries  # noqa: E402
from validator.kernels.case import KernelCase  # noqa: E402
from validator.kernels.implementation import check, default, missing, using  # noqa: E402
from validator.kernels.measure import Bench, library  # noqa: E402
from validator.kernels.table import KERNELS, kernel  # noqa: E402
from validator.timing import held_until_issued  # noqa: E402

RANDOM = ("dropout_add",)
"""Kernels whose results differ from call to call."""


@pytest.fixture(autouse=True)
def _random_operands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "filled", lambda shape, device, dtype: torch.randn(shape, device=device).to(dtype))
    yield


def results(name: str, which: str, dtype: str = "fp32") -> list[Tensor]:
    """Everything that one forward and backward pass of a kernel computes, from the same random operands each time."""
    torch.manual_seed(0)
    bound = calls.bound(name, calls.Make((48, 128), dtype, "cpu", which))
    outputs = bound.forward()
    if bound.writes is not None:
        return [t.clone() for t in bound.writes]
    outputs = [t for t in (outputs if isinstance(outputs, tuple | list) else [outputs]) if isinstance(t, Tensor)]
    if not bound.leaves:
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, bound.leaves, [torch.full_like(t, 0.5) for t in outputs])]


def assert_same(name: str, which: str) -> None:
    """As the runtime's function computes it on a CPU: its reference."""
    expected, got = results(name, "cuda"), results(name, which)
    if name == "grad_norm" and which != "cuda":  # ours is the sum of squares and a flag
        expected = [expected[0][0].sqrt()]
        got = [got[0].sqrt()] if which == "compile" else got
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            a.float(), b.float(), rtol=2e-5, atol=2e-6, msg=lambda text: f"{name} {which}: {text}"
        )


# ---- which there are ----------------------------------------------------------------------------------------------


def test_every_name_has_a_function_and_every_function_a_name() -> None:
    plain = {"copy", "cast_to_fp32", "cast_from_fp32", "add", "accumulate_grad", "embedding"}
    assert set(functions.OURS) == set(implementation.FAMILIES)
    assert set(functions.TORCH) == {k.name for k in KERNELS} - plain - set(implementation.NOT_IN_TORCH)
    assert set(functions.FUSED) == set(implementation.FUSED)
    assert set(functions.EXPRESSIONS) == set(implementation.COMPILED)
    with pytest.raises(InputError, match="'rotary' has no implementation 'fused'"):
        functions.function("rotary", "fused")


@pytest.mark.parametrize(
    ("name", "which", "device", "why"),
    [
        ("rms_norm", "cuda", "cpu", "that needs a GPU, not 'cpu'; allowed there: 'torch', 'fused', 'compile'"),
        ("copy", "cuda", "cuda", "the runtime has no such kernel for 'copy'; allowed: 'torch'"),
        ("lion", "torch", "cpu", "torch has no such operator as 'lion'"),
        ("rotary", "fused", "cpu", "torch has no operator for the whole of 'rotary'"),
        ("embedding", "compile", "cpu", "no expression is compiled for 'embedding'"),
        ("rms_norm", "compile", "cuda", "'triton' is not installed"),
        ("rms_norm", "compile", "cpu", "there is no C++ compiler"),
        ("rms_norm", "liger", "cpu", "needs a GPU"),
        ("rms_norm", "liger", "cuda", "'liger_kernel' is not installed"),
        ("optimizer_step", "liger", "cuda", "the library has nothing for 'optimizer_step'"),
        ("rms_norm", "apex", "cuda", "'fused_layer_norm_cuda' is not installed"),
        ("optimizer_step", "apex", "cuda", "'amp_C' is not installed"),
        ("linear_cross_entropy", "fused", "cuda", "has no F.linear_cross_entropy"),
    ],
)
def test_what_is_missing_says_why(
    name: str, which: str, device: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "find_spec", lambda module: None)
    monkeypatch.setattr(implementation.shutil, "which", lambda program: None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    reason = missing(name, which, device)
    assert reason is not None and reason.startswith(f"implementation is {which!r}, and ") and why in reason
    with pytest.raises(InputError, match=f"implementation is '{which}'"):
        KernelCase(
            kernel=name, both=name == "linear_cross_entropy", dtype="fp32", implementation=which, device=device  # type: ignore[arg-type]
        )  # fmt: skip


def test_what_is_there_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "find_spec", lambda module: object())
    for name in implementation.LIGER:
        assert missing(name, "liger", "cuda") is None
    for name in (*implementation.APEX, *implementation.COMPILED):
        assert missing(name, "apex" if name in implementation.APEX else "compile", "cuda") is None
    with pytest.raises(InputError, match=r"implementation is 'triton'; allowed: apex, compile, cuda"):
        missing("rms_norm", "triton", "cuda")


def test_a_measurement_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(8)
    ours, plain = (lambda: loader.launch(loader.kernel("activation", "f"), 1, 32, x)), (lambda: None)
    launched = []
    with loader.cpu_launcher(lambda kernel, *rest: launched.append(kernel.name)):
        check("rms_norm", "cuda", ours)
        for rival in implementation.RIVALS:
            check("rms_norm", rival, plain)
            with pytest.raises(
                InputError, match=f"'rms_norm' launched 1 CUDA kernels .* with implementation '{rival}'"
            ):
                check("rms_norm", rival, ours)
        with pytest.raises(InputError, match=r"launched 0 CUDA kernels .* with implementation 'cuda'"):
            check("rms_norm", "cuda", plain)
    assert set(launched) == {"f"}
    for rival in implementation.RIVALS:
        with using("rms_norm", rival):
            assert not loader.enabled("rms_norm") and not loader.enabled("bucket")
    with using("rms_norm", "cuda"):
        assert loader.enabled("rms_norm")
    assert default("rms_norm", "cuda") == "cuda" and default("rms_norm", "cpu") == default("copy", "cuda") == "torch"
    monkeypatch.setenv("ZEROCAST_KERNELS_OFF", "rms_norm")
    assert default("add_rms_norm", "cuda") == "torch" and default("layer_norm", "cuda") == "cuda"
    with (
        pytest.raises(InputError, match="switches 'rms_norm' off; allowed: 'torch', 'fused'"),
        using("rms_norm", "cuda"),
    ):
        pass


@pytest.mark.parametrize("name", sorted(implementation.FAMILIES))
def test_cuda_calls_the_runtimes_own_kernel(name: str) -> None:
    """With the device replaced by a launcher that only notes what it is given."""
    launched = []
    with loader.cpu_launcher(lambda kernel, *rest: launched.append(kernel)), loader.counting() as n:
        calls.bound(name, calls.Make((64, 128), "fp32", "cpu", "cuda")).forward()
    assert launched and n() == len(launched)


# ---- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in functions.TORCH if name not in RANDOM])
def test_torch_computes_what_ours_does(name: str) -> None:
    assert_same(name, "torch")


@pytest.mark.parametrize("name", implementation.FUSED)
def test_torchs_fused_operators_compute_what_ours_do(name: str) -> None:
    if missing(name, "fused", "cpu"):
        pytest.skip(str(missing(name, "fused", "cpu")))
    assert_same(name, "fused")


def test_in_16_bits_the_steps_write_the_parameters() -> None:
    for which in ("torch", "fused"):
        for name in ("optimizer_step", "sgd"):
            expected, got = results(name, "cuda", "bf16"), results(name, which, "bf16")
            assert got[-1].dtype == torch.bfloat16 and torch.equal(got[-1], got[0].bfloat16())
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(missing("rms_norm", "compile", "cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", [name for name in implementation.COMPILED if name not in RANDOM])
def test_compiled_expressions_compute_what_ours_do(name: str) -> None:
    assert_same(name, "compile")


@pytest.mark.slow
@needs_shim
@pytest.mark.parametrize("name", [name for name in implementation.FAMILIES if name not in RANDOM])
def test_our_kernels_compute_what_their_references_do(name: str) -> None:
    expected = results(name, "cuda")
    with on_shim():
        got = results(name, "cuda")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-5, atol=2e-6)


# ---- repeated -----------------------------------------------------------------------------------------------------


@needs_shim
@pytest.mark.parametrize(("backward", "both"), [(True, False), (False, True)])
def test_a_loss_that_uses_its_logits_up_gets_them_back(backward: bool, both: bool) -> None:
    entry = kernel("cross_entropy", backward, both)
    with on_shim():
        make = calls.Make((8, 128), "fp32", "cpu", "cuda")
        prepared = calls.prepared(entry, calls.bound("cross_entropy", make), make, ())
        assert prepared.before is not None
        gradients = []
        for _ in range(3):
            prepared.before()
            gradients.append(prepared.call()[0].clone())
        assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
        if backward:
            with pytest.raises(RuntimeError, match="second time"):
                prepared.call()  # a pass that nothing has made anew
    assert prepared.operand_bytes == 8 * 128 * 4 + 8 * 8


@pytest.mark.slow
@pytest.mark.skipif(missing("rms_norm", "compile", "cpu") is not None, reason="needs a C++ compiler")
def test_the_bench_times_rivals_on_this_processor() -> None:
    bench = Bench("cpu")
    for which in ("torch", "fused", "compile"):
        for case in (KernelCase(kernel="rms_norm", backward=True, dtype="fp32", n_bytes=1 << 18, implementation=which),  # type: ignore[arg-type]
                     KernelCase(kernel="cross_entropy", both=True, dtype="fp32", n_bytes=1 << 18, implementation=which)):  # type: ignore[arg-type]  # fmt: skip
            report = bench.measure(case)
            assert report.key == case.key and report.implementation == which and report.both == case.both
            assert report.repeats >= 7 and 0 < report.low_s <= report.seconds and report.peak_bytes is None
    assert library("liger") == {"liger-kernel": None} and library("torch") == {}


def test_a_gpus_stream_is_held_while_the_host_issues_and_its_peak_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("hold"))
    ready = held_until_issued(lambda: done.append("call"), lambda: done.append("before"))
    assert done == ["before", "wait", "call"] * 2 + ["wait"]
    done.clear()
    ready()
    assert done == ["before", "hold"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)
    bench = Bench.__new__(Bench)
    bench.device = "cuda"
    done.clear()
    prepared = calls.Prepared(
        call=lambda: done.append("call"), shape=(1, 1), ops=(), least_bytes=1, operand_bytes=50,
        before=lambda: done.append("before"),
    )  # fmt: skip
    assert bench._peak_bytes(prepared) == 750
    assert done == ["before", "wait", "reset", "call", "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", sorted(implementation.FAMILIES))
def test_a_gpu_times_ours_and_every_rival_that_is_there(name: str) -> None:
    """``Bench.measure`` refuses a call that launches other kernels than it says."""
    bench = Bench("cuda")
    entries = [k for k in KERNELS if k.name == name]
    for entry in entries if len(entries) == 1 else [*entries, kernel(name, both=True)]:
        reports = {}
        for which in implementation.IMPLEMENTATIONS:
            if missing(name, which, "cuda"):
                continue
            case = KernelCase(
                kernel=name, backward=entry.backward, both=entry.both, dtype=entry.dtypes[0], n_bytes=1 << 22,
                implementation=which, device="cuda",  # type: ignore[arg-type]
            )  # fmt: skip
            reports[which] = bench.measure(case)
        assert {"cuda"} < set(reports) or name in implementation.NOT_IN_TORCH
        for report in reports.values():
            assert report.seconds > 0 and report.peak_bytes and report.bytes == reports["cuda"].bytes


# ---- libraries that are not here: their public interfaces, with plain torch behind them -----------------------------


class _InPlaceLoss(torch.autograd.Function):
    """As Liger's: the gradient is written over the logits in the forward pass, behind autograd's back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            x = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(x, labels)
        logits.data.copy_(torch.autograd.grad(loss, x)[0])
        ctx.gradient = logits.data
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * grads[0], None


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """q ``[B, heads, S, D]``, cos ``[1, S, D]``"""
    half = q.shape[-1] // 2
    turned = lambda x: x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]  # noqa: E731
    return turned(q), turned(k)


def _rms(
    X: Tensor, W: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
) -> Tensor:
    return F.rms_norm(X, W.shape, W, eps)


def _add_rms(X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    return F.rms_norm(X + R, W.shape, W, eps), X + R


@pytest.fixture
def fake_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    liger: Any = types.ModuleType("liger_kernel.transformers.functional")
    liger.liger_swiglu = lambda a, b: F.silu(a) * b
    liger.liger_geglu = lambda a, b: F.gelu(a) * b
    liger.liger_rms_norm, liger.liger_fused_add_rms_norm, liger.liger_rope = _rms, _add_rms, _rope
    liger.liger_layer_norm = lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps)
    liger.liger_cross_entropy = lambda input, target, weight=None: _InPlaceLoss.apply(input, target)
    liger.liger_fused_linear_cross_entropy = lambda input, weight, target, bias=None: F.cross_entropy(
        input @ weight.t(), target
    )
    apex: Any = types.ModuleType("apex.normalization.fused_layer_norm")
    apex.fused_rms_norm_affine = lambda input, weight, normalized_shape, eps=1e-6: F.rms_norm(
        input, normalized_shape, weight, eps
    )
    apex.fused_layer_norm_affine = lambda input, weight, bias, normalized_shape, eps=1e-6: F.layer_norm(
        input, normalized_shape, weight, bias, eps
    )
    optimizers: Any = types.ModuleType("apex.optimizers")

    class FusedAdam(torch.optim.AdamW):
        def __init__(
            self, params: Any, *, adam_w_mode: bool, capturable: bool, master_weights: bool, **rest: Any
        ) -> None:
            assert adam_w_mode and capturable and not master_weights
            super().__init__(params, **rest)

    optimizers.FusedAdam = FusedAdam
    packages = ("liger_kernel", "liger_kernel.transformers", "apex", "apex.normalization")
    for module in (liger, apex, optimizers, *map(types.ModuleType, packages)):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_libraries")
def test_libraries_are_called_by_their_interfaces() -> None:
    assert set(libraries._liger()) == set(implementation.LIGER) and set(libraries._apex()) == set(implementation.APEX)
    for name in implementation.LIGER:
        assert_same(name, "liger")
    for name in ("rms_norm", "layer_norm"):
        assert_same(name, "apex")
    torch.manual_seed(0)
    bound = calls.bound("adamw", calls.Make((48, 128), "fp32", "cpu", "apex"))
    before = bound.reads[1].clone()
    bound.forward()
    assert not torch.equal(before, bound.reads[1]), "the step is taken on the operands, by the optimizer's own states"


@pytest.mark.usefixtures("fake_libraries")
def test_what_a_library_overwrites_is_put_back() -> None:
    make = calls.Make((8, 128), "fp32", "cpu", "liger")
    prepared = calls.prepared(kernel("cross_entropy", both=True), calls.bound("cross_entropy", make), make, ())
    assert prepared.before is not None
    gradients = []
    for _ in range(2):
        prepared.before()
        gradients.append(prepared.call()[0].clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    assert not torch.equal(prepared.call()[0], gradients[0]), "without it the second call works on gradients"
