"""Small modules that are no decoders, trained by the engine and by plain PyTorch side by side, with the engine's live bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.job import Strategy
from estimator.memory.reader import StepMemory, read_memory
from estimator.ops.cost import PassMemory, UnitCost
from estimator.predict import traffic_of
from runtime import Engine, OptimizerConfig, initialize
from runtime.context import metered_by
from runtime.ledger import Ledger

WORDS, WIDTH, ROWS = 40, 24, 6
STATES = ("params", "grads", "master_params", "optimizer_state", "gathered_params", "reduce_buckets", "offload_staging")
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-5)


class Adapted(nn.Module):
    """A frozen layer with a small trained one beside it (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)).relu()


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


class Sometimes(nn.Module):
    """``spare`` takes part only where ``on``; ``never`` never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare, self.never = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.spare(x.relu()) if self.on else x


class Model(nn.Module):
    """Embedding, ``blocks``, head: ids ``[ROWS]`` to logits."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def switch(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Sometimes):
                module.on = on


def adapted() -> Model:
    """A frozen embedding, partly frozen blocks, one that is frozen as a whole, a head with a frozen bias."""
    model = Model([Block(Adapted()), Block(nn.Linear(WIDTH, WIDTH)).requires_grad_(False), Block(Adapted())])
    model.embed.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


def frozen_from_the_top() -> Model:
    """Only the embedding is trained: gradients pass through frozen units."""
    model = Model([Block(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    for part in (model.blocks, model.head):
        part.requires_grad_(False)
    return model


def repeated() -> Model:
    """One block three times in a row (Lan et al. 2020), in which a layer is used twice; another between."""
    block = Block(Twice())
    return Model([block, block, Block(nn.Linear(WIDTH, WIDTH)), block])


def unused() -> Model:
    return Model([Block(Sometimes()), Block(nn.Linear(WIDTH, WIDTH)), Block(Sometimes())])


def usual() -> Model:
    return Model([Block(nn.Linear(WIDTH, WIDTH)) for _ in range(3)])


MODELS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (adapted, frozen_from_the_top, repeated, unused, usual)
}


class Run(NamedTuple):
    """A generic model's training."""

    model: str
    strategy: Strategy
    n_micro: int = 2
    steps: int = 4
    param_groups: Any = ()
    """For ``initialize``; plain PyTorch gets ``torch_groups``."""
    torch_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None


def _model(run: Run) -> Model:
    torch.manual_seed(0)
    return MODELS[run.model]()


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    return tuple(torch.randint(WORDS, (ROWS,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def is_on(step: int, micro: int) -> bool:
    return (step + micro) % 2 == 0


def train_engine(run: Run, rank: int) -> Engine:
    model = _model(run)
    groups = {"param_groups": run.param_groups} if run.param_groups else {}
    engine = initialize(model=model, strategy=run.strategy, n_micro_batches=run.n_micro, optimizer=OPTIMIZER, **groups)
    for step in range(run.steps):
        engine_step(engine, run, step, rank)
    return engine


def engine_step(engine: Engine, run: Run, step: int, rank: int) -> None:
    for micro in range(run.n_micro):
        ids, labels = batch(step, rank, micro)
        engine.model.switch(is_on(step, micro))  # type: ignore[operator]
        engine.backward(F.cross_entropy(engine(ids).float(), labels))
        engine.step()


def train_plain(run: Run, world: int) -> dict[str, Tensor]:
    """One process, all ranks' batches; a parameter that takes no part has a gradient of zero."""
    model = _model(run)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = run.torch_groups(model) if run.torch_groups else [{"params": trained}]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay)
    for step in range(run.steps):
        for p in trained:
            p.grad = torch.zeros_like(p)
        for micro in range(run.n_micro):
            model.switch(is_on(step, micro))
            for rank in range(world):
                ids, labels = batch(step, rank, micro)
                (F.cross_entropy(model(ids), labels) / (run.n_micro * world)).backward()
        if run.strategy.grad_clip:
            nn.utils.clip_grad_norm_(trained, run.strategy.grad_clip)
        adam.step()
    return dict(model.named_parameters())


def assert_trains_as_plain(run: Run, rank: int, world: int) -> Engine:
    """fp32 to rounding, and the bytes on the wire and live as the engine's own program says."""
    engine = train_engine(run, rank)
    want, got = train_plain(run, world), engine.full_parameters()
    assert got.keys() == want.keys()
    if run.strategy.dtype == "fp32":
        for name, param in want.items():
            torch.testing.assert_close(
                got[name], param.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert (dict(engine.comm.bytes), dict(engine.comm.calls)) == traffic_of(engine.program)[:2]
    assert_live_bytes(engine, run, rank)
    return engine


def assert_live_bytes(engine: Engine, run: Run, rank: int) -> StepMemory:
    """One more step, metered: states as the program says, at their peaks and on the host."""
    ledger = Ledger()
    with metered_by(ledger):
        for storage in engine.storages:
            storage.meter_all()
        ledger.enter("forward", "start of the step")
        ledger.start_step()
        engine_step(engine, run, run.steps, rank)
        got = ledger.report()
    nothing = PassMemory({}, {}, {})
    costs = [UnitCost((), (), (), nothing, nothing)] * len(engine.layout.units)
    want = read_memory(engine.program, engine.layout.units, costs)
    for category in STATES:
        assert got.category_peak_bytes.get(category, 0) == want.category_peak_bytes.get(category, 0), category
    assert got.host_peak_bytes == want.host_peak_bytes
    return want


def worker(rank: int, world: int, folder: str, runs: list[Run]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    for run in runs:
        try:
            assert_trains_as_plain(run, rank, world)
        except Exception as error:
            raise AssertionError(f"{run} on rank {rank} of {world}") from error
    dist.barrier()
    dist.destroy_process_group()
