"""Results: results.jsonl, written and read, and tables of ours beside the paper's.

    python -m utils.results                       all that outputs/ holds: tables of all tasks, and a line for a model
    python -m utils.results DIR --format latex    of another folder; md and csv are the other formats
"""

import csv
import io
import json
import os
import re
import textwrap
from argparse import Namespace
from collections import Counter, namedtuple
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from . import UserError
from .distributed import is_main, world_size
from .provenance import NAME_ENCODER, NO_EFFECT, this_run

# {"models": {name: printed name}, task: {data set: {"title", "whole": [how many, of what] where known,
# "figures": {column: {model: published number}}}}}
PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())

# Arguments that a row, its table or its column says.
NO_MARK = {"model", "weights", "dataset", "probe", "load_features"}

# Files of this run that could not be written, and why.
unsaved: dict[Path, str] = {}


def run_slug(name: str) -> str:
    """A run's name as the beginning of file names: timm/vit_tiny -> timm-vit_tiny."""
    return re.sub(r"[^\w.+-]+", "-", name)


def args_to_json(args: Namespace) -> dict:
    """The arguments as values that JSON can hold: paths, inf and nan become strings, tuples lists."""
    return json.loads(json.dumps(vars(args), default=str), parse_constant=str)


def settings_of(args: Namespace) -> dict:
    """The arguments that must be the same when a run is resumed, as values that JSON can hold."""
    return {name: value for name, value in args_to_json(args).items() if name not in NO_EFFECT | NAME_ENCODER}


def start_line(task: str, args: Namespace, encoder: object) -> dict:
    """The first keys of a results line; encoder has weights, sha256 and cls_from."""
    return {"task": task, "name": args.name, "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
            "cls_from": encoder.cls_from, "dataset": args.dataset, "world_size": world_size(),
            "precision": args.precision, "seed": args.seed, "args": args_to_json(args)}


def append_result(folder: Path, *results: dict) -> None:
    """Appends the results and what run they are of to results.jsonl, from the main process, in one write: runs may
    share a folder. Raises UserError, on all processes, where a figure is not finite and, having printed the lines,
    where a file of the run could not be written."""
    path, lines = folder / "results.jsonl", []
    for result in results:
        try:
            lines.append(json.dumps(result | this_run(), allow_nan=False) + "\n")
        except ValueError:
            names = [name for name, value in result.items()
                     if "NaN" in (text := json.dumps(value)) or "Infinity" in text]
            raise UserError(f"{', '.join(names)} of the result is not finite; no line is written") from None
    if not is_main():
        return
    problem = next(iter(unsaved.values()), "")
    try:
        if not problem:
            append_text(path, "".join(lines))
    except OSError as error:
        problem = f"{path} could not be written ({error.strerror})"
    if problem:
        print("".join(lines), end="", flush=True)
        raise UserError(f"{problem}; the result is what standard output ends in: append it to {path}")


def append_text(path: Path, text: str) -> None:
    """Appends whole lines in one write, on a new line where a run that was killed left half of one."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def is_finished(folder: Path, probe: str, line: dict) -> bool:
    """Whether results.jsonl has the line of a run's probe. line: its start, with "made_with", a digest of all that its
    figures depend on."""
    same = {"probe": probe, **{key: line[key] for key in ("task", "name", "made_with")}}
    with suppress(UserError):
        return any(result | same == result for result in read_results(folder)[0])
    return False


def read_results(folder: Path, needed: Iterable[str] = (), task: str | None = None) -> tuple[list[dict], list[str]]:
    """The results lines of a folder, or of one task, oldest first, and a note on each line that is none. Sure are
    strings at task, dataset and model, and the needed keys of the task: a line may be of an older version. Raises
    UserError where there is no result."""
    path, results, notes = folder / "results.jsonl", [], []
    if not path.is_file():
        raise UserError(f"{path} does not exist; run without --table first, or name its folder with --output-dir")
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1):
        try:
            result = json.loads(line)
            result["model"] = result.get("model", result.get("name"))
            missing = [key for key in ("task", "dataset", "model") if not isinstance(result.get(key), str)]
            missing += [key for key in needed if result.get("task") == task and key not in result]
            reason = ", ".join(f"no {key}" for key in missing)
        except (ValueError, RecursionError, TypeError, AttributeError):
            reason = "not whole JSON"
        if not reason:
            results.append(result)
        elif line.strip():
            notes.append(f"{path}, line {number}, is not a results line ({reason}); left out")
    if not results:
        raise UserError(notes[0] if notes else f"{path} is empty; run without --table first")
    notes[20:] = [f"{len(notes) - 20} more such lines"] * (len(notes) > 20)
    return [result for result in results if task in (None, result["task"])], notes


def caveats(result: dict) -> str:
    """What must stand wherever the result is printed: random weights, synthetic data; "" for neither."""
    return ", ".join(["random weights"] * (result.get("weights") == "random")
                     + ["synthetic data"] * result["dataset"].startswith("synthetic"))


def with_marks(name: str, marks: str, separator: str = " ") -> str:
    return f"{name}{separator}({marks})" if marks else name


def run_title(result: dict) -> str:
    """Model, data set and caveats of a result: "ibot on synthetic (random weights, synthetic data)"."""
    return with_marks(f"{result.get('name', result['model'])} on {result['dataset']}", caveats(result))


# Of each task: the title of tables that the paper has not; {column: nested keys of a results line} of figures, the
# first for where there is room for one, and of what else is shown; {what has learned nothing: the keys of its figures,
# {} for those of ours}. {best} and {probe} are the line's.
TASKS = {
    "retrieval": ("Part retrieval, AP in percent", {"encoded": "ap_{best}", "projected": "ap_projected"},
                  {"token": "best", "patches": "num_patches"}, {"random ranking": "ap_chance"}),
    "classify": ("Classification, best test accuracy over epochs, percent", {"{probe}": "best_acc1"},
                 {"{probe} +-": "best_acc1_std", "train": "num_train", "held out": "num_held_out", "test": "num_test"},
                 {"most frequent class": "chance"}),
    "segment": ("Segmentation, percent", {f"{{probe}} {name}": name for name in ("mIoU", "mAcc", "aAcc")},
                {"images": "num_images"}, {"largest class": "chance {}"}),
    "transfer": ("Keypoint transfer, PCK@0.1 in percent, published protocols differ",
                 {"PCK@0.1": "pck_image 0.1", "per point": "pck_point 0.1", "category mean": "pck_category 0.1"},
                 {"pairs": "num_pairs"}, {"random cell": "chance {}", "same place": "same_place {}"})}
# A results line in its table. weights, marks: how it differs from the published setting; row: name, and both of them;
# figures, about: by column; baselines: {what has learned nothing: its figures and counts}.
Run = namedtuple("Run", "task dataset name weights marks row figures about baselines")


def value_at(result: object, keys: Iterable[str], kind: type = float) -> float | str | None:
    """What nested dictionaries hold at these keys, where it is a finite number, or, for kind str, a string; or None."""
    for key in keys:
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
    """A results line in its table. Marks are: all arguments that differ from their default and can change a figure, but
    what row and column say; weights; a part of a data set of known size; a name of the paper for another model."""
    task, dataset, name = result["task"], result["dataset"], str(result.get("name") or result["model"])
    published, args = PAPER.get(task, {}).get(dataset, {}), result.get("args")
    args = args if isinstance(args, dict) else {}
    # A head that was only tested has no best epoch; segmentation once had one probe.
    line = {"probe": "linear" if task == "segment" else "unknown", "best_acc1": result.get("acc1"), **result}
    words = {word: str(line.get(word)) for word in ("best", "probe")}

    def values(columns, template="{}", kind=float):
        return {column.format(**words): value_at(line, template.format(path).format(**words).split(), kind)
                for column, path in columns.items()}
    _, columns, others, nothing = TASKS[task]
    # No column for what no run has, as held-out patches.
    figures, about = values(columns), {key: value for key, value in values(others, kind=str).items() if value}
    counts = {key: value for key, value in about.items() if isinstance(value, int)}
    baselines = {title: row | counts for title, where in nothing.items()
                 if {*(row := values(columns, where)).values()} != {None}}

    changed, weights, marks = args.get("changed"), "", ["settings not recorded"]
    if isinstance(changed, list):
        unmarked = NO_EFFECT | NO_MARK | ({"batch_size"} if task in ("retrieval", "transfer") else set())
        marks = [mark(key, args.get(key)) for key in map(str, changed) if key not in unmarked]
        if "weights" in changed:
            weights = f"{mark('weights', result.get('weights'))} {str(result.get('sha256') or '')[:8]}".strip()
    if result.get("weights") == "random":
        weights = "random weights"
    if name in PAPER["models"] and result["model"] != name:
        marks.append(mark("model", result["model"]))
    if "whole" in published and sum(counts.values()) not in (0, published["whole"][0]):
        marks.append("{} of {} {}".format(sum(counts.values()), *published["whole"]))
    # The name of the data set says nothing of one's own data.
    source = args.get("annotations") or args.get("data_path")
    if source and not published:
        dataset += f" in {' '.join(map(str, source)) if isinstance(source, list) else source}"
    if (task, dataset) == ("segment", "synthetic"):
        dataset = "synthetic-part"
    row = name, ", ".join(filter(None, (weights, *marks)))
    return Run(task, dataset, name, weights, ", ".join(marks), row, figures, about, baselines)


def runs_of(folder: Path, tasks: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs of these tasks, of equal ones the last, and notes on what stands in no table. Raises UserError."""
    (results, notes), runs, left_out = read_results(folder), {}, Counter()
    for result in results:
        if result["task"] in tasks:
            run = run_of(result)
            key = (run.task, run.dataset, *run.row, *run.figures)
            left_out.update(["older than another of the same settings"] * (key in runs))
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
    title = f"{TASKS[task][0]}: {dataset} (not in the paper)"
    about = {"title": title, "figures": {}} | PAPER.get(task, {}).get(dataset, {})
    published, runs = about["figures"], [run for run in runs if (run.task, run.dataset) == (task, dataset)]
    rows = {(False, model, ""): {} for figures in published.values() for model in figures}
    for run in runs:
        rows.setdefault((False, *run.row), {}).update(run.figures | run.about)
        for name, figures in run.baselines.items():
            # One row for all probes; another for another number of patches, or another rule of ranking.
            rows.setdefault((True, name, str([*figures.values()])), {}).update(figures)
    keys = sorted(rows, key=lambda key: (key[0], bool(key[2]) or key[1] not in PAPER["models"], place(key[1]), key[2]))
    columns = {"model": [name if baseline else with_marks(name, marks) for baseline, name, marks in keys]}
    names = [*published, *(name for run in runs for name in run.figures)]
    names = [both for name in names for both in (name, f"{name} +-")] + [name for run in runs for name in run.about]
    for column in dict.fromkeys(names):
        ours = [rows[key].get(column) for key in keys]
        if column in published:
            theirs = [None if baseline else published[column].get(name) for baseline, name, _ in keys]
            columns |= {f"{column} paper": map(show, theirs), f"{column} ours": map(show, ours), f"{column} diff": [
                "-" if None in pair else f"{pair[0] - pair[1]:+.1f}" for pair in zip(ours, theirs, strict=True)]}
        elif {*ours} != {None}:
            columns[column] = map(show, ours)
    return about["title"], list(columns), list(zip(*columns.values(), strict=True))


def overview(runs: Sequence[Run]) -> tuple[tuple, list[str]]:
    """(table, notes): a line for a model and its weights, a column for each data set and probe. Of several runs one
    without marks counts, else the last; the marks of the others are in the notes."""
    cells, columns = {}, {}
    for run in sorted(runs, key=lambda run: (list(TASKS).index(run.task), run.dataset)):
        first, figure = next(iter(run.figures.items()))
        column, row = f"{run.dataset} {first}", cells.setdefault((run.name, run.weights), {})
        columns[column] = None
        if column not in row or row[column][1] or not run.marks:
            row[column] = figure, run.marks
    marked = list(dict.fromkeys(marks for row in cells.values() for _, marks in row.values() if marks))

    def cell(figure=None, marks=""):
        return show(figure) + (f" [{marked.index(marks) + 1}]" if marks else "")

    rows = [(with_marks(*key), *(cell(*cells[key].get(column, ())) for column in columns))
            for key in sorted(cells, key=lambda key: (place(key[0]), key[1]))]
    return ("All models", ["model", *columns], rows), [f"[{n}] {marks}" for n, marks in enumerate(marked, 1)]


def paper_tables(tasks: Sequence[str], folder: Path, style: str = "text", everything: bool = False) -> str:
    """A table for each data set of these tasks, the paper's first, with the results in folder/results.jsonl, in one of
    STYLES; below, what is left out and why. everything: only tables with a run, and a last one with a line for a model.
    Raises UserError without results."""
    (runs, notes), tables = runs_of(folder, tasks), []
    for task in tasks:
        paper, ours = PAPER.get(task, {}), {run.dataset for run in runs if run.task == task}
        datasets = [*(name for name in paper if name in ours or not everything), *sorted(ours - paper.keys())]
        tables += [paper_table(task, dataset, runs) for dataset in datasets]
    if everything:
        table, marks = overview(runs)
        tables, notes = [*tables, table], marks + notes
    return render(tables, notes, style)


def figure6_panels(folder: Path) -> dict[str, list[tuple[str, list[float | None]]]]:
    """{title: [(row, [objects published, ours, parts published, ours]), ...]} of figure 6, in percent, None where there
    is none: what utils.drawing.draw_figure6 draws. Besides the paper's panels, those of other parts that were segmented
    and of retrieval and transfer. Raises UserError without results."""
    runs, wanted, panels = runs_of(folder, TASKS)[0], {}, {}

    def bar(run):
        # Another probe of segmentation than the paper's has a bar of its own.
        probe = [] if run.task != "segment" or "linear mIoU" in run.figures else [next(iter(run.figures)).split()[0]]
        return run.name, ", ".join(filter(None, [*probe, run.row[1]]))

    for dataset in [*PAPER["segment"], *(run.dataset for run in runs if run.task == "segment")]:
        if found := re.fullmatch(r"(\S+)-part( in .*)?", dataset):
            title = found[1] + (found[2] or "") + " (not in the paper)" * (dataset not in PAPER["segment"])
            wanted[title] = ("segment", f"{found[1]}-object{found[2] or ''}"), ("segment", dataset)
    for task, title in (("retrieval", "Part retrieval, {}: AP"), ("transfer", "Keypoint transfer, {}: PCK@0.1")):
        wanted |= {title.format(run.dataset): ((), (task, run.dataset)) for run in runs if run.task == task}
    for title, kinds in wanted.items():
        columns = []
        for kind in kinds:
            published = PAPER.get(kind[0], {}).get(kind[1], {"figures": {}})["figures"] if kind else {}
            columns += [{(model, ""): figure for model, figure in next(iter(published.values()), {}).items()},
                        {bar(run): next(iter(run.figures.values())) for run in runs if run[:2] == kind}]
        rows = sorted(set().union(*columns), key=lambda row: (bool(row[1]), place(row[0]), row[1]))
        panels[title] = [(with_marks(PAPER["models"].get(row[0], row[0]), row[1], "\n"),
                          [column.get(row) for column in columns]) for row in rows]
    return panels


# How tables are written

def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120) -> str:
    """For a terminal: columns padded, headings and labels broken into lines; columns that do not fit go below."""
    widths = [max(map(len, [*title.split(), *cells])) for title, *cells in zip(header, *rows, strict=True)]
    least = min(40, max(map(len, " ".join(label for label, *_ in [header, *rows]).split())))
    widths[0] = min(widths[0], max(least, width - sum(widths[1:]) - 2 * len(widths[1:])))
    blocks = [[]]
    for column, wide in enumerate(widths[1:], 1):
        if blocks[-1] and widths[0] + sum(2 + widths[other] for other in blocks[-1]) + 2 + wide > width:
            blocks.append([])
        blocks[-1].append(column)

    lines = []
    for block in blocks:
        lines += [""] * bool(lines)
        for number, row in enumerate([header, *rows]):
            cells = [textwrap.wrap(row[0], widths[0], subsequent_indent="  "),
                     *([row[column]] if number else row[column].split() for column in block)]
            # Headings stand on the line below them, figures beside the first line of their label.
            empty = [""] * max(map(len, cells))
            cells = [(cell + empty)[:len(empty)] if number else (empty + cell)[-len(empty):] for cell in cells]
            lines += ["  ".join(text.rjust(widths[column]) if column else text.ljust(widths[0])
                                for column, text in zip([0, *block], texts, strict=True)).rstrip()
                      for texts in zip(*cells, strict=True)]
            if not number:
                lines.append("-" * (widths[0] + sum(2 + widths[column] for column in block)))
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
    first, *rest = [" & ".join(re.sub(r"\+-|[\\{}$&#%_^~]", lambda found: special.get(found[0], "\\" + found[0]), cell)
                               for cell in line) + r" \\" for line in [header, *rows]]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", first, r"\hline", *rest, r"\end{tabular}"])


STYLES = {"text": text_table, "md": markdown_table, "csv": csv_table, "latex": latex_table}


def render(tables: Iterable[tuple], notes: Sequence[str], style: str) -> str:
    """Tables (title, header, rows) in one of STYLES, and the notes as lines that do not break it."""
    def line(text):
        return {"csv": csv_table([text], []), "latex": f"% {text}"}.get(style, text)
    parts = [part for title, *table in tables for part in (line(title), STYLES[style](*table))]
    return "\n\n".join([*parts, *filter(None, ["\n".join(map(line, notes))])])


def main() -> None:
    """Prints the tables of all tasks in a folder, and a table with a line for each model."""
    # Here, since utils.run imports this file.
    from .run import OneLineParser
    parser = OneLineParser(__doc__, prog="python -m utils.results")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), metavar="DIR",
                        help="the --output-dir of the runs (default: outputs)")
    parser.add_argument("--format", choices=STYLES, default="text", help="(default: text)")
    args = parser.parse_args()
    print(paper_tables(TASKS, args.folder, args.format, everything=True))


if __name__ == "__main__":
    from .run import exit_with_one_line_errors
    exit_with_one_line_errors(main)
