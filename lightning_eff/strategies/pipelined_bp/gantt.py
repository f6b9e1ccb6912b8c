"""A picture of a pipeline schedule, drawn from measured times: one row per stage, one box per forward and backward.

The picture is an SVG of plain text. It needs no plotting package, no font file and no script, and any browser shows it;
there, every box says what it is when the pointer rests on it.
"""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from lightning_eff.errors import ConfigurationError

Kind = Literal["forward", "backward", "update", "wait"]

FILLS: dict[Kind, str] = {"forward": "#9fd0ec", "backward": "#c0450f", "update": "#262626", "wait": "url(#wait)"}
"""Fill of each kind. Lightness alone tells them apart, so that grey prints and colour-blind readers do."""
_INKS: dict[Kind, str] = {"forward": "#111111", "backward": "#ffffff"}
_NAMES: dict[Kind, str] = {"forward": "forward", "backward": "backward", "update": "update", "wait": "waiting"}

# Pixels. A character is taken to be as wide as in the widest of the usual fonts.
_WIDTH, _MARGIN, _BUSY_COLUMN = 1200.0, 16.0, 60.0
_ROW, _GAP = 32.0, 18.0
_TITLE, _TEXT, _SMALL = 16.0, 12.0, 11.0
_EM_PER_CHARACTER, _BOLD = 0.64, 1.2
_LONGEST_LABEL = 32
_BUSY = "forwards, backwards and updates, as a share of the time from the stage's first span drawn to its last"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Span(NamedTuple):
    """Says what one stage did for a while.

    Attributes:
        stage: number of the stage, 0 is the first one.
        kind: forward or backward of a micro-batch, the optimizer's update, or waiting for another stage.
        micro_batch: number of the micro-batch it was done for.
        start_s: when it began, in seconds of a clock that all stages share.
        end_s: when it ended, not before it began.
    """

    stage: int
    kind: Kind
    micro_batch: int
    start_s: float
    end_s: float


def busy_share(spans: Sequence[Span], stage: int) -> float:
    """Return the share of a stage's time in which it computed: forwards, backwards and updates.

    The stage's time is from the start of its first span to the end of its last one, so the bubble before its first
    forward counts only if it is given as a wait. What overlaps is counted once.

    Args:
        spans: of all stages, in any order.
        stage: the stage that is asked about.

    Returns:
        Between 0 and 1; 0 if the stage's spans have no length.

    Raises:
        ConfigurationError: the stage has no spans.

    Example:
        >>> busy_share([Span(0, "forward", 0, 0.0, 1.0), Span(0, "backward", 0, 3.0, 5.0)], 0)
        0.6
    """
    own = sorted((span for span in spans if span.stage == stage), key=lambda span: span.start_s)
    if not own:
        raise ConfigurationError(f"stage={stage!r} has no spans, so it has no busy share.")
    busy_s, until = 0.0, -math.inf
    for span in own:
        if span.kind != "wait":
            busy_s += max(span.end_s - max(span.start_s, until), 0.0)
            until = max(until, span.end_s)
    covered_s = max(span.end_s for span in own) - own[0].start_s
    return min(busy_s / covered_s, 1.0) if covered_s > 0 else 0.0


def schedule_svg(
    spans: Sequence[Span], *, title: str, labels: Sequence[str] | None = None, window_s: float | None = None
) -> str:
    """Draw what every stage did when, and follow one micro-batch on its path through the stages.

    Time is in milliseconds from the start of the first span. At the right stands the :func:`busy_share` of each stage
    in the time that is drawn.

    Args:
        spans: of all stages, in any order. Where two of one stage overlap, the later one is drawn on top.
        title: heading of the picture.
        labels: name of every stage, the first stage first; default ``stage 0``, ``stage 1`` and so on.
        window_s: how much to draw, from the start of the first span, in seconds; default all. What goes on
            beyond it is cut.

    Returns:
        The text of an SVG file, 1200 pixels wide, with a white background.

    Raises:
        ConfigurationError: there are no spans, one of them cannot be, a stage has no label, or the window is not
            positive.

    Example:
        >>> svg = schedule_svg([Span(0, "forward", 0, 0.0, 0.004)], title="One forward", labels=["the only stage"])
        >>> svg.startswith("<svg") and "the only stage" in svg
        True
    """
    _check(spans, labels, window_s)
    names = [f"stage {n}" for n in range(max(span.stage for span in spans) + 1)] if labels is None else list(labels)
    start_s = min(span.start_s for span in spans)
    # Spans without any length are drawn on an axis of one millisecond.
    length_s = window_s or max(span.end_s for span in spans) - start_s or 1e-3
    end_s = start_s + length_s
    whole = sorted((span for span in spans if span.start_s < end_s), key=lambda span: span.start_s)
    drawn = [span._replace(end_s=min(span.end_s, end_s)) for span in whole]
    followed = _followed(drawn, len(names))
    heading = textwrap.wrap(title, int((_WIDTH - 2 * _MARGIN) / _length("x", _BOLD * _TITLE)))
    plot = _Plot(start_s, length_s, _label_width(names), _MARGIN + 22 * len(heading) + 58, len(names))
    room = max(_length(str(span.micro_batch), _SMALL) for span in drawn) + 2
    body = [
        *_heading(heading, {span.kind for span in drawn}, followed),
        *_axis(plot),
        *_rows(plot, names, drawn),
        '<g class="spans">',
        *(_box(plot, span, full, room) for span, full in zip(drawn, whole, strict=True)),
        "</g>",
        *_path(plot, followed),
    ]
    return "\n".join([*_opening(title, plot.bottom + 52), *body, "</svg>\n"])


def _check(spans: Sequence[Span], labels: Sequence[str] | None, window_s: float | None) -> None:
    if not spans:
        raise ConfigurationError("There are no spans to draw; give one or more.")
    for span in spans:
        if span.kind not in get_args(Kind):
            raise ConfigurationError(f"{span!r} is not allowed; its kind is one of {', '.join(get_args(Kind))}.")
        if span.stage < 0:
            raise ConfigurationError(f"{span!r} is not allowed; its stage is 0 or more.")
        if not -math.inf < span.start_s <= span.end_s < math.inf:
            raise ConfigurationError(f"{span!r} is not allowed; its times are finite and it ends after it starts.")
    last = max(span.stage for span in spans)
    if labels is not None and last >= len(labels):
        raise ConfigurationError(f"{len(labels)} labels are too few for stages 0 to {last}; give one for each stage.")
    if window_s is not None and not 0 < window_s < math.inf:
        raise ConfigurationError(f"window_s={window_s!r} is not allowed; it is a positive number of seconds.")


def _followed(spans: Sequence[Span], num_stages: int) -> list[Span]:
    """Return the spans of one micro-batch: of those that are seen on most of their path, the middle one."""
    visits = defaultdict(list)
    for span in spans:
        visits[span.kind, span.stage, span.micro_batch].append(span)
    starts = [span for span in spans if (span.kind, span.stage) == ("forward", 0)]
    journeys = [_journey(span, visits, num_stages) for span in starts]
    longest = max(map(len, journeys), default=0)
    journeys = [journey for journey in journeys if len(journey) == longest]
    return journeys[len(journeys) // 2] if longest > 1 else []


def _journey(first: Span, visits: dict[tuple[Kind, int, int], list[Span]], num_stages: int) -> list[Span]:
    """Return a micro-batch's forwards down the stages and its backwards up again, as far as they are seen."""
    journey = [first]
    down: list[tuple[Kind, int]] = [("forward", stage) for stage in range(1, num_stages)]
    up: list[tuple[Kind, int]] = [("backward", stage) for stage in reversed(range(num_stages))]
    for kind, stage in down + up:
        # Numbers may begin anew in every step, so a visit before the one just made is another micro-batch's. Starts
        # are compared, for the clocks of two stages may differ by a little.
        later = [s for s in visits.get((kind, stage, first.micro_batch), []) if s.start_s >= journey[-1].start_s]
        if not later:
            break
        journey.append(later[0])
    return journey


class _Plot(NamedTuple):
    """Says where times and stages are on the picture, in pixels."""

    start_s: float
    length_s: float
    left: float
    top: float
    num_stages: int

    @property
    def right(self) -> float:
        return _WIDTH - _MARGIN - _BUSY_COLUMN

    @property
    def bottom(self) -> float:
        return self.y(self.num_stages - 1) + _ROW

    def x(self, time_s: float) -> float:
        return self.left + (time_s - self.start_s) / self.length_s * (self.right - self.left)

    def y(self, stage: int) -> float:
        return self.top + stage * (_ROW + _GAP)


def _length(text: str, size: float) -> float:
    return len(text) * size * _EM_PER_CHARACTER


def _label_width(names: Sequence[str]) -> float:
    return _MARGIN + max(_length(_short(name), _TEXT) for name in names) + 10


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _escape(text: str) -> str:
    return html.escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def _text(
    text: str, x: float, y: float, *, size: float = _TEXT, anchor: str = "start", more: str = "", tip: str = ""
) -> str:
    content = (f"<title>{_escape(tip)}</title>" if tip else "") + _escape(text)
    return f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" text-anchor="{anchor}"{more}>{content}</text>'


def _opening(title: str, height: float) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH:g}" height="{height:g}" '
        f'viewBox="0 0 {_WIDTH:g} {height:g}" font-family="Helvetica, Arial, sans-serif" fill="#222222" role="img">'
    )
    yield f"<title>{_escape(title)}</title>"
    yield (
        '<defs><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#f6f6f6"/><rect width="1.2" height="6" fill="#cfcfcf"/></pattern></defs>'
    )
    yield f'<rect width="{_WIDTH:g}" height="{height:g}" fill="#ffffff"/>'


def _heading(lines: Sequence[str], kinds: set[Kind], followed: Sequence[Span]) -> Iterator[str]:
    """Draw the title, and below it the legend of what is drawn."""
    for n, line in enumerate(lines):
        yield _text(line, _MARGIN, _MARGIN + 16 + 22 * n, size=_TITLE, more=' font-weight="bold"')
    x, y = _MARGIN, _MARGIN + 22 * len(lines) + 8
    for kind in get_args(Kind):
        if kind in kinds:
            yield f'<rect x="{x:.2f}" y="{y:.2f}" width="22" height="14" fill="{FILLS[kind]}" stroke="#999999"/>'
            yield _text(_NAMES[kind], x + 28, y + 11)
            x += 28 + _length(_NAMES[kind], _TEXT) + 16
    if followed:
        yield f'<path d="M{x:.2f} {y + 12:.2f}l22 -10" stroke="#000000" stroke-width="1.6"/>'
        yield _text(f"path of micro-batch {followed[0].micro_batch}", x + 28, y + 11)


def _axis(plot: _Plot) -> Iterator[str]:
    """Draw lines and numbers at round milliseconds."""
    bottom = plot.bottom + 6
    length_ms = plot.length_s * 1e3
    step = _round_step(length_ms / 12)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    for n in range(int(length_ms / step * (1 + 1e-9)) + 1):
        x = plot.x(plot.start_s + n * step / 1e3)
        yield f'<path d="M{x:.2f} {plot.top - 6:.2f}V{bottom:.2f}" stroke="#dddddd"/>'
        yield _text(f"{n * step:,.{decimals}f}", x, bottom + 15, size=_SMALL, anchor="middle", more=' class="tick"')
    yield f'<path d="M{plot.left:.2f} {bottom:.2f}H{plot.right:.2f}" stroke="#888888"/>'
    yield _text("time (ms)", (plot.left + plot.right) / 2, bottom + 34, anchor="middle")


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _rows(plot: _Plot, names: Sequence[str], drawn: Sequence[Span]) -> Iterator[str]:
    """Draw every stage's name at the left and its busy share at the right."""
    at = _WIDTH - _MARGIN
    yield _text("busy", at, plot.top - 12, anchor="end", tip=_BUSY)
    seen = {span.stage for span in drawn}
    for stage, name in enumerate(names):
        middle = plot.y(stage) + _ROW / 2
        yield _text(_short(name), plot.left - 10, middle + 4, anchor="end", more=' class="label"', tip=name)
        share = f"{busy_share(drawn, stage):.0%}" if stage in seen else "\N{EN DASH}"
        yield _text(share, at, middle + 4, anchor="end", more=' class="busy"')
        yield f'<path d="M{plot.left:.2f} {middle:.2f}H{plot.right:.2f}" stroke="#dddddd"/>'


def _box(plot: _Plot, span: Span, whole: Span, room: float) -> str:
    """Draw one span, with a tooltip, and inside its micro-batch's number if the longest one had room there."""
    x, y = plot.x(span.start_s), plot.y(span.stage)
    width = plot.x(span.end_s) - x
    # An edge would hide a box that is hardly wider than the edge.
    edge = ' stroke="#ffffff" stroke-width="0.8"' if width > 3 else ""
    shape = f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{_ROW:g}" fill="{FILLS[span.kind]}"{edge}/>'
    number = str(span.micro_batch)
    if span.kind in _INKS and width >= room:
        ink = f' fill="{_INKS[span.kind]}" pointer-events="none"'
        shape += _text(number, x + width / 2, y + _ROW / 2 + 4, size=_SMALL, anchor="middle", more=ink)
    start_ms, length_ms = (whole.start_s - plot.start_s) * 1e3, (whole.end_s - whole.start_s) * 1e3
    about = f"stage {span.stage}, {_NAMES[span.kind]}, micro-batch {number}: "
    return f"<g><title>{about}from {start_ms:,.3f} ms, for {length_ms:,.3f} ms</title>{shape}</g>"


def _path(plot: _Plot, followed: Sequence[Span]) -> Iterator[str]:
    """Outline the boxes of one micro-batch, and draw lines from each to the next stage's."""
    yield '<g class="path" fill="none" stroke="#000000" stroke-width="1.6" pointer-events="none">'
    for span in followed:
        x, y = plot.x(span.start_s), plot.y(span.stage)
        yield f'<rect x="{x:.2f}" y="{y:.2f}" width="{plot.x(span.end_s) - x:.2f}" height="{_ROW:g}"/>'
    for here, there in pairwise(followed):
        if here.stage != there.stage:
            leave, arrive = (_ROW, 0.0) if there.stage > here.stage else (0.0, _ROW)
            yield (
                f'<path d="M{plot.x(here.end_s):.2f} {plot.y(here.stage) + leave:.2f}'
                f'L{plot.x(there.start_s):.2f} {plot.y(there.stage) + arrive:.2f}"/>'
            )
    yield "</g>"
