"""What a run prints about its layers: the table before step 0 and sizes in units people read."""

from __future__ import annotations

import torch
from rich.table import Table

from lightning_eff.precision.layers.convert import Change, Conversion


def readable_bytes(count: int) -> str:
    """Return bytes in KiB or MiB.

    Example:
        >>> readable_bytes(3072), readable_bytes(5 << 20)
        ('3.0 KiB', '5.0 MiB')
    """
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def conversion_table(conversion: Conversion, *, method: str, device: torch.device) -> Table:
    """Return a table of every layer with weights: its formats, or why it was left alone.

    Args:
        conversion: what was done; to one layer at least.
        method: name of the method.
        device: where the model runs.
    """
    fmt = next(iter(conversion.states.values())).format
    native, other = fmt.units
    formats = f"{fmt.operands}: {native if fmt.native(device) else other}"
    title = f"{method}: {conversion.layers} of {len(conversion.rows)} layers with weights converted"
    table = Table(title=title, title_justify="left")
    for column in ("layer", "type", "weight", "input x weight, gradient: products"):
        table.add_column(column, overflow="fold")
    for row in conversion.rows:
        shape = "x".join(map(str, row.shape)) or "-"
        done = f"{formats}; {row.note}" if row.note else formats
        table.add_row(row.name or "(model)", row.kind, shape, f"[dim]{row.reason}[/dim]" if row.reason else done)
    return table


def change_line(change: Change, *, method: str, step: int) -> str:
    """Return one line about layers that came and went while the run went on.

    Args:
        change: which.
        method: name of the method.
        step: optimizer steps made.
    """
    parts = [
        f"{row.name} ({row.kind}) {'left alone: ' + row.reason if row.reason else 'converted'}" for row in change.came
    ]
    parts += [f"{row.name} ({row.kind}) gone" for row in change.went]
    more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
    return f"{method}: the model has changed at step {step}: {'; '.join(parts[:8])}{more}."
