"""A job of several nodes: torchrun runs the workers, and one report comes home."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys

from validator.measure.case import Case, write_case
from validator.measure.runner import WORKER
from validator.store.database import Store
from validator.store.records import import_reports


def test_two_nodes_make_one_report(tmp_path, make_job):
    """Two launchers on this machine stand for two nodes: the network between them is the loopback, all else is real."""
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
