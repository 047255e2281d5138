"""Modules that are no models of this project, and the runtime's own live bytes in training them, for the forecast from their traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.job import Gpu, Job, ModelSpec, Strategy
from estimator.job.options import assemble_job
from estimator.memory.reader import StepMemory
from runtime.context import metered_by
from runtime.ledger import Ledger
from runtime.tracing import trace
from runtime.tracing.trace import TracedRun, placed
from tests.runtime import tiny


class Case(NamedTuple):
    """A module, a batch and what it is trained for."""

    module: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None = None


class Residual(nn.Module):
    """The basic block of a ResNet (He et al. 2016)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """As torchvision's: units with activations, pooling and a reshape between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(32, 32, 1), Residual(32, 32, 1))
        self.layer2 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.average(self.layer2(self.layer1(x))), 1))


class Recurrent(nn.Module):
    """A language model of long short-term memories."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 96)
        self.lstm = nn.LSTM(96, 128, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(128, 1000)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(ids))
        return F.cross_entropy(self.head(y).flatten(0, 1).float(), labels.flatten())


class Patches(nn.Module):
    """The embedding of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 64, 8, 8)
        self.first = nn.Parameter(torch.zeros(1, 1, 64))
        self.places = nn.Parameter(torch.zeros(1, 65, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(y), -1, -1), y], dim=1) + self.places


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, 0.1, "gelu", batch_first=True, norm_first=True) for _ in range(4)
        )
        self.head = nn.Linear(64, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def classes(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), labels)


def images(n: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.empty(n, 3, size, size), torch.zeros(n, dtype=torch.int64)


def words(n: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(n, length, dtype=torch.int64)
    return ids, ids


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(mlp(), (torch.empty(512, 64), torch.zeros(512, dtype=torch.int64)), classes),
    "resnet": lambda: Case(ResNet(), images(8, 64), classes),
    "lstm": lambda: Case(Recurrent(), words(8, 24)),
    "vit": lambda: Case(VisionTransformer(), images(8, 64), classes),
}


def traced(case: Case, strategy: Strategy, gpu: Gpu | None = None) -> ModelSpec:
    return trace(case.module, case.batch, case.loss, strategy=strategy, gpu=gpu or tiny.gpu())


def job(model: ModelSpec, strategy: Strategy, world: int, n_micro_batches: int, arch: str = "hopper") -> Job:
    cluster = tiny.job(tiny.LLAMA, Strategy(dtype="fp32"), world=world, arch=arch).cluster
    assert model.traced is not None
    return assemble_job(
        model, cluster, strategy, {"global_batch": model.traced.micro_batch_size * world * n_micro_batches}
    )


def live_bytes(case: Case, one: Job) -> StepMemory:
    """What one rank of ``one`` holds, metered over the fake group on tensors without data."""
    gpu, world = one.cluster.gpu, one.cluster.n_gpus
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with placed(one.strategy, gpu):
            device = torch.device("cpu" if gpu.arch == "cpu" else "meta")
            run = TracedRun(case.module, case.batch, case.loss, one.strategy, device, one.n_micro_batches)
            ledger = Ledger()
            with metered_by(ledger):
                for storage in run.engine.storages:
                    storage.meter_all()
                run.engine.meter_tables(ledger)
                for _ in range(2):
                    ledger.enter("forward", "start of the step")
                    ledger.start_step()
                    run.step()
                return ledger.report()
    finally:
        if world > 1:
            dist.destroy_process_group()
