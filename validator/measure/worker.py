"""What runs in every process of a case: ``python -m validator.measure.worker --case FILE --out FILE``.

Rank and world size come from torchrun's environment; without it the process is alone. Rank 0 writes the finished
``StepReport`` to ``--out``, every failing rank a ``<out>.failure<rank>`` beside it, rank 0 its steps to
``<out>.progress`` and every rank its process id to ``<out>.pid<rank>``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from validator import provenance
from validator.measure.case import Case, available_cores, read_case
from validator.measure.device_memory import DeviceMeter
from validator.measure.instruments import GpuInstruments, peak_rss_bytes
from validator.measure.report import RankResult, build_report
from validator.measure.yardstick import Yardstick

OnStep = Callable[[int, float], None]
"""Called with the step's number (warm-up included) and its seconds."""
VIRTUAL_DEVICE = "cuda"
"""Where ``cuda-virtual`` runs; tests play it on ``"cpu"``."""


class ParityError(Exception):
    """The case trained otherwise than plain PyTorch does."""


def run_case(
    case: Case, origin: dict[str, Any], on_step: OnStep, meter: DeviceMeter | None = None
) -> dict[str, Any] | None:
    """Runs ``case`` as this process's rank. Returns the report as plain data on rank 0 (and on a played rank).

    ``origin`` is the provenance to write into it; ``meter`` was made before CUDA was touched. Raises whatever the runtime
    raises, out of memory included, and ``ParityError`` when a case with ``reference`` is beyond its dtype's tolerance.
    """
    import torch
    import torch.distributed as dist

    rank, world = _rank_and_world(case)
    gpu = None
    if case.on_cuda and (case.backend == "cuda" or VIRTUAL_DEVICE == "cuda"):
        meter = meter or DeviceMeter()
        _take_gpu(torch, case)
        gpu = GpuInstruments(torch.cuda, meter)
    if case.backend == "cpu":
        origin["memory_limit_bytes"] = _limit_memory(case)
    with _group(case, rank, world):
        if gpu is not None and dist.is_initialized() and not case.plays_one_rank:
            dist.all_reduce(torch.zeros(1, device="cuda"))
            gpu.network_is_up()
        mine = _train(case, rank, origin, on_step, gpu)
        results: list[Any] = [mine]
        if dist.is_initialized() and not case.plays_one_rank:
            results = [None] * world
            dist.all_gather_object(results, mine)
    if rank != 0 and not case.plays_one_rank:
        return None
    report = build_report(case, results, origin)
    _require_parity(case, report.parity)
    return report.to_dict()


def _train(case: Case, rank: int, origin: dict[str, Any], on_step: OnStep, gpu: GpuInstruments | None) -> RankResult:
    """What this rank measures, in its group; what the yardstick says goes into ``origin``."""
    from runtime.session import SessionOptions, run_session

    yardstick = Yardstick() if case.backend == "cpu" else None
    yardstick_seconds: list[float] = []

    def on_each(number: int, seconds: float) -> None:
        on_step(number, seconds)
        if yardstick is not None:  # between the steps: how fast the machine is just now
            yardstick_seconds.append(yardstick.seconds(seconds))
        if gpu is None:
            return
        gpu.after_step()
        if number == case.warmup - 1:
            gpu.warmed_up()
        elif number == case.warmup + case.steps - 1:
            gpu.finished()

    # one session does both: it times steps without metering memory, then meters one further step
    options = SessionOptions(
        steps=case.steps, warmup=case.warmup, track_memory=case.metered, seed=case.seed, reference=case.reference,
        nvme_folder=case.nvme_folder,
    )  # fmt: skip
    session = run_session(case.job, _device(case), options, rank=rank, on_step=on_each)
    if yardstick is not None:
        origin.update(yardstick=yardstick.name, yardstick_seconds=yardstick_seconds[case.warmup :])
    return RankResult(
        rank=rank, session=asdict(session), peak_rss_bytes=peak_rss_bytes(), **(gpu.facts() if gpu else {})
    )


def _require_parity(case: Case, parity: dict[str, float]) -> None:
    if case.reference:
        from runtime.reference import excess

        what = excess(case.job.strategy.dtype, parity, case.job.strategy.n_summands)
        if what is not None:
            raise ParityError(what)


def _share_cores() -> None:
    """Gives this process its part of the machine's cores."""
    import torch

    torch.set_num_threads(max(1, available_cores() // _local_world()))


def _local_world() -> int:
    """Processes of this case on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _rank_and_world(case: Case) -> tuple[int, int]:
    if case.plays_one_rank:
        return case.rank, case.job.cluster.n_gpus
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != case.job.cluster.n_gpus:
        raise InputError(
            f"the case needs {case.job.cluster.n_gpus} processes and {world} were started; allowed: torchrun with as many "
            "processes as the job has GPUs"
        )
    return rank, world


def _device(case: Case) -> Any:
    """What ``run_session`` is to run on."""
    if case.backend == "fake":
        return "fake-cpu" if case.job.cluster.gpu.arch == "cpu" else "meta"
    return VIRTUAL_DEVICE if case.plays_one_rank else case.backend


def _group(case: Case, rank: int, world: int) -> AbstractContextManager[None]:
    """Inside, the default process group spans the case's ranks, where there are several; they leave it together.

    The launcher sees a process end and the case's own time limit decides about one that hangs, so no thread watches.
    """
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from runtime.faults import process_group

    if world == 1:
        return nullcontext()
    if case.plays_one_rank:
        return process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    if case.backend == "cpu":
        return process_group("gloo", timeout_s=case.time_limit_s, watch=False)
    gpu = torch.device("cuda", torch.cuda.current_device())
    return process_group("nccl", timeout_s=case.time_limit_s, watch=False, device_id=gpu)


def _take_gpu(torch: Any, case: Case) -> None:
    """Makes this process's GPU the current one. Raises ``InputError`` when there is none."""
    local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise InputError(
            f"backend is {case.backend!r} with {_local_world()} process(es) on this machine, which has {n_gpus} GPU(s) "
            "that torch can use; allowed without a GPU: fake, cpu"
        )
    torch.cuda.set_device(local_rank)


def _limit_memory(case: Case) -> int | None:
    """Makes this process fail cleanly when it takes more than its share, before the whole machine runs out.

    Returns the limit in bytes; ``None`` where the system has none to set.
    """
    try:
        import resource
    except ImportError:  # not a Unix: the operating system alone decides
        return None
    limit = case.memory_limit_bytes
    if limit is None:
        free = provenance.available_memory_bytes()
        if free is None:
            return None
        limit = free // _local_world()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that device or host memory ran out."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    text = str(error).lower()
    signs = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc",
             "cublas_status_alloc_failed")  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _end_with_parent() -> None:
    """Ends this process as soon as stdin closes, which it does when the measuring program ends, however it ends."""

    def follow() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def write_atomically(path: Path, data: Any) -> None:
    """JSON in one piece: a reader sees all of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _kind(error: BaseException) -> str:
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, ParityError):
        return "parity"
    if type(error).__name__ == "LostRankError":
        return "lost_rank"
    return "out_of_memory" if is_out_of_memory(error) else "crash"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of one process; the exit status is 0 when its part of the case is finished."""
    parser = argparse.ArgumentParser(
        prog="python -m validator.measure.worker", description="Runs one rank of one measured case."
    )
    parser.add_argument("--case", required=True, type=Path, help="JSON file with the case")
    parser.add_argument("--out", required=True, type=Path, help="where rank 0 writes the report")
    parser.add_argument("--follow-stdin", action="store_true", help="end as soon as stdin closes")
    args = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    beside = args.out.with_name
    beside(f"{args.out.name}.pid{rank}").write_text(str(os.getpid()), encoding="utf-8")
    if args.follow_stdin:
        _end_with_parent()

    def on_step(number: int, seconds: float) -> None:
        if rank == 0:
            with beside(f"{args.out.name}.progress").open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, seconds]) + "\n")

    origin: dict[str, Any] = {}
    try:
        case = read_case(args.case)
        meter = DeviceMeter() if case.on_cuda else None
        _share_cores()
        origin = provenance.collect(with_torch=True)
        report = run_case(case, origin, on_step, meter)
        if report is not None:
            write_atomically(args.out, report)
    except Exception as error:
        failed_at = time.time()
        traceback.print_exc()
        failure = {
            "rank": rank,
            "time": failed_at,
            "kind": _kind(error),
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "provenance": origin,
        }
        write_atomically(beside(f"{args.out.name}.failure{rank}"), failure)
        sys.stderr.flush()
        os._exit(1)  # the others may wait for this rank in a collective: leave without an orderly goodbye
    return 0


if __name__ == "__main__":
    sys.exit(main())
