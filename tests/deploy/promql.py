"""Which metrics a PromQL expression reads, and by which labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import promql_parser as promql

Node = TypeVar("Node", bound=promql.Expr)

FROM_PROMETHEUS = {"up": frozenset[str]()}
"""What Prometheus itself reports of every target."""
ON_EVERY_SERIES = frozenset({"job", "instance"})
"""The labels that Prometheus gives to all that it scrapes."""


@dataclass
class Use:
    """How an expression reads one metric: the labels that it names, and the values that it asks a label for."""

    labels: set[str] = field(default_factory=set)
    values: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def uses(expression: str) -> dict[str, Use]:
    """Every metric of the expression. Raises ValueError for what is not PromQL."""
    parsed = promql.parse(expression)
    found: dict[str, Use] = defaultdict(Use)
    for selector in _inside(parsed, promql.VectorSelector):
        use = found[selector.name]
        for matcher in selector.matchers.matchers:
            use.labels.add(matcher.name)
            use.values[matcher.name] |= set(matcher.value.split("|"))
    for aggregate in _inside(parsed, promql.AggregateExpr):
        for selector in _inside(aggregate, promql.VectorSelector):
            found[selector.name].labels |= set(aggregate.modifier.labels if aggregate.modifier else ())
    return dict(found)


def unknown(expression: str, exported: Mapping[str, frozenset[str]]) -> set[str]:
    """What the expression reads and nobody exports: metrics, and labels of metrics."""
    known = {**exported, **FROM_PROMETHEUS}
    read = uses(expression)
    labels = {
        f"{metric}{{{label}}}"
        for metric, use in read.items()
        if metric in known
        for label in use.labels - known[metric] - ON_EVERY_SERIES
    }
    return read.keys() - known.keys() | labels


def filters(expression: str, label: str) -> list[tuple[str, str | None]]:
    """Every metric that the expression reads, as often as it reads it, with the pattern that it asks the label for."""
    return [
        (selector.name, next((each.value for each in selector.matchers.matchers if each.name == label), None))
        for selector in _inside(promql.parse(expression), promql.VectorSelector)
    ]


def _inside(expression: promql.Expr, kind: type[Node]) -> list[Node]:
    found: list[Node] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, kind):
            found.append(node)

    promql.walk(expression, visit)
    return found
