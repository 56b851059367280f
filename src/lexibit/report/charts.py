"""The charts, as Vega-Lite: each names the tables of the page whose rows it draws.

Colours are the page's CSS variables, so that charts follow its light and dark look, and its print.
"""

from __future__ import annotations

from typing import Any

import altair as alt

KINDS = ["embeddings", "query", "key", "value", "attention output", "intermediate", "output"]
STATES = ["float", "as quantized", "tuned"]
_FG, _ACCENT, _SECOND = "var(--fg)", "var(--accent)", "var(--second)"


def size_score(series: list[str]) -> dict[str, Any]:
    """Score against bytes on disk, with intervals and the Pareto front: the table ``sizes``.

    Args:
        series: all that have a colour of their own, the same in every chart.
    """
    base = alt.Chart(alt.NamedData("sizes")).encode(
        x=alt.X("megabytes:Q", title="MB on disk", scale=alt.Scale(type="log", nice=False, padding=12)),
        color=_series(series),
    )
    front = (
        base.transform_filter("datum.front")
        .mark_line(interpolate="step-after", strokeWidth=1.5)
        .encode(y=_score(), color=alt.value(_FG))
    )
    tooltip = [
        "model:N",
        "series:N",
        alt.Tooltip("bits:Q"),
        "state:N",
        alt.Tooltip("score:Q", format=".2f"),
        alt.Tooltip("low:Q", format=".2f"),
        alt.Tooltip("high:Q", format=".2f"),
        alt.Tooltip("megabytes:Q", title="MB", format=".3s"),
        alt.Tooltip("stored_bits:Q", title="bits a weight", format=".3f"),
    ]
    points = base.mark_point(size=70, filled=True, opacity=0.9).encode(
        y=_score(), shape=_state("shape"), tooltip=tooltip
    )
    return _spec(front + _interval(base) + points, 380)


def bits_score(series: list[str]) -> dict[str, Any]:
    """Score by bits of a code, a line a scheme, tuned ones dashed: the table ``by_bits``.

    Args:
        series: all that have a colour of their own, the same in every chart.
    """
    data = alt.Chart(alt.NamedData("by_bits"))
    base = data.transform_filter("datum.state !== 'float'").encode(
        x=alt.X("bits:O", title="bits of a code", axis=alt.Axis(labelAngle=0)), color=_series(series)
    )
    floats = (
        data.transform_filter("datum.state === 'float'")
        .mark_rule(strokeDash=[2, 3], color=_FG)
        .encode(y=_score(), tooltip=["series:N", alt.Tooltip("score:Q", format=".2f")])
    )
    lines = base.mark_line().encode(y=_score(), detail="state:N", strokeDash=_state("dash"))
    tooltip = [
        "series:N",
        "bits:O",
        "state:N",
        alt.Tooltip("score:Q", format=".2f"),
        alt.Tooltip("low:Q", format=".2f"),
        alt.Tooltip("high:Q", format=".2f"),
        "seeds:Q",
    ]
    points = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=_score(), shape=_state("shape"), tooltip=tooltip
    )
    return _spec(floats + _interval(base) + lines + points, 340)


def heat_map() -> dict[str, Any]:
    """The error of each layer and kind of weight: the table ``weights``."""
    chart = (
        alt.Chart(alt.NamedData("weights"))
        .mark_rect()
        .encode(
            x=alt.X(
                "kind:N",
                title=None,
                sort=KINDS,
                axis=alt.Axis(labelAngle=-40, grid=False, labelOverlap=False),
            ),
            y=_layer(),
            color=alt.Color(
                "mean(error):Q",
                title="relative error",
                # errors of few bits are tens of times those of many, and some are none
                scale=alt.Scale(scheme="viridis", type="symlog", constant=1e-3),
                legend=alt.Legend(format=".2~g", gradientLength=180),
            ),
            tooltip=[
                "layer:N",
                "kind:N",
                alt.Tooltip("mean(error):Q", title="relative error", format=".4f"),
                alt.Tooltip("mean(bits):Q", title="bits", format=".2~f"),
                alt.Tooltip("count():Q", title="weights"),
            ],
        )
    )
    return _spec(chart, {"step": 24})


def histogram() -> dict[str, Any]:
    """A weight's values and its levels over them: the tables ``bins`` and ``levels``."""
    x = alt.X("low:Q", title="value of a weight", scale=alt.Scale(zero=False, nice=False, padding=6))
    bars = (
        alt.Chart(alt.NamedData("bins"))
        .mark_bar(color=_ACCENT, opacity=0.75, orient="vertical")
        .encode(
            x=x,
            x2="high:Q",
            y=alt.Y("count:Q", title="weights"),
            y2=alt.Y2Datum(0),
            tooltip=[
                alt.Tooltip("low:Q", title="from", format=".4~g"),
                alt.Tooltip("high:Q", title="to", format=".4~g"),
                alt.Tooltip("count:Q", title="weights", format=","),
            ],
        )
    )
    levels = alt.Chart(alt.NamedData("levels"))
    told = [
        alt.Tooltip("level:Q"),
        alt.Tooltip("median:Q", format=".4~g"),
        alt.Tooltip("low:Q", title="5 %", format=".4~g"),
        alt.Tooltip("high:Q", title="95 %", format=".4~g"),
    ]
    # a strip along the top: bands of neighbours overlap
    bands = levels.mark_rect(color=_SECOND, opacity=0.35).encode(
        x=x, x2="high:Q", y=alt.value(0), y2=alt.value(14), tooltip=told
    )
    rules = levels.mark_rule(color=_SECOND, strokeWidth=1.5).encode(x="median:Q", tooltip=told)
    return _spec(bars + bands + rules, 300)


def by_layer(column: str, title: str) -> dict[str, Any]:
    """One number of each layer: a column of the table ``layers``."""
    chart = (
        alt.Chart(alt.NamedData("layers"))
        .mark_bar(color=_ACCENT)
        .encode(
            x=alt.X(f"{column}:Q", title=title, axis=alt.Axis(tickMinStep=1 if column == "bits" else 0)),
            y=_layer(),
            tooltip=["layer:N", alt.Tooltip(f"{column}:Q", title=title, format=".4~g")],
        )
    )
    return _spec(chart, {"step": 20})


def history(objective: str) -> dict[str, Any]:
    """The objective of each trial and the least so far: the table ``trials``."""
    base = alt.Chart(alt.NamedData("trials")).encode(x=alt.X("trial:Q", title="trial"))
    y = alt.Y("value:Q", title=objective, scale=alt.Scale(zero=False))
    tooltip = [
        "trial:Q",
        "stage:N",
        alt.Tooltip("value:Q", title="objective", format=".5~g"),
        alt.Tooltip("least:Q", title="least so far", format=".5~g"),
        alt.Tooltip("E:Q", format=".4~g"),
        alt.Tooltip("gap:Q", title="1 - C", format=".3~g"),
        alt.Tooltip("P:Q", format=".4~g"),
    ]
    points = base.mark_point(filled=True, size=28, color="var(--muted)", opacity=0.8).encode(
        y=y, tooltip=tooltip
    )
    least = base.mark_line(interpolate="step-after", color=_SECOND, strokeWidth=2).encode(
        y=alt.Y("least:Q", title=objective)
    )
    return _spec(points + least, 280)


def _layer() -> Any:
    """Layers in the model's order; of long names the end tells them apart."""
    short = "length(datum.label) > 18 ? '…' + slice(datum.label, -17) : datum.label"
    return alt.Y("layer:N", title=None, sort=None, axis=alt.Axis(labelExpr=short, grid=False))


def _series(series: list[str]) -> Any:
    legend = alt.Legend(columns=3, labelLimit=220)
    return alt.Color("series:N", title="scheme", legend=legend, scale=alt.Scale(domain=series))


def _score() -> Any:
    return alt.Y("score:Q", title="score", scale=alt.Scale(zero=False))


def _state(channel: str) -> Any:
    """Float, as quantized and tuned, told apart by ``shape`` or ``dash``."""
    if channel == "shape":
        scale = alt.Scale(domain=STATES, range=["square", "circle", "triangle-up"])
        return alt.Shape("state:N", title="state", scale=scale)
    scale = alt.Scale(domain=STATES, range=[[1, 0], [1, 0], [5, 4]])
    return alt.StrokeDash("state:N", title="state", scale=scale, legend=None)


def _interval(base: Any) -> Any:
    return base.mark_rule(opacity=0.45).encode(y=alt.Y("low:Q", title="score"), y2="high:Q")


def _spec(chart: Any, height: Any) -> dict[str, Any]:
    """The chart as wide as its place, without Altair's own look.

    A height by step is a layer's: the page's script multiplies it.
    """
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    return spec
