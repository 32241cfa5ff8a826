"""The report's four plots as Bokeh documents without points; the page fills them from its one copy of the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, InlineStyleSheet, NumeralTickFormatter, Range1d, TapTool
from bokeh.models.annotations import BoxAnnotation, Slope, Span
from bokeh.plotting import figure
from bokeh.resources import Resources

from miwv_fast.comparison import spearman
from miwv_fast.notebook import bin_count

_HEIGHT = 320
_MIWV_LABEL = "MIWV (nats per token)"
_HOVERED = {
    "record": ("record", ""),
    "miwv": ("MIWV", "{+0.000} nats"),
    "one": ("one-shot", "{0.000} nats"),
    "zero": ("zero-shot", "{0.000} nats"),
    "tokens": ("tokens", ""),
    "similarity": ("similarity", "{0.000}"),
}


@dataclass(frozen=True)
class Plot:
    """A plot and what is said of it; `x` and `y` name the columns of its points."""

    name: str
    title: str
    caption: str
    alt: str
    item: dict[str, Any]
    x: str = ""
    y: str = ""


@dataclass(frozen=True)
class _Axis:
    label: str
    values: np.ndarray
    logarithmic: bool = False
    # Where the view begins and ends, if there are values beyond.
    floor: float = -np.inf
    ceiling: float = np.inf


def library() -> str:
    """BokehJS, the JavaScript that draws the plots."""
    # What follows it in the list sets a log level and tells the console.
    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def make_plots(columns: Mapping[str, np.ndarray], miwv: np.ndarray) -> list[Plot]:
    """The plots of records whose numbers are `columns`, [N] each; `miwv` is that of all scored records."""
    axes = {
        "miwv": _Axis(_MIWV_LABEL, columns["miwv"], floor=_fences(miwv)[0]),
        "one": _Axis("one-shot loss (nats per token)", columns["one"]),
        "zero": _Axis("zero-shot loss (nats per token)", columns["zero"]),
        "tokens": _Axis("response length (tokens)", columns["tokens"], logarithmic=True),
        "similarity": _Axis("cosine of record and demonstration", columns["similarity"]),
    }
    plots = [_distribution(miwv)]
    texts = (
        (
            "losses",
            ("zero", "one"),
            "One-shot against zero-shot loss",
            "On the diagonal the demonstration changes nothing; above it, it hurts. The dashed line is the threshold.",
        ),
        (
            "length",
            ("tokens", "miwv"),
            "MIWV against response length",
            "Far from 0, the score would follow length. Short responses scatter more, being means over few tokens.",
        ),
        (
            "similarity",
            ("similarity", "miwv"),
            "MIWV against the demonstration's similarity",
            "At a similarity near 1 the demonstration is a near-duplicate, and MIWV tells little.",
        ),
    )
    for name, (x, y), title, caption in texts:
        rho = spearman(columns[x], columns[y])
        correlation = "No rank correlation: all equal." if np.isnan(rho) else f"Rank correlation {_signed(rho)}."
        alt = f"Scatter plot of {len(columns[x]):,} records: {axes[y].label} against {axes[x].label}. {correlation}"
        item = _scatter(axes[x], axes[y], diagonal=name == "losses")
        plots.append(Plot(name, title, f"{correlation} {caption}{_hidden(axes[y])}", alt, item, x, y))
    return plots


def _fences(miwv: np.ndarray) -> tuple[float, float]:
    """Where a view of MIWV begins and ends at the latest: six times the middle half's width from it.

    A few records, such as those whose demonstration gives the answer away, would press all others together.
    """
    first, third = np.quantile(miwv, [0.25, 0.75])
    if first == third:
        return -np.inf, np.inf
    return float(first - 6 * (third - first)), float(third + 6 * (third - first))


def _distribution(miwv: np.ndarray) -> Plot:
    """How many records lie where; the page moves the threshold and the shade behind it."""
    low, first, median, third, high = np.quantile(miwv, [0, 0.25, 0.5, 0.75, 1])
    floor, ceiling = _fences(miwv)
    ceiling = max(ceiling, float(np.quantile(miwv, 0.999)))  # the best are what a selection is made of
    axis = _Axis(_MIWV_LABEL, miwv, floor=floor, ceiling=ceiling)
    spread = f"median {_signed(median)}, middle half {_signed(first)} to {_signed(third)} nats per token"
    caption = f"{spread.capitalize()}. The shade covers the selection.{_hidden(axis)}"
    alt = f"Histogram of {len(miwv):,} records: MIWV from {_signed(low)} to {_signed(high)}, {spread}."

    seen = miwv[(miwv >= floor) & (miwv <= ceiling)]
    counts, edges = np.histogram(seen, bin_count(seen))
    plot = _figure(axis.label, "records", _range(axis), Range1d(start=0, end=float(counts.max()) * 1.05))
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
    bars = plot.quad(left=edges[:-1], right=edges[1:], top=counts, bottom=0, line_width=0.5)
    bars.name = "bars"
    plot.add_tools(
        HoverTool(tooltips=[("MIWV", "@left{+0.000} to @right{+0.000} nats"), ("records", "@top")], renderers=[bars])
    )
    plot.add_layout(BoxAnnotation(name="shade", left=0, fill_alpha=0.16, line_color=None, level="underlay"))
    plot.add_layout(Span(name="threshold", dimension="height", location=0, line_width=2, level="overlay"))
    return Plot("distribution", "Distribution of MIWV", caption, alt, dict(json_item(plot)))


def _scatter(x: _Axis, y: _Axis, *, diagonal: bool) -> dict[str, Any]:
    """A point per record, those of the selection in a layer of their own, so that moving it repaints them alone.

    With `diagonal` both axes are losses: MIWV is the height above the diagonal, and the threshold is parallel to it.
    """
    plot = _figure(x.label, y.label, _range(x), _range(y), "log" if x.logarithmic else "linear")
    size = 3 if len(x.values) > 20_000 else 4 if len(x.values) > 2_000 else 6
    points = ColumnDataSource({name: [] for name in ("x", "y", "color", *_HOVERED)}, name="points")
    shown = plot.scatter("x", "y", color="color", line_color=None, size=size, source=points)
    shown.selection_glyph = shown.nonselection_glyph = None
    best = ColumnDataSource({name: [] for name in ("x", "y", "color")}, name="best")
    plot.scatter("x", "y", color="color", line_color=None, size=size + 1, source=best, level="overlay")
    tooltips = [(label, f"@{column}{form}") for column, (label, form) in _HOVERED.items()]
    plot.add_tools(HoverTool(tooltips=tooltips, renderers=[shown], limit=1), TapTool(renderers=[shown]))
    if diagonal:
        plot.add_layout(Slope(name="diagonal", gradient=1, y_intercept=0, line_width=1))
    threshold = Slope(gradient=1, y_intercept=0) if diagonal else Span(dimension="width", location=0)
    threshold.update(name="threshold", line_width=1.5, line_dash="dashed", level="overlay")
    plot.add_layout(threshold)
    return dict(json_item(plot))


def _figure(
    x_label: str, y_label: str, x_range: Range1d, y_range: Range1d, x_axis_type: Literal["linear", "log"] = "linear"
) -> Any:
    plot = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        x_axis_type=x_axis_type,
        x_axis_label=x_label,
        y_axis_label=y_label,
        tools="box_zoom,pan,wheel_zoom,reset",
        # A finger or a wheel on a plot scrolls the page until a tool is chosen.
        active_drag=None,
        active_scroll=None,
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border=4,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.toolbar.stylesheets = [InlineStyleSheet(css=":host { --background-color: transparent; }")]
    if x_axis_type == "log":
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    for axis in plot.axis:
        axis.update(
            axis_label_text_font="system-ui",
            axis_label_text_font_style="normal",
            axis_label_text_font_size="13px",
            major_label_text_font="system-ui",
            major_label_text_font_size="12px",
            minor_tick_line_color=None,
            axis_line_color=None,
            major_tick_in=0,
            major_tick_out=4,
        )
    return plot


def _range(axis: _Axis) -> Range1d:
    """From the least value to the greatest that are in view, with some air."""
    low = max(axis.floor, float(axis.values.min()))
    high = min(axis.ceiling, float(axis.values.max()))
    if axis.logarithmic:
        return Range1d(start=low / 1.25, end=high * 1.25)
    air = 0.04 * (high - low) or 0.5
    return Range1d(start=low - air, end=high + air)


def _hidden(axis: _Axis) -> str:
    """A sentence on the values that lie beyond the view."""
    beyond = (("below", axis.floor, axis.values < axis.floor), ("above", axis.ceiling, axis.values > axis.ceiling))
    told = [f"{np.count_nonzero(these):,} {side} {_signed(fence)}" for side, fence, these in beyond if these.any()]
    return f" Not in view: {' and '.join(told)}." if told else ""


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
