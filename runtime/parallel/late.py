"""Gradients of weights that are made later than those of inputs (Qi et al. 2023, section 2): zero-bubble pipelines.

What a product with weights needs for their gradient waits in a queue, by unit of the model, until ``LateGradients.make`` is
called: its input and the gradient of its output. ``estimator.ops.split_backward`` forecasts what that holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from runtime.executor import Executor

Product = Callable[[], None]
"""Makes gradients and adds them to their parameters'."""
Key = tuple[int, int]
"""Chunk and micro-batch."""

_collecting: LateGradients | None = None


def later(product: Product) -> bool:
    """Whether ``product`` is put off: a backward pass is under way that leaves gradients of weights for later."""
    if _collecting is None:
        return False
    _collecting.add(product)
    return True


@torch.no_grad()
def add_gradient(param: Tensor, grad: Tensor) -> None:
    """As autograd does at the end of a backward pass."""
    assert param.grad is not None
    param.grad.add_(grad)


class LateGradients:
    """Of one rank of a pipeline."""

    def __init__(self, executor: Executor) -> None:
        """``executor`` knows which unit's pass is under way."""
        self._executor = executor
        self._waiting: dict[Key, dict[int, deque[Product]]] = {}
        self._key: Key = (0, 0)

    def linears(self) -> TorchFunctionMode:
        """Inside, a forward pass goes through linear layers that can leave the gradients of their weights for later."""
        return _Linears(self._executor)

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Inside, a backward pass leaves them."""
        global _collecting
        _collecting, self._key = self, key
        self._waiting[key] = {}
        try:
            yield
        finally:
            _collecting = None

    def add(self, product: Product) -> None:
        entered = self._executor.entered
        assert entered is not None
        self._waiting[self._key].setdefault(entered.unit, deque()).append(product)

    def make(self, key: Key, units: range) -> None:
        """All that was left of ``key``'s backward pass over ``units``, in that pass's order."""
        waiting = self._waiting.pop(key)
        for unit in reversed(units):
            self._executor.enter(unit, "weight_grad")
            products = waiting.pop(unit, deque())
            while products:
                products.popleft()()
        assert not waiting


class _Linears(TorchFunctionMode):
    """``F.linear`` of what is no loss: its logits are too large to wait."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self._executor = executor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or not torch.is_grad_enabled() or self._in_loss:
            return func(*args, **(kwargs or {}))
        return _linear(*args, **(kwargs or {}))

    @property
    def _in_loss(self) -> bool:
        entered = self._executor.entered
        return entered is not None and entered.phase == "loss"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (x.requires_grad and weight.requires_grad and weight.is_leaf):
        return F.linear(x, weight, bias)
    kept = _Kept()
    out = F.linear(_keep(x, kept), weight.detach(), None if bias is None else bias.detach())

    def put_off(grad: Tensor) -> None:
        x = kept.take()
        if not later(lambda: _product(x, grad, weight, bias)):
            _product(x, grad, weight, bias)

    out.register_hook(put_off)
    return out


@torch.no_grad()
def _product(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    add_gradient(weight, grad.t() @ x)
    if bias is not None:
        add_gradient(bias, grad.sum(0))


class _Kept:
    """A linear layer's input, where autograd keeps it: it may be made again for that."""

    ctx: Any = None

    def take(self) -> Tensor:
        (x,) = self.ctx.saved_tensors
        self.ctx = None
        return x  # type: ignore[no-any-return]


class _Keep(torch.autograd.Function):
    """The same tensor, which is saved as a product saves its input: before it is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: _Kept) -> Tensor:
        ctx.save_for_backward(x)
        kept.ctx = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _keep(x: Tensor, kept: _Kept) -> Tensor:
    return _Keep.apply(x, kept)  # type: ignore[no-any-return]
