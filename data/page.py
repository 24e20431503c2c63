"""What reports are made of: one HTML file without script, link or network; its tables, bars and drawings."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, log10
from pathlib import Path
from string import Template

import cv2
from cv2.typing import MatLike

TEMPLATE = Path(__file__).parent / "page.html"


def document(title: str, header: str, sections: Mapping[str, str], style: str = "") -> str:
    """A page of sections by title. `header` and the sections are HTML, `style` is CSS beside that of all pages."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections.items())
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), header=header, body=body, style=style
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table from cells in HTML; the first cell of a row names it. `kind`: classes of the style."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def bar(share: float, colour: str) -> str:
    """A bar of a share of its cell's width, 0..1."""
    return f'<span class="bar"><i style="width:{100 * share:.1f}%;background:{colour}"></i></span>'


def swatch(name: str, colour: str) -> str:
    """A colour and what it stands for."""
    return f'<span class="swatch"><i style="background:{colour}"></i>{escape(name)}</span>'


def svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A drawing; `label` says to who cannot see it what it shows."""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Words in a drawing; `anchor` is start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def grid(peak: float, left: float, right: float, top: float, plot: float, unit: str = "") -> str:
    """Lines at each quarter of `peak`, with their value, over a height of `plot` below `top`."""
    parts = []
    for quarter in range(5):
        y = top + plot * (1 - quarter / 4)
        value = peak * quarter / 4
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(text(left - 6, y + 4, f"{value:,g}{unit}", "end"))
    return "".join(parts)


def round_up(value: float) -> float:
    """The next number whose quarters are short to write: 1, 2, 4, 6 or 8 times a power of ten."""
    power: float = 10.0 ** floor(log10(value))
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value)


def png_uri(pixels_bgr: MatLike) -> str:
    """Pixels as the address of a PNG that lies in the page itself."""
    return _uri("png", cv2.imencode(".png", pixels_bgr)[1].tobytes())


def jpeg_uri(pixels_bgr: MatLike, quality: int) -> str:
    """Pixels as the address of a JPEG that lies in the page itself."""
    return _uri("jpeg", cv2.imencode(".jpg", pixels_bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes())


def _uri(kind: str, encoded: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
