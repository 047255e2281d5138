"""Layers that tensor-parallel ranks share, as ``runtime.parallel.tensor`` and ``runtime.parallel.vocabulary`` compute them.

Collectives are operators here: on the compute stream, some beside the products that follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle

from estimator.job.mesh import Span
from estimator.ops.graph import Graph
from estimator.ops.in_place_loss import in_place_loss
from estimator.ops.kernels.linear_cross_entropy import default_chunk_rows
from estimator.ops.operator import Op
from estimator.ops.products import products_of
from estimator.ops.tape import Late, Node, Ref
from estimator.ops.written_out import cross_entropy_in_place
from estimator.sharding.tensor import share

_LOSS = "logits_loss"


class SharedGraph(Graph):
    """What one of ``n_tensor`` ranks does of a unit. ``n_heads``, channels and the vocabulary are given whole."""

    def share(self, size: int) -> int:
        return share(size, self.n_tensor)

    def _collective(self, op: str, n_bytes: int, *, backward: bool, beside: int = 0, dtype: str = "") -> Op:
        """``beside``: so many operators after it run meanwhile."""
        return Op(op, "collective", backward, dtype or self.dtype, 0, n_bytes, (beside,), span=Span(self.n_tensor))

    def _to_stream(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> Op:
        op = "reduce_scatter" if self.splits_tokens else "all_reduce"
        return self._collective(op, n_bytes, backward=backward, beside=beside)

    def _from_stream(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> tuple[Op, ...]:
        if not self.splits_tokens:
            return ()
        return (self._collective("all_gather", n_bytes, backward=backward, beside=beside),)

    def gathered(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> tuple[Op, ...]:
        return self._from_stream(n_bytes, backward=backward, beside=beside)

    def summed(self, n_bytes: int, *, backward: bool = False, beside: int = 0) -> tuple[Op, ...]:
        return (self._to_stream(n_bytes, backward=backward, beside=beside),)

    def statistics(self, n_bytes: int) -> tuple[Op, ...]:
        return (self._collective("all_gather", self.n_tensor * n_bytes, backward=False, dtype="fp32"),)

    # ---- into heads or channels, and back -------------------------------------------------------------------------

    def columns(self, x: Ref, n_in: int, widths: Sequence[int], *, bias: bool) -> tuple[Ref, ...]:
        m, w = self.rows, self.width
        full_bytes = m * n_in * w
        outputs = tuple(self.activation(n_out) for n_out in widths)
        widths = [sum(widths)] if self.style.joined_columns else widths
        n = len(widths)
        fresh = 0 if self.style.fused_wgrad else n_in
        products: list[tuple[Op, ...]] = []
        dgrads: list[Op] = []
        wgrads: list[Op] = []
        added: list[Op] = []
        parts = [
            products_of(self, n_in, n_out, input_is_cast=self.style.compiled and number > 0)
            for number, n_out in enumerate(widths)
        ]
        for n_out, part in zip(widths, parts, strict=True):
            products.append(part.forward)
            dgrads += part.input_grad
            wgrads += part.weight_grad
            added += self.accumulated(fresh * n_out + (n_out if bias else 0))
            if bias:
                added.insert(0, self.elementwise("bias_grad", m * n_out * w, m * n_out, True))
        kept_bytes = sum(part.kept_bytes for part in parts) * self.stream_rows // m
        read_bytes = m * n_in if kept_bytes else full_bytes  # what is gathered has been cast already
        gathered_bytes = full_bytes if self.splits_tokens else 0
        grad_bytes = [fresh * n_out * w for n_out in widths]
        bias_bytes = [n_out * w if bias else 0 for n_out in widths]
        late = Late(
            (*dgrads, self._to_stream(full_bytes, backward=True)),
            (*self._from_stream(read_bytes, backward=True), *wgrads, *added),
            sum(grad_bytes) + sum(bias_bytes),
            gathered_bytes + max(*grad_bytes, *bias_bytes),
            gathered_bytes,
        )
        keeps = [(self.n_matmuls + i) % 2 == 0 for i in range(n)]
        self.n_matmuls += n
        self.record(
            Node(
                (x,),
                outputs,
                forward=(*self._from_stream(read_bytes), *chain.from_iterable(products)),
                backward=(
                    *self._from_stream(read_bytes, backward=True, beside=len(dgrads)),
                    *dgrads,
                    self._to_stream(full_bytes, backward=True, beside=len(wgrads)),
                    *wgrads,
                    *added,
                ),
                saves=() if kept_bytes else (x,),
                aux=(self.tensor(kept_bytes, grad=False),) if kept_bytes else (),
                forward_temp_bytes=gathered_bytes + max(part.forward_temp_bytes for part in parts),
                backward_temp_bytes=2 * gathered_bytes + max(part.backward_temp_bytes for part in parts),
                param_grad_bytes=sum(grad_bytes) + sum(bias_bytes),
                late=late,
                cached_outputs=tuple(ref for ref, keep in zip(outputs, cycle(keeps), strict=False) if keep),
                uncached=(
                    *self._from_stream(read_bytes),
                    *chain.from_iterable(ops for ops, keep in zip(products, keeps, strict=True) if not keep),
                ),
                saves_after=True,
            )
        )
        return outputs

    def row(self, x: Ref, n_in: int, n_out: int, *, bias: bool) -> Ref:
        partial = self.linear(x, n_in, n_out, bias=False)
        self.n_matmuls -= 1  # selective recomputation leaves it out of account
        product = self.nodes[-1]
        product.cached = False
        full_bytes, stream_bytes = self.rows * n_out * self.width, self.stream_rows * n_out * self.width
        forward = [self._to_stream(full_bytes)]
        backward = [*self._from_stream(full_bytes, backward=True)]
        if bias:
            forward.append(self.elementwise("add", 2 * stream_bytes))
            backward += [
                self.elementwise("bias_grad", stream_bytes, 0, True),
                self.accumulate_grad(n_out),
            ]
        if not self.splits_tokens:  # in place
            product.forward += tuple(forward)
            product.backward = (*backward, *product.backward)
            assert product.late is not None
            product.late = product.late._replace(inputs=(*backward, *product.late.inputs))
            product.param_grad_bytes += n_out * self.width if bias else 0
            return partial
        with self.call(x):
            return self.record(
                Node(
                    (partial,),
                    (self.stream(n_out),),
                    forward=tuple(forward),
                    backward=tuple(backward),
                    param_grad_bytes=n_out * self.width if bias else 0,
                )
            )

    def stream_linear(self, x: Ref, n_in: int, n_out: int, *, bias: bool) -> Ref:
        with self.of_rows(self.stream_rows):
            out = self.linear(x, n_in, n_out, bias=bias)
        if not self.splits_tokens:  # all ranks do the same
            node = self.nodes[-1]
            node.forward = tuple(op._replace(useful=1 / self.n_tensor) for op in node.forward)
        return out

    def enter(self, x: Ref, width: int) -> Ref:
        if not self.splits_tokens:
            return x
        full_bytes = self.rows * width * self.width
        forward, backward = self._from_stream(full_bytes), (self._to_stream(full_bytes, backward=True),)
        return self.record(Node((x,), (self.activation(width),), forward=forward, backward=backward))

    def sum_input_gradient(self, width: int) -> None:
        if not self.splits_tokens:  # in place
            node = self.nodes[-1]
            node.backward += (self._to_stream(self.rows * width * self.width, backward=True),)

    def leave(self, y: Ref, width: int) -> Ref:
        full_bytes = self.rows * width * self.width
        if not self.splits_tokens:  # in place
            self.nodes[-1].forward += (self._to_stream(full_bytes),)
            self.nodes[-1].after = 1
            return y
        forward, backward = (self._to_stream(full_bytes),), self._from_stream(full_bytes, backward=True)
        return self.record(Node((y,), (self.stream(width),), forward=forward, backward=backward))

    def head_norm(self, x: Ref, head_dim: int, n_heads: int) -> Ref:
        """The gradient of its weight is summed over ranks at once, or in the step's last reduction."""
        out = super().head_norm(x, head_dim, n_heads)
        if not self.splits_tokens:
            node = self.nodes[-1]
            summed = self._collective("all_reduce", head_dim * self.width, backward=True)
            node.backward = (*node.backward, summed)
        return out

    # ---- the vocabulary -------------------------------------------------------------------------------------------

    def tokens(self, width: int, vocab_size: int, *, tied: bool) -> Ref:
        m, w = self.rows, self.width
        held = self.share(vocab_size)
        full_bytes, table_bytes = m * width * w, held * width * w
        ids = self.tensor(2 * 8 * m, grad=False)
        found = self.tensor((8 + 1) * m, grad=False)
        return self.record(
            Node(
                (),
                (self.stream(width),),
                forward=(
                    self.elementwise("embedding", 2 * full_bytes, kind="embedding"),
                    self.elementwise("mask", full_bytes),
                    self._to_stream(full_bytes),
                ),
                backward=(
                    *self._from_stream(full_bytes, backward=True),
                    self.elementwise("mask", full_bytes, 0, True),
                    self.elementwise("embedding_backward", 2 * full_bytes + table_bytes, 0, True, kind="embedding"),
                    self.accumulate_grad(held * width),
                ),
                aux=(ids, found),
                forward_temp_bytes=full_bytes if self.splits_tokens else 0,
                backward_temp_bytes=full_bytes,
                param_grad_bytes=table_bytes,
                settled_grad_bytes=table_bytes if tied and not self.style.fused_wgrad else 0,
                pending_category=_LOSS,
                saves_after=True,
            )
        )

    def add_learned_positions(self, x: Ref, width: int, table_rows: int, seq_len: int) -> Ref:
        if not self.splits_tokens:
            return super().add_learned_positions(x, width, table_rows, seq_len)
        places = self.tensor(8 * self.stream_rows, grad=False)
        positions = self.embedding(self.stream_rows, width, table_rows)
        self.nodes[-1].aux = (places,)
        return self.add(x, positions, width)

    def linear_cross_entropy(
        self, h: Ref, width: int, vocab_size: int, *, bias: bool, pending: bool, factor_is_one: bool = True
    ) -> Ref:
        """In chunks of tokens, all gradients in the forward pass."""
        if self.style.loss == "in_place":
            return in_place_loss(self, h, width, vocab_size)
        if self.style.loss == "fp32_in_place":
            return self._whole_loss(h, width, self.share(vocab_size), bias=bias)
        m, w, held = self.rows, self.width, self.share(vocab_size)
        full_bytes, weight_bytes = m * width * w, held * width * w
        stream_bytes = self.stream_rows * width * w
        chunk = min(m, default_chunk_rows(m, width, held))
        logit_bytes = 4 if self.dtype == "fp32" else w + 4
        forward = [*self._from_stream(full_bytes)]
        for start in range(0, m, chunk):
            forward += self._chunk(min(chunk, m - start), width, held, bias=bias)
        forward.append(self._to_stream(full_bytes))
        grad_bytes = weight_bytes + (held * w if bias else 0)
        kept = self.tensor(stream_bytes + weight_bytes + (4 * held if bias else 0), _LOSS, grad=False)
        row_bytes = 5 * m
        # bytes per token while all ranks' are put together: its label's place (8) and whether it is here (1), seven fp32 of its own
        # (maximum, sum and label's logit, twice, and the highest maximum), and of each rank three, their weight and its product
        statistics = 8 + 1 + 7 * 4 + 5 * 4 * self.n_tensor
        while_chunks = chunk * (held * logit_bytes + statistics) + row_bytes
        at_end = row_bytes
        if self.splits_tokens:
            while_chunks += 2 * full_bytes - stream_bytes
            at_end += full_bytes
        return self.record(
            Node(
                (h,),
                (self.tensor(4, _LOSS),),
                forward=tuple(forward),
                backward=(
                    self.elementwise("scale_grads", 2 * (stream_bytes + weight_bytes), 0, True),
                    self.accumulate_grad(weight_bytes // w),
                ),
                aux=(kept,),
                forward_temp_bytes=max(while_chunks, at_end),
                temp_category=_LOSS,
                param_grad_bytes=0 if pending else grad_bytes,
                pending_grad_bytes=grad_bytes if pending else 0,
                pending_category=_LOSS,
                kept_grads=_LOSS,
                saves_after=True,
            )
        )

    def _whole_loss(self, h: Ref, width: int, held: int, *, bias: bool) -> Ref:
        with self.call(h):
            (logits,) = self.columns(h, width, (held,), bias=bias)
            self.tensors[logits].category = _LOSS
            with self.call(logits):
                return cross_entropy_in_place(self, logits, held)

    def _chunk(self, rows: int, width: int, held: int, *, bias: bool) -> list[Op]:
        """Logits of some tokens, their softmax with all ranks' help, and the gradients that follow from them."""
        w, n = self.width, rows * held
        flops, n_bytes = 2.0 * rows * width * held, (rows * width + width * held + n) * w
        passes = (6 * 4 + 2 * 4 + (0 if self.dtype == "fp32" else 2 * w + 2 * 4)) * n
        ops = [
            Op("head", "matmul", False, self.dtype, flops, n_bytes, (1, rows, held, width)),
            self._collective("all_gather", self.n_tensor * 3 * 4 * rows, backward=False, dtype="fp32"),
            Op("vocabulary_softmax", "loss", False, self.dtype, 8 * n, passes, launches=8),
            Op("head_grad_input", "matmul", True, self.dtype, flops, n_bytes, (1, rows, width, held)),
            Op("head_grad_weight", "matmul", True, self.dtype, flops, n_bytes, (1, held, width, rows)),
        ]
        return [*ops, self.elementwise("head_grad_bias", n * w, n, True)] if bias else ops
