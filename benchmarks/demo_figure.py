"""Draw docs/demo.svg from what ``lexibit demo --json`` printed.

lexibit demo --json > demo.json
python benchmarks/demo_figure.py demo.json docs/demo.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 130, 66, 60
COLOURS = {"kmeans": "#1a7f5a", "linear": "#c2571a", "lq": "#5a5fc7"}
NAMES = {"kmeans": "k-means", "linear": "linear bins", "lq": "LQ"}


def x(nbytes: float, most: float) -> float:
    """Position of a size: logarithmic, the float32 file at the right."""
    share = math.log(nbytes / 5e6) / math.log(most / 5e6)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def y(cosine: float) -> float:
    return TOP + (1 - max(cosine, 0)) * (HEIGHT - TOP - BOTTOM)


def figure(rows: list[dict[str, float | str | bool]]) -> str:
    reference = next(row for row in rows if row["scheme"] == "float32")
    most = float(reference["nbytes"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#333">',
        "<title>Size on disk against cosine to the float32 embeddings</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="15" font-weight="600">all-MiniLM-L6-v2: cosine to the float32 '
        "embeddings, by size on disk</text>",
    ]
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>'
            f'<text x="{LEFT - 10}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for size in (6, 9, 12, 23, 91):
        at = x(size * 1e6, most)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 24}" text-anchor="middle">{size} MB</text>')
    for scheme, colour in COLOURS.items():
        mine = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: row["nbytes"])
        points = [(x(float(row["nbytes"]), most), y(float(row["cosine"]))) for row in mine]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        for (px, py), row in zip(points, mine, strict=True):
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"><title>{NAMES[scheme]}, '
                f"{row['bits']} bits: {row['nbytes'] / 1e6:.1f} MB, {row['cosine']:.3f}</title></circle>"
            )
            if scheme == "kmeans":
                parts.append(
                    f'<text x="{px:.1f}" y="{py - 11:.1f}" text-anchor="middle" fill="{colour}" '
                    f'font-weight="600">{row["bits"]} bits</text>'
                )
    end = x(most, most)
    parts.append(f'<circle cx="{end:.1f}" cy="{y(1):.1f}" r="5" fill="#333"/>')
    parts.append(f'<text x="{end + 10:.1f}" y="{y(1) + 4:.1f}">float32</text>')
    for index, (scheme, colour) in enumerate(COLOURS.items()):
        at = y(0.6) + index * 22
        parts.append(
            f'<circle cx="{WIDTH - RIGHT - 90}" cy="{at:.1f}" r="5" fill="{colour}"/>'
            f'<text x="{WIDTH - RIGHT - 78}" y="{at + 4:.1f}">{NAMES[scheme]}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).write_text(figure(json.loads(Path(source).read_text())["rows"]))
