"""Results: results.jsonl, written and read, and tables of ours beside the paper's."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import UserError
from .distributed import is_main, world_size
from .provenance import NAME_ENCODER, NO_EFFECT, this_run

# {"models": {name: printed name}, task: {table: {column: {model: published number}}}}; columns of ours alone are empty.
PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())
# Patches that the published rule leaves of a whole data set; the table marks other numbers.
FULL_PATCHES = {"cub": 30543}
# Panels are shown where the paper or we have results. Title: task, columns of its tables for objects ("" for none) and
# for parts.
FIGURE6 = {title: ("segment", f"{data}-object mIoU", f"{data}-part mIoU") for title, data in {
    "ADE20K": "ade20k", "Pascal": "pascal",
    "PartImageNet, ImageNet's training images (not in the paper)": "partimagenet",
    "Synthetic data (not in the paper)": "synthetic"}.items()}
FIGURE6 |= {f"Part retrieval, {data}: AP": ("retrieval", "", f"{data} encoded") for data in ("cub", "coco")}
FIGURE6 |= {f"Keypoint transfer, {data}: PCK@0.1": ("transfer", "", data)
            for data in ("spair", "cub-pairs", "synthetic-pairs")}


def run_slug(name: str) -> str:
    """A run's name as the beginning of file names: timm/vit_tiny -> timm-vit_tiny."""
    return re.sub(r"[^\w.+-]+", "-", name)


def args_to_json(args: Namespace) -> dict:
    """The arguments as values that JSON can hold: paths become strings, tuples lists."""
    return json.loads(json.dumps(vars(args), default=str))


def settings_of(args: Namespace) -> dict:
    """The arguments that must be the same when a run is resumed, as values that JSON can hold."""
    return {name: value for name, value in args_to_json(args).items() if name not in NO_EFFECT | NAME_ENCODER}


def start_line(task: str, args: Namespace, encoder: object) -> dict:
    """The first keys of a results line; encoder has weights, sha256 and cls_from."""
    return {"task": task, "name": args.name, "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
            "cls_from": encoder.cls_from, "dataset": args.dataset, "world_size": world_size(),
            "precision": args.precision, "seed": args.seed, "args": args_to_json(args)}


def append_result(folder: Path, result: dict) -> None:
    """Appends the result and what run it is of to results.jsonl, from the main process, in one write: runs may share a
    folder. Raises UserError, on all processes, where a figure is not finite."""
    try:
        line = json.dumps(result | this_run(), allow_nan=False) + "\n"
    except ValueError:
        names = [name for name, value in result.items() if "NaN" in (text := json.dumps(value)) or "Infinity" in text]
        raise UserError(f"{', '.join(names)} of the result is not finite; no line is written") from None
    if not is_main():
        return
    with open(folder / "results.jsonl", "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_results(folder: Path, task: str) -> list[dict]:
    """The results lines of one task, oldest first. Raises UserError where there is no file or a line is no result."""
    path = folder / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; run without --table first, or name its folder with --output-dir")
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            result = json.loads(line)
            if not {"task", "model", "weights", "dataset", "args"} <= result.keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f"{path}, line {number}, is not a results line; remove it") from None
        results.append(result)
    return [result for result in results if result["task"] == task]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caveats(result: dict) -> str:
    """What must stand wherever the result is printed: random weights, synthetic data; "" for neither."""
    return ", ".join(["random weights"] * (result["weights"] == "random")
                     + ["synthetic data"] * result["dataset"].startswith("synthetic"))


def with_marks(name: str, marks: str, separator: str = " ") -> str:
    return f"{name}{separator}({marks})" if marks else name


def run_title(result: dict) -> str:
    """Model, data set and caveats of a result: "ibot on synthetic (random weights, synthetic data)"."""
    return with_marks(f"{result.get('name', result['model'])} on {result['dataset']}", caveats(result))


class Entry(NamedTuple):
    """What a result gives to its tables. figures: by column; those of no table are left out. marks: how the run differs
    from the paper's, which gives it a row of its own; false ones are left out. remark: a line below the table; star:
    the sign that then follows the figures."""

    figures: dict[str, float | str | None]
    marks: tuple[str | bool | None, ...] = ()
    remark: str = ""
    star: str = ""


def retrieval_entry(result: dict) -> Entry:
    """Nothing under another protocol than the default one."""
    dataset, count, whole = result["dataset"], result["num_patches"], FULL_PATCHES.get(result["dataset"])
    if (not {"ap_cls", "ap_avg"} <= result.keys() or result["num_queries"] != count or result["crop_scale"] != 0.5
            or result["keypoints"] or result["authors_defects"] or result["args"]["exclude_query"]):
        return Entry({})
    best = result["best"]
    known = f" (the whole data set: {dataset} {whole:,})" if whole else ""
    remark = "" if count == whole else f"{dataset}: on {count:,} patches{known}"
    return Entry({f"{dataset} encoded": result[f"ap_{best}"], f"{dataset} token": best,
                  f"{dataset} projected": result.get("ap_projected")}, remark=remark, star="*")


def classify_entry(result: dict) -> Entry:
    column, args = f"{result['dataset']} {result['probe']}", result["args"]
    remarks = (result["select"] == "held-out" and "chosen held out", args["authors_defects"] and "authors' defects",
               args["crop_scale"] != 0.5 and f"crop scale {args['crop_scale']}",
               f"{result.get('num_train')} training patches")
    # A head that was only tested (--evaluate) has no best_acc1 and no num_train.
    keypoints = args.get("keypoints") and f"keypoints {' '.join(args['keypoints'])}"
    return Entry({column: result.get("best_acc1")}, (keypoints,), f"{column}: {', '.join(filter(None, remarks))}")


def segment_entry(result: dict) -> Entry:
    dataset = "synthetic-part" if result["dataset"] == "synthetic" else result["dataset"]
    blocks, iterations = result.get("layers", [3, 5, 7, 11]), result["iterations"]
    trained = iterations != 160_000 and f"{iterations} iterations"
    return Entry({f"{dataset} {metric}": result[metric] for metric in ("mIoU", "mAcc", "aAcc")}, (
        "nearest neighbours" if result.get("probe") == "knn" else trained,
        blocks != [3, 5, 7, 11] and f"blocks {' '.join(map(str, blocks))}", result.get("norm") and "final norm",
        result.get("batch_norm") and "batch norm", "heads" in result and f"best of {len(result['heads'])} heads",
        result["args"].get("select") == "held-out" and "chosen held out",
        result["args"]["authors_defects"] and "authors' defects"))


def transfer_entry(result: dict) -> Entry:
    args, layers = result["args"], result["args"]["layers"]
    return Entry({result["dataset"]: result["pck_image"]["0.1"]}, (
        f"{args['image_size']} pixels", layers != ["last"] and f"blocks {' '.join(layers)}",
        not args["norm"] and "without norm", args["match"] != "cell" and args["match"],
        args["split"] != "test" and args["split"]),
        f"{result['dataset']}: {result['num_pairs']:,} pairs, a random cell "
        f"{result['chance']['pck_image']['0.1']:.1f}, the same place {result['same_place']['pck_image']['0.1']:.1f}")


ENTRIES = {"retrieval": retrieval_entry, "classify": classify_entry, "segment": segment_entry,
           "transfer": transfer_entry}


def latest_entries(task: str, folder: Path) -> tuple[dict[tuple[str, str, str], Entry], int]:
    """({(model, marks, column): entry}, number of results left out); of runs with equal marks the last one counts."""
    ours, left_out, columns = {}, 0, {column for table in PAPER[task].values() for column in table}
    for result in read_results(folder, task):
        entry = ENTRIES[task](result)
        marks = ", ".join(filter(None, (result["weights"] == "random" and "random weights", *entry.marks)))
        found = [column for column in entry.figures if column in columns and {*entry.figures.values()} != {None}]
        ours |= {(result.get("name", result["model"]), marks, column): entry for column in found}
        left_out += not found
    return ours, left_out


def rows_of(columns: Mapping[str, Mapping[str, float]], ours: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(model, marks) of a table's rows: the paper's models, always where it has numbers, then the others."""
    order = {model: place for place, model in enumerate(PAPER["models"])}
    rows = {(model, "") for published in columns.values() for model in published}
    rows |= {(model, marks) for model, marks, column in ours if column in columns}
    return sorted(rows, key=lambda row: (row[1] != "" or row[0] not in order, order.get(row[0], len(order)), row))


def paper_tables(task: str, folder: Path) -> str:
    """The paper's tables of a task in Markdown: published, ours (the last run in folder/results.jsonl), difference; and
    tables of other data where we have results. Raises UserError without results."""
    ours, left_out = latest_entries(task, folder)
    texts = []
    for title, columns in PAPER[task].items():
        lines, remarks = [], {}
        for model, marks in rows_of(columns, ours):
            line = [with_marks(model, marks)]
            for column, published in columns.items():
                entry = ours.get((model, marks, column), Entry({}))
                figure = entry.figures.get(column)
                # Segmentation says in the marks how its runs differ; elsewhere they do not compare.
                number = published.get(model) if task == "segment" or not marks else None
                difference = "-" if None in (figure, number) else f"{figure - number:+.1f}"
                shown = show(figure) + (entry.star if entry.remark and isinstance(figure, float) else "")
                line += [show(number), shown, difference] if published else [shown]
                if entry.remark:
                    remarks[f"* {line[0]}, {entry.remark}"] = None
            lines.append(line)
        header = [text for column, published in columns.items()
                  for text in ([f"{column}, published", "ours", "difference"] if published else [column])]
        if lines:
            texts += [title, markdown_table(["model", *header], lines), *filter(None, ["\n".join(remarks)])]
    if left_out:
        texts.append(f"{left_out} results with other data, another probe or another protocol are left out.")
    return "\n\n".join(texts)


def show(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1f}"


def figure6_panels(folder: Path) -> dict[str, list[tuple[str, list[float | None]]]]:
    """{title: [(row, [objects published, ours, parts published, ours]), ...]} of FIGURE6, in percent, None where there
    is none: what utils.drawing.draw_figure6 draws. Raises UserError without results."""
    ours = {task: latest_entries(task, folder)[0] for task in ("segment", "retrieval", "transfer")}
    panels = {}
    for title, (task, *names) in FIGURE6.items():
        paper = {column: published for table in PAPER[task].values() for column, published in table.items()}
        columns = {name: paper.get(name, {}) for name in names}
        rows = rows_of(columns, ours[task])
        # Beside the paper's figure only what we have.
        for model, marks in rows if "" not in names or any(row[2] in names for row in ours[task]) else ():
            values = []
            for column, published in columns.items():
                entry = ours[task].get((model, marks, column), Entry({}))
                values += [None if marks else published.get(model), entry.figures.get(column)]
            name = with_marks(PAPER["models"].get(model, model), marks, "\n")
            panels.setdefault(title, []).append((name, values))
    return panels
