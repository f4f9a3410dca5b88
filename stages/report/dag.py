"""The graph of stages as places on paper: layers from top to bottom, arrows around the boxes that lie between.

The usual four steps (Sugiyama, Tagawa, Toda 1981): a layer for each stage, a place held free in every layer that an arrow
passes, an order within layers that crosses few arrows, and coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

WIDTH, HEIGHT = 150.0, 44.0
"""Of a box."""
LANE = 14.0
"""Width of the place that is held free for an arrow."""
GAP, STEP = 16.0, 78.0
"""Between two boxes of a layer, and from layer to layer."""
SWEEPS = 6
"""Passes over the layers; few stages need more than two."""


@dataclass(frozen=True)
class Layout:
    """Where everything is."""

    width: float
    height: float
    boxes: dict[str, tuple[float, float]]
    """Stage -> left and top of its box."""
    arrows: list[str]
    """SVG paths, from the lower edge of a box to the upper edge of another."""


Node = str | tuple[str, str, int]
"""A stage, or the place that the arrow (from, to) passes in a layer."""


def layout(needs: Mapping[str, Sequence[str]]) -> Layout:
    """Place stages. `needs`: stage -> stages it takes something from; a name that is no stage is left out.

    Raises graphlib.CycleError when they go round in a circle.
    """
    needs = {name: [source for source in dict.fromkeys(sources) if source in needs] for name, sources in needs.items()}
    level: dict[str, int] = {}
    for name in TopologicalSorter(needs).static_order():
        level[name] = 1 + max((level[source] for source in needs[name]), default=-1)
    layers: list[list[Node]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name in needs:
        layers[level[name]].append(name)
    above: dict[Node, list[Node]] = {name: [] for name in needs}
    chains: list[list[Node]] = []
    for name, sources in needs.items():
        for source in sources:
            chain: list[Node] = [source]
            for between in range(level[source] + 1, level[name]):
                layers[between].append((source, name, between))
                chain.append((source, name, between))
            chain.append(name)
            chains.append(chain)
            for upper, lower in pairwise(chain):
                above.setdefault(lower, []).append(upper)
    below: dict[Node, list[Node]] = {node: [] for layer in layers for node in layer}
    for lower, uppers in above.items():
        for upper in uppers:
            below[upper].append(lower)
    _order(layers, above, below)
    middle = _places(layers, above, below)
    left = min((x - _width(node) / 2 for node, x in middle.items()), default=0.0)
    middle = {node: x - left + 2 for node, x in middle.items()}
    return Layout(
        width=max((x + _width(node) / 2 for node, x in middle.items()), default=0.0) + 2,
        height=max(len(layers) - 1, 0) * STEP + HEIGHT + 4,
        boxes={name: (middle[name] - WIDTH / 2, level[name] * STEP + 2) for name in needs},
        arrows=[_path(chain, middle, level[str(chain[0])]) for chain in chains],
    )


def _width(node: Node) -> float:
    return WIDTH if isinstance(node, str) else LANE


def _order(layers: list[list[Node]], above: Mapping[Node, list[Node]], below: Mapping[Node, list[Node]]) -> None:
    """Order each layer by the mean place of what its nodes are joined to, downwards and upwards in turn."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for number in range(1, len(layers)) if down else range(len(layers) - 2, -1, -1):
            fixed = {node: place for place, node in enumerate(layers[number - 1 if down else number + 1])}
            here = {node: place for place, node in enumerate(layers[number])}
            keys = {node: _mean([fixed[n] for n in neighbours.get(node, [])], here[node]) for node in here}
            layers[number].sort(key=lambda node, keys=keys: keys[node])  # type: ignore[misc]


def _places(layers: list[list[Node]], above: Mapping[Node, list[Node]], below: Mapping[Node, list[Node]]) -> dict[Node, float]:
    """Middles: as near to those of the neighbours as the order in the layer and the gaps allow."""
    middle: dict[Node, float] = {}
    for layer in layers:
        middle |= _spread(layer, [0.0] * len(layer))
    for sweep in range(SWEEPS):
        neighbours, order = (above, layers) if sweep % 2 == 0 else (below, layers[::-1])
        for layer in order:
            middle |= _spread(layer, [_mean([middle[n] for n in neighbours.get(node, [])], middle[node]) for node in layer])
    return middle


def _spread(layer: list[Node], wanted: list[float]) -> dict[Node, float]:
    """Places in order, apart from each other, whose mean is that of the wanted ones."""
    found: list[float] = []
    for index, (node, place) in enumerate(zip(layer, wanted, strict=True)):
        least = found[-1] + (_width(layer[index - 1]) + _width(node)) / 2 + GAP if found else place
        found.append(max(place, least))
    shift = (sum(wanted) - sum(found)) / len(layer) if layer else 0.0
    return {node: place + shift for node, place in zip(layer, found, strict=True)}


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _path(chain: Sequence[Node], middle: Mapping[Node, float], top: int) -> str:
    x, y = middle[chain[0]], top * STEP + HEIGHT + 2
    parts = [f"M{x:.1f} {y:.1f}"]
    for node in chain[1:]:
        top += 1
        end_x, end_y = middle[node], top * STEP + 2
        bend = (end_y - y) / 2
        parts.append(f"C{x:.1f} {y + bend:.1f} {end_x:.1f} {end_y - bend:.1f} {end_x:.1f} {end_y:.1f}")
        if not isinstance(node, str):  # straight through the layer
            end_y += HEIGHT
            parts.append(f"V{end_y:.1f}")
        x, y = end_x, end_y
    return "".join(parts)
