"""What a run prints about its layers: the table before step 0 and sizes in units people read."""

from __future__ import annotations

from rich.table import Table

from lightning_eff.precision.layers.convert import Conversion


def readable_bytes(count: int) -> str:
    """Bytes in KiB or MiB.

    Example:
        >>> readable_bytes(3072), readable_bytes(5 << 20)
        ('3.0 KiB', '5.0 MiB')
    """
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def conversion_table(conversion: Conversion, *, title: str, formats: str) -> Table:
    """Every layer with weights and its formats, or why it was left alone.

    Args:
        conversion: what was done.
        title: heading.
        formats: formats and products of a converted layer.
    """
    table = Table(title=title, title_justify="left")
    for column in ("layer", "type", "weight", "input x weight, gradient: products"):
        table.add_column(column, overflow="fold")
    for row in conversion.rows:
        shape = "x".join(map(str, row.shape)) or "-"
        done = f"{formats}; {row.note}" if row.note else formats
        table.add_row(row.name or "(model)", row.kind, shape, f"[dim]{row.reason}[/dim]" if row.reason else done)
    return table
