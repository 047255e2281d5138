"""A job of several nodes: the case is handed over, torchrun runs the workers, the report comes home."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from validator.measure.case import read_case
from validator.store.database import Store
from validator.store.records import import_reports
from zerocast.cli import main

JOB = ("--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "16", "--backend", "cuda")


def test_the_case_and_the_command_are_written(tmp_path):
    file = tmp_path / "case.json"
    said = CliRunner().invoke(main, ["measure", *JOB, "--steps", "5", "--write-case", str(file), "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
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
def test_what_cannot_be_handed_over_is_refused(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["measure", *JOB, *flags])
    assert said.exit_code == 2 and complaint in said.stderr and not list(tmp_path.iterdir())


def test_two_nodes_make_one_report(tmp_path, make_job):
    """Two launchers on this machine stand for two nodes: the network between them is the loopback, all else is real."""
    from validator.measure.case import Case, write_case
    from validator.measure.runner import WORKER

    case = Case(job=make_job(n_gpus=2, zero=3), backend="cpu", steps=2, warmup=1)
    write_case(case, tmp_path / "case.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"{shlex.quote(sys.executable)} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d "
        f"--rdzv-endpoint 127.0.0.1:{port} -m {WORKER} --case case.json --out report.jsonl"
    )
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(shlex.split(command), cwd=tmp_path, env=env, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [node.communicate(timeout=120)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    (report,) = import_reports(tmp_path / "report.jsonl")
    assert (report.job_key, report.origin, report.fits) == (case.job.key, "cpu", True)
    assert set(report.provenance["rank_peak_bytes"]) == {"0", "1"} and len(report.provenance["step_seconds"]) == 2
    assert report.collective_bytes["all_gather"] > 0
    assert Store(tmp_path / "store.db").add_many([report]) == 1
