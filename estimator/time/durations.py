"""Seconds of every kind of event of one job, each worked out once."""

from __future__ import annotations

from collections.abc import Sequence

from estimator.job.framework import FRAMEWORKS
from estimator.job.job import Job
from estimator.job.kernels import kernels_in_use
from estimator.job.mesh import Span
from estimator.job.optimizers import orthogonal_flops
from estimator.job.strategy import OPTIMIZER_STATES
from estimator.ops.cost import UnitCost
from estimator.ops.kernels import grad_norm, optimizer
from estimator.ops.operator import Op
from estimator.ops.streaming import around_step, foreach_step, frozen_step, fused_step, plain_step
from estimator.schedule.buffers import steps_by_kernel
from estimator.schedule.events import AddRows, CollectiveOp, Keep, Pack, PickRows, SumPieces, Unpack
from estimator.sharding.units import model_units
from estimator.time.compression import codec_op
from estimator.time.files import file_seconds
from estimator.time.network import CollectiveTimer, timer_over
from estimator.time.operators import OperatorTimer, curve_seconds, seconds_curve
from estimator.time.profile import COMMIT, HardwareProfile
from estimator.time.stack import Stack, stack_of
from estimator.units import DTYPE_BYTES

PassTime = tuple[str, float, float, float]
"""Part, device seconds, seconds from issue to end if the device never lags, seconds of issuing. With compute clock
``c`` and host clock ``h`` the pass ends at ``max(c + device, h + issue_to_end)``: a chain of kernels, each of which
starts when it is issued and its predecessor is done, is linear in that sense."""


class Durations:
    """Seconds of a job's events on a profile; ``workers`` ranks share a node."""

    def __init__(
        self, costs: Sequence[UnitCost], job: Job, profile: HardwareProfile, stack: Stack | None = None
    ) -> None:
        cluster, strategy = job.cluster, job.strategy
        self.job, self.profile, self.costs = job, profile, costs
        self.kernels = kernels_in_use(cluster.gpu.arch, strategy.kernels_off)
        self.workers = min(cluster.n_gpus, cluster.gpus_per_node)
        self.stack = stack or stack_of(job, profile).stack
        self.ops = OperatorTimer(cluster.gpu, profile, self.workers, self.stack)
        self.is_cpu = self.ops.is_cpu
        self.overlap = profile.host_point(self.workers).overlap if self.is_cpu else 1.0
        self.issue_s = 0.0 if self.is_cpu else self.ops.host_op_s
        self._passes: dict[tuple[int, str], tuple[PassTime, ...]] = {}
        self._copies: dict[tuple[str, int], float] = {}
        self._collectives: dict[tuple[CollectiveOp, int, Span | None], float] = {}
        self._networks: dict[tuple[Span | bool | None, str], CollectiveTimer] = {}

    def passes(self, unit: int, phase: str) -> tuple[PassTime, ...]:
        """What ``Compute(unit, phase)`` runs: the loss counts as forward; recomputation precedes backward."""
        cost = self.costs[unit]
        key = (id(cost), phase)
        known = self._passes.get(key)
        if known is None:
            chains = chains_of(cost, phase)
            times = [self._chain(part, ops) for part, ops in chains.items() if ops]
            exposed_s = sum(self._exposed(ops) for ops in chains.values())
            if exposed_s > 0:
                times.append(("exposed_other_comm", exposed_s, 0.0 if self.is_cpu else exposed_s, 0.0))
            known = self._passes[key] = tuple(times)
        return known

    def _exposed(self, ops: Sequence[Op]) -> float:
        """Seconds for which collectives among ``ops`` keep the compute stream waiting: what the operators beside them do not
        hide. Where arithmetic and collectives share cores, it hides only the share that calibration measured."""
        exposed_s = 0.0
        for index, op in enumerate(ops):
            if op.kind == "collective":
                seconds = self._exchange(op)
                beside_s = sum(self.ops.seconds(other) for other in ops[index + 1 : index + 1 + op.shape[0]])
                exposed_s += seconds - min(beside_s, self.overlap * seconds)
        return exposed_s * (1.0 - self.stack.overlapped)

    def _exchange(self, op: Op) -> float:
        """A collective within layers. Around a ring all wait for its slowest link."""
        if op.name == "send":
            assert op.span is not None
            return self.message(op.n_bytes, op.span.size * op.span.stride > self.job.cluster.gpus_per_domain)
        n_bytes = op.n_bytes if op.name != "all_to_all" else round(op.n_bytes * self._share_of_rows(op.span))
        return self.collective(op.name, n_bytes, op.span)  # type: ignore[arg-type]

    def _share_of_rows(self, span: Span | None) -> float:
        """Part of the rows on their way to experts that are really sent, where a token goes once to a node (or, inside one, to a rank)
        that has several of its experts: of ``k`` experts, drawn alike, ``n (1 - (1 - 1/n)^k)`` of ``n`` places have one."""
        experts = self.job.model.experts
        if experts is None or span is None or not FRAMEWORKS[self.job.strategy.framework].sends_rows_once:
            return 1.0
        n_nodes = -(-span.size * span.stride // self.job.cluster.gpus_per_node)
        n, k = n_nodes if n_nodes > 1 else span.size, experts.per_token
        return n * (1.0 - (1.0 - 1.0 / n) ** k) / k

    def _chain(self, part: str, ops: Sequence[Op]) -> PassTime:
        device_s = issue_s = end_s = 0.0
        for op in ops:
            if op.kind == "collective":
                issue_s += self.issue_s
                continue
            seconds = self.ops.seconds(op)
            issue_s += self.ops.host_seconds(op)
            end_s = max(end_s, issue_s) + seconds
            device_s += seconds
        return part, device_s, 0.0 if self.is_cpu else end_s, issue_s

    def collective(self, op: CollectiveOp, n_bytes: int, span: Span | None = None) -> float:
        known = self._collectives.get((op, n_bytes, span))
        if known is None:
            known = self._collectives[op, n_bytes, span] = self._collective(op, n_bytes, span)
        return known

    def _collective(self, op: CollectiveOp, n_bytes: int, span: Span | None) -> float:
        dtype = self.job.strategy.dtype if op in ("all_gather", "pull") else self.job.strategy.grads
        network = self._networks.get((span, dtype))
        if network is None:
            network = self._networks[span, dtype] = timer_over(span, self.job, self.profile, dtype)
        if op == "push" or op == "pull":
            return network.through_servers(n_bytes, self.job.strategy.n_servers) / self.stack.network
        return network.seconds(op, n_bytes) / self.stack.network

    def message(self, n_bytes: int, crosses: bool) -> float:
        """From one rank to another, on another node where it ``crosses``: an all-gather's time between the two, in which as many
        bytes leave each."""
        dtype = self.job.strategy.dtype
        network = self._networks.get((crosses, dtype))
        if network is None:
            network = CollectiveTimer(self.job.cluster, self.profile, 2, 1 if crosses else 2, dtype)
            self._networks[crosses, dtype] = network
        return network.seconds("all_gather", 2 * n_bytes) / self.stack.network

    def copy(self, direction: str, n_bytes: int) -> float:
        """A pinned copy: the host link, or this GPU's share of host memory if that is less; or one between host and files.

        Raises ``InputError`` where the profile has no rates of files.
        """
        if n_bytes <= 0:
            return 0.0
        known = self._copies.get((direction, n_bytes))
        if known is None:
            known = self._copies[direction, n_bytes] = self._copy(direction, n_bytes)
        return known

    def commit(self) -> float:
        """What was written is made to last (``estimator.time.profile.COMMIT``); 0 where that was not measured."""
        return next((p.seconds for p in self.profile.overheads if p.name == COMMIT), 0.0)

    def _copy(self, direction: str, n_bytes: int) -> float:
        if direction.startswith("nvme"):
            return file_seconds(direction, n_bytes, self.job, self.profile)
        profile, cluster = self.profile, self.job.cluster
        shared_s = 0.0 if self.is_cpu else n_bytes * self.workers / cluster.host.memory_bytes_per_s
        if profile.is_measured and profile.copies:
            points = [p for p in profile.copies if p.direction == direction and p.pinned] or list(profile.copies)
            workers = min({p.workers for p in points}, key=lambda w: (abs(w - self.workers), w))
            curve = seconds_curve((p.bytes, p.bytes / p.bytes_per_s) for p in points if p.workers == workers)
            share = self.stack.memory if self.is_cpu else 1.0  # where both ends are the same memory
            return max(curve_seconds(curve, n_bytes) / share, shared_s)
        chip = profile.chip
        assert chip is not None, f"profile {profile.name} has neither copies nor chip constants"
        return chip.copy_s + max(n_bytes / (chip.copy_efficiency * cluster.gpu.host_link_bytes_per_s), shared_s)

    # ---- compression ----------------------------------------------------------------------------------------------

    def compression(self, event: Pack | Unpack | Keep) -> float:
        """What the compute stream does before a compressed collective and after it."""
        s = self.job.strategy
        if isinstance(event, Keep):
            return self._stream(2 * event.n_bytes)
        return self.ops.seconds(codec_op(event, s.dtype if event.purpose == "params" else s.grads, self.kernels))

    def restage(self, n_bytes: int) -> float:
        """``n_bytes`` read and written."""
        return self._stream(n_bytes)

    def rows(self, event: PickRows | AddRows) -> float:
        """A table is read to find its rows, which are copied; it is cleared, and every rank's rows are added to it."""
        n_rows, columns = event.table
        table_bytes, message_bytes = n_rows * columns * event.width, event.n_rows * columns * event.width
        if isinstance(event, PickRows):
            return self._stream(table_bytes + 2 * message_bytes)
        return self._stream(table_bytes + 3 * event.pieces * message_bytes)

    def sum_pieces(self, event: SumPieces) -> float:
        """The first is widened to fp32, every other one added to it."""
        width = DTYPE_BYTES[self.job.strategy.grads]
        return self._stream(event.numel * (width + 4)) + (event.pieces - 1) * self._stream(event.numel * (width + 8))

    # ---- gradients and optimizer ----------------------------------------------------------------------------------

    def accumulate(self, n_bytes: int) -> float:
        """Two reads and a write."""
        return self._stream(3 * n_bytes)

    def clear(self, n_bytes: int) -> float:
        """A new buffer of gradients is filled with zeros by this runtime. Constants of others, and of GPUs whose curves were not
        measured through it, hold such passes already."""
        ours = self.profile.is_measured and self.job.strategy.framework == "zerocast"
        return self._stream(n_bytes) if ours else 0.0

    def blend(self, numel: int) -> float:
        """Gradients read and written, the first moment read."""
        s = self.job.strategy
        return self._stream(numel * (2 * DTYPE_BYTES[s.grads] + DTYPE_BYTES[s.states]))

    def grad_norm(self, n_bytes: int, on_host: bool) -> float:
        """One read of the gradient shard."""
        if "grad_norm" in self.kernels and not on_host:
            dtype, width = self.job.strategy.dtype, DTYPE_BYTES[self.job.strategy.step_grads]
            return self.ops.seconds(grad_norm.cost(n_bytes // width, dtype, width))
        return self._host_stream(n_bytes, on_host)

    def update(self, numel: int, on_host: bool) -> float:
        """One optimizer step on ``numel`` elements: bound by memory on the device, by the measured rate on the host.

        The runtime's kernel does everything in one pass. Around torch's fused step the runtime makes passes of its own: it
        casts low-precision gradients to fp32, scales them, and casts the new parameters back.
        """
        if numel <= 0:
            return 0.0
        strategy = self.job.strategy
        if steps_by_kernel(strategy, self.kernels) and not on_host:
            width = DTYPE_BYTES[strategy.dtype]
            copy_width = 0 if strategy.dtype == "fp32" else width
            rule, eight_bit = strategy.optimizer.removesuffix("8bit"), strategy.optimizer.endswith("8bit")
            width_of_grads = DTYPE_BYTES[strategy.step_grads]
            step = optimizer.cost(rule, numel, width_of_grads, copy_width, eight_bit=eight_bit)
            return self.ops.seconds(step._replace(dtype=strategy.dtype))
        around_s = self._host_stream(numel * self._passes_bytes(), on_host)
        if on_host or self.is_cpu:
            return numel / self._host_rate() + around_s
        return self._stream(round(numel * self._update_bytes())) + self._orthogonal_s(numel) + around_s

    def _orthogonal_s(self, numel: int) -> float:
        """Products of Muon's iterations on ``numel`` elements, as large as the model's width, spread evenly over all parameters."""
        job = self.job
        if job.strategy.optimizer != "muon":
            return 0.0
        units = model_units(job.model)
        blocks = [unit for unit in units if unit.kind not in ("embed", "head")]
        flops = sum(orthogonal_flops(param.shape) for unit in blocks for param in unit.params)
        share, d = flops * numel / sum(unit.numel for unit in units), job.model.d_model
        product = Op("orthogonalise", "matmul", False, "bf16", 2.0 * d**3, 3 * 2 * d * d, (1, d, d, d))
        return self.ops.seconds(product) * share / product.flops

    def _passes_bytes(self) -> int:
        """Bytes per element moved by the passes before and after the fused optimizer step."""
        s = self.job.strategy
        around = around_step(
            s.dtype, 1, s.step_grads, narrow_masters=s.masters != "fp32",
            narrow_states=OPTIMIZER_STATES[s.optimizer] if s.states != "fp32" else 0,
        )  # fmt: skip
        return sum(op.n_bytes for op in around)

    def _host_stream(self, n_bytes: int, on_host: bool) -> float:
        if on_host and not self.is_cpu:
            return n_bytes * self.workers / self.job.cluster.host.memory_bytes_per_s
        return self._stream(n_bytes)

    def _update_bytes(self) -> float:
        """Bytes per element of the step itself."""
        s = self.job.strategy
        frozen = s.freezes_variance and self.job.mesh.n_data > 1
        if frozen:
            return frozen_step(1).n_bytes
        step = plain_step if s.framework == "zerocast" else fused_step  # others have kernels of their own
        step = foreach_step if s.optimizer_impl == "foreach" else step
        return step(s.optimizer, 1000).n_bytes / 1000

    def _host_rate(self) -> float:
        """Elements per second of one rank: published rates are a whole node's, measured ones one process's of many.

        Other optimizers than Adam move fewer bytes (28 per element there), and no rank exceeds its share of memory.
        """
        point = self.profile.host_point(self.workers)
        n_bytes = self._update_bytes()
        if self.profile.is_measured:
            return point.adam_elements_per_s * 28 / n_bytes
        node = min(point.adam_elements_per_s * 28 / n_bytes, self.job.cluster.host.memory_bytes_per_s / n_bytes)
        return node / self.workers

    def _stream(self, n_bytes: int) -> float:
        return self.ops.traffic_seconds(n_bytes, dtype=self.job.strategy.dtype) if n_bytes > 0 else 0.0


def chains_of(cost: UnitCost, phase: str) -> dict[str, tuple[Op, ...]]:
    """Operators of a pass by part."""
    if phase in ("forward", "loss"):
        return {"forward": cost.forward}
    if phase == "weight_grad":
        assert cost.split is not None
        return {"backward": cost.split.weights}
    if phase == "recompute":
        return {"recompute": cost.again}
    return {"recompute": cost.recompute, "backward": cost.backward if cost.split is None else cost.split.inputs}
