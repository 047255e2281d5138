"""Which nodes of a block are recomputed where only parts of it are.

``attention`` and ``mlp`` are checkpoints of their own: what goes in is kept, the nodes run again when backward reaches the last
of them (what Megatron calls recomputing a module). ``norms`` and ``activation`` keep no outputs: whoever saved one gets it made
again, once for all, from what the norm or activation itself keeps (Megatron's output-discarding checkpoints). With a flash kernel
there is nothing to gain from recomputing softmax and product alone, the selective recomputation of Korthikanti et al. 2022: the
kernel does so itself, and the output is the next matrix product's input, which keeps it.
"""

from __future__ import annotations

from estimator.job.recompute import SUBMODULE_PARTS
from estimator.ops.tape import Node, Ref, Tape


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
            self.inputs[span] = tuple(dict.fromkeys(r for node in nodes for r in node.inputs if r not in made))
        self.remade: dict[Ref, Node] = {
            node.outputs[0]: node
            for i, node in enumerate(graph.nodes)
            if node.remakes in chosen and i not in self.span_of and node.outputs[0] != graph.output
        }
        """Outputs that are not kept, with the nodes that make them again."""

    def _spans(self, chosen: frozenset[str]) -> list[range]:
        spans: list[range] = []
        for i, node in enumerate(self.graph.nodes):
            if node.part not in chosen:
                continue
            if spans and spans[-1].stop == i and self.graph.nodes[i - 1].part == node.part:
                spans[-1] = range(spans[-1].start, i + 1)
            else:
                spans.append(range(i, i + 1))
        return spans

    def kept(self) -> set[Ref]:
        """Storages that the forward pass leaves behind for the backward pass."""
        nodes = enumerate(self.graph.nodes)
        saved = {ref for i, node in nodes if i not in self.span_of for ref in (*node.saves, *node.aux)}
        return saved.union(*self.inputs.values()) - self.remade.keys()
