"""HTML as a type: an element escapes all content that is not `Html`.

Thus no text from a file, however hostile, becomes markup, and no caller has to remember to escape.
"""

import html
import re
from typing import Any

__all__ = ["Html", "collapsed", "escaped", "joined", "table", "tag"]

VOID = {"br", "img", "link", "meta"}
# Control characters, lone surrogates, and characters that change the direction of text.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


class Html(str):
    """Text that is markup already."""


def escaped(content: Any) -> Html:
    """Markup that shows ``content``; `Html` stays as it is."""
    if isinstance(content, Html):
        return content
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(content))))


def joined(*parts: Any) -> Html:
    """Join the parts; a part that is not `Html` is escaped."""
    return Html("".join(map(escaped, parts)))


def tag(name: str, /, *content: Any, **attributes: Any) -> Html:
    """An element. ``class_`` is class, ``aria_label`` aria-label; None leaves an attribute out."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(*content)}</{name}>")


def table(head: list[str], rows: list[list[Any]], label: str, numeric: set[int]) -> Html:
    """A table that scrolls inside its own container; a row's first cell is the row's header.

    ``numeric`` are the columns to align to the right.
    """

    def cell(kind: str, i: int, content: Any, **more: Any) -> Html:
        return tag(kind, content, class_="number" if i in numeric else None, **more)

    columns = (cell("th", i, name, scope="col") for i, name in enumerate(head))
    lines = (
        joined(
            *(
                cell("td", i, content) if i else cell("th", i, content, scope="row")
                for i, content in enumerate(row)
            )
        )
        for row in rows
    )
    body = joined(*(tag("tr", line) for line in lines))
    whole = tag("table", tag("thead", tag("tr", *columns)), tag("tbody", body))
    # Focusable, so that the keyboard can scroll the table too.
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def collapsed(summary: Any, *content: Any) -> Html:
    """Content that is hidden until the reader opens ``summary``."""
    return tag("details", tag("summary", summary), *content)
