"""Telling the ledger, if one is metering, which pass of which unit what is made belongs to."""

from __future__ import annotations

from estimator.schedule.events import PHASE_OF_PASS, Compute, Event
from runtime.context import current_ledger


def begin_pass(compute: Compute, name: str) -> None:
    """The model runs ``compute``, a pass of the unit ``name``."""
    ledger = current_ledger()
    if ledger is not None:
        ledger.close_scope()
        ledger.enter(PHASE_OF_PASS[compute.phase], f"{compute.phase} of {name}")
        if PHASE_OF_PASS[compute.phase] != "backward":
            ledger.open_scope()


def end_pass() -> None:
    """A forward pass is over, of a unit or, with its loss, of the model."""
    ledger = current_ledger()
    if ledger is not None:
        ledger.close_scope()


def between_passes(due: Event | None, unit_names: list[str]) -> None:
    """What a model makes between its units counts as part of the forward pass that is ``due`` next; what follows on the
    last unit (a loss that is computed outside), as part of that one's."""
    ledger = current_ledger()
    if ledger is None:
        return
    if isinstance(due, Compute) and PHASE_OF_PASS[due.phase] != "backward":
        ledger.enter(due.phase, f"{due.phase} of {unit_names[due.unit]}")
    ledger.open_scope()
