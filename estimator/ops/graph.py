"""A unit's forward pass as a list of operators, and what eager autograd makes of it.

The builder methods mirror the operators that ``runtime.models`` calls, one for one. From the list follow, without any
further formula: the operators of the backward pass, what is kept for it, and the live bytes at every instant
(``estimator.ops.liveness``). Views cost nothing and are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from estimator.ops import fused, written_out
from estimator.ops.attention import Heads, efficient_attention, score_attention
from estimator.ops.in_place_loss import in_place_loss
from estimator.ops.kernel_loss import kernel_loss
from estimator.ops.operator import Op
from estimator.ops.products import Products, products_of
from estimator.ops.tape import TEMPORARIES, Late, Node, Ref, Tape


class Graph(Tape):
    """Operators in plain torch, or as kernels where these work (``estimator.ops.fused``)."""

    def share(self, size: int) -> int:
        """How many of ``size`` heads, channels or rows of a vocabulary this rank holds."""
        return size

    def gathered(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> tuple[Op, ...]:
        """What brings together ``n_bytes`` of the residual stream that a layer reads; ``beside``: so many operators after it run
        meanwhile."""
        return ()

    def summed(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> tuple[Op, ...]:
        """What sums ``n_bytes`` that ranks have summands of, for the residual stream."""
        return ()

    def statistics(self, n_bytes: int) -> tuple[Op, ...]:
        """What gives every rank all ranks' ``n_bytes`` about their parts of the vocabulary."""
        return ()

    # ---- operators ------------------------------------------------------------------------------------------------

    def linear(
        self, x: Ref, n_in: int, n_out: int, *, bias: bool, category: str = "activations", pending: bool = False,
        trained: bool = False,
    ) -> Ref:  # fmt: skip
        """``x @ W.T + b``. Backward multiplies twice and adds the parameter gradient to the flat buffer."""
        out = self.tensor(self.rows * n_out * self.width, category)
        product = products_of(self, n_in, n_out)
        return self._project(x, (out,), product, n_in, n_out, bias=bias, pending=pending, trained=trained)

    def _project(
        self, x: Ref, outputs: tuple[Ref, ...], p: Products, n_in: int, n_out: int, *, bias: bool, pending: bool = False,
        trained: bool = False,
    ) -> Ref:  # fmt: skip
        """One product, whose result ``outputs`` are parts of."""
        m, w = self.rows, self.width
        weight_bytes, bias_bytes = 0 if self.style.fused_wgrad else n_in * n_out * w, n_out * w if bias else 0
        of_weights = [*p.weight_grad, *self.accumulated((weight_bytes + bias_bytes) // w)]
        if bias:
            of_weights.append(self.elementwise("bias_grad", m * n_out * w, m * n_out, True))
        late = Late(p.input_grad, tuple(of_weights), weight_bytes + bias_bytes, max(weight_bytes, bias_bytes))
        self.n_matmuls += 1
        return self.record(
            Node(
                (x,),
                outputs,
                forward=p.forward,
                backward=(*(p.input_grad if self.tensors[x].n_grad_bytes else ()), *of_weights),
                saves=() if p.kept_bytes or (self.frozen and not trained) else (x,),
                aux=(self.tensor(p.kept_bytes, grad=False),) if p.kept_bytes else (),
                forward_temp_bytes=p.forward_temp_bytes,
                backward_temp_bytes=p.backward_temp_bytes,
                param_grad_bytes=bias_bytes if pending else weight_bytes + bias_bytes,
                pending_grad_bytes=weight_bytes if pending else 0,
                cached=self.n_matmuls % 2 == 1,
                # logits are too large to wait
                late=late if self.tensors[outputs[0]].category == "activations" else None,
                trained=trained,
                saves_weight=self.frozen and not trained,
            )
        )

    def columns(self, x: Ref, n_in: int, widths: Sequence[int], *, bias: bool) -> tuple[Ref, ...]:
        """Projections of the residual stream into heads or channels, of which ``widths`` are this rank's."""
        outputs = tuple(self.activation(n_out) for n_out in widths)
        if self.style.joined_columns:
            total = sum(widths)
            self._project(x, outputs, products_of(self, n_in, total), n_in, total, bias=bias)
            return outputs
        for number, (out, n_out) in enumerate(zip(outputs, widths, strict=True)):
            product = products_of(self, n_in, n_out, input_is_cast=self.style.compiled and number > 0)
            self._project(x, (out,), product, n_in, n_out, bias=bias)
        return outputs

    def row(self, x: Ref, n_in: int, n_out: int, *, bias: bool) -> Ref:
        """The projection of (this rank's) heads or channels back to the residual stream."""
        return self.linear(x, n_in, n_out, bias=bias)

    def stream_linear(self, x: Ref, n_in: int, n_out: int, *, bias: bool) -> Ref:
        """A projection of the residual stream, as this rank has it, by weights that every rank holds whole."""
        return self.linear(x, n_in, n_out, bias=bias)

    def enter(self, x: Ref, width: int) -> Ref:
        """All tokens of the micro-batch, of ``width`` elements each, of what the residual stream holds."""
        return x

    def sum_input_gradient(self, width: int) -> None:
        """The last node's input, of ``width`` elements a token, came through ``enter``, where its gradient is summed."""

    def leave(self, y: Ref, width: int) -> Ref:
        """As the residual stream holds it, what the ranks that share a layer make together of all tokens."""
        return y

    @contextmanager
    def of_rows(self, n_rows: int) -> Iterator[None]:
        """What is recorded inside has so many rows."""
        before, self.rows = self.rows, n_rows
        yield
        self.rows = before

    def head_norm(self, x: Ref, head_dim: int, n_heads: int) -> Ref:
        """RMSNorm of every one of ``n_heads`` (this rank's) heads with one weight."""
        return self.norm(x, head_dim, rms=True, bias=False, rows=self.rows * n_heads)

    def norm(
        self, x: Ref, width: int, *, rms: bool, bias: bool, rows: int | None = None, n_weights: int | None = None
    ) -> Ref:
        """LayerNorm (in plain torch one native operator) or RMSNorm over ``width`` elements of ``rows`` rows, with ``n_weights``
        (by default ``width``)."""
        rows = self.stream_rows if rows is None else rows
        name = "rms_norm" if rms else "layer_norm"
        if name in self.kernels and n_weights is None:
            return self.record(fused.norm_node(self, x, None, rows, width, rms=rms, bias=bias))
        if rms and not self.style.fused_norm and n_weights is None:
            return written_out.rms_norm(self, x, rows, width)
        n, w = rows * width, self.width
        out = self.tensor(n * w)
        stats = self.tensor(rows * (4 if rms else 2 * self.stat_bytes), grad=False)
        grad_bytes = (width if n_weights is None else n_weights) * w * (2 if bias else 1)
        low, beside = self.dtype != "fp32", rms and not self.style.lean_kernels
        return self.record(
            Node(
                (x,),
                (out,),
                forward=(self.elementwise(name, 2 * n * w, 4 * n, kind="norm"),),
                backward=(self.elementwise(f"{name}_backward", 3 * n * w, 8 * n, True, kind="norm"),),
                saves=(x,),
                aux=(stats,),
                forward_temp_bytes=6 * n if beside and low else 0,
                backward_temp_bytes=(6 * n if low else 4 * n) if beside else 0,
                param_grad_bytes=grad_bytes,
                saves_after=True,  # torch's LayerNorm too: of its statistics
                remakes="norms",
            )
        )

    def add_norm(
        self, x: Ref, residual: Ref, width: int, *, rms: bool, bias: bool, n_weights: int | None = None
    ) -> tuple[Ref, Ref]:
        """The norm of ``residual + x`` and that sum: one kernel, or an addition and a norm."""
        if ("rms_norm" if rms else "layer_norm") in self.kernels and n_weights is None:
            node = fused.norm_node(self, x, residual, self.stream_rows, width, rms=rms, bias=bias)
            return self.record(node), node.outputs[1]
        with self.call(x, residual):
            total = self.add(residual, x, width)
            with self.call(total):
                return self.norm(total, width, rms=rms, bias=bias, n_weights=n_weights), total

    def rotary(self, x: Ref, shape: tuple[int, int, int, int], rotary_dim: int) -> Ref:
        """Rotation by position (Su et al. 2021) of ``shape`` ``[B, S, H, D]``: keeps nothing but the shared tables."""
        width = shape[2] * shape[3]
        if "rotary" in self.kernels:
            return self.record(fused.rotary_node(self, x, shape, rotary_dim))
        if not self.style.fused_rotary:
            return written_out.rotary(self, x, width)
        n_bytes = self.rows * width * self.width
        return self.record(
            Node(
                (x,),
                (self.activation(width),),
                forward=(self.elementwise("rotary", 2 * n_bytes, 3 * self.rows * width),),
                backward=(self.elementwise("rotary_backward", 2 * n_bytes, 3 * self.rows * width, True),),
            )
        )

    def repeat_heads(self, x: Ref, width: int, repeats: int) -> Ref:
        """Key/value heads copied to every query head, where the attention kernel has no grouped form."""
        n_bytes = self.rows * width * self.width
        return self.record(
            Node(
                (x,),
                (self.activation(width * repeats),),
                forward=(self.elementwise("repeat_heads", (1 + repeats) * n_bytes),),
                backward=(self.elementwise("repeat_heads_backward", (1 + repeats) * n_bytes, 0, True),),
            )
        )

    def attention(
        self, q: Ref, k: Ref, v: Ref, *, batch: int, n_heads: int, n_kv_heads: int, head_dim: int, window: int = 0,
        causal: bool = True, useful: float = 1.0, rows: int = 0,
    ) -> Ref:  # fmt: skip
        """Attention by a flash kernel (Dao 2023): keeps q, k, v, its output and one fp32 per row and head. Or by that of the
        tape's style.

        FLOPs are those of the lower triangle where it is ``causal``, of the square otherwise; backward does 2.5 times the
        forward's (five products instead of two). ``useful``: see ``Op``. ``rows``: tokens, by default all of the tape's.
        """
        rows = rows or self.rows
        seq_len = rows // batch
        span = min(window or seq_len, seq_len)
        pairs = seq_len * (seq_len + 1) / 2 - (seq_len - span) * (seq_len - span + 1) / 2
        pairs = pairs if causal else float(seq_len * seq_len)
        if self.style.attention in ("math", "eager"):
            share = useful * pairs / (seq_len * seq_len)
            return score_attention(
                self, Heads(batch, n_heads, n_kv_heads, head_dim, rows, causal=causal, useful=share), q, k, v
            )
        flops = 4.0 * batch * n_heads * head_dim * pairs
        shape = (batch, n_heads, n_kv_heads, seq_len, head_dim, window)
        q_bytes, kv_bytes = (rows * h * head_dim * self.width for h in (n_heads, n_kv_heads))
        out = self.tensor(q_bytes)
        lse = self.tensor(batch * n_heads * seq_len * 4, grad=False)
        n_bytes = 2 * q_bytes + 2 * kv_bytes
        node = Node(
            (q, k, v),
            (out,),
            forward=(Op("attention", "attention", False, self.dtype, flops, n_bytes, shape, 1, useful),),
            backward=(Op("attention_backward", "attention", True, self.dtype, 2.5 * flops, 2 * n_bytes, shape),),
            saves=(q, k, v, out),
            aux=(lse,),
            cached=True,
            saves_after=True,
            makes_all_grads=True,
        )
        if self.style.attention == "efficient":
            return efficient_attention(self, Heads(batch, n_heads, n_kv_heads, head_dim, rows), node)
        return self.record(node)

    def activate(self, x: Ref, width: int, name: str) -> Ref:
        """The activation ``name``: keeps its input; torch's ReLU its output, which is what its square keeps too."""
        if name == "relu2":
            x = self.activate(x, width, "relu")
            n_bytes = self.rows * width * self.width
            with self.call(x):
                return self.record(
                    Node(
                        (x,),
                        (self.activation(width),),
                        forward=(self.elementwise("square", 2 * n_bytes, self.rows * width),),
                        backward=(self.elementwise("square_backward", 3 * n_bytes, 2 * self.rows * width, True),),
                        saves=(x,),
                        backward_temp_bytes=n_bytes,
                    )
                )
        if "activation" in self.kernels:
            return self.record(fused.activation_node(self, (x,), width, name))
        n_bytes, out = self.rows * width * self.width, self.activation(width)
        return self.record(
            Node(
                (x,),
                (out,),
                forward=(self.elementwise("activation", 2 * n_bytes, 8 * self.rows * width),),
                backward=(self.elementwise("activation_backward", 3 * n_bytes, 12 * self.rows * width, True),),
                saves=(out,) if name == "relu" else (x,),
                remakes="" if name == "relu" else "activation",  # whose backward reads its output
            )
        )

    def clamp(self, x: Ref, width: int) -> Ref:
        """Values brought into a range: keeps its input, of which it makes a copy where it works in place."""
        n_bytes = self.rows * width * self.width
        return self.record(
            Node(
                (x,),
                (self.activation(width),),
                forward=(self.elementwise("clamp", 2 * n_bytes, 2 * self.rows * width),),
                backward=(self.elementwise("clamp_backward", 3 * n_bytes, 2 * self.rows * width, True),),
                saves=(x,),
            )
        )

    def linear_activate(
        self,
        x: Ref,
        n_in: int,
        n_out: int,
        name: str,
        *,
        bias: bool,
        adapt: Callable[[Ref], Ref] = lambda product: product,
    ) -> Ref:
        """``activation(x @ W.T + b)``: the bias belongs to the activation's kernel, or to the matrix product, of which ``adapt``
        makes what the activation reads."""
        if bias and "activation" in self.kernels and name != "relu2":
            (product,) = self.columns(x, n_in, (n_out,), bias=False)
            return self.record(fused.activation_node(self, (adapt(product),), n_out, name, bias=True))
        (product,) = self.columns(x, n_in, (n_out,), bias=bias)
        return self.activate(adapt(product), n_out, name)

    def gated_activate(self, gate: Ref, up: Ref, width: int, name: str) -> Ref:
        """``activation(gate) * up`` as one function: keeps gate and up only."""
        if "gated_activation" in self.kernels:
            return self.record(fused.activation_node(self, (gate, up), width, name))
        if not self.style.fused_activation:
            return written_out.gated_activation(self, gate, up, width, name)
        n_bytes = self.rows * width * self.width
        return self.record(
            Node(
                (gate, up),
                (self.activation(width),),
                forward=(self.elementwise("gated_activation", 5 * n_bytes, 6 * self.rows * width),),
                backward=(self.elementwise("gated_activation_backward", 9 * n_bytes, 12 * self.rows * width, True),),
                saves=(gate, up),
                backward_temp_bytes=0 if self.style.lean_kernels else n_bytes,
                saves_after=True,
                remakes="activation",
                makes_all_grads=True,
            )
        )

    def add(self, a: Ref, b: Ref, width: int) -> Ref:
        numel = self.stream_rows * width
        n_bytes = numel * self.width
        return self.record(
            Node(
                (a, b),
                (self.stream(width),),
                forward=(self.elementwise("add", 3 * n_bytes, numel),),
                backward=(self.elementwise("add_grads", 3 * n_bytes, numel, True),),
                passes_grad=True,
            )
        )

    # ---- both ends of a model -------------------------------------------------------------------------------------

    def embedding(self, rows: int, width: int, table_rows: int, *, tied: bool = False) -> Ref:
        """Look-up of ``rows`` rows; backward writes a dense gradient of the whole table.

        When ``tied`` the head's gradient of the same table, which has waited, is added to it first.
        """
        n_bytes, table_bytes = rows * width * self.width, table_rows * width * self.width
        out = self.tensor(n_bytes)
        return self.record(
            Node(
                (),
                (out,),
                forward=(self.elementwise("embedding", 2 * n_bytes, kind="embedding"),),
                backward=(
                    self.elementwise("embedding_backward", 2 * n_bytes + table_bytes, 0, True, kind="embedding"),
                    self.accumulate_grad(table_rows * width),
                ),
                param_grad_bytes=table_bytes,
                settled_grad_bytes=table_bytes if tied and not self.style.fused_wgrad else 0,
                pending_category="logits_loss" if "linear_cross_entropy" in self.kernels else TEMPORARIES,
            )
        )

    def tokens(self, width: int, vocab_size: int, *, tied: bool) -> Ref:
        """Look-up of a micro-batch's tokens. The batch itself (ids and labels, int64) is its input."""
        ids = self.tensor(2 * 8 * self.rows, grad=False)
        x = self.embedding(self.rows, width, vocab_size, tied=tied)
        self.nodes[-1].aux = (ids,)
        return x

    def add_learned_positions(self, x: Ref, width: int, table_rows: int, seq_len: int) -> Ref:
        """Look-up of every place of the sequence, added to ``x``."""
        places = self.tensor(8 * seq_len, grad=False)
        positions = self.embedding(seq_len, width, table_rows)
        if self.frozen:  # which keeps nothing
            self.nodes[-1].outputs = (positions, places)
            self.tensors[places].last_use = len(self.nodes) - 1
        else:
            self.nodes[-1].aux = (places,)
        return self.add_positions(x, positions, width)

    def add_positions(self, x: Ref, positions: Ref, width: int) -> Ref:
        """Adds a ``[seq_len, width]`` table to every sequence; its gradient is a sum over the batch."""
        n_bytes = self.rows * width * self.width
        return self.record(
            Node(
                (x, positions),
                (self.activation(width),),
                forward=(self.elementwise("add", 2 * n_bytes, self.rows * width),),
                backward=(self.elementwise("sum_over_batch", n_bytes, self.rows * width, True),),
                passes_grad=True,
            )
        )

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def linear_cross_entropy(
        self, h: Ref, width: int, vocab_size: int, *, bias: bool, pending: bool, factor_is_one: bool = True
    ) -> Ref:
        """Projection to the vocabulary and mean cross-entropy: in chunks of rows, or all logits at once.

        ``pending``: the projection's weight is another unit's too. ``factor_is_one``: nothing multiplies the loss.
        """
        if self.style.loss == "in_place":
            return in_place_loss(self, h, width, vocab_size)
        if "linear_cross_entropy" in self.kernels:
            return self.record(
                fused.linear_cross_entropy_node(
                    self, h, width, vocab_size, bias=bias, pending=pending, factor_is_one=factor_is_one
                )
            )
        with self.call(h):
            logits = self.linear(h, width, vocab_size, bias=bias, category="logits_loss", pending=pending)
            return self.cross_entropy(logits, vocab_size)

    def capped_cross_entropy(self, h: Ref, width: int, vocab_size: int, *, bias: bool, pending: bool) -> Ref:
        """All logits at once, divided by a cap, through ``tanh``, which keeps its result, and times the cap."""
        n = self.rows * vocab_size

        def step(x: Ref, name: str, *, keeps: bool = False) -> Ref:
            with self.call(x):
                out = self.tensor(n * self.width, "logits_loss")
                forward = (self.elementwise(name, 2 * n * self.width, n, kind="loss"),)
                backward = (self.elementwise(f"{name}_backward", (2 + keeps) * n * self.width, n, True, kind="loss"),)
                return self.record(Node((x,), (out,), forward, backward, saves=(out,) if keeps else ()))

        def capped(logits: Ref) -> Ref:
            return step(step(step(logits, "scale"), "tanh", keeps=True), "scale")

        if self.style.loss == "in_place":
            return in_place_loss(self, h, width, vocab_size, capped)
        with self.call(h):
            logits = self.linear(h, width, vocab_size, bias=bias, category="logits_loss", pending=pending)
            return self.cross_entropy(capped(logits), vocab_size)

    def cross_entropy(self, logits: Ref, vocab_size: int) -> Ref:
        """In place of the logits, or ``F.cross_entropy(logits.float(), labels)``: an fp32 copy, log-softmax (kept),
        negative log likelihood."""
        if "cross_entropy" in self.kernels:
            with self.call(logits):
                return self.record(fused.cross_entropy_node(self, logits, vocab_size))
        if self.style.loss == "kernel":
            return kernel_loss(self, logits, vocab_size)
        n = self.rows * vocab_size
        if self.style.loss == "fp32_in_place":
            with self.call(logits):
                return written_out.cross_entropy_in_place(self, logits, vocab_size)
        if self.dtype != "fp32":
            copy = self.tensor(4 * n, "logits_loss")
            logits = self.record(
                Node(
                    (logits,),
                    (copy,),
                    forward=(self.elementwise("logits_to_fp32", (self.width + 4) * n, kind="loss"),),
                    backward=(self.elementwise("logits_grad_from_fp32", (self.width + 4) * n, 0, True, kind="loss"),),
                )
            )
        log_probs = self.record(
            Node(
                (logits,),
                (self.tensor(4 * n, "logits_loss"),),
                forward=(self.elementwise("log_softmax", 8 * n, 5 * n, kind="loss"),),
                backward=(self.elementwise("log_softmax_backward", 12 * n, 5 * n, True, kind="loss"),),
            )
        )
        self.nodes[-1].saves = (log_probs,)
        with self.call(logits):
            return self.record(
                Node(
                    (log_probs,),
                    (self.tensor(4, "logits_loss"),),
                    forward=(self.elementwise("nll_loss", 8 * self.rows, kind="loss"),),
                    backward=(self.elementwise("nll_loss_backward", 4 * n, 0, True, kind="loss"),),
                    saves=(log_probs,),
                )
            )
