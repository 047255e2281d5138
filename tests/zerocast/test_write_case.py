"""``zerocast measure --write-case``: a job of several nodes is handed over to torchrun."""

from __future__ import annotations

import json

import pytest

from validator.measure.case import read_case

JOB = ("--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "16", "--backend", "cuda")


def test_the_case_and_the_command_are_written(zerocast, tmp_path):
    file = tmp_path / "case.json"
    said = zerocast("measure", *JOB, "--steps", "5", "--write-case", str(file), "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["on_every_node"].startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d ")
    assert told["on_every_node"].endswith(f"--case {file} --out {tmp_path}/case.report.jsonl")
    case = read_case(file)
    assert (case.backend, case.steps, case.n_processes, case.job.cluster.n_nodes) == ("cuda", 5, 16, 2)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (
            ("--backend", "fake", "--write-case", "case.json"),
            "--backend is 'fake'; allowed with --write-case: 'cuda' or 'cpu'",
        ),
        (("--write-case", "/proc/nowhere/case.json"), "cannot be written"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(zerocast, flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = zerocast("measure", *JOB, *flags)
    assert said.code == 2 and complaint in said.err and said.out == ""
    assert not (tmp_path / "case.json").exists()
