"""The report in the terminal."""

from typing import Any

from .text import interval, number, probability, visible

_TITLES = {
    "attribution": "Attribution by token (observational)",
    "effect": "Effect by token (interventional)",
}


def show(report: Any, *, limit: int, console: Any = None) -> None:
    """Prints the tables of a CausalityReport."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("show needs rich, which is missing: pip install 'react-fast[report]'") from error
    console = console or Console()
    # Text: a token such as "[bold]" is not markup.
    for kind, title in _TITLES.items():
        tokens = [token for token in report.key_tokens if token.kind == kind]
        if not tokens:
            continue
        table = _table(Table, title, ("token", "count", "mean", "95% interval", "p", ""))
        for token in tokens[:limit]:
            cells = [visible(token.token), str(token.count), number(token.mean)]
            cells += [interval(token.low, token.high), probability(token.p_value)]
            cells += ["*" if token.significant else ""]
            table.add_row(*map(Text, cells))
        console.print(table)
    if report.effects:
        table = _table(Table, "Effects in the examples", ("action", "example", "effect", "95% interval", ""))
        ranked = sorted(report.effects, key=lambda row: -abs(row.mean) if row.mean == row.mean else 0.0)
        for row in ranked[:limit]:
            shown = interval(row.low, row.high) if row.samples > 1 else "not sampled"
            cells = [visible("".join(row.tokens)), str(row.example + 1), number(row.mean), shown]
            table.add_row(*map(Text, [*cells, "*" if row.significant else ""]))
        console.print(table)
    if not report.key_tokens and not report.effects:
        console.print("The tracker has seen nothing yet.")
    else:
        console.print("*: significant at a false discovery rate of 5%")


def _table(kind: Any, title: str, columns: tuple[str, ...]) -> Any:
    table = kind(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or not column else "right")
    return table
