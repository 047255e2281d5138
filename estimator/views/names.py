"""What events are called in front of people."""

from __future__ import annotations

from estimator.schedule.events import Alloc, Collective, Compute, Copy, Event, Free, Recv, Send, Sent, Wait
from estimator.sharding.layout import Layout

PURPOSES = {
    "params": "parameters", "grads": "gradients", "updated_params": "new parameters", "grad_norm": "gradient norm",
    "states": "optimizer states", "activations": "activations",
}  # fmt: skip
_PASSES = {"input_grad": "input gradients", "weight_grad": "weight gradients"}
_KINDS = {
    "Restage": "cast", "Pack": "compress", "Unpack": "decompress", "PickRows": "pick rows", "AddRows": "add rows",
    "SumPieces": "sum of pushes", "Keep": "keep nearer copy", "Blend": "blend with momentum", "Accumulate": "add gradients",
    "GradNorm": "squares of gradients", "Update": "optimizer step", "Commit": "commit files",
}  # fmt: skip


def group_name(layout: Layout, group: int) -> str:
    """The units of a group, e.g. ``"blocks.3"`` or ``"blocks.2 to blocks.5"``; empty for what is of no group."""
    if not 0 <= group < len(layout.groups):
        return ""
    units = layout.groups[group].units
    first, last = layout.units[units[0]].name, layout.units[units[-1]].name
    return first if first == last else f"{first} to {last}"


def event_name(event: Event, layout: Layout) -> str:
    """An event in a few words: what happens, and to which units."""
    if isinstance(event, Compute):
        return f"{_PASSES.get(event.phase, event.phase)} {layout.units[event.unit].name}"
    if isinstance(event, Wait):
        return f"wait for {_tag_name(event.tag, layout)}"
    if isinstance(event, Send | Sent | Recv):
        return f"{ {'Send': 'send', 'Sent': 'drop sent', 'Recv': 'receive'}[type(event).__name__] } {event.what}"
    if isinstance(event, Alloc | Free):
        verb = "allocate" if isinstance(event, Alloc) else "free"
        return _of(f"{verb} {event.buffer.role}", group_name(layout, event.buffer.group))
    if isinstance(event, Collective):
        return _of(f"{event.op.replace('_', '-')} {PURPOSES[event.purpose]}", group_name(layout, event.group))
    if isinstance(event, Copy):
        of_unit = event.purpose == "activations"
        units = layout.units[event.group].name if of_unit else group_name(layout, event.group)
        return _of(f"copy {PURPOSES[event.purpose]}", units)
    words = _KINDS[type(event).__name__]
    return _of(words, group_name(layout, getattr(event, "group", -1)))


def _tag_name(tag: tuple[str, int], layout: Layout) -> str:
    verb, number = tag
    if verb.startswith("act_"):
        return f"activations of {layout.units[number].name}"
    if verb.startswith(("send_", "recv_")):
        return verb.replace("_", " ")
    return _of(verb.replace("_", " "), group_name(layout, number))


def _of(words: str, units: str) -> str:
    return f"{words} {units}" if units else words
