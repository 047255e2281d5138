"""Builds the stub for the torch of a Python environment, and the environment variables under which it is used."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_USERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so", "libtorch_nvshmem.so")
_PRIVATE = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
"""NVRTC has a C++ library of its own, which another one in front of it breaks."""


def environment(python: str, **chosen: str) -> dict[str, str]:
    """Variables for a command of ``python``, whose torch is a CUDA build; builds what they name."""
    folder = built(python)
    paths = (str(HERE / "hook"), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ, **chosen, "LD_PRELOAD": str(folder / "libstub.so"), "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip


def built(python: str) -> Path:
    """The folder with the libraries, in the temporary folder; built once for each version of sources and torch."""
    ask = "import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent, torch.__version__, torch.version.cuda)"
    site, version, cuda = _output([python, "-c", ask]).split()
    assert cuda != "None", f"torch {version} is not a CUDA build"
    sources = [path for path in sorted(HERE.iterdir()) if path.suffix in (".cpp", ".c", ".py")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + version.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"zerocast-cuda-stub-{key}"
    if not (folder / "done").exists():
        folder.mkdir(exist_ok=True)
        _build(Path(site), folder)
        (folder / "done").touch()
    return folder


def _build(site: Path, folder: Path) -> None:
    wanted = set()
    for library in _USERS:
        names = re.findall(
            r"^ +U (\w+)", _output(["nm", "-D", "--undefined-only", str(site / "torch/lib" / library)]), re.M
        )
        wanted |= {name for name in names if re.match(r"cuda[A-Z]|cublas|nccl[A-Z]|cufile", name)}
    include = site / "nvidia/cu13/include"
    driver = (include / "cuda.h").read_text()
    offered = set(re.findall(r"CUresult CUDAAPI (cu\w+)\(", driver)) | set(
        re.findall(r"#define cu\w+\s+(cu\w+_v\d+)", driver)
    )
    _compile(folder / "libstub.so", "runtime.cpp", wanted, folder, f"-I{include}", "-ldl", *_PRIVATE)
    beside = ("-Wl,-soname,libcuda.so.1", "-L", str(folder), "-l:libstub.so", *_PRIVATE)
    _compile(folder / "libcuda.so.1", "driver.cpp", offered, folder, *beside)
    _compile(folder / "libnvidia-ml.so.1", "nvml.c", set(), folder, "-Wl,-soname,libnvidia-ml.so.1")


def _compile(library: Path, source: str, wanted: set[str], folder: Path, *flags: str) -> None:
    """``library`` of ``source``, in which every name of ``wanted`` that it lacks is a function that succeeds at nothing."""
    text = (HERE / source).read_text()
    lacking = sorted(name for name in wanted if not re.search(rf"\b{name}\(", text))
    rest = folder / f"{library.name}.rest.c"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in lacking))
    compiled = folder / f"{library.name}.o"
    _output(["gcc", "-c", "-O1", "-fPIC", "-w", "-o", str(compiled), str(rest)])
    compiler = ["g++", "-std=c++17"] if source.endswith(".cpp") else ["gcc"]
    _output([*compiler, "-O1", "-fPIC", "-shared", "-w", "-o", str(library), str(HERE / source), str(compiled), *flags])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr[-2000:]}"
    return done.stdout
