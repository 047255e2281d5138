"""The door: flags and job files give a valid ``Job`` or one ``InputError`` of one line, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job
from estimator.job.cluster import Gpu, Host
from estimator.job.files import job_from_dict, job_to_dict, load_job
from estimator.job.hf import spec_from_config
from estimator.job.options import JobOptions, build_job

CPU = Gpu(name="my-laptop", arch="cpu", memory_bytes=8 << 30, memory_bytes_per_s=1e10, peak_flops={"fp32": 1e11, "bf16": 5e10},
          n_sms=2, l2_bytes=1 << 20, link_bytes_per_s=1e9, host_link_bytes_per_s=1e10)  # fmt: skip
HOST = Host(memory_bytes=16 << 30, n_cores=2, memory_bytes_per_s=1e10)

TOML = """
[model]
name = "llama-3-8b"
[workload]
seq_len = 2048
micro_batch = 2
[strategy]
zero = 2
recompute = "full"
[cluster]
gpu = "h100"
gpus = 16
"""


def flags(**changes: Any) -> JobOptions:
    return JobOptions(**{"model": "gpt2", "gpu": "h100", **changes})


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_of_the_flags() -> None:
    job = build_job(flags(model="llama-3-8b", gpus=16, micro_batch=2))
    assert (job.workload.seq_len, job.workload.global_batch_size, job.n_micro_batches) == (4096, 32, 1)
    assert (job.strategy.zero_stage, job.strategy.dtype, job.cluster.gpus_per_node) == (3, "bf16", 8)
    assert build_job(flags()).workload.seq_len == 1024


def test_every_catalogue_name_makes_a_job() -> None:
    for gpu in catalog.gpu_names():
        dtype = "bf16" if "bf16" in catalog.gpu(gpu).peak_flops else "fp16"
        job = build_job(flags(gpu=gpu, dtype=dtype))
        assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job
    for model in catalog.model_names():
        assert build_job(flags(model=model)).model.name == model


def test_model_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 4, "vocab_size": 9}'
    )
    job = build_job(flags(model=str(tmp_path)))
    assert job == build_job(flags(model=str(tmp_path / "config.json")))
    assert job.workload.seq_len == 4
    assert "does not exist" in refusal(lambda: build_job(flags(model=str(tmp_path / "other.json"))))


def test_cpu_needs_calibration() -> None:
    assert "zerocast calibrate" in refusal(lambda: build_job(flags(gpu="cpu")))
    job = build_job(flags(gpu="cpu", gpus=2), local_gpu=CPU, local_host=HOST)
    assert job.cluster.gpu == CPU and job.cluster.host == HOST and job.cluster.gpus_per_node == 2
    assert job == build_job(flags(gpu="My-Laptop", gpus=2), local_gpu=CPU, local_host=HOST)
    assert job_from_dict(job_to_dict(job)) == job
    assert "internode_gbps" in refusal(
        lambda: build_job(flags(gpu="cpu", gpus=4, gpus_per_node=2), local_gpu=CPU, local_host=HOST)
    )
    assert "no fast path" in refusal(lambda: build_job(flags(gpu="cpu", dtype="fp16"), local_gpu=CPU, local_host=HOST))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "v100", "dtype": "bf16"}, "dtype is 'bf16', for which v100-32 has no fast path; allowed: fp32, fp16"),
        ({"gpu": "h1000"}, "did you mean 'h100'"),
        ({"model": "lama-3-8b"}, "did you mean 'llama-3-8b'"),
        ({"model": "missing/config.json"}, "does not exist"),
        ({"zero": 4}, "zero is 4; allowed: 0, 1, 2 or 3"),
        ({"zero": "3"}, "zero is '3'"),
        ({"zero": 2.0}, "zero is 2.0"),
        ({"offload": "optimizer,params"}, "did you mean 'optimizer,param'"),
        ({"recompute": "all"}, "recompute is 'all'"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 12}, "multiple of gpus_per_node = 8"),
        ({"tp": 3}, "a divisor of gpus = 8"),
        ({"global_batch": 12}, "the nearest is"),
        ({"seq_len": 2048}, "at most 1024"),
        ({"micro_batch": None}, "micro_batch is None"),
        ({"grad_clip": math.nan}, "grad_clip"),
        ({"internode_gbps": -1}, "internode_gbps"),
        ({"model": "a\nb"}, "model is 'a\\nb'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_wrong_flags(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: build_job(flags(**changes)))


def test_toml_and_json_files(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    job = load_job(tmp_path / "job.toml")
    assert job == build_job(flags(model="llama-3-8b", seq_len=2048, micro_batch=2, zero=2, recompute="full", gpus=16))
    (tmp_path / "job.json").write_text(json.dumps(job_to_dict(job)))
    assert load_job(tmp_path / "job.json") == job
    assert load_job(tmp_path / "job.json").key == job.key


def test_config_path_is_relative_to_the_job_file(tmp_path: Path) -> None:
    config = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 4, "vocab_size": 9}'
    (tmp_path / "tiny.json").write_text(config)
    (tmp_path / "job.toml").write_text('[model]\nconfig = "tiny.json"\n[cluster]\ngpu = "cpu"\ngpus = 1\n')
    assert load_job(tmp_path / "job.toml", local_gpu=CPU, local_host=HOST).model.name == "tiny"
    assert "calibrate" in refusal(lambda: load_job(tmp_path / "job.toml"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[strategy]", "[stratgy]", "did you mean 'strategy'"),
        ("zero = 2", "zero_stag = 2", "did you mean 'zero_stage'"),
        ("zero = 2", "zero = 2\nzero_stage = 2", "twice"),
        ("zero = 2", 'zero = "2"', "strategy.zero_stage is '2'"),
        ("seq_len = 2048", "seq_len = 20.5", "workload.seq_len is 20.5"),
        ("seq_len = 2048", "seq_length = 2048", "did you mean 'seq_len'"),
        ("gpus = 16", "gpus_per_nod = 16", "did you mean 'gpus_per_node'"),
        ("gpus = 16", "gpus = true", "gpus is True"),
        ('gpu = "h100"', "", "cluster has no 'gpu'"),
        ('gpu = "h100"', "gpu = {name = 'x'}", "cluster.gpu has no"),
        ('name = "llama-3-8b"', "", "exactly one of"),
        ('name = "llama-3-8b"', "name = 3", "model.name is 3"),
        ('name = "llama-3-8b"', 'name = "a"\nconfig = "b"', "exactly one of"),
        ("[workload]", "[workload", "not valid TOML"),
        ("seq_len = 2048", "seq_len = " + "9" * 5000, "cannot be read"),
    ],
    ids=lambda value: value[:25],
)
def test_wrong_job_files(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(TOML.replace(old, new))
    assert words in refusal(lambda: load_job(path))


def test_wrong_paths(tmp_path: Path) -> None:
    assert "allowed: .toml, .json" in refusal(lambda: load_job(tmp_path / "job.yaml"))
    assert "does not exist" in refusal(lambda: load_job(tmp_path / "job.toml"))
    (tmp_path / "folder.toml").mkdir()
    assert "is a folder" in refusal(lambda: load_job(tmp_path / "folder.toml"))
    (tmp_path / "list.json").write_text("[]")
    assert "a table" in refusal(lambda: load_job(tmp_path / "list.json"))


def test_full_tables_are_checked() -> None:
    data = job_to_dict(build_job(flags()))
    for section, key, value in (
        ("model", "gated_mlp", "yes"), ("model", "n_layers", 10**9), ("model", "norm_eps", math.nan),
        ("model", "norm", "batchnorm"), ("cluster", "n_gpus", 2.0), ("cluster", "internode_bytes_per_s", "fast"),
    ):  # fmt: skip
        wrong = copy.deepcopy(data)
        wrong[section][key] = value
        assert key in refusal(lambda wrong=wrong: job_from_dict(wrong)) or key == "n_gpus"
    for key, value in (
        ("memory_bytes", -1),
        ("peak_flops", {}),
        ("peak_flops", {"fp32": 0}),
        ("arch", 3),
        ("memory_byte", 1),
    ):
        wrong = copy.deepcopy(data)
        wrong["cluster"]["gpu"][key] = value
        assert key in refusal(lambda wrong=wrong: job_from_dict(wrong))


# ---- property tests: at least 2,000 random jobs --------------------------------------------------------------------

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([2**31, 2**63, 10**40, 10**6000, -(2**70)]),
    st.floats(), st.text(max_size=8), st.sampled_from(["3", "all", "\n", "a\0b", "x" * 9999, "../..", "/", "config.json"]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.just(b"bytes"),
)  # fmt: skip
GOOD_FLAGS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["gpt2", "llama-3-8b", "gemma-2-2b", "opt-350m", "nope"]),
    "gpu": st.sampled_from(["h100", "V100", "gb200", "rtx-4090", "cpu", "h"]),
    "gpus": st.sampled_from([1, 2, 8, 16, 24, 144, 10_000]),
    "gpus_per_node": st.sampled_from([None, 1, 4, 8]),
    "internode_gbps": st.sampled_from([None, 100, 0.5]),
    "zero": st.integers(0, 3),
    "offload": st.sampled_from(["none", "optimizer", "optimizer,param"]),
    "recompute": st.sampled_from(["none", "selective", "full"]),
    "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
    "tp": st.sampled_from([1, 1, 1, 2]),
    "pp": st.just(1),
    "cp": st.sampled_from([1, 1, 1, 2]),
    "cp_kind": st.sampled_from(["ulysses", "ring"]),
    "ep": st.just(1),
    "seq_len": st.sampled_from([None, 1, 512, 5000]),
    "micro_batch": st.integers(1, 3),
    "global_batch": st.sampled_from([None, None, 16, 48]),
    "optimizer": st.sampled_from(["adamw", "adam", "sgd"]),
    "bucket_bytes": st.sampled_from([1, 1 << 26]),
    "prefetch_depth": st.integers(0, 2),
    "grad_clip": st.sampled_from([0, 1.0]),
}
GOOD_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
               "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 100, "head_dim": 16,
               "max_position_embeddings": 32, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5.0}, "hidden_act": "silu",
               "tie_word_embeddings": True, "attention_bias": False, "rms_norm_eps": 1e-5}  # fmt: skip
QUIET = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def outcome(call: Callable[[], object]) -> str:
    """``"taken"`` or ``"refused"``; any other exception, or a text of several lines, fails the test."""
    try:
        call()
    except InputError as error:
        assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))[:300]
        return "refused"
    return "taken"


@st.composite
def random_flags(draw: st.DrawFn) -> JobOptions:
    """Mostly good flags; sometimes one or two of them are junk."""
    chosen = {name: draw(good) for name, good in GOOD_FLAGS.items()}
    for name in draw(st.lists(st.sampled_from(sorted(GOOD_FLAGS)), max_size=2)):
        chosen[name] = draw(JUNK)
    return JobOptions(**chosen)


def paths_of(data: Any) -> list[tuple[str, ...]]:
    """Every key of nested tables as a path."""
    if not isinstance(data, dict):
        return []
    return [path for key, value in data.items() for path in [(key,), *((key, *rest) for rest in paths_of(value))]]


@st.composite
def spoiled(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """``good`` with up to three keys replaced by junk, removed, or added."""
    data = copy.deepcopy(good)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        paths = paths_of(data)
        if not paths:
            break
        *folder, key = draw(st.sampled_from(paths))
        table = data
        for step in folder:
            table = table[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            table.pop(key)
        else:
            table[key if action == "replace" else draw(st.text(max_size=6))] = draw(JUNK)
    return data


def test_random_flags_make_a_job_or_one_sentence() -> None:
    seen: Counter[str] = Counter()

    @settings(QUIET, max_examples=1200)
    @given(random_flags())
    def throw(options: JobOptions) -> None:
        def call() -> None:
            job = build_job(options, local_gpu=CPU, local_host=HOST)
            assert isinstance(job, Job) and len(job.key) == 16
            assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job

        seen[outcome(call)] += 1

    throw()
    assert seen.total() >= 1200 and seen["taken"] >= 50 and seen["refused"] >= 200, seen


def test_random_job_tables_make_a_job_or_one_sentence() -> None:
    seen: Counter[str] = Counter()
    full = job_to_dict(build_job(flags()))
    short = {
        "model": {"name": "gpt2"},
        "cluster": {"gpu": "h100", "gpus": 8},
        "strategy": {"zero": 1},
        "workload": {"seq_len": 64},
    }

    @settings(QUIET, max_examples=800)
    @given(st.one_of(spoiled(full), spoiled(short)))
    def throw(data: dict[str, Any]) -> None:
        def call() -> None:
            job = job_from_dict(data)
            assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job

        seen[outcome(call)] += 1

    throw()
    assert seen.total() >= 800 and seen["taken"] >= 30 and seen["refused"] >= 200, seen


def test_random_configs_make_a_model_or_one_sentence() -> None:
    seen: Counter[str] = Counter()

    @settings(QUIET, max_examples=800)
    @given(
        spoiled(GOOD_CONFIG), st.sampled_from([None, "gemma3_text", "mpt", "gpt2", "opt", "qwen2", "bloom", "gpt_neox"])
    )
    def throw(config: dict[str, Any], family: str | None) -> None:
        if family:
            config = {**config, "model_type": family, "architectures": None, "n_positions": 8, "n_layer": 1, "seq_length": 4,
                      "ffn_dim": 8, "max_seq_len": 5, "attn_config": config.get("rope_parameters")}  # fmt: skip
        seen[outcome(lambda: spec_from_config(config))] += 1

    throw()
    assert seen.total() >= 800 and seen["taken"] >= 50 and seen["refused"] >= 200, seen


@pytest.mark.parametrize(
    "junk",
    [
        None,
        3,
        "x",
        [],
        {1: 2},
        {"a\rb": 1},
        {"model": 3},
        {"model": {}, "cluster": []},
        {"model": {"name": []}, "cluster": {}},
    ],
)
def test_tables_that_are_none(junk: Any) -> None:
    refusal(lambda: job_from_dict(junk))


def test_options_are_the_flags_of_the_issue() -> None:
    names = {field.name for field in dataclasses.fields(JobOptions)}
    assert {"model", "gpu", "gpus", "gpus_per_node", "zero", "offload", "recompute", "dtype", "tp", "pp", "cp", "ep", "seq_len",
            "micro_batch", "global_batch"} <= names  # fmt: skip


def test_the_network_of_a_job() -> None:
    assert build_job(flags()).cluster.network.is_plain
    job = build_job(flags(gpu="h100-sxm", gpus=64, nodes_per_leaf=4, oversubscription=2.0, rail_optimized=True))
    assert (job.cluster.network.nodes_per_leaf, job.cluster.network.oversubscription) == (4, 2.0)
    assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job
    assert job.key == build_job(flags(gpu="h100-sxm", gpus=64)).key, (
        "figures of the network are no part of a job's identity"
    )
    table = {
        "model": {"name": "llama-3-8b"},
        "cluster": {"gpu": "gb200", "gpus": 72, "gpus_per_node": 4, "network": {"nvlink_domain": 72}},
    }
    assert job_from_dict(table).cluster.gpus_per_domain == 72
    for wrong, word in (
        ({"oversubscription": 0.5}, "from 1 to 1000"), ({"oversubscription": 2.0}, "without nodes_per_leaf"),
        ({"nvlink_domain": 12}, "multiple of gpus_per_node"), ({"nodes_per_leaf": -1}, "nodes_per_leaf is -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            build_job(flags(gpu="h100-sxm", gpus=64, **wrong))
