"""The command line's manners: help, errors in one sentence, exit codes, clean standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zerocast.cli import COMMANDS, cli

TREE = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(zerocast) -> None:
    done = zerocast("--help")
    assert done.code == 0 and done.err == ""
    for name in COMMANDS:
        assert f"\n  {name} " in done.out


def test_no_command_prints_the_help(zerocast) -> None:
    assert zerocast().out == zerocast("--help").out


def test_version(zerocast) -> None:
    import zerocast as package

    assert zerocast("--version").out == f"zerocast {package.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(zerocast, name: str) -> None:
    done = zerocast(name, "--help")
    assert done.code == 0
    assert "Example: zerocast " + name in " ".join(done.out.split())
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    parts = getattr(command, "commands", {name: command}).values()
    for part in parts:
        assert any("--json" in p.opts for p in part.params), part.name
        assert part.epilog and part.epilog.startswith("Example: zerocast"), part.name


def test_job_flags_are_the_same_everywhere() -> None:
    def flags(name: str) -> list[str]:
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        named = [p.opts[0] for p in command.params]
        return named[: named.index("--job") + 1]

    assert flags("predict") == flags("plan") == flags("measure")
    assert flags("predict") == [
        "--model", "--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--lora-config",
        "--gpu", "--gpus", "--gpus-per-node", "--internode-gbps", "--nvlink-domain", "--nodes-per-leaf", "--oversubscription",
        "--rail-optimized", "--in-network-reduction", "--hierarchical", "--zero", "--offload", "--offload-fraction",
        "--delayed-update", "--recompute", "--recompute-every", "--activation-offload", "--persistent-numel", "--dtype", "--grad-dtype",
        "--master-dtype", "--state-dtype", "--optimizer", "--optimizer-impl", "--grad-clip", "--framework", "--overlap-comm", "--prefetch-numel", "--live-numel", "--compile", "--compile-loss", "--root-apart", "--attention", "--matmul-dtype",
        "--train-tower", "--kernels-off", "--shard-size",
        "--quantized-weights", "--secondary-shard", "--quantized-grads", "--grad-compression",
        "--compression-warmup-steps", "--sparse-embeddings", "--tp", "--sequence-parallel", "--pp", "--pp-schedule",
        "--virtual-pp", "--pp-layers", "--cp", "--cp-kind", "--ep", "--expert-imbalance", "--sync", "--n-servers",
        "--staleness", "--seq-len", "--micro-batch", "--global-batch", "--job",
    ]  # fmt: skip


def test_help_has_every_flag_once_under_a_heading(zerocast) -> None:
    text = zerocast("predict", "--help").out
    command = cli.get_command(None, "predict")  # type: ignore[arg-type]
    assert command is not None
    for param in command.params:
        assert text.count(f"\n  {param.opts[0]} ") + text.count(f"\n  {param.opts[0]}\n") == 1, param.opts
    sections = text.split("\nParallelism:\n")[1].split("\nParameter servers:\n")
    assert "--tp N" in sections[0] and "--staleness K" in sections[1] and "--zero" not in sections[0]


LLAMA = ("--model", "llama-3-8b", "--gpu", "h100-sxm", "--gpus", "8")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["predikt"], ["predikt", "did you mean 'predict'?"]),
        (["--bogus"], ["--bogus", "zerocast"]),
        (["predict", "--zer0", "3"], ["--zer0", "did you mean '--zero'?"]),
        (["predict", "--gpus", "many"], ["--gpus", "'many'"]),
        (["predict", "--gpus"], ["--gpus"]),
        (["predict", "stray"], ["stray"]),
        (["predict", "--model", "lama-3-8b", "--gpu", "h100-sxm"], ["lama-3-8b", "llama-3-8b"]),
        (["predict", "--model", "llama-3-8b", "--gpu", "h10-sxm"], ["h10-sxm", "h100-sxm"]),
        (["predict", *LLAMA, "--zero", "5"], ["zero", "5", "0, 1, 2 or 3"]),
        (["predict", *LLAMA, "--offload", "optimiser"], ["offload", "optimiser", "did you mean 'optimizer'?"]),
        (["predict", *LLAMA, "--recompute", "ful"], ["recompute", "did you mean 'full'?"]),
        (["predict", *LLAMA, "--dtype", "bf17"], ["dtype", "did you mean 'bf16'?"]),
        (["predict", *LLAMA, "--tp", "3"], ["tp", "3", "8"]),
        (["predict", *LLAMA, "--global-batch", "9"], ["global_batch", "9"]),
        (["predict", "--job", "nowhere.toml"], ["nowhere.toml"]),
        (["predict", "--job", "nowhere.toml", "--zero", "1"], ["--job", "--zero"]),
        (["predict", *LLAMA, "--profile", "nowhere.json"], ["nowhere.json"]),
        (["plan", *LLAMA, "--top", "0"], ["--top", "0"]),
        (["plan", *LLAMA, "--seq-len", "-1"], ["seq_len", "-1"]),
        (["plan", *LLAMA, "--global-batch", "9"], ["global_batch", "9"]),
        (["runs", "list", "--store", "/proc/none/runs.db", "--bogus"], ["--bogus"]),
        (["runs", "show", "7"], ["record", "7"]),
        (["runs", "delete", "7"], ["record", "7"]),
        (["runs", "delete"], ["ID"]),
        (["runs", "export", "runs.xml"], [".xml", ".jsonl"]),
        (["runs", "import", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["compare"], ["no such measured runs"]),
        (["compare", "--fail-over", "-1"], ["--fail-over"]),
        (["dashboard", "--port", "99999"], ["--port", "99999"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_mistake_is_one_sentence(
    zerocast, args: list[str], words: list[str], as_json: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zerocast(*args, *(["--json"] if as_json and args[0] in COMMANDS else []))
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_store_is_one_sentence(zerocast, tmp_path) -> None:
    store = tmp_path / "runs.db"
    store.write_bytes(b"this is no database " * 100)
    for args in (["runs", "list"], ["compare"], ["dashboard"]):
        done = zerocast(*args, "--store", store)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1, done
        assert "runs.db" in done.err
    assert store.read_bytes() == b"this is no database " * 100


def test_a_missing_extra_is_one_sentence(zerocast, monkeypatch) -> None:
    import zerocast.commands.dashboard as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    done = zerocast("dashboard")
    assert done.code == 2 and done.err == "error: this command needs streamlit: pip install 'zerocast[dashboard]'\n"


def start(*args: str, **kwargs) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(TREE)}
    command = [sys.executable, "-m", "zerocast", *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_a_closed_pipe_is_silent() -> None:
    process = start("predict", *LLAMA, "--zero", "3", "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(30)


def test_interrupt_exits_with_130() -> None:
    process = start("dashboard", "--json")
    try:
        assert process.stdout is not None
        line = ""
        while "}" not in line:
            line += process.stdout.readline()
        server = json.loads(line)["pid"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "interrupted"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{server}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{server}").exists(), "the server outlived the command"
