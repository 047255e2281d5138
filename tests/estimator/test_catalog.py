"""The catalogue: plausible dense figures, each with a source; names, aliases, and clusters from names."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest

from estimator import catalog
from estimator.catalog.hardware import DATA, load_data
from estimator.errors import InputError
from estimator.sharding.units import count_params, model_units
from estimator.units import GIB

GPUS = load_data("gpus.json")
MACHINES = load_data("machines.json")
MODELS = {
    name: entry for file in (DATA / "models").glob("*.json") for name, entry in json.loads(file.read_text()).items()
}

MATRIX_FLOP_PER_CLOCK_PER_SM = {
    "volta": 1024,
    "ampere": 2048,
    "cdna2": 1024,
    "cdna4": 4096,
    "ada": 1024,
    "hopper": 4096,
    "blackwell": 8192,
    "cdna3": 2048,
}
"""Dense 16-bit FLOP of one SM (or CU) per clock."""
SLOWER = {"rtx-4090": 2, "rtx-3090": 4, "a10g": 4, "rtx-5090": 16, "h20": 4}
"""Consumer chips and their kin accumulate in fp32 at a part of that rate; H20 is capped."""


@pytest.mark.parametrize("name", GPUS)
def test_gpu_figures(name: str) -> None:
    gpu, entry = catalog.gpu(name), GPUS[name]
    for field in (
        "memory_bytes",
        "memory_bytes_per_s",
        "n_sms",
        "l2_bytes",
        "link_bytes_per_s",
        "host_link_bytes_per_s",
        "context_bytes",
    ):
        assert 0 < getattr(gpu, field) < 1e16, field
    assert entry["source"] and all(url.startswith("https://") for url in entry["source"])
    assert entry["date"].startswith("20")
    assert all(field.split(".")[0] in entry for field in entry["unsourced"])
    assert gpu.context_bytes < 1e9 < gpu.memory_bytes
    assert gpu.host_link_bytes_per_s <= gpu.link_bytes_per_s < gpu.memory_bytes_per_s


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_dense(name: str) -> None:
    """A sparse figure would need twice the clock: 16-bit peak / (SMs x FLOP per clock) must be a real clock rate."""
    gpu = catalog.gpu(name)
    peaks = gpu.peak_flops
    rate = MATRIX_FLOP_PER_CLOCK_PER_SM[gpu.arch] / SLOWER.get(name, 1)
    assert 1.2e9 < peaks["fp16"] / (gpu.n_sms * rate) < 2.6e9
    order = [peaks[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8") if dtype in peaks]
    assert order == sorted(order)
    if "bf16" in peaks:
        assert peaks["bf16"] == peaks["fp16"]
    if "fp8" in peaks:
        assert peaks["fp8"] / peaks["bf16"] == pytest.approx(2, rel=0.02)


def test_known_facts() -> None:
    assert catalog.gpu("h100-sxm").memory_bytes == 81559 << 20
    assert catalog.gpu("h200").memory_bytes == 143771 << 20
    assert catalog.gpu("h100-sxm").peak_flops["bf16"] == 989.4e12
    assert "bf16" not in catalog.gpu("v100").peak_flops and "tf32" not in catalog.gpu("v100").peak_flops
    assert "fp8" not in catalog.gpu("a100").peak_flops


def test_names_and_aliases() -> None:
    assert catalog.gpu("H100") == catalog.gpu("h100-sxm") == catalog.gpu(" h100_SXM ")
    assert catalog.gpu("a100").name == "a100-80"
    assert catalog.gpu("v100").name == "v100-32"
    spellings = [alias for name, entry in GPUS.items() for alias in (name, *entry["aliases"])]
    assert len(spellings) == len(set(spellings))
    spellings = [alias.lower() for name, entry in MODELS.items() for alias in (name, *entry["aliases"])]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    "name",
    ["h1000", "", "a100 80 gb!", "cpu", "x" * 10_000, "tpu\nv5", None, 7, 10**6000],
    ids=lambda value: type(value).__name__,
)
def test_unknown_gpu_is_an_error(name: object) -> None:
    with pytest.raises(InputError, match="gpu is") as caught:
        catalog.gpu(name)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_nearest_names() -> None:
    with pytest.raises(InputError, match="did you mean 'h100'"):
        catalog.gpu("h10")
    with pytest.raises(InputError, match="did you mean 'llama-3-8b'"):
        catalog.model("lama-3-8b")


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_one_machine(name: str) -> None:
    assert sum(name in machine["gpus"] for machine in MACHINES.values()) == 1
    host = catalog.host_of(name)
    assert host.memory_bytes > 64 * GIB and host.n_cores >= 16 and 1e10 < host.memory_bytes_per_s < 2e13 and host.source


@pytest.mark.parametrize("name", MACHINES)
def test_machine_entries(name: str) -> None:
    machine = MACHINES[name]
    assert machine["source"] and machine["date"].startswith("20")
    assert set(machine["unsourced"]) <= set(machine)
    assert machine["gpus_per_node"] % machine["gpus_per_host"] == 0
    assert machine["internode_bytes_per_s_per_gpu"] is None or 1e9 < machine["internode_bytes_per_s_per_gpu"] < 2e11


def test_cluster_from_names() -> None:
    cluster = catalog.cluster("h100", 64)
    assert (cluster.n_nodes, cluster.gpus_per_node, cluster.internode_bytes_per_s) == (8, 8, 50e9)
    assert "gpu.context_bytes" in cluster.unsourced and "host.memory_bytes_per_s" in cluster.unsourced
    assert catalog.cluster("h100", 16, gpus_per_node=4, internode_gbps=100).internode_bytes_per_s == 12.5e9
    assert catalog.cluster("gb200", 8).host.memory_bytes == 2 * 960_000_000_000
    assert catalog.cluster("gb200", 144).host.n_cores == 18 * 144


def test_cluster_refusals() -> None:
    with pytest.raises(InputError, match="multiple of gpus_per_node"):
        catalog.cluster("h100", 12)
    with pytest.raises(InputError, match="internode_gbps is not given"):
        catalog.cluster("rtx-4090", 16)
    assert catalog.cluster("rtx-4090", 16, internode_gbps=100).n_nodes == 2
    for bad in (0, -1, math.nan, math.inf, "fast", 1e300):
        with pytest.raises(InputError, match="internode_gbps"):
            catalog.cluster("h100", 16, internode_gbps=bad)  # type: ignore[arg-type]
    for bad in (0, -8, 2.5, "8", True):
        with pytest.raises(InputError, match="gpus"):
            catalog.cluster("h100", bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_model_counts_are_exact(name: str) -> None:
    entry, spec = MODELS[name], catalog.model(name)
    assert spec.name == name
    assert count_params(model_units(spec)) == entry["n_params"] == catalog.published_params(name)
    assert entry["source"] and entry["date"].startswith("20") and "unsourced" in entry


def test_usual_models_are_there() -> None:
    for name in ("gpt2", "gpt2-xl", "opt-66b", "bloom", "gpt-neox-20b", "mpt-7b", "mpt-30b", "llama-2-70b",
                 "llama-3-8b", "llama-3.1-405b", "mistral-7b", "qwen2.5-32b", "qwen3-8b", "gemma-2-27b"):  # fmt: skip
        assert name in catalog.model_names()
    assert catalog.model("meta-llama/Meta-Llama-3-8B") == catalog.model("LLAMA-3-8B")


def test_project_models_have_the_promised_sizes() -> None:
    assert catalog.published_params("gpt-30m") == 29_676_544
    assert catalog.published_params("llama-30m") == 30_417_408
    n_params = catalog.published_params("zero-paper-7.5b")
    # Rajbhandari et al. 2020, Figure 1: 16, 4 + 12/64, 2 + 14/64 and 16/64 bytes per parameter on 64 GPUs
    gb = [round(n_params * factor / 1e9, 1) for factor in (16, 4 + 12 / 64, 2 + 14 / 64, 16 / 64)]
    assert gb == [120.0, 31.4, 16.6, 1.9]


def test_look_ups_are_fast() -> None:
    catalog.model("llama-3-8b"), catalog.gpu("h100")
    start = time.perf_counter()
    for name in catalog.model_names():
        catalog.model(name)
    for name in catalog.gpu_names():
        catalog.gpu(name)
    assert (time.perf_counter() - start) / len(catalog.model_names()) < 2e-3


def test_import_is_light() -> None:
    code = "import sys, estimator.job, estimator.catalog, estimator.job.files; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_gpus_have_a_rated_power() -> None:
    assert catalog.gpu("h100-sxm").tdp_watts == 700 and catalog.gpu("h100-96").tdp_watts == 500
    assert all(50 < catalog.gpu(name).tdp_watts < 2000 for name in GPUS)


@pytest.mark.parametrize("name", catalog.machine_names())
def test_machine_types(name: str) -> None:
    machine = catalog.machine_type(name)
    assert machine.gpu in GPUS and machine.source and machine.date.startswith("20")
    assert set(machine.unsourced) <= {"network_bytes_per_s", "n_nics", "host_cores", "host_memory_bytes", "nvme_bytes"}
    if machine.usd_per_hour is not None:
        assert machine.price_date and machine.price_region and machine.price_source.startswith("https://")
        assert machine.usd_per_gpu_hour is not None and 0.3 < machine.usd_per_gpu_hour < 20
    if machine.network_bytes_per_s_per_gpu is not None:
        assert 1e8 < machine.network_bytes_per_s_per_gpu <= 1.125e11


def test_machine_types_by_name() -> None:
    p5 = catalog.machine_type("AWS_p5.48xlarge")
    assert (p5.gpu, p5.n_gpus, p5.usd_per_gpu_hour, p5.network_bytes_per_s_per_gpu) == ("h100-sxm", 8, 6.88, 50e9)
    assert "lambda-gpu-1x-gh200" in catalog.machine_names("gh200")
    with pytest.raises(InputError, match=r"did you mean 'aws-p5\.48xlarge'"):
        catalog.machine_type("aws-p5.48xlarg")


def test_clusters_of_machine_types() -> None:
    p4d = catalog.cluster("aws-p4d.24xlarge", 16)
    assert (p4d.gpu.name, p4d.gpus_per_node, p4d.internode_bytes_per_s, p4d.host.n_cores) == ("a100-40", 8, 6.25e9, 48)
    assert catalog.cluster("aws-p4d.24xlarge", 16, internode_gbps=100).internode_bytes_per_s == 12.5e9
    tray = catalog.cluster("azure-nd128isr-gb200-v6", 16)
    assert (tray.gpus_per_node, tray.n_nodes) == (72, 1), "trays of a rack stay one NVLink domain"
    assert tray.host.memory_bytes == 4 * 966_367_641_600
