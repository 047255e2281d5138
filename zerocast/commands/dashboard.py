"""``zerocast dashboard``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import click

from estimator.errors import InputError
from zerocast.failed import Failed
from zerocast.job_flags import json_flag, load_profile, profile_flag, store_flag

HOST = "127.0.0.1"
START_LIMIT_S = 60.0


@click.command(
    "dashboard",
    short_help="Open the dashboard in a browser.",
    epilog="Example: zerocast dashboard --store runs.db --port 8501",
)
@store_flag
@profile_flag
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; default: a free one.")
@json_flag
def command(store_path: Path | None, profile_path: Path | None, port: int | None, as_json: bool) -> None:
    """Serve the dashboard on this machine until Ctrl-C, and print its address.

    With --json the address is printed as JSON.
    """
    from validator.store.database import Store
    from zerocast.show import say, write_json

    if find_spec("streamlit") is None:
        raise ModuleNotFoundError(name="streamlit")
    Store(store_path).count()  # a store that cannot be read is said here, not in the page
    load_profile(profile_path)
    port = _port(port)
    url = f"http://{HOST}:{port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server must not outlive this process
    with subprocess.Popen(
        server_command(port, store_path, profile_path), stdout=subprocess.DEVNULL, env=_environment()
    ) as server:
        try:
            _wait_until_it_answers(server, port)
            if as_json:
                write_json({"url": url, "pid": server.pid})
            else:
                say(f"dashboard at {url} (Ctrl-C stops it)")
            sys.stdout.flush()
            code = server.wait()
        except BaseException:
            server.terminate()
            raise
    if code:
        raise Failed(f"the dashboard's server ended with exit status {code}")


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    """Returns when ``port`` accepts connections. Raises ``Failed`` when the server ends before, or takes too long."""
    deadline = time.monotonic() + START_LIMIT_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.05)
    raise Failed(f"the dashboard's server did not start on port {port}")


def server_command(port: int, store_path: Path | None, profile_path: Path | None) -> list[str]:
    """The command that serves the page on ``port`` of this machine only."""
    import dashboard

    page = Path(dashboard.__file__).with_name("app.py")
    options = {
        "server.port": port, "server.address": HOST, "server.headless": "true", "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false", "client.toolbarMode": "minimal", "client.showErrorDetails": "none",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    own = [
        part
        for name, path in (("--store", store_path), ("--profile", profile_path))
        if path
        for part in (name, str(path.resolve()))
    ]
    return [sys.executable, "-m", "streamlit", "run", str(page), *flags, "--", *own]


def _environment() -> dict[str, str]:
    """The page imports the floors by name: their folder must be importable, installed or not."""
    import dashboard

    tree = str(Path(dashboard.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), tree)))}


def _port(wanted: int | None) -> int:
    """``wanted`` when it is free, or any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise InputError(
                f"--port is {wanted}; allowed: a port that is free ({(error.strerror or '').lower()})"
            ) from None
        return int(probe.getsockname()[1])
