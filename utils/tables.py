"""The paper's tables with results of ours beside the published numbers, from results.jsonl.

    python -m utils.tables --output-dir DIR --format latex
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import UserError
from .formats import STYLES, render
from .results import NO_EFFECT, read_results
from .run import OneLineParser, run_main

# {"models": {name: printed name}, "tasks": {task: title of tables that the paper has not}, task: {data set: {"title",
# "whole": [how many, of what] where known, "figures": {column: {model: published number}}}}}
PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())
TASKS, MODELS = PAPER["tasks"], [*PAPER["models"]]
# Arguments that are no marks: name, table, column, and the marks of the run that made loaded features say the last.
NO_MARK = NO_EFFECT | {"model", "dataset", "probe", "ours", "load_features"}


class Run(NamedTuple):
    """A results line as tables need it."""
    task: str
    dataset: str  # with the place of one's own data
    name: str
    marks: str  # all that differs from the published setting, and what tells it from other runs of this name
    figures: dict  # column -> percent, or None; the first column for where there is room for one
    about: dict  # column -> what else is shown; whole numbers are counts of patches, images or pairs
    baselines: dict  # what has learned nothing -> its figures and counts by column


def measured(result: Mapping) -> tuple[dict, dict, dict]:
    """The figures, about and baselines of a results line's Run, as far as the line has them."""
    task, probe = result["task"], result.get("probe")
    if task == "retrieval":
        best = result.get("best")
        figures = {"encoded": result.get(f"ap_{best}"), "projected": result.get("ap_projected")}
        chance = {column: result["ap_chance"] for column, value in figures.items() if value is not None}
        return figures, {"token": best, "patches": result["num_patches"]}, {"random ranking": chance}
    if task == "classify":
        figures = {probe: result["best_acc1"], f"{probe} +-": result.get("best_acc1_std")}
        # No column of held-out patches where no run has any.
        about = {"train": result.get("num_train"), "held out": result.get("num_held_out") or None,
                 "test": result["num_test"]}
        return figures, about, {"most frequent class": {probe: result["chance"]}}
    if task == "segment":
        figures, chance = ({f"{probe} {name}": found[name] for name in ("mIoU", "mAcc", "aAcc")}
                           for found in (result, result["chance"]))
        return figures, {"images": result["num_images"]}, {"largest class": chance}

    def pck(found):
        columns = {"PCK@0.1": "pck_image", "per point": "pck_point", "category mean": "pck_category"}
        return {column: found[level]["0.1"] for column, level in columns.items() if level in found}

    by_block = {block: found["pck_image"]["0.1"] for block, found in result.get("by_layer", {}).items()}
    best = max(by_block, key=by_block.get, default=None)
    about = {"best block": best, "its PCK@0.1": by_block.get(best), "pairs": result["num_pairs"]}
    return pck(result), about, {"random cell": pck(result["chance"]), "same place": pck(result["same_place"])}


def words(name: str, value: object) -> str:
    """An argument in words: "epochs 10", "exclude query", "no norm"."""
    text = name.replace("_", " ")
    if value == "random":
        return f"random {text}"
    if isinstance(value, bool):
        return text if value else f"no {text}"
    return f"{text} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def marks_of(result: Mapping, counts: Iterable[int], alike: Sequence[Mapping]) -> str:
    """The marks of a line's Run. counts: of what was measured. alike: the lines of its name and data."""
    marks = [f"model {result['model']}"] if result["name"] != result["model"] else []
    for name, value in result["args"].items():
        # Defaults differ too: the precision by the device, or those of another version.
        defaults = {str(other["args"].get(name)) for other in alike if name not in other["args"]["changed"]}
        if name not in NO_MARK and (name in result["args"]["changed"] or len(defaults) > 1):
            marks.append(words(name, value))
    used, in_training = sum(counts), result.get("num_test_in_training")
    whole, unit = PAPER[result["task"]].get(result["dataset"], {}).get("whole", (used, ""))
    facts = {f"{used} of {whole} {unit}": used != whole, "our recipe": result.get("recipe") == "ours",
             "undertrained": result.get("undertrained"), f"{in_training} test images in training": in_training}
    return ", ".join(marks + [text for text, holds in facts.items() if holds])


def dataset_title(result: Mapping) -> str:
    """A data set's name, and of one's own data its place, as the name says nothing of it."""
    args, dataset = result["args"], result["dataset"]
    places = [args.get("data_path"), *(args.get("annotations") or ()), *(args.get("images") or ())]
    own = any(places) and dataset not in PAPER[result["task"]]
    return f"{dataset} in {' '.join(filter(None, places))}" if own else dataset


def order(row: tuple[str, str]) -> tuple:
    """Sorts rows, (name, marks): the paper's models in its order, then the others."""
    return MODELS.index(row[0]) if row[0] in MODELS else len(MODELS), row


def runs_of(folder: Path, tasks: Iterable[str]) -> list[Run]:
    """The runs of these tasks, of those with equal arguments the last, in the order of their rows. Raises UserError
    where there is no results.jsonl."""
    results = [result for result in read_results(folder) if result["task"] in tasks]
    groups, runs = defaultdict(list), {}
    for result in results:
        result["args"]["weights"] = f"{result['weights']} {(result['sha256'] or '')[:8]}".strip()
        groups[result["task"], dataset_title(result), result["name"]].append(result)
    for result in results:
        group = result["task"], dataset_title(result), result["name"]
        figures, about, baselines = measured(result)
        counts = {column: value for column, value in about.items() if isinstance(value, int)}
        baselines = {title: chance | counts for title, chance in baselines.items()}
        marks = marks_of(result, counts.values(), groups[group])
        runs[(*group, marks, *figures)] = Run(*group, marks, figures, about, baselines)
    return sorted(runs.values(), key=lambda run: order((run.name, run.marks)))


def show(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def paper_table(runs: Sequence[Run], paper: Mapping, notes: Sequence[str], all_models: bool = False) -> tuple:
    """(title, header, rows): published, ours and difference, a row for each name and marks; below, what has learned
    nothing. paper: of this table in PAPER. notes: marks in the order of their numbers. all_models: the paper's models
    have a row even without a run."""
    published = paper["figures"]
    rows = {(model, ""): {} for figures in published.values() for model in figures if all_models}
    baselines = {}
    for run in runs:
        rows.setdefault((run.name, run.marks), {}).update(run.figures | run.about)
        for name, values in run.baselines.items():
            # One row for all probes; another for another number of patches, or another rule of ranking.
            baselines.setdefault((name, str(sorted({*values.values()}))), {}).update(values)
    rows = {row: rows[row] for row in sorted(rows, key=order)} | baselines

    columns = {"model": [name for name, _ in rows]}
    titles = [*(column for run in runs for column in run.figures), *published]
    titles += [column for run in runs for column in run.about]
    for column in dict.fromkeys(titles):
        ours = [row.get(column) for row in rows.values()]
        theirs = [published.get(column, {}).get(name) for name, _ in rows]
        if any(number is not None for number in theirs):
            columns[f"{column} paper"], columns[f"{column} ours"] = theirs, ours
            columns[f"{column} diff"] = [None if None in pair else f"{pair[0] - pair[1]:+.1f}"
                                         for pair in zip(ours, theirs, strict=True)]
        elif any(value is not None for value in ours):
            columns[column] = ours
    if any(run.marks for run in runs):
        columns["note"] = [f"[{notes.index(marks) + 1}]" if marks in notes else "" for _, marks in rows]
    return paper["title"], list(columns), [list(map(show, row)) for row in zip(*columns.values(), strict=True)]


def paper_tables(tasks: Sequence[str], folder: Path, style: str = "text") -> str:
    """A table for each data set of these tasks with the results in folder/results.jsonl, in one of
    utils.formats.STYLES, and below, numbered, the marks of its rows. As text with all that the paper has, else our runs
    alone. Raises UserError where there is no run."""
    runs, tables = runs_of(folder, tasks), []
    notes = list(dict.fromkeys(run.marks for run in runs if run.marks))
    for task in tasks:
        for dataset in dict.fromkeys([*PAPER[task], *(run.dataset for run in runs if run.task == task)]):
            new = {"title": f"{TASKS[task]}: {dataset} (not in the paper)", "figures": {}}
            chosen = [run for run in runs if (run.task, run.dataset) == (task, dataset)]
            if chosen or style == "text":
                tables.append(paper_table(chosen, PAPER[task].get(dataset, new), notes, style == "text"))
    if not tables:
        raise UserError(f"{folder / 'results.jsonl'} holds no run of {', '.join(tasks)}; run without --table first")
    return render(tables, [f"[{number}] {marks}" for number, marks in enumerate(notes, 1)], style)


def main() -> None:
    """Prints the tables of all tasks in a folder."""
    parser = OneLineParser(__doc__, prog="python -m utils.tables")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), metavar="DIR",
                        help="of the runs (default: outputs)")
    parser.add_argument("--format", choices=STYLES, default="text", help="(default: text)")
    args = parser.parse_args()
    print(paper_tables(list(TASKS), args.output_dir, args.format))


if __name__ == "__main__":
    run_main(main)
