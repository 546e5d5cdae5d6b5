"""The paper's tables with results of ours beside the published numbers, from results.jsonl.

    python -m utils.tables                       all that outputs/ holds: tables of all tasks, and a line for a model
    python -m utils.tables DIR --format latex    of another folder; md and csv are the other formats
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .ending import exit_with_one_line_errors
from .formats import STYLES, render
from .provenance import NO_EFFECT
from .results import read_results, with_marks
from .run import OneLineParser

# {"models": {name: printed name}, task: {data set: {"title", "whole": [how many, of what] where known,
# "figures": {column: {model: published number}}}}}
PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())
# The tasks that have tables, and the titles of tables that the paper has not.
TASKS = {"retrieval": "Part retrieval, AP in percent",
         "classify": "Classification, best test accuracy over epochs, percent",
         "segment": "Segmentation, percent",
         "transfer": "Keypoint transfer, PCK@0.1 in percent, published protocols differ"}
# Arguments that a row, its table or its column says.
NO_MARK = {"model", "weights", "dataset", "probe", "load_features"}


class Run(NamedTuple):
    """A results line as tables need it."""
    task: str
    dataset: str  # with the place of one's own data
    name: str
    weights: str  # "" for the official ones
    marks: str  # what else differs from the published setting
    figures: dict  # column -> percent, or None; the first column for where there is room for one
    about: dict  # column -> what else is shown
    baselines: dict  # what has learned nothing -> its figures and counts, by column

    @property
    def row(self) -> tuple[str, str]:
        return self.name, ", ".join(filter(None, (self.weights, self.marks)))


def columns_of(task: str, best: object, probe: object) -> tuple[dict, dict, dict]:
    """Where a results line holds what stands in each column, as keys of nested dictionaries with spaces between:
    {column: keys} of figures, {column: keys} of what else is shown, and {name: {column: keys}} of what has learned
    nothing. best, probe: the line's."""
    if task == "retrieval":
        return ({"encoded": f"ap_{best}", "projected": "ap_projected"}, {"token": "best", "patches": "num_patches"},
                {"random ranking": {"encoded": "ap_chance", "projected": "ap_chance"}})
    if task == "classify":
        return ({f"{probe}": "best_acc1"},
                {f"{probe} +-": "best_acc1_std", "train": "num_train", "held out": "num_held_out", "test": "num_test"},
                {"most frequent class": {f"{probe}": "chance"}})
    if task == "segment":
        return ({f"{probe} {name}": name for name in ("mIoU", "mAcc", "aAcc")}, {"images": "num_images"},
                {"largest class": {f"{probe} {name}": f"chance {name}" for name in ("mIoU", "mAcc", "aAcc")}})
    figures = {"PCK@0.1": "pck_image 0.1", "per point": "pck_point 0.1", "category mean": "pck_category 0.1"}
    return (figures, {"pairs": "num_pairs"},
            {"random cell": {column: f"chance {keys}" for column, keys in figures.items()},
             "same place": {column: f"same_place {keys}" for column, keys in figures.items()}})


def value_at(result: object, keys: str, kind: type = float) -> float | str | None:
    """What nested dictionaries hold at these keys, where it is a finite number, or, for kind str, a string; or None."""
    for key in keys.split():
        result = result.get(key) if isinstance(result, dict) else None
    number = isinstance(result, int | float) and abs(result) < 1e15
    return result if number or kind is str and isinstance(result, str) else None


def mark(name: str, value: object) -> str:
    """An argument in words: "epochs 10", "exclude query", "no norm"; of paths the last part."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return " ".join([words, *(Path(str(one)).name for one in (value if isinstance(value, list) else [value]))])


def run_of(result: dict) -> Run:
    """A results line of one of TASKS. Marks are: all arguments that differ from their default and can change a figure,
    but what row and column say; a part of a data set of known size; a name of the paper for another model."""
    task, dataset, name = result["task"], result["dataset"], str(result.get("name") or result["model"])
    published = PAPER[task].get(dataset, {})
    args = result["args"] if isinstance(result.get("args"), dict) else {}

    # A head that was only tested has no best epoch; segmentation once had one probe.
    line = {"probe": "linear" if task == "segment" else "unknown", "best_acc1": result.get("acc1"), **result}
    figure_keys, about_keys, baseline_keys = columns_of(task, line.get("best"), line["probe"])
    figures = {column: value_at(line, keys) for column, keys in figure_keys.items()}
    # No column for what no run has, as held-out patches.
    about = {column: value for column, keys in about_keys.items() if (value := value_at(line, keys, str))}
    counts = {column: value for column, value in about.items() if isinstance(value, int)}
    baselines = {}
    for title, columns in baseline_keys.items():
        row = {column: value_at(line, keys) for column, keys in columns.items()}
        if any(value is not None for value in row.values()):
            baselines[title] = row | counts

    changed, weights, marks = args.get("changed"), "", []
    if isinstance(changed, list):
        unmarked = NO_EFFECT | NO_MARK | ({"batch_size"} if task in ("retrieval", "transfer") else set())
        marks += [mark(key, args.get(key)) for key in map(str, changed) if key not in unmarked]
        if "weights" in changed:
            weights = f"{mark('weights', result.get('weights'))} {str(result.get('sha256') or '')[:8]}".strip()
    else:
        marks.append("settings not recorded")
    if result.get("weights") == "random":
        weights = "random weights"
    if name in PAPER["models"] and result["model"] != name:
        marks.append(mark("model", result["model"]))
    if "whole" in published:
        used, (whole, unit) = sum(counts.values()), published["whole"]
        if used not in (0, whole):
            marks.append(f"{used} of {whole} {unit}")

    # The name of the data set says nothing of one's own data.
    source = args.get("annotations") or args.get("data_path")
    if source and not published:
        dataset += f" in {' '.join(map(str, source)) if isinstance(source, list) else source}"
    if (task, dataset) == ("segment", "synthetic"):
        dataset = "synthetic-part"
    return Run(task, dataset, name, weights, ", ".join(marks), figures, about, baselines)


def runs_of(folder: Path, tasks: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs of these tasks, of equal ones the last, and notes on what stands in no table. Raises UserError."""
    results, notes = read_results(folder)
    runs, left_out = {}, Counter()
    for result in results:
        if result["task"] in tasks:
            run = run_of(result)
            key = (run.task, run.dataset, *run.row, *run.figures)
            if key in runs:
                left_out["older than another of the same settings"] += 1
            runs[key] = run
        elif result["task"] not in TASKS:
            left_out[f"of {result['task']}, which has no table here"] += 1
    return [*runs.values()], notes + [f"results left out: {count} {reason}" for reason, count in left_out.items()]


def place(name: str) -> tuple[int, str]:
    """Sorts names: the paper's models in the paper's order, then the others."""
    models = list(PAPER["models"])
    return models.index(name) if name in models else len(models), name


def show(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def paper_table(task: str, dataset: str, runs: Iterable[Run]) -> tuple:
    """(title, header, rows) of a data set: published, ours, difference, a row for each setting; below, what has learned
    nothing."""
    paper = PAPER[task].get(dataset, {"title": f"{TASKS[task]}: {dataset} (not in the paper)", "figures": {}})
    published, runs = paper["figures"], [run for run in runs if (run.task, run.dataset) == (task, dataset)]
    ours, baselines = {(model, ""): {} for figures in published.values() for model in figures}, {}
    for run in runs:
        ours.setdefault(run.row, {}).update(run.figures | run.about)
        for name, values in run.baselines.items():
            # One row for all probes; another for another number of patches, or another rule of ranking.
            baselines.setdefault((name, str([*values.values()])), {}).update(values)
    settings = sorted(ours, key=lambda row: (row[1] != "" or row[0] not in PAPER["models"], place(row[0]), row[1]))
    # A label, the name of a published number, and values by column.
    rows = [(with_marks(*row), row[0], ours[row]) for row in settings]
    rows += [(name, None, values) for (name, _), values in sorted(baselines.items())]
    labels, names, rows = zip(*rows, strict=True)

    order = []
    for column in [*published, *(column for run in runs for column in run.figures)]:
        order += [column, f"{column} +-"]
    order += [column for run in runs for column in run.about]
    columns = {"model": labels}
    for column in dict.fromkeys(order):
        values = [row.get(column) for row in rows]
        if column in published:
            theirs = [published[column].get(name) for name in names]
            pairs = zip(values, theirs, strict=True)
            columns[f"{column} paper"] = theirs
            columns[f"{column} ours"] = values
            columns[f"{column} diff"] = [None if None in pair else f"{pair[0] - pair[1]:+.1f}" for pair in pairs]
        elif any(value is not None for value in values):
            columns[column] = values
    return paper["title"], list(columns), [list(map(show, row)) for row in zip(*columns.values(), strict=True)]


def overview(runs: Sequence[Run]) -> tuple[tuple, list[str]]:
    """(table, notes): a line for a model and its weights, a column for each data set and probe. Of several runs one
    without marks counts, else the last; the marks of the others are in the notes."""
    rows, columns = {}, {}
    for run in sorted(runs, key=lambda run: (list(TASKS).index(run.task), run.dataset)):
        column, row = f"{run.dataset} {next(iter(run.figures))}", rows.setdefault((run.name, run.weights), {})
        columns[column] = None
        if column not in row or row[column].marks or not run.marks:
            row[column] = run
    marks = list(dict.fromkeys(run.marks for row in rows.values() for run in row.values() if run.marks))

    def cell(run):
        figure = show(next(iter(run.figures.values())))
        return f"{figure} [{marks.index(run.marks) + 1}]" if run.marks else figure

    lines = [[with_marks(*row), *(cell(rows[row][column]) if column in rows[row] else "-" for column in columns)]
             for row in sorted(rows, key=lambda row: (place(row[0]), row[1]))]
    return ("All models", ["model", *columns], lines), [f"[{number}] {text}" for number, text in enumerate(marks, 1)]


def paper_tables(tasks: Sequence[str], folder: Path, style: str = "text", everything: bool = False) -> str:
    """A table for each data set of these tasks, the paper's first, with the results in folder/results.jsonl, in one of
    utils.formats.STYLES; below, what is left out and why. everything: only tables with a run, and a last one with a
    line for a model. Raises UserError without results."""
    (runs, notes), tables = runs_of(folder, tasks), []
    for task in tasks:
        paper, ours = PAPER[task], {run.dataset for run in runs if run.task == task}
        datasets = [name for name in paper if name in ours or not everything] + sorted(ours - paper.keys())
        tables += [paper_table(task, dataset, runs) for dataset in datasets]
    if everything:
        table, marks = overview(runs)
        tables, notes = [*tables, table], marks + notes
    return render(tables, notes, style)


def figure6_panels(folder: Path) -> dict[str, list[tuple[str, list[float | None]]]]:
    """{title: [(row, [objects published, ours, parts published, ours]), ...]} of figure 6, in percent, None where there
    is none: what utils.drawing.draw_figure6 draws. Besides the paper's panels, those of other parts that were segmented
    and of retrieval and transfer. Raises UserError without results."""
    runs, _ = runs_of(folder, TASKS)
    panels = {}  # title -> (task, data set) of objects and of parts
    for dataset in [*PAPER["segment"], *(run.dataset for run in runs if run.task == "segment")]:
        if found := re.fullmatch(r"(\S+)-part( in .*)?", dataset):
            name, where = found[1], found[2] or ""
            title = name + where + ("" if dataset in PAPER["segment"] else " (not in the paper)")
            panels[title] = ("segment", f"{name}-object{where}"), ("segment", dataset)
    for task, title in (("retrieval", "Part retrieval, {}: AP"), ("transfer", "Keypoint transfer, {}: PCK@0.1")):
        panels |= {title.format(run.dataset): (("", ""), (task, run.dataset)) for run in runs if run.task == task}

    def bar(run):
        # Another probe of segmentation than the paper's has a bar of its own.
        probe = next(iter(run.figures)).split()[0] if run.task == "segment" and "linear mIoU" not in run.figures else ""
        return run.name, ", ".join(filter(None, (probe, run.row[1])))

    def rows(kinds):
        columns = []
        for task, dataset in kinds:
            published = PAPER.get(task, {}).get(dataset, {"figures": {}})["figures"]
            columns += [{(model, ""): figure for model, figure in next(iter(published.values()), {}).items()},
                        {bar(run): next(iter(run.figures.values())) for run in runs
                         if (run.task, run.dataset) == (task, dataset)}]
        names = sorted(set().union(*columns), key=lambda row: (row[1] != "", place(row[0]), row[1]))
        return [(with_marks(PAPER["models"].get(name, name), marks, "\n"),
                 [column.get((name, marks)) for column in columns]) for name, marks in names]

    return {title: rows(kinds) for title, kinds in panels.items()}


def main() -> None:
    """Prints the tables of all tasks in a folder, and a table with a line for each model."""
    parser = OneLineParser(__doc__, prog="python -m utils.tables")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), metavar="DIR",
                        help="the --output-dir of the runs (default: outputs)")
    parser.add_argument("--format", choices=STYLES, default="text", help="(default: text)")
    args = parser.parse_args()
    print(paper_tables(TASKS, args.folder, args.format, everything=True))


if __name__ == "__main__":
    exit_with_one_line_errors(main)
