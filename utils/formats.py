"""A table as text for a terminal, Markdown, CSV or LaTeX. header: column titles; rows: cells, the first one a label."""

import csv
import io
from collections.abc import Iterable, Sequence

# A bracket at the start of a row would be an argument of the \\ before it.
LATEX = str.maketrans({"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "[": "{[}",
                       **{letter: "\\" + letter for letter in "{}$&#%_"}})


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a terminal: columns padded, the words of a title below each other."""
    titles = [title.split() for title in header]
    deepest = max(map(len, titles))
    stacked = [[""] * (deepest - len(words)) + words for words in titles]
    cells = [*zip(*stacked, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([label.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
             for label, *others in cells]
    lines.insert(deepest, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\\", r"\\").replace("|", r"\|") for cell in line) + " |"
                     for line in lines)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue().removesuffix("\n")


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles, *lines = [" & ".join(cell.translate(LATEX).replace("+-", r"$\pm$") for cell in line) + r" \\"
                      for line in [header, *rows]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join([begin, titles, r"\hline", *lines, r"\end{tabular}"])


STYLES = {"text": text_table, "md": markdown_table, "csv": csv_table, "latex": latex_table}


def render(tables: Iterable[tuple], notes: Sequence[str], style: str) -> str:
    """Tables (title, header, rows) in one of STYLES and the notes below them, a row and a note on one line each,
    whatever a name in it holds. Around LaTeX's tables the text is comments."""
    def line(text):
        text = " ".join(text.split())
        return {"csv": csv_table([text], []), "latex": f"% {text}"}.get(style, text)

    parts = []
    for title, header, rows in tables:
        parts += [line(title), STYLES[style](header, [[" ".join(cell.split()) for cell in row] for row in rows])]
    if notes:
        parts.append("\n".join(map(line, notes)))
    return "\n\n".join(parts)
