"""Every kernel once, on small tensors of odd sizes: what compute-sanitizer watches. ``python -m tests.runtime.kernels.sample``"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.activation import activate, gated_activate
from runtime.kernels.adacomp import adacomp_add, adacomp_pack
from runtime.kernels.blockwise8 import zeros8
from runtime.kernels.bucket import flatten, unflatten
from runtime.kernels.cross_entropy import LossOptions, VocabShard, cross_entropy, vocab_parallel_cross_entropy
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.grad_norm import squares
from runtime.kernels.lamb import lamb_step
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from runtime.kernels.norm import add_layer_norm, layer_norm, rms_norm
from runtime.kernels.one_bit import one_bit_pack, one_bit_sum
from runtime.kernels.optimizer import optimizer_step
from runtime.kernels.quantize import dequantize_sum, quantize
from runtime.kernels.rotary import rotate
from runtime.kernels.rules import Adam, Control, Lamb, Sgd


def run(device: str) -> None:
    """Forward and backward of every operator, one step of three optimizers, and the compression of a gradient."""

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    labels = torch.randint(0, 517, (5,), device=device)
    labels[1] = -100
    options = LossOptions(label_smoothing=0.1, z_loss=1e-4)
    angles = torch.rand(7, 12, device=device).bfloat16()
    results = [
        rms_norm(made(7, 129), made(129), 1e-5),
        layer_norm(made(3, 9001), made(9001), made(9001), 1e-5),
        *add_layer_norm(made(5, 264), made(5, 264), made(264), made(264), 1e-5, 0.1),
        gated_activate(made(3, 1001), made(3, 1001), "silu"),
        activate(made(3, 1001), "gelu"),
        activate(made(33, 1001), "gelu_tanh", made(1001)),
        rotate(made(2, 7, 3, 32), angles, angles),
        dropout_residual(made(3, 1001), made(3, 1001), 0.3),
        cross_entropy(made(5, 517), labels, options),
        vocab_parallel_cross_entropy(made(5, 517), labels, VocabShard(0, 517, lambda tensor, op: None)),
        linear_cross_entropy(made(5, 40), made(517, 40), made(517), labels, chunk_rows=2),
    ]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])

    sizes = (1, 0, 8195, 300)
    params, *states = ([torch.rand(n, device=device) for n in sizes] for _ in range(3))
    grads = [torch.randn(n, device=device).bfloat16() for n in sizes]
    copies = [torch.empty(n, device=device, dtype=torch.bfloat16) for n in sizes]
    norm = squares(grads)
    control = Control(lr=1e-3, step=torch.ones(1, device=device), factor=norm[:1].rsqrt(), skip=norm[1:])
    optimizer_step(Adam(), params, grads, states, control, copies)
    optimizer_step(Adam(), params, grads, [[zeros8(p) for p in params] for _ in range(2)], control, copies)
    optimizer_step(Sgd(nesterov=True), params, grads, states[:1], control)
    lamb_step(Lamb(), params, grads, states, control, copies)
    bucket = torch.empty(sum(sizes), device=device)
    flatten(grads, bucket, control.factor)
    unflatten(bucket, copies)

    gradient, residual = grads[2], params[2]
    for format, seed in (("int8", torch.ones(1, dtype=torch.int64, device=device)), ("int4", None), ("e4m3", None)):
        dequantize_sum(quantize(gradient, format, 256, seed))
    adacomp_add(adacomp_pack(gradient, residual, 50, capacity=100), torch.zeros(8195, device=device))
    one_bit_sum(one_bit_pack(gradient, residual, 128))


if __name__ == "__main__":
    run("cuda")
    torch.cuda.synchronize()
