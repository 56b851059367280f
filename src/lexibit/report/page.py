"""A page: sections of text, charts and tables, as one HTML file that needs no other.

Text that is written into the page is escaped by its template; all data is one block of JSON, which the page's
script draws. A policy in the page allows no request at all, and no script but the two whose hashes it has.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from lexibit import __version__
from lexibit.files import finite


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: by which charts know it.
        title: over it.
        kind: ``text``, ``number``, ``whole``, ``seconds``, ``bytes`` or ``code``.
        printed: whether it stands on paper too, where there is less room.
    """

    name: str
    title: str
    kind: str = "text"
    printed: bool = True


@dataclass(frozen=True)
class Table:
    """Numbers, under the charts that draw them or alone.

    Attributes:
        id: by which charts know it; of a page's tables each has its own.
        title: what it holds.
        columns: of it.
        rows: a value a column; None where the page's script makes them, of the model that is picked.
        open: whether it is shown at once.
    """

    id: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]] | None = None
    open: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        id: of its place in the page.
        label: what it shows, for those who do not see it.
        spec: in Vega-Lite.
        sources: the tables that it draws.
    """

    id: str
    label: str
    spec: dict[str, Any]
    sources: Sequence[str]


@dataclass(frozen=True)
class Block:
    """Charts with what belongs to them.

    Attributes:
        title: over it.
        about: what is seen, in a sentence or two.
        charts: of it.
        tables: under the charts.
        picks: what can be chosen, by the label of its list: columns of the tables, or ``weight``.
        needs: a column, without any number in which there is nothing to see.
        missing: what is said then.
        titles: what a chart's title says for what is picked in the last list.
    """

    title: str
    about: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    picks: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    missing: str = ""
    titles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: of its heading.
        title: its heading.
        notes: sentences.
        facts: by their names.
        code: lines to copy.
        blocks: charts and tables.
        models: whether a list to pick a model from stands above.
    """

    id: str
    title: str
    notes: Sequence[str] = ()
    facts: dict[str, str] = field(default_factory=dict)
    code: str = ""
    blocks: Sequence[Block] = ()
    models: bool = False


def render(title: str, about: str, sections: Sequence[Section], models: Sequence[dict[str, Any]] = ()) -> str:
    """The page.

    Args:
        title: of it.
        about: what it is, in a sentence.
        sections: in their order.
        models: what is known of models' weights (:func:`lexibit.report.models.packed`).
    """
    blocks = [block for section in sections for block in section.blocks]
    # cells of one float model have the same: each stands in the page once
    histograms: dict[str, int] = {}
    data = {
        "models": [
            {**model, "histograms": [_place(one, histograms) for one in model["histograms"]]}
            for model in models
        ],
        "blocks": [
            {
                "charts": [asdict(chart) for chart in block.charts],
                "tables": [asdict(table) for table in block.tables],
                "picks": block.picks,
                "needs": block.needs,
                "missing": block.missing,
                "titles": block.titles,
            }
            for block in blocks
        ],
    }
    data["histograms"] = [json.loads(text) for text in histograms]
    library, script = bundle(), _text("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            about=about,
            sections=sections,
            models=models,
            data=_embedded(data),
            style=Markup(_text("page.css")),
            library=Markup(library),
            script=Markup(script),
            hashes=" ".join(f"'{_hash(text)}'" for text in (library, script)),
            version=__version__,
        )
    )


def _place(histogram: Any, seen: dict[str, int]) -> int | None:
    return None if histogram is None else seen.setdefault(json.dumps(histogram), len(seen))


@cache
def bundle() -> str:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed, fit to stand in a page."""
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        .replace("</script", r"<\/script")
        .replace("<!--", r"<\!--")
    )


def size(value: Any) -> int:
    """Bytes that a value takes in the page."""
    return len(_embedded(value))


def within(budget: int, values: Sequence[Any]) -> list[Any]:
    """The first of some values, as many as take no more than so many bytes in the page."""
    kept: list[Any] = []
    for value in values:
        budget -= size(value) + 1
        if budget < 0:
            break
        kept.append(value)
    return kept


def _embedded(value: Any) -> Markup:
    """A value as JSON that cannot end the script it stands in."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False, default=_plain)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _plain(value: Any) -> Any:
    """NumPy's and pandas' values as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lexibit.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (files("lexibit.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
