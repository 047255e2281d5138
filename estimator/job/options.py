"""A job from the command line's flags: names are looked up, defaults filled in, the parts checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from estimator import catalog
from estimator.catalog.hardware import gbps_to_bytes_per_s
from estimator.errors import InputError
from estimator.job.cluster import Cluster, Gpu, Host
from estimator.job.fields import hints_of, shown, typed, whole
from estimator.job.hf import load_config
from estimator.job.hf_lora import load_adapter
from estimator.job.job import Job
from estimator.job.lora import Lora
from estimator.job.model import ModelSpec
from estimator.job.network import Network
from estimator.job.pipeline import stage_sizes
from estimator.job.strategy import Strategy
from estimator.job.tower import with_tower
from estimator.job.workload import Workload
from estimator.units import MIB

DEFAULT_SEQ_LEN = 4096
"""Longest sequence taken when none is given; models that accept less take their own maximum."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The flags of a job, as typed by a user; ``None`` stands for the default that the field's note names."""

    model: str
    """Catalogue name, ``config.json``, or a folder with one."""
    gpu: str
    """Catalogue name (of a GPU or of a machine type with it), ``"cpu"``, or the name of this machine's calibrated profile."""
    lora_rank: int = 0
    """Of adapters, which alone are trained; 0: there are none."""
    lora_alpha: float = 0.0
    """Default: the rank."""
    lora_dropout: float = 0.0
    lora_targets: str = ""
    """Parts of blocks or projections that have adapters, separated by commas. Default: all."""
    lora_config: str = ""
    """PEFT's ``adapter_config.json``, or its folder, in place of these."""
    gpus: int = 8
    gpus_per_node: int | None = None
    """Default: what is usual for the GPU; on ``cpu`` one node holds all."""
    internode_gbps: float | None = None
    """Network between nodes in gigabits per second and GPU. Default: what is usual for the GPU."""
    nvlink_domain: int = 0
    """GPUs that NVLink joins beyond a node; 0: a node's."""
    nodes_per_leaf: int = 0
    """Nodes under one leaf switch; 0: all."""
    oversubscription: float = 1.0
    """Of leaf switches, towards the spine."""
    rail_optimized: bool = False
    in_network_reduction: bool = False
    hierarchical: bool = False
    """All-gathers and reduce-scatters in two steps, across nodes and inside them."""
    zero: int = 3
    offload: str = "none"
    offload_fraction: float = 1.0
    """Part of the optimizer that the host steps, with offload ``optimizer``."""
    delayed_update: bool = False
    recompute: str = "none"
    recompute_every: int = 1
    """Every k-th block recomputes."""
    activation_offload: bool = False
    """Inputs of blocks that recompute wait in host memory."""
    dtype: str = "bf16"
    grad_dtype: str = "model"
    master_dtype: str = "fp32"
    state_dtype: str = "fp32"
    shard_size: int = 0
    """Data-parallel GPUs that share one sharded copy; 0: all of them."""
    quantized_weights: bool = False
    secondary_shard: int = 0
    quantized_grads: int = 0
    grad_compression: str = "none"
    compression_warmup_steps: int = 0
    sparse_embeddings: bool = False
    tp: int = 1
    sequence_parallel: bool = True
    """With tensor parallelism."""
    pp: int = 1
    pp_schedule: str = "1f1b"
    virtual_pp: int = 1
    pp_layers: str = ""
    """Blocks of each pipeline stage, separated by commas; empty: divided evenly."""
    cp: int = 1
    cp_kind: str = "ulysses"
    """With context parallelism."""
    ep: int = 1
    expert_imbalance: float = 1.0
    """With expert parallelism: the most loaded GPU's rows over the mean."""
    sync: str = "allreduce"
    n_servers: int = 1
    """GPUs that are parameter servers too, with sync ``parameter_server``."""
    staleness: int = 0
    seq_len: int | None = None
    """Default: the model's longest sequence, at most 4096."""
    micro_batch: int = 1
    """Sequences per GPU and pass."""
    global_batch: int | None = None
    """Sequences per step. Default: micro_batch x data-parallel GPUs (no accumulation)."""
    optimizer: str = "adamw"
    optimizer_impl: str = "fused"
    bucket_bytes: int = 64 * MIB
    prefetch_depth: int = 1
    persistent_numel: int = 0
    grad_clip: float = 1.0
    framework: str = "zerocast"
    overlap_comm: bool | None = None
    """With framework deepspeed, as are the next two. Default: DeepSpeed's own."""
    prefetch_numel: int = 0
    live_numel: int = 0
    compile: bool = False
    compile_loss: bool = False
    """With a framework other than zerocast."""
    root_apart: bool = False
    """With framework fsdp2."""
    attention: str = "flash"
    matmul_dtype: str = "model"
    train_tower: bool = False
    """An image-text model's vision tower is held as trained parameters are; else frozen."""
    kernels_off: str = ""
    """Kernels of the runtime to switch off, separated by commas; ``all`` for every one."""


def build_job(options: JobOptions, *, local_gpu: Gpu | None = None, local_host: Host | None = None) -> Job:
    """The ``Job`` that ``options`` describe.

    ``local_gpu`` and ``local_host`` are this machine as ``calibrate`` measured it; ``--gpu cpu`` (or its name) means it.
    Raises ``InputError`` for the first thing that is wrong.
    """
    strategy, nodes, batch = job_parts(options, local_gpu=local_gpu, local_host=local_host)
    model, lora = resolve_model(typed("model", options.model, str)), adapters_of(options)
    model = model if lora is None else replace(model, lora=lora)
    return assemble_job(with_tower(model, trained=options.train_tower), nodes, strategy, batch)


def job_parts(
    options: JobOptions, *, local_gpu: Gpu | None = None, local_host: Host | None = None
) -> tuple[Strategy, Cluster, dict[str, int | None]]:
    """What ``options`` say beside the model: strategy, cluster, and the sizes that ``assemble_job`` takes."""
    hints = hints_of(JobOptions)
    o = JobOptions(**{f.name: typed(f.name, getattr(options, f.name), hints[f.name]) for f in fields(JobOptions)})
    strategy = Strategy(
        zero_stage=o.zero,
        offload=o.offload,  # type: ignore[arg-type]  # Strategy checks the choice
        offload_fraction=o.offload_fraction,
        delayed_update=o.delayed_update,
        recompute=o.recompute,
        recompute_every=o.recompute_every,
        activation_offload=o.activation_offload,
        dtype=o.dtype,  # type: ignore[arg-type]
        grad_dtype=o.grad_dtype,  # type: ignore[arg-type]
        master_dtype=o.master_dtype,  # type: ignore[arg-type]
        state_dtype=o.state_dtype,  # type: ignore[arg-type]
        optimizer=o.optimizer,  # type: ignore[arg-type]
        optimizer_impl=o.optimizer_impl,  # type: ignore[arg-type]
        shard_size=o.shard_size,
        quantized_weights=o.quantized_weights,
        secondary_shard=o.secondary_shard,
        quantized_grads=o.quantized_grads,
        grad_compression=o.grad_compression,  # type: ignore[arg-type]
        compression_warmup_steps=o.compression_warmup_steps,
        sparse_embeddings=o.sparse_embeddings,
        tp=o.tp,
        sequence_parallel=o.sequence_parallel,
        pp=o.pp,
        pp_schedule=o.pp_schedule,  # type: ignore[arg-type]
        virtual_pp=o.virtual_pp,
        pp_layers=stage_sizes(o.pp_layers),
        cp=o.cp,
        cp_kind=o.cp_kind,  # type: ignore[arg-type]
        ep=o.ep,
        expert_imbalance=o.expert_imbalance,
        sync=o.sync,  # type: ignore[arg-type]
        n_servers=o.n_servers,
        staleness=o.staleness,
        bucket_bytes=o.bucket_bytes,
        prefetch_depth=o.prefetch_depth,
        persistent_numel=o.persistent_numel,
        grad_clip=o.grad_clip,
        framework=o.framework,  # type: ignore[arg-type]
        overlap_comm=o.overlap_comm,
        prefetch_numel=o.prefetch_numel,
        live_numel=o.live_numel,
        compile=o.compile,
        compile_loss=o.compile_loss,
        root_apart=o.root_apart,
        attention=o.attention,  # type: ignore[arg-type]
        matmul_dtype=o.matmul_dtype,  # type: ignore[arg-type]
        kernels_off=tuple(name.strip() for name in o.kernels_off.split(",") if name.strip()),
    )
    sizes = {"n_gpus": o.gpus, "gpus_per_node": o.gpus_per_node, "internode_gbps": o.internode_gbps}
    nodes = resolve_cluster(o.gpu, sizes, local_gpu=local_gpu, local_host=local_host)  # type: ignore[arg-type]
    network = Network(
        nvlink_domain=o.nvlink_domain,
        nodes_per_leaf=o.nodes_per_leaf,
        oversubscription=o.oversubscription,
        rail_optimized=o.rail_optimized,
        in_network_reduction=o.in_network_reduction,
        hierarchical=o.hierarchical,
    )
    if not network.is_plain:
        nodes = replace(nodes, network=network)
    return strategy, nodes, {"seq_len": o.seq_len, "micro_batch": o.micro_batch, "global_batch": o.global_batch}


def adapters_of(options: JobOptions) -> Lora | None:
    """What ``options`` say of adapters. Raises ``InputError`` where they say it twice, or in part."""
    given = {field: getattr(options, f"lora_{field}") for field in ("alpha", "dropout", "targets")}
    named = [f"lora_{field}" for field, value in given.items() if value]
    rank = typed("lora_rank", options.lora_rank, int)
    if options.lora_config:
        if rank or named:
            raise InputError(
                f"lora_config and {'lora_rank' if rank else named[0]} are both given; allowed: one of them"
            )
        return load_adapter(typed("lora_config", options.lora_config, str))
    if rank == 0 and named:
        raise InputError(f"{named[0]} is given without lora_rank, which it needs")
    if rank == 0:
        return None
    targets = tuple(
        name.strip() for name in typed("lora_targets", options.lora_targets, str).split(",") if name.strip()
    )
    return Lora(
        rank=rank, alpha=typed("lora_alpha", options.lora_alpha, float),
        dropout=typed("lora_dropout", options.lora_dropout, float), targets=targets or ("all",),
    )  # fmt: skip


def resolve_model(name: str) -> ModelSpec:
    """The model in the catalogue (which comes first), or in the ``config.json`` (or folder with one) at the path ``name``."""
    if catalog.find_model(name):
        return catalog.model(name)
    try:
        is_path = Path(name).exists() or name.endswith((".json", "/")) or name.startswith(("/", "./", "../"))
    except (OSError, ValueError):
        is_path = False
    return load_config(Path(name)) if is_path else catalog.model(name)


def resolve_cluster(
    gpu_name: str, sizes: dict[str, int | float | None], *, local_gpu: Gpu | None = None, local_host: Host | None = None
) -> Cluster:
    """The cluster of ``sizes`` (``n_gpus``, ``gpus_per_node``, ``internode_gbps``) from a GPU's name."""
    name = gpu_name.strip().lower()
    if local_gpu is not None and local_host is not None and name in ("cpu", local_gpu.name.lower()):
        return local_cluster(local_gpu, local_host, sizes)
    if name == "cpu":
        raise InputError("gpu is 'cpu', but this machine has not been measured; run `zerocast calibrate` first")
    return catalog.cluster(gpu_name, **sizes)  # type: ignore[arg-type]


def local_cluster(gpu: Gpu, host: Host, sizes: dict[str, int | float | None]) -> Cluster:
    """Processes on this machine; more than ``gpus_per_node`` of them need a given network."""
    n_gpus = whole("gpus", sizes["n_gpus"])
    per_node = n_gpus if sizes["gpus_per_node"] is None else whole("gpus_per_node", sizes["gpus_per_node"])
    rate = gpu.link_bytes_per_s
    if sizes["internode_gbps"] is not None:
        rate = gbps_to_bytes_per_s(sizes["internode_gbps"])
    elif n_gpus > per_node:
        raise InputError(
            f"internode_gbps is not given; several nodes of {shown(gpu.name)} need it, allowed: a number > 0"
        )
    return Cluster(gpu=gpu, n_gpus=n_gpus, gpus_per_node=per_node, internode_bytes_per_s=rate, host=host)


def _usual_seq_len(model: ModelSpec) -> int:
    return min(DEFAULT_SEQ_LEN, model.max_positions) if model.traced is None else model.traced.seq_len


def assemble_job(model: ModelSpec, cluster: Cluster, strategy: Strategy, batch: dict[str, int | None]) -> Job:
    """Puts the parts together and fills in the defaults of ``batch`` (``seq_len``, ``micro_batch``, ``global_batch``).

    Raises ``InputError`` when the GPU has no fast path for the dtype, or when sizes do not fit together.
    """
    peaks = cluster.gpu.peak_flops
    if strategy.dtype not in peaks and strategy.dtype != "fp32":
        usable = [dtype for dtype in ("fp32", "fp16", "bf16") if dtype in peaks]
        raise InputError(
            f"dtype is {strategy.dtype!r}, for which {cluster.gpu.name} has no fast path; allowed: {', '.join(usable)}"
        )
    usual = 1 if model.traced is None else model.traced.micro_batch_size
    micro_batch = usual if batch.get("micro_batch") is None else whole("micro_batch", batch["micro_batch"])
    seq_len, global_batch = batch.get("seq_len"), batch.get("global_batch")
    dp = max(1, cluster.n_gpus // strategy.model_parallel)
    workload = Workload(
        seq_len=_usual_seq_len(model) if seq_len is None else seq_len,
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * dp if global_batch is None else global_batch,
    )
    return Job(model=model, workload=workload, strategy=strategy, cluster=cluster)
