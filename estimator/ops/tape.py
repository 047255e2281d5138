"""What is recorded of a unit's forward pass: tensors, and the autograd nodes that read and make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

from estimator.ops.frozen import freeze
from estimator.ops.kernels.chip import H200, Chip
from estimator.ops.operator import Op
from estimator.ops.style import PLAIN, Style
from estimator.units import DTYPE_BYTES

Ref = int
"""A tensor's storage; views of it are the same ``Ref``."""

TEMPORARIES = "temporaries"


@dataclass(slots=True)
class Tensor:
    n_bytes: int
    category: str
    n_grad_bytes: int = 0
    """Bytes of its gradient; 0 when it needs none."""
    last_use: int = -1
    """Last node during which Python still refers to it."""


class Late(NamedTuple):
    """The backward pass of a node in two, of which the second may come later: it makes the gradients of weights from what the
    node has saved and the gradients of its outputs."""

    inputs: tuple[Op, ...]
    weights: tuple[Op, ...]
    grad_bytes: int
    """Of the parameters' gradients that the second pass makes (of ``Node.param_grad_bytes``)."""
    weights_temp_bytes: int
    """Temporaries of the second pass, gradients of parameters included."""
    inputs_temp_bytes: int = 0


@dataclass(slots=True)
class Node:
    """One autograd node. Bytes beyond its output are temporaries of the pass."""

    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    """Results that have a gradient."""
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
    stays_pending: bool = False
    """That sum waits in turn, for one more use."""
    pending_category: str = TEMPORARIES
    """Category of the gradients that wait, or end their wait, here."""
    temp_category: str = TEMPORARIES
    """Category of ``forward_temp_bytes``."""
    passes_grad: bool = False
    """Its backward hands on the incoming gradient itself (addition)."""
    one_grad: bool = False
    """Its inputs get one and the same new gradient."""
    kept_grads: str = ""
    """Category of the gradients that it returns where all of them are tensors that it kept (``saves``, ``aux``): its
    backward then makes none."""
    cached: bool = False
    """Selective recomputation keeps its outputs, ..."""
    cached_outputs: tuple[Ref, ...] = ()
    """... or these of several, and then does ``uncached`` of ``forward`` again."""
    uncached: tuple[Op, ...] = ()
    saves_after: bool = False
    """Saved tensors are packed after the kernel ran (Python autograd functions), not before it."""
    remakes: str = ""
    """Part of a block (``norms``, ``activation``) with which its first output can be made again from what its own backward keeps."""
    remake: tuple[Op, ...] = ()
    """Operators that do so; empty: ``forward``."""
    part: str = ""
    """Part of a block (``attention``, ``mlp``) that it belongs to."""
    after: int = 0
    """So many of ``forward``, the last ones, change the output in its place when all has been saved."""
    late: Late | None = None
    """How its weights' gradients are left for later, if they can be."""
    trained: bool = False
    """Its weights are an adapter's: they have gradients on a ``frozen`` tape."""
    makes_all_grads: bool = False
    """Its backward makes gradients of all inputs, also of those that need none."""
    saves_weight: bool = False
    """It saves a frozen weight alone, whose bytes are the group's: a checkpoint replays for that too."""

    @property
    def packs(self) -> bool:
        """Whether its backward reads anything that was saved."""
        return bool(self.saves or self.aux or self.saves_weight)


class Shared(NamedTuple):
    """A tensor of an earlier unit that several units read."""

    ref: Ref
    waits: bool
    """Its gradient exists when the unit's backward pass begins: later units have read the tensor too."""


@dataclass(slots=True)
class Tape:
    """What has been recorded of one unit. ``rows`` is tokens of one micro-batch; widths are elements."""

    dtype: str
    rows: int
    kernels: frozenset[str] = frozenset()
    """Kernels of the runtime that work on the device; plain torch does the rest."""
    chip: Chip = H200
    """Sizes of their launches."""
    grad_dtype: str = ""
    """Of the buffers that parameter gradients are added to; empty: ``dtype``."""
    stat_bytes: int = 4
    """Bytes of each of a row's two statistics that torch's LayerNorm keeps: fp32, but ``dtype`` on a CPU."""
    n_tensor: int = 1
    """Tensor-parallel ranks that share the layers."""
    splits_tokens: bool = False
    """They split the tokens of the residual stream among them."""
    style: Style = PLAIN
    """How the framework runs its operators."""
    param_grads: str = "added"
    """What becomes of parameters' gradients: ``estimator.job.framework.ParamGrads``."""
    tensors: list[Tensor] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    input: Ref = -1
    output: Ref = -1
    further_outputs: tuple[Ref, ...] = ()
    """What other units than the next read. Their gradients exist when the unit's backward pass begins."""
    shared: list[Shared] = field(default_factory=list)
    n_matmuls: int = 0
    current_part: str = ""
    frozen: bool = False
    """Weights have no gradients, but for those of nodes that are ``trained``."""

    @property
    def width(self) -> int:
        """Bytes of one element of the activations' dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def stream_rows(self) -> int:
        """Tokens of a micro-batch of which this rank has the residual stream."""
        return self.rows // self.n_tensor if self.splits_tokens else self.rows

    # ---- tensors --------------------------------------------------------------------------------------------------

    def tensor(self, n_bytes: int, category: str = "activations", grad: bool = True) -> Ref:
        self.tensors.append(Tensor(n_bytes, category, n_bytes if grad else 0))
        return len(self.tensors) - 1

    def activation(self, width: int) -> Ref:
        """A ``[rows, width]`` tensor of the activations' dtype."""
        return self.tensor(self.rows * width * self.width)

    def stream(self, width: int) -> Ref:
        """A ``[rows, width]`` tensor of the residual stream."""
        return self.tensor(self.stream_rows * width * self.width)

    def shared_tensor(self, n_bytes: int, *, first: bool, last: bool, n_grad_bytes: int = 0) -> Ref:
        """A tensor of an earlier unit that several units read, all of which keep it (an encoder's result).

        Its bytes count in the ``first`` of them, whose backward pass is the last to drop it; the ``last`` one's backward pass
        makes its gradient, to which the others add theirs.
        """
        self.tensors.append(Tensor(n_bytes if first else 0, "activations", n_grad_bytes or n_bytes))
        self.shared.append(Shared(len(self.tensors) - 1, waits=not last))
        return self.shared[-1].ref

    def record(self, node: Node) -> Ref:
        """Appends ``node``; its (first) output."""
        node.part = node.part or self.current_part
        if self.frozen:
            freeze(self, node)
        self.nodes.append(node)
        for ref in (*node.inputs, *node.aux, *node.outputs):
            self.tensors[ref].last_use = max(self.tensors[ref].last_use, len(self.nodes) - 1)
        return node.outputs[0]

    def elementwise(
        self, name: str, n_bytes: int, flops: int = 0, backward: bool = False, kind: str = "elementwise"
    ) -> Op:
        """One memory-bound operator of the activations' dtype."""
        return Op(name, kind, backward, self.dtype, flops, n_bytes)  # type: ignore[arg-type]

    def accumulate_grad(self, numel: int) -> Op:
        """A parameter's gradient added to its place in the flat buffer: two reads and a write."""
        n_bytes = numel * (self.width + 2 * DTYPE_BYTES[self.grad_dtype or self.dtype])
        return self.elementwise("accumulate_grad", n_bytes, numel, backward=True)

    def accumulated(self, numel: int) -> tuple[Op, ...]:
        """The same of fresh gradients, which some frameworks take as they are."""
        return (self.accumulate_grad(numel),) if numel and self.param_grads == "added" else ()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is recorded inside belongs to that part of a block."""
        before, self.current_part = self.current_part, name
        yield
        self.current_part = before

    @contextmanager
    def call(self, *held: Ref) -> Iterator[None]:
        """A Python call: its arguments stay referenced until it returns."""
        yield
        for ref in held:
            self.tensors[ref].last_use = max(self.tensors[ref].last_use, len(self.nodes) - 1)


def part_of_block(name: str) -> Callable[[Callable[..., Ref]], Callable[..., Ref]]:
    """For functions that record a part of a block (``estimator.job.recompute.PARTS``) on their first argument, a ``Tape``."""

    def mark(record: Callable[..., Ref]) -> Callable[..., Ref]:
        @wraps(record)
        def marked(tape: Tape, *args: Any) -> Ref:
            with tape.part(name):
                return record(tape, *args)

        return marked

    return mark
