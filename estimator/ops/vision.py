"""Both ends of a vision transformer as operator graphs; its blocks are those of ``estimator.ops.encoder``.

Each function mirrors one ``forward`` in ``runtime.models.vision``, statement by statement.
"""

from __future__ import annotations

from estimator.job.model import ModelSpec
from estimator.job.patches import Patches
from estimator.ops.graph import Graph
from estimator.ops.layers import Shape, record_norm
from estimator.ops.operator import Op
from estimator.ops.tape import Node


def embedding_graph(spec: ModelSpec, patches: Patches, shape: Shape) -> Graph:
    """Images (which the projection keeps, with their labels) to patches, the class's token before them, places added."""
    g, d, batch = shape.graph(), spec.d_model, shape.micro_batch_size
    image_bytes = batch * patches.channels * patches.image_size**2 * g.width
    images = g.tensor(image_bytes + 8 * batch, grad=False)
    rows, k = batch * patches.n_patches, patches.patch_numel
    flops, projected_bytes = 2.0 * rows * d * k, rows * d * g.width
    n_bytes = image_bytes + projected_bytes + d * (k + 1) * g.width
    weight_numel = d * (k + 1)
    x = g.record(
        Node(
            (),
            (g.tensor(projected_bytes),),
            forward=(Op("convolution", "matmul", False, g.dtype, flops, n_bytes, (1, rows, d, k)),),
            backward=(
                Op("convolution_backward", "matmul", True, g.dtype, flops, n_bytes, (1, d, k, rows)),
                g.accumulate_grad(weight_numel),
            ),
            aux=(images,),
            param_grad_bytes=weight_numel * g.width,
        )
    )
    all_bytes = g.rows * d * g.width
    g.tensors[x].n_grad_bytes = all_bytes  # it is a part of the gradient of what follows
    x = g.record(
        Node(
            (x,),
            (g.tensor(all_bytes),),
            forward=(g.elementwise("concatenate", projected_bytes + all_bytes),),
            backward=(g.elementwise("sum_over_batch", batch * d * g.width, batch * d, True), g.accumulate_grad(d)),
            param_grad_bytes=d * g.width,
            passes_grad=True,
        )
    )
    places = patches.n_tokens * d
    g.output = g.record(
        Node(
            (x,),
            (g.tensor(all_bytes),),
            forward=(g.elementwise("add", 2 * all_bytes + places * g.width, g.rows * d),),
            backward=(g.elementwise("sum_over_batch", all_bytes, g.rows * d, True), g.accumulate_grad(places)),
            param_grad_bytes=places * g.width,
            passes_grad=True,
        )
    )
    return g


def head_graph(spec: ModelSpec, shape: Shape) -> Graph:
    """The class's token, norm, projection to the classes, cross-entropy."""
    batch, d = shape.micro_batch_size, spec.d_model
    g = shape._replace(seq_len=1).graph()
    x = g.input = g.tensor(shape.rows * d * g.width)
    n_bytes = batch * d * g.width
    with g.call(x):
        h = g.record(
            Node(
                (x,),
                (g.tensor(n_bytes),),
                forward=(g.elementwise("copy", 2 * n_bytes),),
                backward=(g.elementwise("select_backward", shape.rows * d * g.width + 2 * n_bytes, 0, True),),
            )
        )
        h = record_norm(g, spec, h) if spec.final_norm else h
        g.output = g.linear_cross_entropy(
            h, d, spec.vocab_size, bias=spec.head_bias, pending=False, factor_is_one=shape.factor_is_one
        )
    return g
