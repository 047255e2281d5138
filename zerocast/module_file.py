"""``--module FILE.py:NAME``: a module of the user's own, from a callable in a Python file, traced into a ``Job``."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.errors import InputError
from estimator.job.fields import nearest, shown
from estimator.job.options import JobOptions, adapters_of, assemble_job, job_parts

if TYPE_CHECKING:
    from estimator.job import Job

_GIVES = "(module, example_batch) or (module, (inputs, targets), loss)"


def traced_job(place: str, flags: dict[str, Any], **local: Any) -> Job:
    """The job of ``flags`` (those of ``JobOptions`` but for the model) with the module that ``place`` names; ``local`` as for
    ``build_job``. Raises ``InputError`` for every mistake."""
    from runtime.tracing import trace

    options = JobOptions(model=place, **{f.name: flags[f.name] for f in fields(JobOptions) if f.name in flags})
    if adapters_of(options) is not None:
        raise InputError(
            "--module is given with --lora flags; allowed: a module that has its adapters, and frozen parameters"
        )
    strategy, cluster, batch = job_parts(options, **local)
    module, example, loss = load_module(place)
    spec = trace(module, example, loss, strategy=strategy, gpu=cluster.gpu)
    given = {name: flags.get(name) for name in batch}  # without flags the example batch says the sizes
    return assemble_job(spec, cluster, strategy, given)


def load_module(place: str) -> tuple[Any, Any, Any]:
    """What the callable at ``place`` (``FILE.py:NAME``) makes: module, example batch, and a loss or ``None``."""
    from torch import nn

    path, _, name = place.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise InputError(f"module is {shown(place)}; allowed: FILE.py:NAME, the name of a function that gives {_GIVES}")
    made = _call(path, name)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise InputError(f"module {name!r} of {shown(path)} gives {_described(made)}; allowed: {_GIVES}")
    module, example, loss = (*made, None)[:3]
    if not isinstance(module, nn.Module):
        raise InputError(f"module {name!r} of {shown(path)} gives a {type(module).__name__} first; allowed: {_GIVES}")
    if loss is not None and not callable(loss):
        raise InputError(f"module {name!r} of {shown(path)} gives a {type(loss).__name__} as loss; allowed: {_GIVES}")
    return module, example, loss


def _call(path: str, name: str) -> Any:
    if not Path(path).is_file():
        raise InputError(f"module file {shown(path)} does not exist")
    spec = importlib.util.spec_from_file_location("zerocast_user_module", path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code  # dataclasses and pickles look there
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        try:
            spec.loader.exec_module(code)
        except Exception as error:  # whatever a user's file does
            raise InputError(f"module file {shown(path)} cannot be run: {_said(error)}") from error
        names = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
        make = getattr(code, name, None)
        if make is None:
            raise InputError(f"module file {shown(path)} has no {name!r}{nearest(name, names)}")
        if not callable(make):
            raise InputError(f"module {name!r} of {shown(path)} is a {type(make).__name__}; allowed: a function")
        try:
            return make()
        except Exception as error:
            raise InputError(f"module {name!r} of {shown(path)} fails: {_said(error)}") from error
    finally:
        sys.path.remove(folder)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def _described(made: Any) -> str:
    return f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
