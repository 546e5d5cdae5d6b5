"""A table as text for a terminal, Markdown, CSV or LaTeX. header: column titles; rows: cells, the first one a label."""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120) -> str:
    """For a terminal: columns padded, titles and labels broken into lines; columns that do not fit go below."""
    widths = [max(map(len, [*title.split(), *cells])) for title, *cells in zip(header, *rows, strict=True)]
    longest_word = max(map(len, " ".join(label for label, *_ in [header, *rows]).split()))
    widths[0] = min(widths[0], max(min(40, longest_word), width - sum(2 + wide for wide in widths[1:])))
    blocks, left = [[]], width - widths[0]
    for column, wide in enumerate(widths[1:], 1):
        if blocks[-1] and 2 + wide > left:
            blocks.append([])
            left = width - widths[0]
        blocks[-1].append(column)
        left -= 2 + wide

    lines = []

    def add_line(label, cells, block):
        padded = [cell.rjust(widths[column]) for column, cell in zip(block, cells, strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())

    for block in blocks:
        if lines:
            lines.append("")
        titles = [header[column].split() for column in (0, *block)]
        deepest = max(map(len, titles))
        for label, *cells in zip(*([""] * (deepest - len(words)) + words for words in titles), strict=True):
            add_line(label, cells, block)
        lines.append("-" * (widths[0] + sum(2 + widths[column] for column in block)))
        for row in rows:
            label, *label_goes_on = textwrap.wrap(row[0], widths[0], subsequent_indent="  ") or [""]
            add_line(label, [row[column] for column in block], block)
            lines += label_goes_on
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue().removesuffix("\n")


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "+-": r"$\pm$"}

    def escape(cell):
        return re.sub(r"\+-|[\\{}$&#%_^~]", lambda found: special.get(found[0], "\\" + found[0]), cell)

    titles, *lines = [" & ".join(map(escape, line)) + r" \\" for line in [header, *rows]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([begin, titles, r"\hline", *lines, r"\end{tabular}"])


STYLES = {"text": text_table, "md": markdown_table, "csv": csv_table, "latex": latex_table}


def render(tables: Iterable[tuple], notes: Sequence[str], style: str) -> str:
    """Tables (title, header, rows) in one of STYLES, and the notes as lines that do not break it."""
    def line(text):
        return {"csv": csv_table([text], []), "latex": f"% {text}"}.get(style, text)

    parts = []
    for title, header, rows in tables:
        parts += [line(title), STYLES[style](header, rows)]
    if notes:
        parts.append("\n".join(map(line, notes)))
    return "\n\n".join(parts)
