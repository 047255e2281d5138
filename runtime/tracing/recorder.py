"""``Recorder``: the operators of every pass, as the estimator's records, from what torch dispatches.

FLOPs are those of ``torch.utils.flop_counter`` (causal attention: of the lower triangle); bytes are those of the tensors that are
read and written. Views, and tensors that are only made room for, are no work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimator.job.traced import TracedOp
from runtime.storage import TORCH_DTYPES

_aten = torch.ops.aten
_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NO_WORK = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "resize_", "set_", "_unsafe_view",
}  # fmt: skip
_LOOK_UPS = {"embedding", "gather", "index", "index_select", "nll_loss_forward"}
"""They read of their first tensor what they write."""
_NORMS = ("norm", "group_norm", "layer_norm", "batch_norm")
_LOSSES = ("_log_softmax", "nll_loss", "mse_loss", "binary_cross_entropy", "smooth_l1_loss", "huber_loss", "kl_div")
_ONEDNN = (
    "what oneDNN keeps for a recurrent layer's backward pass on a CPU is not known without running it: it is left out"
)
_MIN_CHANNELS = 16
"""Convolutions in groups of fewer output channels than a matrix tile has are bound by memory."""


class Recorder(TorchDispatchMode):
    """Notes operators while active. ``where`` says which pass is under way (``None``: what follows is not the model's), ``replays`` whether a forward pass runs again in it.

    ``passes`` holds the operators by pass: ``(phase and place, replayed?)``.
    """

    def __init__(self, where: Callable[[], tuple[str, str] | None], replays: Callable[[], bool], dtype: str) -> None:
        super().__init__()
        self._where, self._replays, self._dtype = where, replays, dtype
        self.passes: dict[tuple[tuple[str, str], bool], list[TracedOp]] = {}
        self.unknown: dict[str, None] = {}
        """Sentences on what could not be known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for op in _ops_of(func, args, kwargs or {}, out, self._dtype):
            self.add(op)
        return out

    def add(self, op: TracedOp) -> None:
        where, replays = self._where(), self._replays()
        if where is None:
            return
        self.passes.setdefault((where, replays), []).append(
            op._replace(backward=where[0] == "backward" and not replays)
        )

    def __enter__(self) -> Recorder:
        global _recorder
        _recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global _recorder
        _recorder = None
        super().__exit__(*error)


_recorder: Recorder | None = None


def note(op: TracedOp) -> None:
    """An operator that torch does not dispatch as one."""
    if _recorder is not None:
        _recorder.add(op)


def note_unknown(sentence: str) -> None:
    """Something about the module that tracing cannot know."""
    if _recorder is not None:
        _recorder.unknown[sentence] = None


def matmul(
    name: str, shape: tuple[int, int, int, int], n_bytes: int, dtype: torch.dtype, launches: int = 1
) -> TracedOp:
    """``batch`` products of m x k by k x n: ``shape`` is ``(batch, m, n, k)``."""
    return TracedOp(name, "matmul", False, _DTYPES[dtype], 2.0 * prod(shape), n_bytes, shape, launches)


def norm(name: str, tensors: Iterable[Tensor]) -> TracedOp:
    """A norm that reads and writes ``tensors``, the first of which it is of."""
    tensors = list(tensors)
    return TracedOp(
        name, "norm", False, _DTYPES[tensors[0].dtype], 4.0 * tensors[0].numel(), sum(map(_n_bytes, tensors))
    )


def _ops_of(func: Any, args: Any, kwargs: Any, out: Any, dtype: str) -> Iterable[TracedOp]:
    name = func._schema.name.partition("::")[2]
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    given = {key: value for key, value in kwargs.items() if key != "out"}
    inputs = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
    read = {x.untyped_storage()._cdata: x for x in inputs}
    is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in read for x in results)
    if name == "mkldnn_rnn_layer":
        note_unknown(_ONEDNN)
    if name in _NO_WORK or is_view or not results:
        return
    written_bytes = sum(map(_n_bytes, results))
    read_bytes = [_n_bytes(x) for x in read.values()]
    if name in _LOOK_UPS and read_bytes:
        read_bytes[0] = min(read_bytes[0], written_bytes)
    if name == "nll_loss_backward":
        read_bytes[1] = 0  # only its shape
    n_bytes = sum(read_bytes) + written_bytes
    if name == "convolution":
        yield _convolution(name, inputs[0], inputs[1], results[0], args, n_bytes)
        return
    if name == "convolution_backward":
        yield from _convolution_backward(inputs, args, results, n_bytes)
        return
    special = _SPECIAL.get(name)
    if special is not None and results[0].dtype in _DTYPES:
        yield special(name, inputs, args, kwargs, results, n_bytes)
        return
    of = _DTYPES.get(results[0].dtype, dtype)
    flops = float(max((x.numel() for x in (*inputs, *results)), default=0))
    yield TracedOp(name, _kind(name), False, of, flops, n_bytes)


def _kind(name: str) -> str:
    if name.startswith(_LOSSES):
        return "loss"
    if name.startswith("embedding"):
        return "embedding"
    bare = name.removesuffix("_backward").lstrip("_")
    return "norm" if bare.endswith(_NORMS) and not bare.endswith("vector_norm") else "elementwise"


def _n_bytes(x: Tensor) -> int:
    """Those that are read or written: an expanded tensor's are fewer than its elements'."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


# ---- matrix products ------------------------------------------------------------------------------------------------


def _product(
    name: str, inputs: list[Tensor], _args: Any, _kwargs: Any, results: list[Tensor], n_bytes: int
) -> TracedOp:
    """The last two tensors are the factors; a summand may come before them."""
    a, b = inputs[-2:]
    batch = a.shape[0] if a.dim() == 3 else 1
    return matmul(name, (batch, a.shape[-2], b.shape[-1], a.shape[-1]), n_bytes, results[0].dtype)


def _convolution(name: str, x: Tensor, weight: Tensor, y: Tensor, args: Any, n_bytes: int) -> TracedOp:
    """As the product of an implicit matrix of windows with the filters."""
    is_transposed, groups = args[6], args[8]
    places = (x if is_transposed else y).shape
    return _windows(name, places, weight, groups, n_bytes, y.dtype, by_output=not is_transposed)


def _windows(
    name: str, places: torch.Size, weight: Tensor, groups: int, n_bytes: int, dtype: torch.dtype, *,
    by_output: bool = True,
) -> TracedOp:  # fmt: skip
    rows = places[0] * prod(places[2:])
    n_out, k = weight.shape[0] // groups, prod(weight.shape[1:])
    shape = (groups, rows, n_out, k) if by_output else (groups, rows, k, n_out)
    if groups > 1 and min(shape[2:]) < _MIN_CHANNELS:
        return TracedOp(name, "elementwise", False, _DTYPES[dtype], 2.0 * prod(shape), n_bytes)
    return matmul(name, shape, n_bytes, dtype)


def _convolution_backward(inputs: list[Tensor], args: Any, results: list[Tensor], n_bytes: int) -> Iterable[TracedOp]:
    grad, x, weight = inputs[:3]
    is_transposed, groups, wanted = args[7], args[9], args[10]
    places = (x if is_transposed else grad).shape
    share = n_bytes // max(1, sum(wanted[:2]))
    for part, is_wanted in zip(("grad_input", "grad_weight"), wanted[:2], strict=True):
        if is_wanted:
            yield _windows(f"convolution_{part}", places, weight, groups, share, grad.dtype)


# ---- attention --------------------------------------------------------------------------------------------------------


def _attention(
    name: str, inputs: list[Tensor], args: Any, kwargs: Any, results: list[Tensor], n_bytes: int
) -> TracedOp:
    """Flash attention ``[B, H, S, D]``: two products forward, five backward; of a causal one, the lower triangle."""
    is_backward = name.endswith("_backward")
    q, k = inputs[1:3] if is_backward else inputs[:2]
    batch, heads, rows, head = q.shape
    columns = k.shape[2]
    is_causal = any(arg is True for arg in args) if is_backward else _is_causal(name, args, kwargs)
    pairs = rows * (rows + 1) / 2 if is_causal and rows == columns else float(rows * columns)
    flops = 4.0 * batch * heads * head * pairs * (2.5 if is_backward else 1.0)
    shape = (batch, heads, k.shape[1], columns, head, 0)
    return TracedOp(name.lstrip("_"), "attention", False, _DTYPES[q.dtype], flops, n_bytes, shape)


def _is_causal(name: str, args: Any, kwargs: Any) -> bool:
    place = 6 if "efficient" in name else 4
    return bool(args[place] if len(args) > place else kwargs.get("is_causal", False))


_SPECIAL: dict[str, Callable[..., TracedOp]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    **{
        f"_scaled_dot_product_{kind}{way}": _attention
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
        for way in ("", "_backward")
    },
}
