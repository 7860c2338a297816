"""The report in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

from ..records import HeatMap, KeyFeature
from .examples import reliability
from .page import KINDS, named
from .text import interval, number, printed, probability, running, visible

# Red, green, blue at full strength; what is 0 keeps the terminal's own colours.
_RAISES, _LOWERS = (224, 112, 16), (38, 110, 220)
# Tokens of a heat map that are printed.
_TOKENS = 2000


def show(report: Any, *, limit: int, console: Any = None) -> None:
    """Prints the heat maps and tables of a CausalityReport."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("show needs rich, which is missing: pip install 'react-fast[report]'") from error
    console = console or Console()
    for heat_map in report.heat_maps[:limit]:
        console.print(heat_map_text(heat_map))
    # Text: a token such as "[bold]" is not markup.
    for kind, (title, _) in KINDS.items():
        features = [feature for feature in report.features if feature.kind == kind]
        if not features:
            continue
        names = ("feature", "family", "count", "mean", "95% interval", "p", "drift", "")
        table = _table(Table, f"{title} by feature", names)
        for feature in features[:limit]:
            table.add_row(*map(Text, _cells(feature)))
        console.print(table)
    if report.effects:
        table = _table(Table, "Effects in the examples", ("action", "example", "effect", "95% interval", ""))
        for row in sorted(report.effects, key=reliability, reverse=True)[:limit]:
            shown = interval(row.low, row.high) if row.samples > 1 else "not sampled"
            cells = [visible("".join(row.tokens)), str(row.example + 1), number(row.mean), shown]
            table.add_row(*map(Text, [*cells, "*" if row.significant else ""]))
        console.print(table)
    if report.features or report.effects:
        console.print("*: significant at a false discovery rate of 5%")
    elif not report.heat_maps:
        console.print("The tracker has seen nothing yet.")


def heat_map_text(heat_map: HeatMap) -> Any:
    """A heat map as coloured text for rich: orange raises the outcome, blue lowers it."""
    from rich.text import Text

    tokens = [*heat_map.prompt_tokens, *heat_map.response_tokens][:_TOKENS]
    scores = heat_map.sums()
    text = Text()
    for i, (token, style) in enumerate(zip(tokens, _styles(scores[:_TOKENS]), strict=True)):
        if i == len(heat_map.prompt_tokens):
            text.append(" ▸ ", style="bold")
        text.append(printed(token) if token else running(token), style=style)
    left = len(scores) - len(tokens)
    if left:
        text.append(f" … {left} more", style="dim")
    return text


def _styles(scores: Sequence[float]) -> list[str]:
    top = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
    return [_style(score / top) if top and math.isfinite(score) else "" for score in scores]


def _style(share: float) -> str:
    """Background of a token: from dark to the full colour, so that white reads on all of it."""
    if abs(share) < 0.05:
        return ""
    full = _RAISES if share > 0 else _LOWERS
    strength = 0.25 + 0.75 * abs(share)
    return "white on rgb({},{},{})".format(*(round(strength * part) for part in full))


def _cells(feature: KeyFeature) -> list[str]:
    return [
        named(feature),
        feature.family,
        str(feature.count),
        number(feature.mean),
        interval(feature.low, feature.high),
        probability(feature.p_value),
        number(feature.drift) + (" *" if feature.drift_significant else ""),
        "*" if feature.significant else "",
    ]


def _table(kind: Any, title: str, columns: tuple[str, ...]) -> Any:
    table = kind(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or not column else "right")
    return table
