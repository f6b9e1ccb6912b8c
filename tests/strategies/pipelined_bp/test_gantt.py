"""The picture of a pipeline schedule: every box where its times say, every text escaped, odd input refused."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from lightning_eff.errors import ConfigurationError
from lightning_eff.strategies.pipelined_bp.gantt import FILLS, Kind, Span, busy_share, schedule_svg

SVG = "{http://www.w3.org/2000/svg}"
# Two stages, two micro-batches, 100 ms: the clock does not begin at zero.
HAND = [
    Span(0, "forward", 0, 5.000, 5.010),
    Span(0, "forward", 1, 5.010, 5.020),
    Span(1, "wait", 0, 5.000, 5.012),
    Span(1, "forward", 0, 5.012, 5.022),
    Span(1, "backward", 0, 5.022, 5.042),
    Span(0, "wait", 0, 5.020, 5.044),
    Span(0, "backward", 0, 5.044, 5.064),
    Span(1, "forward", 1, 5.042, 5.052),
    Span(1, "backward", 1, 5.052, 5.072),
    Span(0, "backward", 1, 5.074, 5.094),
    Span(0, "update", 1, 5.094, 5.100),
]


class Picture:
    """What a reader sees."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        boxes = self.root.find(f"{SVG}g[@class='spans']")
        assert boxes is not None
        self.boxes = {self.tip(box): self.place(box.find(f"{SVG}rect")) for box in boxes}
        self.numbers = {self.tip(box): text.text for box in boxes if (text := box.find(f"{SVG}text")) is not None}
        self.width, self.height = (float(self.root.attrib[name]) for name in ("width", "height"))

    @staticmethod
    def tip(box: ET.Element) -> str:
        return box.findtext(f"{SVG}title") or ""

    @staticmethod
    def place(rect: ET.Element | None) -> tuple[float, float, float, float, str]:
        assert rect is not None
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        return x, y, width, height, rect.attrib["fill"]

    def texts(self, kind: str) -> list[ET.Element]:
        return self.root.findall(f"{SVG}text[@class='{kind}']")

    def at_ms(self, ms: float) -> float:
        """Where the axis has a time, read off two of its ticks."""
        first, *_, last = self.texts("tick")
        at, step = float(first.attrib["x"]), float(last.attrib["x"]) - float(first.attrib["x"])
        value = float((last.text or "").replace(",", ""))
        assert first.text is not None
        assert float(first.text) == 0
        return at + ms * step / value

    def path(self) -> tuple[list[tuple[float, float]], list[list[float]]]:
        """Corners of the outlined boxes, and the lines between them."""
        group = self.root.find(f"{SVG}g[@class='path']")
        assert group is not None
        outlines = [(float(r.attrib["x"]), float(r.attrib["y"])) for r in group.findall(f"{SVG}rect")]
        lines = [[float(n) for n in re.findall(r"[\d.]+", p.attrib["d"])] for p in group.findall(f"{SVG}path")]
        return outlines, lines


def tip(span: Span, start_s: float = 5.0) -> str:
    name = "waiting" if span.kind == "wait" else span.kind
    times = f"from {(span.start_s - start_s) * 1e3:,.3f} ms, for {(span.end_s - span.start_s) * 1e3:,.3f} ms"
    return f"stage {span.stage}, {name}, micro-batch {span.micro_batch}: {times}"


def test_boxes_lie_where_their_times_and_stages_say() -> None:
    picture = Picture(schedule_svg(HAND, title="by hand"))
    assert picture.boxes.keys() == {tip(span) for span in HAND}
    rows: dict[int, set[float]] = {0: set(), 1: set()}
    for span in HAND:
        x, y, width, _, fill = picture.boxes[tip(span)]
        assert x == pytest.approx(picture.at_ms((span.start_s - 5) * 1e3), abs=0.05)
        assert x + width == pytest.approx(picture.at_ms((span.end_s - 5) * 1e3), abs=0.05)
        assert fill == FILLS[span.kind]
        rows[span.stage].add(y)
    (first,), (second,) = rows[0], rows[1]
    height = next(iter(picture.boxes.values()))[3]
    assert first + height < second
    labels = picture.texts("label")
    assert [first < float(label.attrib["y"]) < first + height for label in labels] == [True, False]


def test_nothing_leaves_the_picture_and_the_axis_ends_with_the_last_span() -> None:
    picture = Picture(schedule_svg(HAND, title="by hand"))
    right = max(x + width for x, _, width, _, _ in picture.boxes.values())
    assert right == pytest.approx(picture.at_ms(100.0), abs=0.05)
    assert right < picture.width - 30  # room for the busy share
    for text in picture.root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < picture.width
        assert 10 < float(text.attrib["y"]) < picture.height - 4


def test_every_stage_has_its_busy_share_at_the_right() -> None:
    assert busy_share(HAND, 0) == pytest.approx(0.066 / 0.1)
    assert busy_share(HAND, 1) == pytest.approx(0.060 / 0.072)
    assert [text.text for text in Picture(schedule_svg(HAND, title="x")).texts("busy")] == ["66%", "83%"]


def test_busy_share_counts_an_overlap_once_and_a_wait_not_at_all() -> None:
    nested = [Span(2, "forward", 0, 0.0, 4.0), Span(2, "backward", 0, 1.0, 2.0), Span(2, "update", 0, 3.0, 6.0)]
    assert busy_share(nested, 2) == 1.0
    assert busy_share([*nested, Span(2, "wait", 0, 4.0, 8.0)], 2) == pytest.approx(6 / 8)
    assert busy_share([Span(0, "wait", 0, 0.0, 1.0)], 0) == 0.0
    assert busy_share([Span(0, "forward", 0, 1.0, 1.0)], 0) == 0.0
    with pytest.raises(ConfigurationError, match="stage=1 has no spans"):
        busy_share(nested, 1)


def test_numbers_stand_in_the_boxes_that_have_room_for_the_longest() -> None:
    spans = [Span(0, "forward", 7, 0.0, 0.5), Span(0, "backward", 7, 0.5, 0.506), Span(0, "update", 7, 0.6, 1.0)]
    assert Picture(schedule_svg(spans, title="x")).numbers == {tip(spans[0], 0.0): "7"}
    long = [*spans, Span(0, "forward", 10**80, 1.0, 1.1)]
    assert Picture(schedule_svg(long, title="x")).numbers == {}


def test_one_micro_batch_is_followed_down_the_stages_and_up_again() -> None:
    picture = Picture(schedule_svg(HAND, title="x"))
    outlines, lines = picture.path()
    visits = [span for span in HAND if span.micro_batch == 1 and span.kind in ("forward", "backward")]
    assert outlines == [picture.boxes[tip(span)][:2] for span in visits]
    down, up = lines
    x, y, width, height, _ = picture.boxes[tip(visits[0])]
    assert down == pytest.approx([x + width, y + height, *picture.boxes[tip(visits[1])][:2]], abs=0.02)
    assert up[2:] == pytest.approx([outlines[3][0], outlines[3][1] + height], abs=0.02)
    assert any("path of micro-batch 1" in (text.text or "") for text in picture.root.iter(f"{SVG}text"))


def test_a_number_that_comes_again_is_not_followed_back_in_time() -> None:
    early = Span(1, "forward", 0, 0.0, 1.0)  # of the step before
    spans = [early, Span(0, "forward", 0, 2.0, 3.0), Span(1, "forward", 0, 3.0, 4.0)]
    picture = Picture(schedule_svg(spans, title="x"))
    assert picture.path()[0] == [picture.boxes[tip(span, 0.0)][:2] for span in spans[1:]]
    outlines, lines = Picture(schedule_svg([early], title="x")).path()
    assert (outlines, lines) == ([], [])


def test_the_window_cuts_boxes_and_leaves_out_what_is_beyond() -> None:
    picture = Picture(schedule_svg(HAND, title="x", window_s=0.030))
    shown = [span for span in HAND if span.start_s < 5.030]
    assert picture.boxes.keys() == {tip(span) for span in shown}  # the tooltip has the whole length
    assert max(x + w for x, _, w, _, _ in picture.boxes.values()) == pytest.approx(picture.at_ms(30.0), abs=0.05)
    assert [text.text for text in picture.texts("busy")] == ["67%", "60%"]
    late = [Span(0, "forward", 0, 0.0, 1.0), Span(1, "forward", 0, 1.0, 2.0)]
    assert [t.text for t in Picture(schedule_svg(late, title="x", window_s=1.0)).texts("busy")] == [
        "100%",
        "\N{EN DASH}",
    ]


@pytest.mark.parametrize(
    ("length_s", "ticks"),
    [
        (0.1, [f"{n}" for n in range(0, 101, 10)]),
        (0.0007, ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]),
        (7.0, ["0", "1,000", "2,000", "3,000", "4,000", "5,000", "6,000", "7,000"]),
        (0.0, [f"{n / 10:.1f}" for n in range(11)]),
    ],
)
def test_ticks_are_round_milliseconds(length_s: float, ticks: list[str]) -> None:
    picture = Picture(schedule_svg([Span(0, "forward", 0, 3.0, 3.0 + length_s)], title="x"))
    assert [text.text for text in picture.texts("tick")] == ticks


@pytest.mark.parametrize("exponent", range(-9, 7))
@pytest.mark.parametrize("factor", [1.0, 1.7, 2.4, 4.9, 9.99])
def test_ticks_are_never_crowded_nor_few(factor: float, exponent: int) -> None:
    picture = Picture(schedule_svg([Span(0, "forward", 0, 0.0, factor * 10.0**exponent)], title="x"))
    assert 5 <= len(picture.texts("tick")) <= 13


def test_texts_are_escaped_and_long_ones_fit() -> None:
    title, name = "<b>a & b</b> \"q\" 'p' \x00 " + "long " * 60, "<stage> & more of it " + "x" * 40
    picture = Picture(schedule_svg(HAND, title=title, labels=[name, "decoder"]))
    assert picture.root.findtext(f"{SVG}title") == title.replace("\x00", "�")
    heading = [text.text or "" for text in picture.root.iter(f"{SVG}text") if "font-weight" in text.attrib]
    assert len(heading) > 1
    assert " ".join(heading).startswith("<b>a & b</b> \"q\" 'p' � long long")
    label = picture.texts("label")[0]
    assert label.findtext(f"{SVG}title") == name  # the whole name is in the tooltip
    assert "".join(label.itertext()).removeprefix(name) == name[:31] + "…"


def test_overlapping_spans_are_drawn_the_later_one_on_top() -> None:
    late, early = Span(0, "backward", 0, 0.5, 1.5), Span(0, "forward", 0, 0.0, 1.0)
    twins = [Span(0, "forward", 1, 0.2, 0.2), Span(0, "forward", 1, 0.2, 0.9)]
    picture = Picture(schedule_svg([late, early, *twins], title="x"))
    assert list(picture.boxes) == [tip(span, 0.0) for span in (early, *twins, late)]


def test_lightness_alone_tells_the_kinds_apart() -> None:
    def lightness(fill: str) -> float:
        """CIE L*, 0 to 100."""
        linear = [(int(fill[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
        return 116 * math.pow(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 1 / 3) - 16

    kinds: tuple[Kind, ...] = ("forward", "backward", "update")
    forward, backward, update = (lightness(FILLS[kind]) for kind in kinds)
    assert forward - backward > 25
    assert backward - update > 25


@pytest.mark.parametrize(
    ("spans", "options", "match"),
    [
        ([], {}, "no spans to draw"),
        ([Span(0, "sleep", 0, 0.0, 1.0)], {}, "its kind is one of forward, backward"),  # type: ignore[arg-type]
        ([Span(-1, "forward", 0, 0.0, 1.0)], {}, "its stage is 0 or more"),
        ([Span(0, "forward", 0, 1.0, 0.0)], {}, "ends after it starts"),
        ([Span(0, "forward", 0, math.nan, 1.0)], {}, "finite"),
        ([Span(0, "forward", 0, 0.0, math.inf)], {}, "finite"),
        (HAND, {"labels": ["encoder"]}, "1 labels are too few for stages 0 to 1"),
        (HAND, {"window_s": 0.0}, "positive number of seconds"),
        (HAND, {"window_s": math.nan}, "positive number of seconds"),
    ],
)
def test_input_that_cannot_be_drawn_is_refused(spans: list[Span], options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        schedule_svg(spans, title="x", **options)  # type: ignore[arg-type]
