"""The table printed before step 0: every layer with weights, its formats, or why it was left alone."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_eff.precision.convert import Conversion


def conversion_table(conversion: Conversion, *, title: str, formats: tuple[str, str, str], products: str) -> Table:
    """Build the table.

    Args:
        conversion: what was done.
        title: heading.
        formats: names of the input, weight and gradient formats of converted layers.
        products: how the products of converted layers run.
    """
    table = Table(title=title, title_justify="left")
    for column in ("layer", "type", "weight", "input", "weights", "gradient", "products"):
        table.add_column(column)
    for row in conversion.rows:
        shape = "x".join(map(str, row.shape)) or "-"
        if row.reason:
            table.add_row(row.name or "(model)", row.kind, shape, f"[dim]{row.reason}[/dim]")
        else:
            table.add_row(row.name or "(model)", row.kind, shape, *formats, products)
    return table


def print_conversion(
    conversion: Conversion, *, title: str, formats: tuple[str, str, str], products: str, console: Console | None = None
) -> None:
    """Print :func:`conversion_table`, long models shortened to their first and last twenty layers."""
    (console or Console()).print(conversion_table(conversion, title=title, formats=formats, products=products))
