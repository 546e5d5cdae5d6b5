"""The paper's tables and figure 6, from results lines made here."""

import csv
import io
import json
import re
import sys

import pytest

from datasets.segmentation_pictures import figure6_panels
from utils import UserError
from utils.formats import STYLES, render, text_table
from utils.tables import main, paper_tables

LINES = {
    "retrieval": {"dataset": "cub", "ap_cls": 40.0, "ap_avg": 51.25, "best": "avg", "num_queries": 30543,
                  "num_patches": 30543, "ap_chance": 27.0},
    "classify": {"dataset": "cub", "probe": "linear", "best_acc1": 51.25, "acc1": 50.0, "best_epoch": 3,
                 "num_train": 15000, "num_held_out": 0, "num_test": 15543, "chance": 34.0},
    "segment": {"dataset": "ade20k-part", "probe": "linear", "mIoU": 51.25, "mAcc": 60.0, "aAcc": 70.0,
                "num_images": 2000, "chance": {"mIoU": 1.0, "mAcc": 2.0, "aAcc": 30.0}},
    "transfer": {"dataset": "spair", "num_pairs": 12234,
                 **{key: {"0.05": 20.0, "0.1": 51.25} for key in ("pck_image", "pck_point", "pck_category")},
                 "chance": {"pck_image": {"0.1": 2.5}}, "same_place": {"pck_image": {"0.1": 12.5}}}}
DEFAULTS = {"data_path": None, "annotations": None, "images": None, "precision": "fp32"}


def line_of(task, name="ibot", change=None, **given):
    """A results line. change: keys of the line; given: what stood on the command line."""
    args = DEFAULTS | {"model": name} | given | {"changed": list(given)}
    return {"task": task, "name": name, "model": args["model"], "weights": given.get("weights", "official"),
            "sha256": None, "args": args} | LINES[task] | (change or {})


def write(folder, *lines):
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(folder, *tasks, style="md"):
    return paper_tables(tasks or tuple(LINES), folder, style)


def rows_of(text):
    """[cells, ...] of all Markdown tables, their first cell without escapes."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]


def marked(text):
    """{name: [marks of each of its rows]}, by the numbered notes."""
    notes = dict(re.findall(r"^(\[\d+\]) (.*)$", text, re.M))
    found = {}
    for name, *_, last in rows_of(text):
        found.setdefault(name.strip(), []).append(notes.get(last.strip(), ""))
    return found


@pytest.mark.parametrize("task", ["retrieval", "classify", "segment"])
def test_a_terminal_shows_the_papers_seven_and_ours_and_files_ours_alone(tmp_path, task):
    write(tmp_path, line_of(task, "timm/x"), line_of(task), line_of(task, "mae", weights="random"),
          line_of(task, change={"dataset": "synthetic"}))
    text = table(tmp_path, task, style="text")
    assert "Table 2" in text or task != "segment", "a table of the paper without a run of ours"
    names = re.findall(r"^\S+(?=  .*\d)", text[text.index("ade20k-part" if task == "segment" else "Table 3"):], re.M)
    assert names[:9] == ["deit", "mocov3", "dino", "beit", "mae", "mae", "cae", "ibot", "timm/x"]

    text = table(tmp_path, task)
    _, _, mae, ibot, other, chance, *_ = rows_of(text)
    assert [row[0] for row in (mae, ibot, other)] == ["mae", "ibot", "timm/x"] and mae[-1] == "[1]"
    assert chance[0] in ("random ranking", "most frequent class", "largest class")
    assert ibot[2] == "51.2" and float(ibot[3]) == pytest.approx(51.25 - float(ibot[1]), abs=0.051)
    assert other[1:4] == ["-", "51.2", "-"]
    # Synthetic figures never stand beside the paper's.
    alone = text[text.index("synthetic"):]
    assert "(not in the paper)" in alone and "paper |" not in alone and "| ibot | 51.2" in alone


MARKS = {"epochs 10": {"epochs": 10}, "lr 0.1 0.2": {"lr": [0.1, 0.2]}, "layers last4": {"layers": ["last4"]},
         "no augment": {"no_augment": True}, "no norm": {"norm": False}, "select held-out": {"select": "held-out"},
         "num images 50": {"num_images": 50}, "an option of tomorrow 3": {"an_option_of_tomorrow": 3},
         "evaluate out/head.pth": {"evaluate": "out/head.pth"}}


@pytest.mark.parametrize("task", LINES)
def test_every_setting_that_can_change_a_figure_is_a_note_of_its_row(tmp_path, task):
    write(tmp_path, *(line_of(task, **settings) for settings in MARKS.values()), line_of(task),
          line_of(task, workers=3, data_path=None, device="cpu", name="ibot", probe=["knn"]))
    assert sorted(marked(table(tmp_path))["ibot"]) == sorted(["", *MARKS])


def test_a_row_for_each_run_whose_arguments_differ(tmp_path):
    """Of runs with equal arguments the last is shown, as a whole."""
    kept = line_of("retrieval", "cae")
    write(tmp_path, *(line_of("retrieval", weights="a/x.pth", weights_key=f"{key}/backbone") for key in ("b", "a")),
          *(line_of("retrieval", "own", model=f"{key}.py:build") for key in ("a/net", "b/net", "b/other")),
          *(line_of("retrieval", "mine", {"sha256": sha * 64}, weights=f"{folder}/x.pth") for folder, sha in (
              ("a", "0"), ("b", "0"), ("a", "1"))),
          *(line_of("retrieval", "dino", {"ap_projected": ap}, epochs=1) for ap in (3.0, None)),
          kept, kept | {"args": kept["args"] | {"precision": "bf16"}})
    text = table(tmp_path)
    found = marked(text)
    assert found["ibot"] == ["weights a/x.pth, weights key a/backbone", "weights a/x.pth, weights key b/backbone"]
    assert found["own"] == ["model a/net.py:build", "model b/net.py:build", "model b/other.py:build"]
    assert found["mine"] == ["weights a/x.pth 00000000", "weights a/x.pth 11111111", "weights b/x.pth 00000000"]
    # A default that was another one, as on another device.
    assert found["cae"] == ["precision bf16", "precision fp32"]
    assert found["dino"] == ["epochs 1"] and "| dino | 48.9 | 51.2 | +2.4 | 31.7 | - | - | avg |" in text


def test_each_data_set_has_its_own_defaults(tmp_path):
    lines = [line_of("segment", change={"dataset": name}) for name in ("ade20k-part", "lip")]
    for line, size in zip(lines, (512, 320), strict=True):
        line["args"]["crop_size"], line["num_images"] = size, {512: 2000, 320: 10000}[size]
    write(tmp_path, *lines)
    assert marked(table(tmp_path))["ibot"] == ["", ""]


def test_notes_of_what_a_line_says_beside_its_arguments(tmp_path):
    write(tmp_path, line_of("retrieval", change={"num_patches": 914}), line_of("segment", change={"num_images": 20}),
          line_of("classify", change={"recipe": "ours", "undertrained": True, "num_test_in_training": 7}),
          line_of("classify", "mae", {"recipe": "published", "undertrained": False, "num_test_in_training": 0}),
          line_of("transfer", "run1", {"num_outside": 3}, model="ibot", weights="random"))
    assert marked(table(tmp_path)) | {"model": 0, "---": 0} == {
        "ibot": ["914 of 30543 patches", "our recipe, undertrained, 7 test images in training", "20 of 2000 images"],
        "mae": [""], "run1": ["model ibot, random weights"], "model": 0, "---": 0, "random ranking": [""],
        "most frequent class": [""], "largest class": [""], "random cell": [""], "same place": [""]}


def test_probes_and_data_of_ones_own_have_columns_and_tables(tmp_path):
    new = {"dataset": "newdata"}
    write(tmp_path, *(line_of(task, "m", new) for task in LINES), line_of("classify", "m", new | {"probe": "newprobe"}),
          line_of("segment", "m", new | {"probe": "newprobe"}), line_of("classify", "m", new, data_path="a/birds"),
          *(line_of("retrieval", "m", new, annotations=["x.json"], images=[folder]) for folder in ("a/i", "b/i")))
    text = table(tmp_path)
    assert text.count("newdata (not in the paper)") == 4 and "newdata in a/birds (not in the paper)" in text
    assert "newdata in x.json a/i (not" in text and "newdata in x.json b/i (not" in text
    assert "| model | linear | newprobe | train | test |" in text and "newprobe mIoU" in text
    assert "| m | 51.2 | 51.2 | 15000 | 15543 |" in text and "paper |" not in text


def test_seeds_and_neighbours_and_counts_have_columns(tmp_path):
    write(tmp_path, *(line_of("classify", change=change) for change in (
        {"best_acc1_std": 0.34}, {"probe": "attentive"}, {"probe": "knn"})))
    header, _, ours, chance = rows_of(table(tmp_path, "classify"))
    assert header == ["model", "linear paper", "linear ours", "linear diff", "linear +-", "attentive paper",
                      "attentive ours", "attentive diff", "knn", "train", "test"]
    assert ours == ["ibot", "93.8", "51.2", "-42.5", "0.3", "95.8", "51.2", "-44.5", "51.2", "15000", "15543"]
    assert chance == ["most frequent class", "-", "34.0", "-", "-", "-", "34.0", "-", "34.0", "15000", "15543"]


def test_the_best_of_several_layers_stands_beside_the_last(tmp_path):
    layers = {"7": {"pck_image": {"0.1": 60.0}}, "9": {"pck_image": {"0.1": 61.0}}, "11": {"pck_image": {"0.1": 51.25}}}
    write(tmp_path, line_of("transfer"), line_of("transfer", "mae", {"by_layer": layers}))
    header, _, mae, ibot, *chance = rows_of(table(tmp_path, "transfer"))
    assert header == ["model", "PCK@0.1", "per point", "category mean", "best block", "its PCK@0.1", "pairs"]
    assert mae == ["mae", "51.2", "51.2", "51.2", "9", "61.0", "12234"] and ibot[4:] == ["-", "-", "12234"]
    assert [row[:2] for row in chance] == [["random cell", "2.5"], ["same place", "12.5"]]


def test_chance_has_a_row_for_each_count_and_rule(tmp_path):
    new = {"dataset": "new"}
    write(tmp_path, line_of("retrieval", change=new), line_of("retrieval", change=new | {"ap_projected": 3.0}, seed=1),
          line_of("retrieval", change=new | {"ap_chance": 26.0}, exclude_query=True),
          line_of("retrieval", change=new | {"num_patches": 914}, num_images=3))
    found = [row[1:5] for row in rows_of(table(tmp_path, "retrieval")) if row[0] == "random ranking"]
    assert sorted(found) == [["26.0", "-", "-", "30543"], ["27.0", "-", "-", "914"], ["27.0", "27.0", "-", "30543"]]


def test_one_command_prints_all_that_a_folder_holds(monkeypatch, capsys, tmp_path):
    write(tmp_path, *(line_of(task) for task in LINES),
          line_of("segment", change={"dataset": "ade20k-object", "mIoU": 60.0}),
          line_of("retrieval", "mae", image_size=448), {"task": "pca"})
    monkeypatch.setattr(sys, "argv", ["tables.py", "--output-dir", str(tmp_path), "--format", "md"])
    main()
    out = capsys.readouterr().out
    titles = ("part retrieval on cub", "classification on cub", "Table 4", "Table 5", "spair")
    assert all(title in out for title in titles) and "on coco" not in out and "Table 2" not in out
    assert out.count("| ibot |") == 5 and marked(out)["mae"] == ["image size 448"]
    with pytest.raises(UserError, match="holds no run of classify; run without --table"):
        write(tmp_path, line_of("segment"))
        table(tmp_path, "classify")


def test_figure_6_puts_objects_and_parts_of_any_data_set_side_by_side(tmp_path):
    own = {"data_path": "my-parts/x-part"}
    write(tmp_path, *(line_of("segment", "mine", {"dataset": f"new-{kind}", "mIoU": iou}, **own)
                      for kind, iou in (("object", 60.0), ("part", 40.0))), line_of("segment", change={"mIoU": 30.0}),
          line_of("segment", change={"mIoU": 20.0, "probe": "knn"}), line_of("segment", change={"mIoU": 9.0}, seed=3),
          line_of("segment", change={"dataset": "synthetic", "mIoU": 10.0}))
    panels = {title: dict(rows) for title, rows in figure6_panels(tmp_path).items()}
    assert list(panels) == ["ade20k", "pascal", "synthetic", "new in my-parts/x-part"]
    assert panels["ade20k"]["iBOT"] == [55.2, None, 32.2, 30.0] and len(panels["pascal"]) == 7
    assert panels["ade20k"]["iBOT (seed 3)"] == [None, None, None, 9.0] and len(panels["ade20k"]) == 8
    assert panels["new in my-parts/x-part"] == {"mine": [None, 60.0, None, 40.0]}
    assert panels["synthetic"] == {"iBOT": [None, None, None, 10.0]}


NAME = "a_b & c%d|e\\|\n~f^ $g$ #{h}\u2028[i]"


def test_a_row_is_a_line_whatever_a_name_holds(tmp_path):
    write(tmp_path, line_of("classify", NAME, {"dataset": "own#1", "best_acc1_std": 0.5}, evaluate="a\nb"))
    texts = {style: table(tmp_path, "classify", style=style) for style in STYLES}
    csv_rows = list(csv.reader(io.StringIO(texts["csv"])))
    assert csv_rows[-4] == ["a_b & c%d|e\\| ~f^ $g$ #{h} [i]", "51.2", "0.5", "15000", "15543", "[1]"]
    assert csv_rows[-1] == ["[1] evaluate a b"]
    assert r"| a_b & c%d\|e\\\| ~f^ $g$ #{h} [i] | 51.2 | 0.5 | 15000 | 15543 | [1] |" in texts["md"].splitlines()
    assert (r"a\_b \& c\%d|e\textbackslash{}| \textasciitilde{}f\textasciicircum{} \$g\$ \#\{h\} {[}i] & 51.2 & 0.5 & "
            r"15000 & 15543 & {[}1] \\") in texts["latex"].splitlines()
    assert r"model & linear & linear $\pm$ & train & test & note \\" in texts["latex"]
    assert all(line.startswith(("%", "\\")) or line.endswith("\\\\") or not line
               for line in texts["latex"].splitlines())
    assert render([("a\nb", ["c", "d"], [["e\nf", "g"]])], ["h\ni"], "text").count("\n") == 2 + 2 + 2


def test_text_is_padded_with_the_words_of_a_title_below_each_other():
    text = text_table(["model", "cub linear mIoU", "n"], [["a long name", "9.0", "100"], ["b", "10.0", ""]])
    assert text == """
                cub
             linear
model          mIoU    n
------------------------
a long name     9.0  100
b              10.0"""[1:]
