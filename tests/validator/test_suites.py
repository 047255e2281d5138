"""Suites: shipped ones make sense, the most informative cases come first, nothing is left out silently."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Gpu, Host
from estimator.predict import lay_out, memory_of, predict
from estimator.units import GIB
from validator import suites
from validator.suites import Boundary, Place, Suite, expand, load_suite, suite_names

H200 = Place(gpu_here="h200", free_host_bytes=120 * GIB, nvme_folder="nvme")


def local_machine() -> Place:
    """A machine with a profile of its processor, as ``calibrate`` makes one."""
    gpu = Gpu(
        name="cpu", arch="cpu", memory_bytes=8 * GIB, memory_bytes_per_s=1e10, peak_flops={"fp32": 1e11, "bf16": 1e11}, n_sms=2,
        l2_bytes=1 << 20, link_bytes_per_s=1e9, host_link_bytes_per_s=1e10,
    )  # fmt: skip
    return Place(
        gpu_here="h200", local_gpu=gpu, local_host=Host(memory_bytes=8 * GIB, n_cores=2, memory_bytes_per_s=1e10)
    )


def small(**matrix: object) -> Suite:
    shared = {"backend": "fake", "gpu": "h200", "model": "gpt2", "seq_len": 64, "gpus": 8}
    return Suite(name="s", about="", combinations=tuple(suites._product("s", {**shared, **matrix}, 1000)))


@pytest.fixture
def write(tmp_path):
    def to_file(content: str) -> str:
        (tmp_path / "mine.toml").write_text(content)
        return str(tmp_path / "mine.toml")

    return to_file


@pytest.mark.parametrize("name", [name for name in suite_names() if not name.startswith("kernels")])
def test_a_shipped_suite_runs_on_its_machine(name):
    suite = load_suite(name)
    plan = expand(
        replace(suite, combinations=suite.combinations[::7]), local_machine() if name in ("cpu", "parity") else H200
    )
    assert suite.about and (plan.cases or plan.boundaries)
    allowed = ("the same step as", "it would pin")
    assert [item.reason for item in plan.left_out if not item.reason.startswith(allowed)] == []
    fitting = [b.forecast() > 0 for b in plan.boundaries] + [
        bool(predict(c.job).fits)
        for c in plan.cases[:40]
        if c.on_cuda and not c.nvme_folder  # whose time is not known
    ]
    assert not fitting or sum(fitting) / len(fitting) > 0.6


def test_the_memory_suite_shows_every_value_of_every_axis_early():
    suite = load_suite("memory")
    assert len(suite.combinations) > 2000
    cases = expand(replace(suite, combinations=suite.combinations[::7]), H200).cases  # a seventh, to be quick
    axes = {
        "model": lambda c: c.job.model.name, "world": lambda c: c.job.dp, "stage": lambda c: c.job.strategy.zero_stage,
        "offload": lambda c: c.job.strategy.offload, "recompute": lambda c: c.job.strategy.recompute,
        "dtype": lambda c: c.job.strategy.dtype, "micro_batch": lambda c: c.job.workload.micro_batch_size,
    }  # fmt: skip
    for name, value in axes.items():
        assert {value(c) for c in cases[:12]} == {value(c) for c in cases}, name
    peaks = [memory_of(lay_out(c.job)).peak_bytes / c.job.cluster.gpu.memory_bytes for c in cases]
    first_hopeless = next((i for i, share in enumerate(peaks) if share > suites.HOPELESS), len(peaks))
    assert all(share > suites.HOPELESS for share in peaks[first_hopeless:])


def test_pairs_are_covered_early_and_every_case_comes_once():
    settings = [
        dict(zip("abcd", values, strict=True)) for values in itertools.product(range(4), range(3), range(3), range(2))
    ]
    order = list(suites.most_informative_first(settings))
    assert sorted(order) == list(range(72))
    pairs = {(p, q, s[p], s[q]) for s in settings for p, q in itertools.combinations("abcd", 2)}
    seen = {(p, q, s[p], s[q]) for s in (settings[i] for i in order[:18]) for p, q in itertools.combinations("abcd", 2)}
    assert seen == pairs
    assert list(suites.most_informative_first([{"a": 1}])) == [0] and list(suites.most_informative_first([])) == []
    assert sorted(suites.most_informative_first([{"a": 1}, {"a": 2}, {"b": 2}])) == [0, 1, 2]


def test_what_cannot_run_is_left_out_with_its_reason():
    plan = expand(small(seq_len=[64, 4096], gpus=[1, 8], zero=[0, 3], rank=[0, 5]), Place())
    reasons = [item.reason for item in plan.left_out]
    assert len(plan.cases) + len(reasons) == 16 and len(plan.cases) == 5
    assert sum(reason.startswith("seq_len is 4096") for reason in reasons) == 8
    assert sum(reason.startswith("rank is 5") for reason in reasons) == 2
    assert sum("every stage runs as stage 0" in reason for reason in reasons) == 1
    twice = expand(small(seq_len=[64, 64]), Place())
    assert len(twice.cases) == 1 and "listed twice" in twice.left_out[0].reason


def test_here_is_this_machines_gpu():
    assert "no GPU" in expand(small(gpu="here"), Place()).left_out[0].reason
    (case,) = expand(small(gpu="here"), H200).cases
    assert case.job.cluster.gpu == catalog.gpu("h200")


def test_a_case_that_would_fill_the_host_is_left_out():
    suite = small(backend="cuda-virtual", offload=["none", "optimizer"], model="gpt2-xl", gpus=1, zero=0)
    plan = expand(suite, Place(free_host_bytes=20 * GIB))
    assert [c.job.strategy.offload for c in plan.cases] == ["none"]
    assert "of the 20.00 GiB of host memory" in plan.left_out[0].reason
    assert len(expand(suite, Place(free_host_bytes=200 * GIB)).cases) == 2


def test_cases_far_beyond_the_memory_come_last():
    suite = small(backend="cuda-virtual", micro_batch=[4096, 1, 2], gpu="rtx-4090")
    assert [c.job.workload.micro_batch_size for c in expand(suite, Place()).cases] == [1, 2, 4096]


def test_a_boundary_is_forecast_as_brute_force_would():
    settings = {"backend": "fake", "gpu": "rtx-4090", "model": "gpt2", "seq_len": 1024, "gpus": 1, "zero": 0}
    boundary = Boundary(settings=settings, place=Place(), largest=128)
    fitting = [n for n in range(1, 129) if predict(boundary.case_at(n).job).fits]
    assert 1 < boundary.forecast() == max(fitting) < 128
    assert " mb" not in boundary.label
    hopeless = Boundary(settings={**settings, "model": "llama-3-8b"}, place=Place(), largest=64)
    assert hopeless.forecast() == 0


def test_a_suite_file(write):
    suite = load_suite(
        write(
            'about = "x"\nbackend = "fake"\nzero = [0, 3]\n[[matrix]]\ngpus = [1, 2]\n[[matrix]]\ngpus = 4\nzero = 1\n'
        )
    )
    assert suite.name == "mine" and len(suite.combinations) == 5
    assert suite.combinations[-1] == {"backend": "fake", "zero": 1, "gpus": 4}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("zeroo = 1", "unknown key 'zeroo'.*did you mean 'zero'"),
        ("[[matrix]]\nsearch = 'micro_batch'", "unknown key 'search'"),
        ("zero = []", "zero is an empty list"),
        ("zero = [[1]]", "zero is .*a value or a list of values"),
        ("matrix = 3", "matrix is 3"),
        ("search = 'zero'", "search is 'zero'; allowed: 'micro_batch'"),
        ("search = 'micro_batch'\nmicro_batch = 2", "both given and searched"),
        ("largest = 0", "largest is 0"),
        (f"zero = {[0] * 100}\ngpus = {[1] * 100}", "more than 4096 combinations"),
        ("zero = [", "not valid TOML"),
    ],
)
def test_a_bad_suite_is_refused_in_one_sentence(write, content, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        load_suite(write(content))
    assert "\n" not in str(caught.value)


def test_unknown_suites_and_missing_keys():
    with pytest.raises(InputError, match=r"suite is 'memori'.*did you mean 'memory'"):
        load_suite("memori")
    with pytest.raises(InputError, match="does not exist"):
        load_suite("absent.toml")
    plan = expand(Suite(name="s", about="", combinations=({"gpu": "h200"}, {"gpu": "h200", "model": "gpt2"})), Place())
    assert [item.reason for item in plan.left_out] == [
        "model is not given; a suite needs it",
        "backend is not given; a suite needs it",
    ]
