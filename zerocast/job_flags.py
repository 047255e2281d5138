"""The flags that describe a job: the same names, in the same order, on every command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from estimator.errors import InputError

if TYPE_CHECKING:
    from estimator.job import Job
    from estimator.time.profile import HardwareProfile

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("--model", str, "NAME|PATH", "Catalogue name, or a Hugging Face config.json or its folder."),
    ("--lora-rank", int, "N", "Adapters of this rank beside frozen weights are all that is trained. 0: none."),
    ("--lora-alpha", float, "X", "With --lora-rank: what adapters add is times alpha / rank. Default: the rank."),
    ("--lora-dropout", float, "0..1", "With --lora-rank: dropout of what adapters read."),
    ("--lora-targets", str, "attention|mlp|all|q,v,...", "With --lora-rank: projections that have adapters."),
    ("--lora-config", str, "PATH", "PEFT's adapter_config.json, or its folder, in place of these."),
    ("--gpu", str, "NAME", "GPU of the catalogue, e.g. h100-sxm, or a machine type such as aws-p5.48xlarge."),
    ("--gpus", int, "N", "Number of GPUs."),
    ("--gpus-per-node", int, "N", "GPUs in one server."),
    ("--internode-gbps", float, "X", "Network between nodes, gigabits per second and GPU."),
    ("--nvlink-domain", int, "N", "GPUs that NVLink joins beyond one server (72 in NVL72). 0: one server's."),
    ("--nodes-per-leaf", int, "N", "Servers under one leaf switch. 0: all."),
    ("--oversubscription", float, "X", "With --nodes-per-leaf: a leaf switch's bandwidth down over that up."),
    ("--rail-optimized", bool, "true|false", "The i-th network cards of servers share a leaf switch."),
    ("--in-network-reduction", bool, "true|false", "Network switches add up all-reduces (SHARP)."),
    (
        "--hierarchical",
        bool,
        "true|false",
        "All-gathers and reduce-scatters in two steps, across servers and inside them.",
    ),
    ("--zero", int, "0|1|2|3", "ZeRO stage."),
    ("--offload", str, "none|optimizer|optimizer,param|optimizer:nvme", "What lives in host memory or files."),
    ("--offload-fraction", float, "0..1", "Part of the optimizer that the host steps, with --offload optimizer."),
    (
        "--delayed-update",
        bool,
        "true|false",
        "With --offload optimizer: the host steps one step late, beside the device.",
    ),
    (
        "--recompute",
        str,
        "none|selective|full|PART,...",
        "Activations recomputed in the backward pass; parts of a block: activation, attention, core_attention, mlp, norms.",
    ),
    ("--recompute-every", int, "K", "Every K-th block recomputes, the others keep everything."),
    (
        "--activation-offload",
        bool,
        "true|false",
        "With --recompute full or selective: blocks' inputs wait in host memory.",
    ),
    ("--persistent-numel", int, "N", "Largest parameter that stays gathered (stage 3, parameter offload)."),
    ("--dtype", str, "fp32|fp16|bf16", "Dtype of parameters, activations and gradients."),
    ("--grad-dtype", str, "model|fp32", "Dtype in which gradients are accumulated and reduced."),
    ("--master-dtype", str, "fp32|model", "model: no fp32 masters, a bf16 model's parameters are stepped themselves."),
    ("--state-dtype", str, "fp32|model", "Dtype of the optimizer's states; model: bf16 beside a bf16 model."),
    ("--optimizer", str, "adamw|adam|sgd|lion|adagrad|lamb|adamw8bit|adafactor|muon", "Optimizer."),
    ("--optimizer-impl", str, "fused|foreach", "FSDP: how torch's optimizer steps; foreach is torch's own default."),
    ("--grad-clip", float, "X", "Largest global gradient norm; 0: gradients are not clipped."),
    (
        "--framework",
        str,
        "zerocast|fsdp1|composer|fsdp2|deepspeed|megatron|megatron_bridge",
        "Whose training step is forecast.",
    ),
    ("--overlap-comm", bool, "true|false", "DeepSpeed, ZeRO 1 and 2: one bucket is filled while another is reduced."),
    ("--prefetch-numel", int, "N", "DeepSpeed, ZeRO 3: parameters gathered ahead of use, in elements."),
    ("--live-numel", int, "N", "DeepSpeed, ZeRO 3: gathered parameters that stay, in elements."),
    ("--compile", bool, "true|false", "torch.compile of blocks (other frameworks than zerocast)."),
    ("--compile-loss", bool, "true|false", "torch.compile of the loss (the same)."),
    ("--root-apart", bool, "true|false", "FSDP2: embedding and head are units (torchtitan since 0.2)."),
    ("--attention", str, "flash|efficient|math|eager", "Attention kernel."),
    ("--matmul-dtype", str, "model|fp8", "Dtype in which blocks' linear layers multiply."),
    (
        "--train-tower",
        bool,
        "true|false",
        "Image-text models: hold the vision tower as trained parameters, not frozen.",
    ),
    ("--kernels-off", str, "NAME,...|all", "CUDA kernels of the runtime that plain torch replaces."),
    ("--shard-size", int, "N", "GPUs that share one sharded copy of the states; groups of them are replicas. 0: all."),
    ("--quantized-weights", bool, "true|false", "Stage 3 gathers int8 parameters (ZeRO++ qwZ)."),
    (
        "--secondary-shard",
        int,
        "N",
        "Stage 3 keeps a second copy over N GPUs nearby for later gathers (ZeRO++ hpZ). 0: none.",
    ),
    (
        "--quantized-grads",
        int,
        "N",
        "Int4 gradients, summed inside groups of N GPUs, then across (ZeRO++ qgZ). 0: not.",
    ),
    (
        "--grad-compression",
        str,
        "none|one_bit|adacomp",
        "Signs, or outstanding ones, of gradients, with error feedback (stages 0, 1).",
    ),
    (
        "--compression-warmup-steps",
        int,
        "N",
        "With one_bit: exact steps before Adam's variance is frozen (1-bit Adam).",
    ),
    ("--sparse-embeddings", bool, "true|false", "Token embeddings' gradients go row by row (stages 0, 1)."),
    ("--tp", int, "N", "Tensor-parallel size."),
    (
        "--sequence-parallel",
        bool,
        "true|false",
        "With --tp: split norms and residual stream by tokens too (the default).",
    ),
    ("--pp", int, "N", "Pipeline-parallel size."),
    ("--pp-schedule", str, "gpipe|1f1b|interleaved_1f1b|zero_bubble", "Order of the pipeline's passes."),
    ("--virtual-pp", int, "N", "Chunks of the model on each pipeline rank (interleaved_1f1b)."),
    ("--pp-layers", str, "N,N,...", "Blocks of each pipeline stage."),
    ("--cp", int, "N", "Context-parallel size."),
    ("--cp-kind", str, "ulysses|ring", "With --cp: heads are exchanged for tokens, or keys and values go around."),
    ("--ep", int, "N", "Expert-parallel size: data-parallel GPUs that share the experts of every layer."),
    ("--expert-imbalance", float, "X", "With --ep, dropless: rows of the GPU that gets most, over the mean."),
    (
        "--sync",
        str,
        "allreduce|parameter_server",
        "How data-parallel GPUs share gradients (parameter servers: stage 0).",
    ),
    ("--n-servers", int, "N", "With --sync parameter_server: GPUs that are servers too."),
    ("--staleness", int, "K", "With --sync parameter_server: steps by which gradients are late. 0: none."),
    ("--seq-len", int, "N", "Tokens per sequence."),
    ("--micro-batch", int, "N", "Sequences per GPU and pass."),
    ("--global-batch", int, "N", "Sequences per optimizer step over all GPUs."),
)

_HEADINGS = {
    "--model": "Model and machine",
    "--zero": "ZeRO, offload and recomputation",
    "--dtype": "Numbers and optimizer",
    "--framework": "Framework and kernels",
    "--shard-size": "Hierarchy and compression",
    "--tp": "Parallelism",
    "--sync": "Parameter servers",
    "--seq-len": "Batch",
}
"""Headings of the help, by the flag that each begins with."""


class JobCommand(click.Command):
    """A command with ``job_flags``, whose help has them under headings and its own options at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = {name for name, *_ in _FLAGS}
        sections: dict[str, list[tuple[str, str]]] = {}
        own: list[tuple[str, str]] = []
        heading = ""
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            name = param.opts[0]
            heading = _HEADINGS.get(name, heading)
            if record:
                (sections.setdefault(heading, []) if name in names else own).append(record)
        for title, records in {**sections, "Options": own}.items():
            with formatter.section(title):
                formatter.write_dl(records)


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """What the user typed: a job file, or single flags (those not given are absent)."""

    file: Path | None
    given: dict[str, Any]
    module: str | None = None
    """``FILE.py:NAME`` of a module that takes the model's place."""

    def job(self, local: HardwareProfile | None = None, **defaults: Any) -> Job:
        """The job that the file or the flags describe.

        ``local`` is a profile of this machine: what the GPU name ``cpu`` means. ``defaults`` are flags taken when the
        user gave neither them nor a file. Raises ``InputError``.
        """
        place: dict[str, Any] = {"local_gpu": local.gpu, "local_host": local.host} if local else {}
        if self.module is not None:
            return self._traced_job({**defaults, **self.given}, place)
        if self.file is None:
            from estimator.job.options import JobOptions, build_job

            flags = {**defaults, **self.given}
            for name, example in (("model", "llama-3-8b"), ("gpu", "h100-sxm")):
                if name not in flags:
                    raise InputError(
                        f"--{name} is not given; allowed: a name such as {example!r}, or a whole job with --job FILE"
                    )
            return build_job(JobOptions(**flags), **place)
        if self.given:
            flag = "--" + next(iter(self.given)).replace("_", "-")
            raise InputError(f"--job and {flag} are both given; allowed: a job file alone, or flags alone")
        from estimator.job.files import load_job

        return load_job(self.file, **place)

    def _traced_job(self, flags: dict[str, Any], place: dict[str, Any]) -> Job:
        other = "--job" if self.file is not None else "--model" if "model" in flags else None
        if other is not None:
            raise InputError(f"--module and {other} are both given; allowed: one of them")
        if "gpu" not in flags:
            raise InputError("--gpu is not given; allowed: a name such as 'h100-sxm'")
        from zerocast.module_file import traced_job

        assert self.module is not None
        return traced_job(self.module, flags, **place)


def job_and_profile(
    flags: JobFlags, profile_path: Path | None, store_path: Path | None = None, **defaults: Any
) -> tuple[Job, HardwareProfile | None]:
    """The job, and the profile that its forecast uses.

    That is the profile at ``profile_path``; else the newest one beside the store that was measured on the job's GPU;
    else ``None``, the shipped curves. ``defaults`` as in ``JobFlags.job``.
    """
    from dashboard.profiles import local_machine, profile_of, profiles_beside

    chosen = load_profile(profile_path)
    profiles = [chosen] if chosen else profiles_beside(store_path)
    job = flags.job(local_machine(profiles), **defaults)
    return job, chosen or profile_of(job.cluster.gpu.name, profiles)


def job_flags(function: F) -> F:
    """Adds the job's flags; the command receives them as one ``flags: JobFlags``."""

    def collect(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        given = ctx.meta.setdefault("zerocast.job_flags", {})
        if value is not None and _param.name:
            given[_param.name] = value

    @functools.wraps(function)
    def run(*args: Any, job_file: Path | None, **kwargs: Any) -> Any:
        given = click.get_current_context().meta.get("zerocast.job_flags", {})
        return function(*args, flags=JobFlags(file=job_file, given=dict(given)), **kwargs)

    wrapped: Any = click.option(
        "--job", "job_file", type=click.Path(path_type=Path), metavar="FILE", help="TOML or JSON with the whole job."
    )(run)
    for name, kind, metavar, text in reversed(_FLAGS):
        wrapped = click.option(name, type=kind, metavar=metavar, help=text, expose_value=False, callback=collect)(
            wrapped
        )
    return wrapped  # type: ignore[no-any-return]


def module_flag(function: F) -> F:
    """Adds ``--module``; the command's ``flags`` then describe that module's job."""

    @functools.wraps(function)
    def run(*args: Any, flags: JobFlags, module: str | None, **kwargs: Any) -> Any:
        return function(*args, flags=replace(flags, module=module), **kwargs)

    wrapped: Any = click.option(
        "--module",
        metavar="FILE.py:NAME",
        help="In place of --model: a function that gives (module, example_batch), which is traced.",
    )(run)
    return wrapped  # type: ignore[no-any-return]


def json_flag(function: F) -> F:
    """Adds ``--json``; the command receives ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON (bytes, seconds) instead of tables.")(
        function
    )


def profile_flag(function: F) -> F:
    """Adds ``--profile``; the command receives the path, to be loaded with ``load_profile``."""
    return click.option(
        "--profile",
        "profile_path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Hardware profile written by 'zerocast calibrate'.",
    )(function)


def load_profile(path: Path | None) -> HardwareProfile | None:
    """The profile at ``path``; ``None`` when no path was given (the shipped curves are used)."""
    if path is None:
        return None
    from estimator.time.profile_file import load_profile as load

    return load(path)


def store_flag(function: F) -> F:
    """Adds ``--store``; the command receives ``store_path`` (``None``: the user's own store)."""
    return click.option(
        "--store",
        "store_path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Record store; default ~/.zerocast/records.db, or under $ZEROCAST_HOME.",
    )(function)
