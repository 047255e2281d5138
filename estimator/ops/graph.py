"""A unit's forward pass as a list of operators, and what eager autograd makes of it.

The builder methods mirror the operators that ``runtime.models`` calls, one for one. From the list follow, without any
further formula: the operators of the backward pass, what is kept for it, and the live bytes at every instant
(``estimator.ops.liveness``). Views cost nothing and are not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from estimator.ops.operator import Op
from estimator.units import DTYPE_BYTES

Ref = int
"""A tensor's storage; views of it are the same ``Ref``."""


@dataclass(slots=True)
class Tensor:
    n_bytes: int
    category: str
    n_grad_bytes: int = 0
    """Bytes of its gradient; 0 when it needs none."""
    last_use: int = -1
    """Last node during which Python still refers to it."""


@dataclass(slots=True)
class Node:
    """One autograd node. Bytes beyond its output are temporaries of the pass."""

    inputs: tuple[Ref, ...]
    output: Ref
    forward: tuple[Op, ...] = ()
    backward: tuple[Op, ...] = ()
    saves: tuple[Ref, ...] = ()
    aux: tuple[Ref, ...] = ()
    """Outputs that only its own backward reads (statistics, log-sum-exp)."""
    forward_temp_bytes: int = 0
    backward_temp_bytes: int = 0
    param_grad_bytes: int = 0
    """Fresh parameter gradients, gone once they are added to the flat buffer."""
    pending_grad_bytes: int = 0
    """Parameter gradients that wait for another use of the same parameter (tied embeddings)."""
    settled_grad_bytes: int = 0
    """Such gradients that this node adds to its own and so ends their wait."""
    passes_grad: bool = False
    """Its backward hands on the incoming gradient itself (addition)."""
    cached: bool = False
    """Selective recomputation keeps its output."""
    saves_after: bool = False
    """Saved tensors are packed after the kernel ran (Python autograd functions), not before it."""


@dataclass(slots=True)
class Graph:
    """Builder of one unit. ``rows`` is tokens of one micro-batch; widths are elements."""

    dtype: str
    rows: int
    tensors: list[Tensor] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    input: Ref = -1
    output: Ref = -1
    n_matmuls: int = 0

    @property
    def width(self) -> int:
        """Bytes of one element of the activations' dtype."""
        return DTYPE_BYTES[self.dtype]

    # ---- tensors --------------------------------------------------------------------------------------------------

    def tensor(self, n_bytes: int, category: str = "activations", grad: bool = True) -> Ref:
        self.tensors.append(Tensor(n_bytes, category, n_bytes if grad else 0))
        return len(self.tensors) - 1

    def activation(self, width: int) -> Ref:
        """A ``[rows, width]`` tensor of the activations' dtype."""
        return self.tensor(self.rows * width * self.width)

    def _add(self, node: Node) -> Ref:
        self.nodes.append(node)
        for ref in (*node.inputs, *node.aux, node.output):
            self.tensors[ref].last_use = max(self.tensors[ref].last_use, len(self.nodes) - 1)
        return node.output

    @contextmanager
    def call(self, *held: Ref) -> Iterator[None]:
        """A Python call: its arguments stay referenced until it returns."""
        yield
        for ref in held:
            self.tensors[ref].last_use = max(self.tensors[ref].last_use, len(self.nodes) - 1)

    # ---- operators ------------------------------------------------------------------------------------------------

    def _elementwise(
        self, name: str, n_bytes: int, flops: int = 0, backward: bool = False, kind: str = "elementwise"
    ) -> Op:
        return Op(name, kind, backward, self.dtype, flops, n_bytes)  # type: ignore[arg-type]

    def linear(
        self, x: Ref, n_in: int, n_out: int, *, bias: bool, category: str = "activations", pending: bool = False
    ) -> Ref:
        """``x @ W.T + b``. Backward multiplies twice and adds the parameter gradient to the flat buffer."""
        m, w = self.rows, self.width
        out = self.tensor(m * n_out * w, category)
        flops, n_bytes = 2.0 * m * n_in * n_out, (m * n_in + n_in * n_out + m * n_out) * w
        grad_bytes = (n_in * n_out + (n_out if bias else 0)) * w
        backward = [
            Op("linear_dgrad", "matmul", True, self.dtype, flops, n_bytes, (1, m, n_in, n_out)),
            Op("linear_wgrad", "matmul", True, self.dtype, flops, n_bytes, (1, n_out, n_in, m)),
            self._elementwise("accumulate_grad", 3 * grad_bytes, n_in * n_out, True),
        ]
        if bias:
            backward.append(self._elementwise("bias_grad", m * n_out * w, m * n_out, True))
        self.n_matmuls += 1
        return self._add(
            Node(
                (x,),
                out,
                forward=(Op("linear", "matmul", False, self.dtype, flops, n_bytes, (1, m, n_out, n_in)),),
                backward=tuple(backward),
                saves=(x,),
                param_grad_bytes=0 if pending else grad_bytes,
                pending_grad_bytes=grad_bytes if pending else 0,
                cached=self.n_matmuls % 2 == 1,
            )
        )

    def norm(self, x: Ref, width: int, *, rms: bool, bias: bool, rows: int | None = None) -> Ref:
        """LayerNorm (one fused operator) or RMSNorm (``runtime.functional.rms_norm``) over ``width`` elements."""
        rows = self.rows if rows is None else rows
        n, w = rows * width, self.width
        out = self.tensor(n * w)
        name = "rms_norm" if rms else "layer_norm"
        stats = self.tensor(rows * 4 * (1 if rms else 2), grad=False)
        grad_bytes = width * w * (2 if bias else 1)
        low = self.dtype != "fp32"
        return self._add(
            Node(
                (x,),
                out,
                forward=(self._elementwise(name, 2 * n * w, 4 * n, kind="norm"),),
                backward=(self._elementwise(f"{name}_backward", 3 * n * w, 8 * n, True, kind="norm"),),
                saves=(x,),
                aux=(stats,),
                forward_temp_bytes=6 * n if rms and low else 0,
                backward_temp_bytes=(6 * n if low else 4 * n) if rms else 0,
                param_grad_bytes=grad_bytes,
                saves_after=rms,
            )
        )

    def rotary(self, x: Ref, width: int) -> Ref:
        """Rotation by position (Su et al. 2021): keeps nothing but the shared tables."""
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (x,),
                self.activation(width),
                forward=(self._elementwise("rotary", 2 * n_bytes, 3 * self.rows * width),),
                backward=(self._elementwise("rotary_backward", 2 * n_bytes, 3 * self.rows * width, True),),
            )
        )

    def repeat_heads(self, x: Ref, width: int, repeats: int) -> Ref:
        """Key/value heads copied to every query head, where the attention kernel has no grouped form."""
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (x,),
                self.activation(width * repeats),
                forward=(self._elementwise("repeat_heads", (1 + repeats) * n_bytes),),
                backward=(self._elementwise("repeat_heads_backward", (1 + repeats) * n_bytes, 0, True),),
            )
        )

    def attention(
        self, q: Ref, k: Ref, v: Ref, *, batch: int, n_heads: int, n_kv_heads: int, head_dim: int, window: int
    ) -> Ref:
        """Causal attention by a flash kernel (Dao 2023): keeps q, k, v, its output and one fp32 per row and head.

        FLOPs are those of the lower triangle; backward does 2.5 times the forward's (five products instead of two).
        """
        seq_len = self.rows // batch
        span = min(window or seq_len, seq_len)
        pairs = seq_len * (seq_len + 1) / 2 - (seq_len - span) * (seq_len - span + 1) / 2
        flops = 4.0 * batch * n_heads * head_dim * pairs
        shape = (batch, n_heads, n_kv_heads, seq_len, head_dim, window)
        q_bytes, kv_bytes = (self.rows * h * head_dim * self.width for h in (n_heads, n_kv_heads))
        out = self.activation(n_heads * head_dim)
        lse = self.tensor(batch * n_heads * seq_len * 4, grad=False)
        n_bytes = 2 * q_bytes + 2 * kv_bytes
        return self._add(
            Node(
                (q, k, v),
                out,
                forward=(Op("attention", "attention", False, self.dtype, flops, n_bytes, shape),),
                backward=(Op("attention_backward", "attention", True, self.dtype, 2.5 * flops, 2 * n_bytes, shape),),
                saves=(q, k, v, out),
                aux=(lse,),
                cached=True,
            )
        )

    def activate(self, x: Ref, width: int) -> Ref:
        """GELU, ReLU or SiLU: keeps its input."""
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (x,),
                self.activation(width),
                forward=(self._elementwise("activation", 2 * n_bytes, 8 * self.rows * width),),
                backward=(self._elementwise("activation_backward", 3 * n_bytes, 12 * self.rows * width, True),),
                saves=(x,),
            )
        )

    def gated_activate(self, gate: Ref, up: Ref, width: int) -> Ref:
        """``activation(gate) * up`` as one function: keeps gate and up only."""
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (gate, up),
                self.activation(width),
                forward=(self._elementwise("gated_activation", 5 * n_bytes, 6 * self.rows * width),),
                backward=(self._elementwise("gated_activation_backward", 9 * n_bytes, 12 * self.rows * width, True),),
                saves=(gate, up),
                backward_temp_bytes=n_bytes,
                saves_after=True,
            )
        )

    def add(self, a: Ref, b: Ref, width: int) -> Ref:
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (a, b),
                self.activation(width),
                forward=(self._elementwise("add", 3 * n_bytes, self.rows * width),),
                backward=(self._elementwise("add_grads", 3 * n_bytes, self.rows * width, True),),
                passes_grad=True,
            )
        )

    # ---- both ends of a model -------------------------------------------------------------------------------------

    def embedding(self, rows: int, width: int, table_rows: int, *, tied: bool = False) -> Ref:
        """Look-up of ``rows`` rows; backward writes a dense gradient of the whole table.

        When ``tied`` the head's gradient of the same table is added to it first.
        """
        n_bytes, table_bytes = rows * width * self.width, table_rows * width * self.width
        out = self.tensor(n_bytes)
        return self._add(
            Node(
                (),
                out,
                forward=(self._elementwise("embedding", 2 * n_bytes, kind="embedding"),),
                backward=(
                    self._elementwise("embedding_backward", 2 * n_bytes + table_bytes, 0, True, kind="embedding"),
                    self._elementwise("accumulate_grad", 3 * table_bytes, table_rows * width, True),
                ),
                param_grad_bytes=table_bytes,
                settled_grad_bytes=table_bytes if tied else 0,
            )
        )

    def add_positions(self, x: Ref, positions: Ref, width: int) -> Ref:
        """Adds a ``[seq_len, width]`` table to every sequence; its gradient is a sum over the batch."""
        n_bytes = self.rows * width * self.width
        return self._add(
            Node(
                (x, positions),
                self.activation(width),
                forward=(self._elementwise("add", 2 * n_bytes, self.rows * width),),
                backward=(self._elementwise("sum_over_batch", n_bytes, self.rows * width, True),),
                passes_grad=True,
            )
        )

    def cross_entropy(self, logits: Ref, vocab_size: int) -> Ref:
        """``F.cross_entropy(logits.float(), labels)``: an fp32 copy, log-softmax (kept), negative log likelihood."""
        n = self.rows * vocab_size
        if self.dtype != "fp32":
            copy = self.tensor(4 * n, "logits_loss")
            logits = self._add(
                Node(
                    (logits,),
                    copy,
                    forward=(self._elementwise("logits_to_fp32", (self.width + 4) * n, kind="loss"),),
                    backward=(self._elementwise("logits_grad_from_fp32", (self.width + 4) * n, 0, True, kind="loss"),),
                )
            )
        log_probs = self._add(
            Node(
                (logits,),
                self.tensor(4 * n, "logits_loss"),
                forward=(self._elementwise("log_softmax", 8 * n, 5 * n, kind="loss"),),
                backward=(self._elementwise("log_softmax_backward", 12 * n, 5 * n, True, kind="loss"),),
            )
        )
        self.nodes[-1].saves = (log_probs,)
        with self.call(logits):
            return self._add(
                Node(
                    (log_probs,),
                    self.tensor(4, "logits_loss"),
                    forward=(self._elementwise("nll_loss", 8 * self.rows, kind="loss"),),
                    backward=(self._elementwise("nll_loss_backward", 4 * n, 0, True, kind="loss"),),
                    saves=(log_probs,),
                )
            )
