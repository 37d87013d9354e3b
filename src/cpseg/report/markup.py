"""Parts of a page as HTML that is read aloud, printed, and read on a phone as well as on a desk."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        cells: the first is the row's header.
        marked: whether the row is the one to look at; its header then says ``mark``.
        mark: a word or two in brackets after the header.
        remark: a sentence under the header.
    """

    cells: Sequence[str]
    marked: bool = False
    mark: str = ""
    remark: str = ""


class Group(NamedTuple):
    """Rows that belong together, under a title unless it is empty."""

    title: str
    rows: Sequence[Row]


def table(
    caption: str, header: Sequence[str], groups: Sequence[Group], *, stacked: bool = False
) -> str:
    """A table whose first column holds the headers of the rows.

    Args:
        caption: what the table shows.
        header: of every column, none of them empty.
        groups: its rows.
        stacked: on a narrow screen every row is a block, in which each cell names its column. The
            roles are written out since browsers forget them in elements that are blocks.
    """
    head = "".join(f'<th scope="col" role="columnheader">{escape(cell)}</th>' for cell in header)
    bodies = "\n".join(_body(header, group) for group in groups)
    kind = "figures stacked" if stacked else "figures"
    return (
        f'<table class="{kind}" role="table">\n<caption>{escape(caption)}</caption>\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n{bodies}\n</table>\n'
    )


def _body(header: Sequence[str], group: Group) -> str:
    lines = []
    if group.title:
        lines.append(
            f'<tr class="group" role="row"><th scope="rowgroup" role="rowheader" '
            f'colspan="{len(header)}">{escape(group.title)}</th></tr>'
        )
    lines += [_row(header, row) for row in group.rows]
    return '<tbody role="rowgroup">\n' + "\n".join(lines) + "\n</tbody>"


def _row(header: Sequence[str], row: Row) -> str:
    title, *values = row.cells
    mark = f' <em class="mark">({escape(row.mark)})</em>' if row.mark else ""
    remark = f'<small class="remark">{escape(row.remark)}</small>' if row.remark else ""
    cells = "".join(
        f'<td role="cell" data-column="{escape(column)}">{escape(value)}</td>'
        for column, value in zip(header[1:], values, strict=True)
    )
    kind = ' class="best"' if row.marked else ""
    return (
        f'<tr role="row"{kind}><th scope="row" role="rowheader">{escape(title)}{mark}{remark}</th>'
        f"{cells}</tr>"
    )


def note(text: str) -> str:
    """A small paragraph."""
    return f'<p class="note">{escape(text)}</p>\n'


def details(summary: str, content: str) -> str:
    """Content that is shown on request, and in print."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}</details>\n"


def chart(source: str, alt: str, caption: str) -> str:
    """A diagram, dark on white; a dark page inverts it."""
    return (
        f'<figure class="chart"><img src="{source}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def section(title: str, content: str) -> str:
    """A part of the page that the list of contents leads to."""
    return (
        f'<section id="{anchor(title)}" aria-labelledby="{anchor(title)}-title">\n'
        f'<h2 id="{anchor(title)}-title">{escape(title)}</h2>\n{content}\n</section>'
    )


def contents(titles: Sequence[str]) -> str:
    """Links to the parts of the page."""
    links = "\n".join(
        f'<li><a href="#{anchor(title)}">{escape(title)}</a></li>' for title in titles
    )
    return f'<nav aria-label="On this page">\n<ul>\n{links}\n</ul>\n</nav>\n'


def anchor(title: str) -> str:
    """The place of a part, as links name it."""
    return "-".join(title.lower().replace(",", "").split())


class Shot(NamedTuple):
    """A picture that can be enlarged.

    Attributes:
        title: shown below it.
        source: of the ``<img>``.
        alt: what is to be seen.
    """

    title: str
    source: str
    alt: str


def shots(name: str, pictures: Sequence[Shot]) -> str:
    """Pictures side by side; a click enlarges one, without a script.

    An enlarged picture is the target of a link, leads to its neighbours, and closes by a link to
    the row.

    Args:
        name: of the row, an anchor of its own in the page.
        pictures: in order.
    """
    places = [f"{name}-{number}" for number in range(1, len(pictures) + 1)]
    figures = []
    for number, (place, (title, source, alt)) in enumerate(zip(places, pictures, strict=True)):
        before, after = places[number - 1], places[(number + 1) % len(places)]
        figures.append(
            f'<figure class="shot" id="{place}">'
            f'<a class="enlarge" href="#{place}"><img src="{source}" alt="{escape(alt)}"></a>'
            f"<figcaption>{escape(title)}</figcaption>"
            f'<p class="steps"><a href="#{before}">previous</a> '
            f'<a href="#{name}">close</a> <a href="#{after}">next</a></p></figure>'
        )
    across = " three" if len(pictures) in (3, 5, 6) else ""
    return f'<div class="shots{across}" id="{name}">\n' + "\n".join(figures) + "\n</div>\n"
