"""The shim itself: conversions, barriers, warp operations, and that it notices what a GPU leaves undefined."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.loader import FOLDER, Kernel
from tests.runtime.kernels.checks import needs_shim
from tests.runtime.kernels.shim import guarded, intact, run_text

pytestmark = needs_shim


def run(
    body: str,
    *arguments: object,
    block: int = 64,
    grid: int = 1,
    shared_bytes: int = 0,
    order: int = 0,
    parameters: str = "",
) -> None:
    text = (FOLDER / "common.cuh").read_text() + f'\nextern "C" __global__ void probe({parameters}) {{ {body} }}\n'
    run_text(text, Kernel("probe", "probe", ()), (grid, 1), block, arguments, shared_bytes, order)  # type: ignore[arg-type]


def test_conversions_are_torchs() -> None:
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = torch.cat(
        (
            torch.randn(40_000) * 10.0 ** torch.randint(-12, 12, (40_000,)),
            torch.tensor([0.0, -0.0, 65519.9, 65520.0, 6e-8, 2.9e-8, 1e-40, torch.inf, -torch.inf]),
        )
    )
    for dtype, name in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        half = bits.view(dtype)
        out = torch.empty(half.numel())
        body = f"for (i64 i = threadIdx.x; i < n; i += 64) y[i] = to_float(reinterpret_cast<const {name}*>(x)[i]);"
        run(body, half, out, half.numel(), parameters="const u16* x, float* y, i64 n")
        torch.testing.assert_close(out, half.float(), rtol=0, atol=0, equal_nan=True)
        back = torch.empty(values.numel(), dtype=dtype)
        body = f"for (i64 i = threadIdx.x; i < n; i += 64) reinterpret_cast<{name}*>(y)[i] = from_float<{name}>(x[i]);"
        run(body, values, back, values.numel(), parameters="const float* x, u16* y, i64 n")
        torch.testing.assert_close(back, values.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_sums_over_groups(order: int) -> None:
    x, out = torch.arange(96.0), torch.empty(96)
    body = """
      __shared__ float scratch[64];
      int turn = 0;
      for (int i = 0; i < 3; ++i) {
        float v[1] = {x[threadIdx.x] + i};
        group_sum<96>(v, scratch, turn);
        out[threadIdx.x] = v[0];
      }
      out[threadIdx.x] += lanes_sum<8>(x[threadIdx.x]);"""
    run(body, x, out, block=96, order=order, parameters="const float* x, float* out")
    torch.testing.assert_close(out, x.sum() + 192 + x.view(12, 8).sum(1).repeat_interleave(8), rtol=0, atol=0)


def test_warp_operations() -> None:
    out = torch.empty(5, 64, dtype=torch.int32)
    body = """
      int t = threadIdx.x;
      out[t] = __shfl_down_sync(FULL_WARP, t, 3);
      out[64 + t] = __shfl_up_sync(FULL_WARP, t, 3, 8);
      out[128 + t] = __shfl_sync(FULL_WARP, t, 5);
      out[192 + t] = int(__ballot_sync(FULL_WARP, t % 3 == 0));
      out[256 + t] = __syncthreads_or(t == 40);"""
    run(body, out, parameters="int* out")
    lane, first = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    assert torch.equal(out[0], (first + torch.where(lane < 29, lane + 3, lane)).int())
    assert torch.equal(out[1], (first + torch.where(lane % 8 >= 3, lane - 3, lane)).int())
    assert torch.equal(out[2], (first + 5).int())
    expected = [sum(1 << i for i in range(32) if (w * 32 + i) % 3 == 0) for w in (0, 1)]
    assert [v & 0xFFFFFFFF for v in out[3, ::32].tolist()] == expected
    assert bool((out[4] == 1).all())


def test_missing_barrier_shows_between_orders() -> None:
    results = []
    for order in (0, 1):
        out = torch.empty(64)
        body = "__shared__ float s[64]; s[threadIdx.x] = threadIdx.x; out[threadIdx.x] = s[63 - threadIdx.x];"
        run(body, out, order=order, parameters="float* out")
        results.append(out)
    assert any(r.isnan().any() for r in results) and not torch.equal(*results)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("if (threadIdx.x < 32) {\n__syncthreads(); } else {\n__syncthreads(); }", "different barriers"),
        ("if (threadIdx.x == 3) return; lanes_sum<32>(1.f);", "a lane ended"),
        ("if (threadIdx.x < 40) __ballot_sync(FULL_WARP, 1); else __shfl_sync(FULL_WARP, 1, 0);", "different warp operations"),
        ("__shfl_sync(0xffu, 1, 0);", "partial mask"),
        ("if (threadIdx.x % 32 == 0) { __syncthreads(); } else { __ballot_sync(FULL_WARP, 1); }", "deadlock"),
        ("load<4>(out + 1);", "misaligned"),
        ("DYNAMIC_SHARED(float, s); s[threadIdx.x] = 1.f;", "past the end of dynamic shared memory"),
    ],
)  # fmt: skip
def test_refuses_what_is_undefined(body: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        run(body, torch.zeros(64), parameters="float* out", shared_bytes=32)


def test_refuses_wrong_arguments() -> None:
    for arguments in ((torch.zeros(1),), (torch.zeros(1), 1.0), (1, torch.zeros(1))):
        with pytest.raises(AssertionError, match="takes pi"):
            run("", *arguments, parameters="float* out, i64 n")


def test_guards_notice_a_write_outside() -> None:
    for index, clean in ((0, True), (4, True), (-1, False), (5, False)):
        inner, whole = guarded((5,), torch.float32, offset=1)
        run("if (threadIdx.x == 0) out[n] = 1.f;", inner, index, parameters="float* out, i64 n")
        assert intact(inner, whole) == clean
