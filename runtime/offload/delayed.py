"""Optimizer steps that are one training step late: a thread of the host takes them while the device computes.

Ren et al. 2021 (ZeRO-Offload), section 5.2. There the first steps are taken without delay; here there is no warm-up: the
first two training steps both compute with the initial parameters, and every later one with parameters that lack the
newest gradients.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from estimator.job.strategy import Optimizer
from runtime.context import has_data, managed_memory
from runtime.kernels.rules import Control
from runtime.offload.split import whole_shard
from runtime.optimizer import OptimizerConfig, Shard, step_shard
from runtime.storage import GroupStorage


class LateSteps:
    """Steps groups in the order in which ``start`` names them, all with what was last told to ``remember``."""

    def __init__(self, storages: list[GroupStorage], kind: Optimizer, config: OptimizerConfig) -> None:
        self.due = False
        """Whether gradients wait that no step has been started for."""
        self._storages, self._kind, self._config = storages, kind, config
        self._control: Control | None = None
        self._thread = ThreadPoolExecutor(1, "zerocast-late-steps")

    def remember(self, control: Control) -> None:
        """``control`` (on the host) is for the gradients that lie in host memory now."""
        assert control.step is not None
        self._control, self.due = replace(control, step=control.step.clone()), True

    def start(self, group: int) -> Future[None]:
        """Begin with ``group``'s step. Tensors without data are stepped at once: their mode knows only this thread."""
        storage = self._storages[group]
        shard = replace(whole_shard(storage), temp=self._temp())
        if has_data(shard.master):
            return self._thread.submit(self._step, shard)
        done: Future[None] = Future()
        with managed_memory():
            self._step(shard)
        done.set_result(None)
        return done

    def _temp(self) -> torch.Tensor | None:
        """The one in which gradients of all groups are widened."""
        return next((s.tensors["update_temp"] for s in self._storages if "update_temp" in s.tensors), None)

    @torch.no_grad()
    def _step(self, shard: Shard) -> None:
        control = self._control
        assert control is not None and control.step is not None and not isinstance(control.lr, torch.Tensor)
        step_shard(self._kind, self._config, control.lr, control.step, control.factor, shard, control.skip)
