"""Which nodes of a block are recomputed where only parts of it are.

``attention``, ``core_attention`` (softmax and its products alone: the selective recomputation of Korthikanti et al. 2022) and ``mlp``
are checkpoints of their own: what goes in is kept, the nodes run again when backward reaches the last of them (what Megatron calls
recomputing a module). ``norms`` and ``activation`` keep no outputs: whoever saved one gets it made
again, once for all, from what the norm or activation itself keeps (Megatron's output-discarding checkpoints). With a flash kernel
there is next to nothing to gain from ``core_attention``: the kernel keeps no scores, and its output is the next matrix product's input,
which keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from estimator.job.recompute import PART_OF, SUBMODULE_PARTS
from estimator.ops.tape import Node, Ref, Tape


def again_name(ref: Ref) -> Hashable:
    """Of a tensor that has been made again while the first one is still there."""
    return ("again", ref)


class Regions:
    """What of a unit the parts called ``chosen`` are."""

    def __init__(self, graph: Tape, chosen: frozenset[str]) -> None:
        self.graph = graph
        self.span_of: dict[int, range] = {}
        """By node: the nodes that are checkpointed together with it."""
        self.inputs: dict[range, tuple[Ref, ...]] = {}
        """What goes into such a span from outside."""
        for span in self._spans(chosen & SUBMODULE_PARTS):
            self.span_of |= dict.fromkeys(span, span)
            nodes = [graph.nodes[i] for i in span]
            made = {ref for node in nodes for ref in node.outputs}
            read = dict.fromkeys(r for node in nodes for r in node.inputs if r not in made)
            self.inputs[span] = tuple(read) if any(node.packs for node in nodes) else ()
        self.twice = {span: self._twice(span) for span in self.inputs}
        """What of a span is saved within and outside of it, and so is there twice when it has been made again."""
        self._first = {span: next((i for i in span if self._saves(i)), span.start) for span in self.inputs}
        self.remade: dict[Ref, Node] = {
            node.outputs[0]: node
            for i, node in enumerate(graph.nodes)
            if node.remakes in chosen and i not in self.span_of and node.outputs[0] != graph.output
        }
        """Outputs that are not kept, with the nodes that make them again."""

    def _spans(self, chosen: frozenset[str]) -> list[range]:
        spans: list[range] = []
        before = ""
        for i, node in enumerate(self.graph.nodes):
            part = node.part if node.part in chosen else PART_OF.get(node.part, "")
            if part not in chosen:
                continue
            if spans and spans[-1].stop == i and part == before:
                spans[-1] = range(spans[-1].start, i + 1)
            else:
                spans.append(range(i, i + 1))
            before = part
        return spans

    def _saves(self, index: int) -> tuple[Ref, ...]:
        node = self.graph.nodes[index]
        return (*node.saves, *node.aux)

    def _twice(self, span: range) -> frozenset[Ref]:
        made = {ref for i in span for ref in self.graph.nodes[i].outputs}
        inside = {ref for i in span for ref in self._saves(i)}
        outside = {ref for i in range(len(self.graph.nodes)) if i not in span for ref in self._saves(i)}
        return frozenset(made & inside & outside)

    def dropped_by(self, index: int) -> tuple[Ref, ...]:
        """What the backward pass of node ``index`` lets go: what it saved and, as the last one of a checkpoint, what went into
        that."""
        span = self.span_of.get(index)
        inputs = self.inputs[span] if span is not None and self._first[span] == index else ()
        return (*self._saves(index), *inputs)

    def name_of(self, index: int, ref: Ref) -> Hashable:
        """What ``ref`` is as node ``index`` holds it: the tensor, or the one that has been made again."""
        span = self.span_of.get(index)
        return again_name(ref) if span is not None and ref in self.twice[span] else ref

    def saved(self) -> Counter[Hashable]:
        """By tensor, how many hold it for the backward pass."""
        nodes = range(len(self.graph.nodes))
        return Counter(self.name_of(i, ref) for i in nodes for ref in self.dropped_by(i))

    def kept(self) -> set[Ref]:
        """Storages that the forward pass leaves behind for the backward pass."""
        nodes = enumerate(self.graph.nodes)
        saved = {ref for i, node in nodes if i not in self.span_of for ref in (*node.saves, *node.aux)}
        return saved.union(*self.inputs.values()) - self.remade.keys()
