"""Provenance tells facts about this machine, and ``None`` where it knows none."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from validator import provenance


def test_facts_match_this_machine():
    data = provenance.collect()
    assert data["python"] == platform.python_version() and data["host"] == platform.node()
    assert data["numpy"] == __import__("numpy").__version__
    assert data["cores"] >= 1 and data["memory_bytes"] > 1 << 28
    age = datetime.now(UTC) - datetime.fromisoformat(data["date_utc"])
    assert 0 <= age.total_seconds() < 60
    assert json.loads(json.dumps(data)) == data


def test_torch_facts():
    torch = pytest.importorskip("torch")
    data = provenance.collect(with_torch=True)
    assert data["torch"] == torch.__version__ and data["cuda"] == torch.version.cuda
    assert data["torch_threads"] == torch.get_num_threads()
    assert (data["gpu"] is None) == (not torch.cuda.is_available())
    assert json.loads(json.dumps(data)) == data


def test_memory_figures_are_plausible():
    total, free = provenance.host_memory_bytes(), provenance.available_memory_bytes()
    assert total is not None and free is not None and 0 < free <= total
    assert total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_git_state_of_a_tree(tmp_path):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout

    assert provenance.git_state(tmp_path) is None
    git("init", "-q")
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "file").write_text("1")
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": True}
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_nvidia_smi_is_read_by_name(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$4" = GPU-01234567-89ab-cdef-0123-456789abcdef ] && echo "580.1, 345 MHz, 1980 MHz, 2619 MHz, 700.00 W, Default, Disabled"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = provenance.nvidia_smi("01234567-89ab-cdef-0123-456789abcdef")
    assert (
        facts["driver_version"] == "580.1"
        and facts["clocks.max.sm"] == "1980 MHz"
        and facts["mig.mode.current"] == "Disabled"
    )
    assert provenance.nvidia_smi("another") == {}
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.nvidia_smi("0") == {}


def test_absent_packages_have_no_version():
    assert provenance.package_version("no-such-package-anywhere") is None


def test_collecting_does_not_import_torch():
    code = "import sys; from validator import provenance; provenance.collect(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
