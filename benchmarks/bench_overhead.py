"""What the runtime costs beside plain PyTorch in one process: the same model, dtype, optimizer and batches, step by step in turn.

Goal: below 5 %. Plain PyTorch is a loop as one would write it: autograd, ``torch.optim``'s fused AdamW, fp32 masters where
the dtype asks for them, gradients of micro-batches accumulated in ``.grad``. With an offloaded optimizer the runtime also
copies gradients and parameters between two places in host memory, which the plain loop has no need to.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from estimator.job import ModelSpec, Strategy
from runtime import OptimizerConfig, initialize
from runtime.host_memory import keep_freed_memory
from runtime.models import Decoder
from runtime.storage import TORCH_DTYPES

_SMALL = ModelSpec(
    name="llama, 4 x 128", family="llama", n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=344,
    vocab_size=1024, max_positions=256,
)  # fmt: skip
_MEDIUM = replace(
    _SMALL,
    name="llama, 6 x 384",
    n_layers=6,
    d_model=384,
    n_heads=6,
    n_kv_heads=6,
    head_dim=64,
    d_ff=1024,
    vocab_size=4096,
)
_GPT = ModelSpec(
    name="gpt, 4 x 256", family="gpt2", n_layers=4, d_model=256, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=1024,
    vocab_size=2048, max_positions=256, positions="learned", position_rows=256, norm="layernorm", norm_bias=True,
    activation="gelu_tanh", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_embeddings=True,
)  # fmt: skip
SHAPE = (4, 128)
"""Sequences and tokens of each in a micro-batch."""
CASES = [
    (model, Strategy(grad_clip=0.0, **fields), n)  # type: ignore[arg-type]
    for model in (_SMALL, _GPT, _MEDIUM)
    for fields, n in (
        ({"dtype": "fp32"}, 1),
        ({"dtype": "fp32"}, 4),
        ({"dtype": "bf16"}, 1),
        ({"dtype": "fp32", "offload": "optimizer"}, 1),
        ({"dtype": "bf16", "offload": "optimizer"}, 1),
    )
] + [(_GPT, Strategy(dtype="fp32", grad_clip=1.0), 1), (_GPT, Strategy(dtype="fp32", recompute="full"), 1)]

Batches = list[tuple[Tensor, Tensor]]


def plain_step(spec: ModelSpec, strategy: Strategy) -> Callable[[Batches], None]:
    """One training step in plain PyTorch."""
    model = _model(spec)
    low = strategy.dtype != "fp32"
    masters = [p.detach().clone() for p in model.parameters()] if low else list(model.parameters())
    model.to(TORCH_DTYPES[strategy.dtype])
    params = list(model.parameters())
    adam = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    if strategy.recompute == "full":
        for block in model.blocks:
            block.forward = _checkpointed(block.forward)  # type: ignore[method-assign, assignment]

    def step(batches: Batches) -> None:
        for ids, labels in batches:
            loss = model(ids, labels)
            (loss / len(batches)).backward()
        if low:
            for master, param in zip(masters, params, strict=True):
                assert param.grad is not None
                master.grad = param.grad.float()
        if strategy.grad_clip:
            torch.nn.utils.clip_grad_norm_(masters, strategy.grad_clip)
        adam.step()
        if low:
            with torch.no_grad():
                torch._foreach_copy_([*params], [*masters])
        model.zero_grad()

    return step


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch.utils.checkpoint import checkpoint

    return lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def runtime_step(spec: ModelSpec, strategy: Strategy, n_micro_batches: int) -> Callable[[Batches], None]:
    """The same step in this project's runtime."""
    engine = initialize(
        model=_model(spec), strategy=strategy, n_micro_batches=n_micro_batches, optimizer=OptimizerConfig(lr=1e-4)
    )

    def step(batches: Batches) -> None:
        for ids, labels in batches:
            loss = engine(ids, labels)
            engine.backward(loss)
            engine.step()

    return step


def _model(spec: ModelSpec) -> Decoder:
    model = Decoder(spec, seq_len=SHAPE[1])
    model.reset_parameters(0)
    return model


def _batches(spec: ModelSpec, n: int) -> Batches:
    drawn = torch.randint(spec.vocab_size, (n, 2, *SHAPE), generator=torch.Generator().manual_seed(0))
    return [(ids, labels) for ids, labels in drawn]


def seconds_of(spec: ModelSpec, strategy: Strategy, n: int, limit_s: float) -> tuple[list[float], list[float]]:
    """Seconds of plain and of runtime steps, taken in turn for ``limit_s``, five of each for warm-up."""
    steps = (plain_step(spec, strategy), runtime_step(spec, strategy, n))
    batches, taken = _batches(spec, n), ([], [])  # type: ignore[var-annotated]
    end = time.perf_counter() + limit_s
    number = 0
    while time.perf_counter() < end or number < 15:
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[which](batches)
            taken[which].append(time.perf_counter() - start)
        number += 1
    return taken[0][5:], taken[1][5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{args.threads} thread(s), micro-batches of {SHAPE[0]} x {SHAPE[1]} tokens, torch {torch.__version__}")
    print(f"{'model':<15} {'dtype':<5} {'what':<22} {'steps':>5} {'plain':>9} {'runtime':>9} {'ratio':>6}")
    ratios = []
    for spec, strategy, n in CASES:
        plain, ours = seconds_of(spec, strategy, n, args.seconds)
        gc.collect()
        what = [f"offload {strategy.offload}"] if strategy.offload_optimizer else []
        what += [f"{n} micro-batches"] if n > 1 else []
        what += ["clipping"] if strategy.grad_clip else []
        what += [f"recompute {strategy.recompute}"] if strategy.recompute != "none" else []
        a, b = statistics.median(plain), statistics.median(ours)
        ratios.append(b / a)
        print(
            f"{spec.name:<15} {strategy.dtype:<5} {', '.join(what) or '-':<22} {len(ours):>5} {1e3 * a:>6.1f} ms "
            f"{1e3 * b:>6.1f} ms {b / a:>6.3f}",
            flush=True,
        )
    print(f"ratio of medians: worst {max(ratios):.3f}, median {statistics.median(ratios):.3f}; the goal is below 1.05")


if __name__ == "__main__":
    main()
