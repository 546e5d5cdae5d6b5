"""Tables of the three scripts and their plots, from results lines made here."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import classify
from models.attention.plots import write_plots
from utils import UserError
from utils.drawing import draw_confusion, draw_curves, draw_figure6, require_matplotlib
from utils.formats import STYLES, text_table
from utils.provenance import NO_EFFECT
from utils.results import is_finished
from utils.run import OneLineParser
from utils.tables import figure6_panels, main, overview, paper_tables, runs_of

OURS = "timm/vit_small_patch16_224"
DEFAULTS = {"changed": [], "data_path": None}
LINES = {
    "retrieval": {"dataset": "cub", "ap_cls": 40.0, "ap_avg": 51.25, "best": "avg", "num_queries": 30543,
                  "num_patches": 30543, "ap_chance": 27.0},
    "classify": {"dataset": "cub", "probe": "linear", "best_acc1": 51.25, "acc1": 50.0, "best_epoch": 3,
                 "select": "test", "num_train": 15000, "num_held_out": 0, "num_test": 15543, "chance": 34.0},
    "segment": {"dataset": "ade20k-part", "probe": "linear", "iterations": 160_000, "mIoU": 51.25, "mAcc": 60.0,
                "aAcc": 70.0, "num_images": 2000, "layers": [3, 5, 7, 11],
                "chance": {"mIoU": 1.0, "mAcc": 2.0, "aAcc": 30.0}},
    "transfer": {"dataset": "spair", "num_pairs": 12234, "num_points": 80000,
                 **{key: {"0.05": 20.0, "0.1": 51.25} for key in ("pck_image", "pck_point", "pck_category")},
                 "chance": {"pck_image": {"0.1": 2.5}}, "same_place": {"pck_image": {"0.1": 12.5}}},
}
PAPER_TASKS = ("retrieval", "classify", "segment")


def line_of(task, change=None):
    return {"task": task, "name": OURS, "model": OURS, "weights": "x.pth", "sha256": "0123456789abcdef",
            "cls_from": "class token", "world_size": 1, "precision": "fp32", "seed": 0, "args": DEFAULTS, **LINES[task],
            "seconds": 1.0, **({"name": change["model"]} if "model" in (change or {}) else {}), **(change or {})}


def given(**arguments):
    """The arguments of a run with these words on its command line."""
    return {"args": DEFAULTS | arguments | {"changed": list(arguments)}}


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(folder, *tasks):
    return paper_tables(tasks or tuple(LINES), folder, "md")


def rows(text):
    return [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]


def row_of(text, label):
    [row] = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_models_outside_the_paper_have_rows_after_the_papers_seven(tmp_path, task):
    write(tmp_path, *(line_of(task, change) for change in (
        {}, {"model": "ibot"}, {"model": "ibot", "dataset": "synthetic"}, {"model": "own.py:build", "name": "mine"},
        {"model": "mae", "weights": "random"})))
    text = table(tmp_path, task)
    text = text[text.index("ade20k-part" if task == "segment" else "Table 3"):]
    models = [row[0].removeprefix("| ") for row in rows(text)]
    start = models.index("deit")
    assert models[start:start + 7] == ["deit", "mocov3", "dino", "beit", "mae", "cae", "ibot"]
    assert models[start + 7:start + 10] == ["mae (random weights)", "mine", OURS]
    assert models[start + 10] == {"retrieval": "random ranking", "classify": "most frequent class",
                                  "segment": "largest class"}[task]
    mine, ibot = rows(text)[start + 9], rows(text)[start + 6]
    assert mine[1:4] == ["-", "51.2", "-"] and ibot[2] == "51.2"
    published = float(ibot[1])
    assert float(ibot[3]) == pytest.approx(51.25 - published, abs=0.051)
    # Synthetic figures never stand beside the paper's.
    alone = text[text.index("synthetic"):]
    assert "(not in the paper)" in alone and "paper |" not in alone and "| ibot | 51.2" in alone


def test_the_last_run_counts_as_a_whole(tmp_path):
    write(tmp_path, line_of("retrieval", {"model": "ibot", "ap_projected": 33.3}),
          line_of("retrieval", {"model": "ibot"}))
    text = table(tmp_path, "retrieval")
    assert row_of(text[text.index("cub"):text.index("on coco")], "ibot")[1:8] == [
        "49.3", "51.2", "+2.0", "31.2", "-", "-", "avg"]
    assert "results left out: 1 older than another of the same settings" in text


def test_segmentation_by_neighbours_has_columns_and_other_recipes_have_rows(tmp_path):
    write(tmp_path, line_of("segment", {"model": "dino"}),
          line_of("segment", {"model": "dino", "probe": "knn", "iterations": 0, "mIoU": 20.0}),
          line_of("segment", {"model": "dino", "mIoU": 30.0, **given(
              layers=[10, 11], norm=True, batch_norm=True, lr=[0.1, 0.2], select="held-out")}))
    text = table(tmp_path, "segment")
    assert "| dino | 28.9 | 51.2 | +22.4 |" in text
    part = text[text.index("ade20k-part"):text.index("pascal-part")]
    assert row_of(part, "dino")[-4:] == ["20.0", "60.0", "70.0", "2000"]
    marks = "layers 10 11, norm, batch norm, lr 0.1 0.2, select held-out"
    assert f"| dino ({marks}) | 28.9 | 30.0 | +1.1 |" in text


MARKS = {"epochs 10": {"epochs": 10}, "lr 0.1": {"lr": [0.1]}, "batch size 64": {"batch_size": 64},
         "num heads 6": {"num_heads": 6}, "layers last4": {"layers": ["last4"]}, "crop size 480": {"crop_size": 480},
         "stride 100": {"stride": 100}, "image size 448": {"image_size": 448}, "no augment": {"no_augment": True},
         "exclude query": {"exclude_query": True}, "crop scale 1.0": {"crop_scale": 1.0}, "no norm": {"norm": False},
         "authors defects": {"authors_defects": True}, "select held-out": {"select": "held-out"}, "seed 3": {"seed": 3},
         "seeds 5": {"seeds": 5}, "precision fp16": {"precision": "fp16"}, "memory size 9": {"memory_size": 9},
         "neighbours 7": {"neighbours": 7}, "num queries 50": {"num_queries": 50},
         "features avg": {"features": ["avg"]}, "an option of tomorrow 3": {"an_option_of_tomorrow": 3},
         "evaluate head.pth": {"evaluate": "out/head.pth"}}


@pytest.mark.parametrize("task", LINES)
def test_every_setting_that_can_change_a_figure_marks_the_row(tmp_path, task):
    write(tmp_path, *(line_of(task, {"model": "ibot", **given(**settings)}) for settings in MARKS.values()))
    text = table(tmp_path, task)
    # In what nothing is trained, the batch size changes nothing.
    free = {"batch size 64"} if task in ("retrieval", "transfer") else set()
    for mark in MARKS:
        assert (f"| ibot ({mark}) |" in text) == (mark not in free)
    assert ("51.2" in "".join(line for line in text.splitlines() if line.startswith("| ibot |"))) == bool(free)


def test_marks_of_weights_parts_of_a_data_set_and_names(tmp_path):
    base = {"model": "ibot"}
    write(tmp_path, line_of("retrieval", {**base, **given(weights="dir/mine.pth"), "weights": "dir/mine.pth"}),
          line_of("retrieval", {**base, "num_patches": 914}), line_of("retrieval", {**base, "weights": "random"}),
          line_of("retrieval", {"name": "ibot", "model": "timm/vit_tiny"}),
          line_of("classify", {**base, "num_train": 467, "num_test": 447}),
          line_of("segment", {**base, "num_images": 20}), line_of("retrieval", {**base, "args": {}}),
          line_of("retrieval", {**base, **given(workers=3, data_path="x", device="cpu", name="ibot", probe=["knn"])}))
    text = table(tmp_path)
    for mark in ("weights mine.pth 01234567", "914 of 30543 patches", "random weights", "model vit_tiny",
                 "settings not recorded", "20 of 2000 images"):
        assert f"| ibot ({mark}) |" in text
    assert text.count("914 of 30543 patches") == 2 and row_of(text[:text.index("on coco")], "ibot")[2] == "51.2"


def test_what_differs_from_a_default_is_recorded_whatever_its_name():
    parser = OneLineParser()
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--option-of-tomorrow", type=int, default=3)
    assert parser.parse_args([]).changed == [] == parser.parse_args(["--rate", "0.1"]).changed
    assert parser.parse_args(["--option-of-tomorrow", "4"]).changed == ["option_of_tomorrow"]
    args = classify.parse_arguments(["--epochs", "10", "--workers", "1", "--lr", "0.1"])
    assert {"epochs", "lr", "workers"} == {*args.changed} and {"workers"} == {*args.changed} & NO_EFFECT


def test_methods_data_sets_and_probes_of_tomorrow_have_tables_of_their_own(tmp_path):
    new = {"model": "newmethod", "dataset": "newdata"}
    write(tmp_path, *(line_of(task, new) for task in LINES), line_of("classify", {**new, "probe": "newprobe"}),
          line_of("segment", {**new, "probe": "newprobe"}),
          line_of("classify", {**new, **given(data_path="a/birds", epochs=3)}),
          line_of("retrieval", {**new, **given(annotations=["x.json", "y.json"])}))
    text = table(tmp_path)
    own = text[text.index("newdata (not in the paper)"):]
    assert "newdata" not in text[:text.index("newdata (not")] and text.count("newdata (not in the paper)") == 4
    assert "newdata in a/birds (not in the paper)" in text and "newdata in x.json y.json (not in the paper)" in text
    assert "| model | linear | newprobe | train | test |" in own
    assert "| newmethod | 51.2 | 51.2 | 15000 | 15543 |" in own and "newprobe mIoU" in own
    assert "| newmethod (epochs 3) | 51.2 |" in own and "paper |" not in own[:own.index("Table")]
    line, notes = overview(runs_of(tmp_path, LINES)[0])
    assert len(line[2]) == 1 and notes == ["[1] epochs 3"]


def test_seeds_and_neighbours_and_counts_have_columns(tmp_path):
    write(tmp_path, line_of("classify", {"model": "ibot", "best_acc1_std": 0.34}),
          line_of("classify", {"model": "ibot", "probe": "attentive"}),
          line_of("classify", {"model": "ibot", "probe": "knn", "num_held_out": 0}))
    text = table(tmp_path, "classify")
    text = text[:text.index("on coco")]
    assert ("| model | linear paper | linear ours | linear diff | linear +- | attentive paper | attentive ours | "
            "attentive diff | knn | train | test |") in text
    assert "| ibot | 93.8 | 51.2 | -42.5 | 0.3 | 95.8 | 51.2 | -44.5 | 51.2 | 15000 | 15543 |" in text
    assert "| most frequent class | - | 34.0 | - | - | - | 34.0 | - | 34.0 | 15000 | 15543 |" in text


def test_figure_6_puts_objects_and_parts_of_any_data_set_side_by_side(tmp_path):
    own = {"model": "mine", **given(data_path="my-parts/x-part")}
    write(tmp_path, *(line_of("segment", {**own, "dataset": f"new-{kind}", "mIoU": iou})
                      for kind, iou in (("object", 60.0), ("part", 40.0))),
          line_of("segment", {**own, "dataset": "folder"}), line_of("segment", {"model": "ibot", "mIoU": 30.0}),
          line_of("segment", {"model": "ibot", "mIoU": 20.0, "probe": "knn"}),
          line_of("retrieval", {"model": "ibot", **given(epochs=3)}), line_of("transfer", own))
    panels = figure6_panels(tmp_path)
    assert list(panels) == ["ade20k", "pascal", "new in my-parts/x-part (not in the paper)", "Part retrieval, cub: AP",
                            "Keypoint transfer, spair in my-parts/x-part: PCK@0.1"]
    assert dict(panels["ade20k"])["iBOT"] == [55.2, None, 32.2, 30.0] and len(panels["pascal"]) == 7
    assert dict(panels["ade20k"])["iBOT\n(knn)"] == [None, None, None, 20.0]
    assert panels["new in my-parts/x-part (not in the paper)"] == [("mine", [None, 60.0, None, 40.0])]
    assert dict(panels["Part retrieval, cub: AP"])["iBOT\n(epochs 3)"] == [None, None, None, 51.25]
    assert len(panels["Part retrieval, cub: AP"]) == 8


def test_chance_has_a_row_for_each_count_and_rule(tmp_path):
    write(tmp_path, *(line_of("retrieval", {"dataset": "new", **change}) for change in (
        {}, {"ap_chance": 26.0, **given(exclude_query=True)}, {"num_patches": 914, **given(num_images=3)})))
    text = table(tmp_path, "retrieval")
    found = [row[1:] for row in rows(text) if row[0] == "| random ranking"]
    assert found == [["26.0", "26.0", "-", "30543 |"], ["27.0", "27.0", "-", "30543 |"], ["27.0", "27.0", "-", "914 |"]]


def test_bad_lines_are_named_and_the_rest_is_shown(tmp_path):
    good = json.dumps(line_of("retrieval", {"model": "ibot"}))
    (tmp_path / "results.jsonl").write_bytes(b"\n".join((
        good.encode(), good[:50].encode(), b"\0\0\0", b"[1, 2]", b'{"task": "retrieval"}', b"\xff\xfe", b"null", b"",
        good.replace("27.0", "NaN").replace('"ibot"', '"mine"').replace("30543", "Infinity").encode(), b"[" * 100_000,
        json.dumps({"task": "pca", "model": "ibot", "dataset": "imagenet"}).encode())))
    text = table(tmp_path, "retrieval")
    assert row_of(text[:text.index("on coco")], "ibot")[2] == "51.2" and "| mine | - | 51.2 |" in text
    for number, reason in ((2, "not whole JSON"), (3, "not whole JSON"), (4, "not whole JSON"),
                           (5, "no dataset, no model"), (6, "not whole JSON"), (7, "not whole JSON"),
                           (10, "not whole JSON")):
        assert f"results.jsonl, line {number}, is not a results line ({reason}); left out" in text
    assert "results left out: 1 of pca, which has no table here" in text and "line 8" not in text
    assert not is_finished(tmp_path, "linear", {"task": "classify", "name": "ibot", "made_with": "x"})


@pytest.mark.parametrize("task", LINES)
def test_lines_of_older_and_damaged_schemas_are_shown_as_far_as_they_go(tmp_path, task):
    whole = line_of(task, {"ap_projected": 3.0} if task == "retrieval" else {})
    lines = [{name: value for name, value in whole.items() if name != key} for key in whole]
    lines += [whole | {key: value} for key in whole
              for value in (None, "x", 1, [1], {"a": [2]}, float("nan"), True, 10**400)]
    lines += [whole | {"args": DEFAULTS | {key: value}} for key in ("changed", "data_path", "annotations")
              for value in (None, "x", [[1]], {"a": 1})]
    for number, line in enumerate(lines):
        line |= {key: f"m{number}_" for key in ("model", "name") if line.get(key) == OURS}
    write(tmp_path, *lines)
    runs, notes = runs_of(tmp_path, LINES)
    for style in STYLES:
        assert paper_tables(tuple(LINES), tmp_path, style, everything=True)
    text = table(tmp_path)
    # In a table is every line with a task, a data set and a model; the others are counted or named.
    good = [line for line in lines if line.get("task") == task and isinstance(line.get("dataset"), str)
            and isinstance(line.get("model", line.get("name")), str)]
    assert all(f"| {line.get('name') or line['model']} " in text for line in good)
    assert len(good) > 0.8 * len(lines) and text.count("| 51.2") > 0.6 * len(good)
    assert notes[:20] == [note for note in notes if "is not a results line (no " in note]
    assert notes[20].endswith("more such lines") and notes[21:] == ["results left out: 1 of x, which has no table here"]
    assert "settings not recorded" in text and figure6_panels(tmp_path)


def test_the_four_formats(tmp_path):
    write(tmp_path, line_of("classify", {"name": "a_b & c%d|e", "dataset": "own#1", "best_acc1_std": 0.5}))
    texts = {style: paper_tables(["classify"], tmp_path, style) for style in STYLES}
    assert max(map(len, texts["text"].splitlines())) <= 120
    own = list(csv.reader(io.StringIO(texts["csv"])))[-3:]
    assert own == [["model", "linear", "linear +-", "train", "test"],
                   ["a_b & c%d|e", "51.2", "0.5", "15000", "15543"],
                   ["most frequent class", "34.0", "-", "15000", "15543"]]
    assert r"| a_b & c%d\|e | 51.2 | 0.5 | 15000 | 15543 |" in texts["md"]
    assert r"a\_b \& c\%d|e & 51.2 & 0.5 & 15000 & 15543 \\" in texts["latex"]
    assert r"model & linear & linear $\pm$ & train & test \\" in texts["latex"]
    # Every line of a tabular has as many columns as it declares, and nothing special is left bare.
    for block in re.findall(r"\\begin\{tabular\}\{(l r*)\}\n(.*?)\n\\end".replace(" ", ""), texts["latex"], re.S):
        for line in block[1].replace("\\hline\n", "").split("\n"):
            assert len(re.findall(r"(?<!\\)&", line)) == len(block[0]) - 1
            assert line.endswith("\\\\") and not re.search(r"(?<!\\)[%#_]", line)
    assert all(line.startswith(("%", "\\")) or line.endswith("\\\\") or not line
               for line in texts["latex"].splitlines())


def test_text_is_padded_and_breaks_what_is_too_wide():
    header = ["model", *(f"data-set-{number} linear mIoU" for number in range(20))]
    text = text_table(header, [["a name of many words and " * 4, *["99.9"] * 20], ["short", *["1.0"] * 20]])
    assert max(map(len, text.splitlines())) <= 120 and text.count("99.9") == text.count("1.0") == 20
    assert {len(line) for line in text.splitlines() if line.endswith(("99.9", "1.0"))} <= {
        len(line) for line in text.splitlines() if set(line) == {"-"}}


def test_one_command_prints_all_that_a_folder_holds(monkeypatch, capsys, tmp_path):
    write(tmp_path, *(line_of(task, {"model": "ibot"}) for task in LINES),
          line_of("segment", {"model": "ibot", "dataset": "ade20k-object", "mIoU": 60.0}),
          line_of("segment", {"model": "ibot", "mIoU": 10.0, **given(iterations=300)}),
          line_of("retrieval", {"model": "mae", **given(image_size=448)}))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "--format", "md"])
    main()
    out = capsys.readouterr().out
    for title in ("Table 3, part retrieval on cub", "classification on cub", "Table 4", "Table 5", "spair"):
        assert title in out
    assert "on coco" not in out and "Table 2" not in out, "tables without a run"
    everything = out[out.index("All models"):]
    assert ("| model | cub encoded | cub linear | ade20k-object linear mIoU | ade20k-part linear mIoU | spair PCK@0.1 |"
            in everything)
    assert "| mae | 51.2 [1] | - | - | - | - |" in everything
    assert "| ibot | 51.2 | 51.2 | 60.0 | 51.2 | 51.2 |" in everything and "[1] image size 448" in everything


def test_plots_are_png_or_pdf_by_their_suffix(tmp_path):
    curves = {"lr 0.1, seed 0": [50.0, 60.0, 55.0], "lr 0.2, seed 0": [40.0, 70.0, 65.0]}
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        draw_curves(tmp_path / f"curves{suffix}", "title", curves, ("lr 0.2, seed 0", 2))
        draw_confusion(tmp_path / f"confusion{suffix}", "title", torch.eye(3).long(), ["a", "b", "c"])
        for name in ("curves", "confusion"):
            assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(start)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pdf", ".pdf", ".png", ".png"]
    with pytest.raises(UserError, match=r"curves.txt cannot be written as a plot; use .* ends in .png or .pdf"):
        draw_curves(tmp_path / "curves.txt", "title", curves, ("lr 0.2, seed 0", 2))


def test_no_picture_of_a_plot_is_cut(tmp_path):
    """Long titles, names and legends: the margin all around stays white."""
    long = "timm/vit_base_patch16_clip_224.laion2b on partimagenet-part (random weights, synthetic data), attentive"
    draw_curves(tmp_path / "curves.png", f"{long}: test accuracy by epoch",
                {f"lr {rate}, seed {seed}": [10.0, 20.0] for rate in range(6) for seed in range(5)},
                ("lr 0, seed 0", 1))
    names = [f"class {number} of a long name that goes on" for number in range(30)]
    draw_confusion(tmp_path / "confusion.png", long, torch.eye(30).long(), names)
    write(tmp_path, *(line_of("segment", {"model": f"timm/vit_base_patch16_clip_224.laion2b_{number}"})
                      for number in range(6)))
    draw_figure6(tmp_path / "figure6.png", figure6_panels(tmp_path))
    field = {"receptive_field": [[0.1, None, 0.0]] * 3, "distance_pixels": [[3.0, 9.0]] * 24, "patch_size": 16,
             "distance_pixels_uniform": 20.0, "part": "encoder", "mask_ratio": 0.0, "dataset": "synthetic",
             **{f"receptive_field_radius{share}_{unit}": 1.0 for share in (50, 90) for unit in ("pixels", "patches")}}
    for count in (1, 12):
        write_plots([field | {"model": f"{long}_{number}", "weights": "x.pth"} for number in range(count)], tmp_path)
        (tmp_path / "attention_fields.png").rename(tmp_path / f"fields{count}.png")
        (tmp_path / "attention_distance_encoders.png").rename(tmp_path / f"distances{count}.png")
    for name in ("curves", "confusion", "figure6", "fields1", "fields12", "distances1", "distances12"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
            assert (edge == 255).all(), name


def test_without_matplotlib_a_run_that_asks_for_plots_stops_at_its_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        require_matplotlib()
    with pytest.raises(UserError, match="pip install matplotlib"):
        classify.parse_arguments(["--save-plots"])
    assert not classify.parse_arguments([]).save_plots
