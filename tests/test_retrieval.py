"""Part retrieval: exact average precision, the same figures on any number of processes, errors in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

import retrieval
from retrieval import (
    average_precision,
    find_query,
    mean_average_precision,
    nearest_patches,
    random_ranking_ap,
    ranked_precision,
    ranked_precision_cpu,
)
from utils.storage import save_checked

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
REAL = ROOT / "../shared/real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real samples of ../shared/real are not here")


def scikit_learn(features, labels, exclude_query=False):
    """AP of every row, one query at a time; NaN without positives, where scikit-learn gives 0."""
    normalized = F.normalize(features.float(), dim=1)
    similarity = normalized @ normalized.T
    out = []
    for query in range(len(features)):
        kept = torch.ones(len(features), dtype=torch.bool)
        kept[query] = not exclude_query
        positive = (labels == labels[query])[kept]
        out.append(average_precision_score(positive.numpy(), similarity[query][kept].numpy())
                   if positive.any() else float("nan"))
    return torch.tensor(out, dtype=torch.float64)


def make_cases():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(203, 24, generator=generator), torch.randint(0, 4, (203,), generator=generator)
    yield "random", features, labels
    yield "duplicates", features[torch.randint(0, 50, (203,), generator=generator)], labels
    yield "constant", features[:1].expand(203, -1), labels
    yield "few values", torch.randint(-1, 2, (203, 3), generator=generator).float(), labels
    yield "zero rows", features * (torch.arange(203) % 5 > 0)[:, None], labels
    yield "two classes", features[:100], labels[:100] % 2
    yield "one class", features[:50], torch.zeros(50, dtype=torch.int64)
    alone = torch.zeros(100, dtype=torch.int64)
    alone[13] = 1
    yield "a class of one", features[:100], alone
    yield "two rows", features[:2], labels[:2]
    yield "one row", features[:1], labels[:1]
    yield "half precision", features.half(), labels


CASES = list(make_cases())


@pytest.mark.parametrize("exclude_query", [False, True])
@pytest.mark.parametrize("name, features, labels", CASES, ids=[name for name, *_ in CASES])
def test_average_precision_is_scikit_learns(name, features, labels, exclude_query):
    ours = average_precision(features, labels, exclude_query=exclude_query)
    torch.testing.assert_close(ours, scikit_learn(features, labels, exclude_query), atol=1e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_two_rankings_agree(skip):
    """The one for CUDA, run on the CPU, against the one for the CPU; similarities with many ties and both zeros."""
    similarity = torch.randint(-3, 4, (37, 211), generator=torch.Generator().manual_seed(0)) * -0.25
    ours = ranked_precision_cpu(similarity, 40, 95, skip)
    torch.testing.assert_close(ours, ranked_precision(similarity, 40, 95, skip))


def test_no_rows_and_no_queries():
    assert average_precision(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)
    some = average_precision(torch.randn(5, 8), torch.zeros(5, dtype=torch.int64), queries=torch.empty(0).long())
    assert some.shape == (0,)


def test_a_sample_of_queries_is_those_rows():
    _, features, labels = CASES[0]
    queries = torch.tensor([200, 3, 77])
    torch.testing.assert_close(average_precision(features, labels, queries=queries),
                               average_precision(features, labels)[queries])


def test_features_wider_than_memory_go_through_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 500, generator=generator), torch.randint(0, 3, (90,), generator=generator)
    whole = average_precision(features, labels)
    monkeypatch.setattr(retrieval, "free_memory", lambda device: 4 * 90 * 4 * 3 * 64)
    assert retrieval.free_memory(None) / 2 < 90 * 500 * 4 * 3
    torch.testing.assert_close(average_precision(features, labels), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(average_precision(features, labels), scikit_learn(features, labels), atol=1e-6, rtol=0)


def test_memory_sets_the_chunk_of_queries(monkeypatch):
    _, features, labels = CASES[0]
    seen = []
    monkeypatch.setattr(retrieval, "ranked_precision_cpu",
                        lambda similarity, *rest, **more: seen.append(len(similarity)) or
                        ranked_precision(similarity, *rest, **more))
    monkeypatch.setattr(retrieval, "rows_per_chunk", lambda count, device: 7)
    torch.testing.assert_close(average_precision(features, labels), scikit_learn(features, labels), atol=1e-6, rtol=0)
    assert max(seen) == 7 and sum(seen) == len(features)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad):
    features = torch.randn(10, 4)
    features[3, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        average_precision(features, torch.zeros(10, dtype=torch.int64))


def test_means():
    ap, labels = torch.tensor([1.0, 0.5, 0.25, float("nan")]).double(), torch.tensor([0, 0, 1, 2])
    assert mean_average_precision(ap, labels) == pytest.approx((100 * 1.75 / 3, 100 * (0.75 + 0.25) / 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_average_precision_on_the_gpu():
    for _, features, labels in CASES:
        for exclude_query in (False, True):
            ours = average_precision(features.cuda(), labels, exclude_query=exclude_query)
            torch.testing.assert_close(ours, scikit_learn(features, labels, exclude_query), atol=1e-5, rtol=0,
                                       equal_nan=True)


def test_nearest_patches_against_a_plain_sort():
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([5, 59])
    similarity = F.cosine_similarity(features[queries][:, None], features[None], dim=2)
    similarity[[0, 1], queries] = -2
    assert torch.equal(nearest_patches(features, torch.arange(60), queries, 7), similarity.topk(7).indices)
    # A query is in no list, however long.
    assert nearest_patches(features, torch.arange(60), queries, 60).shape == (len(queries), 59)
    # Rows 0 to 9 are of one image, and so on.
    same = torch.arange(60) // 10 == queries[:, None] // 10
    similarity[same] = -2
    others = nearest_patches(features, torch.arange(60), queries, 60, leave_out=10)
    assert torch.equal(others, similarity.topk(50).indices)


def test_queries_by_name():
    paths = ["/data/a/one.jpg", "/data/b/one.jpg", "/data/b/two.png"]
    assert find_query("b/one.jpg:48", paths) == 49 + 48
    for text in ("one.jpg:3", "two.png:49", "two.png", "three.jpg:0"):
        with pytest.raises(retrieval.UserError, match=re.escape(f"--query {text}: ")):
            find_query(text, paths)


@pytest.fixture
def run(launch):
    def run_retrieval(*words, **options):
        return launch(retrieval.main, ["--workers", "0", "--device", "cpu", *words], **options)
    return run_retrieval


def golden(model, form="checkpoint"):
    return "--model", model, "--weights", GOLDEN / model / f"{form}.pth", "--num-heads", 3


def last_result(folder):
    return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])


def test_processes_do_not_change_the_figures(run, tmp_path):
    results = {}
    for processes in (1, 2, 3):
        run(*golden("dino"), "--num-images", 14, "--batch-size", 16 + processes, "--output-dir", tmp_path,
            processes=processes)
        results[processes] = last_result(tmp_path)
        assert results[processes]["world_size"] == processes
    for processes in (2, 3):
        for key in ("num_patches", "best", "patches_per_class"):
            assert results[processes][key] == results[1][key]
        for key in ("ap_cls", "ap_avg", "ap_projected", "map_cls", "map_avg", "map_projected"):
            assert results[processes][key] == pytest.approx(results[1][key], abs=1e-3)


def test_more_processes_than_images(run, tmp_path):
    run(*golden("ibot"), "--num-images", 2, "--output-dir", tmp_path / "one")
    run(*golden("ibot"), "--num-images", 2, "--output-dir", tmp_path / "three", processes=3)
    one, three = (last_result(tmp_path / name) for name in ("one", "three"))
    assert three["ap_projected"] == pytest.approx(one["ap_projected"], abs=1e-3)


def test_a_whole_run_and_its_options(run, tmp_path):
    common = (*golden("mocov3"), "--num-images", 14, "--output-dir", tmp_path)
    out, _ = run(*common, "--save-features", tmp_path / "features.pt")
    first = last_result(tmp_path)
    assert "synthetic data" in out and "random weights" not in out
    for key in ("task", "model", "weights", "sha256", "dataset", "world_size", "precision", "seed", "seconds", "args",
                "num_patches", "ap_cls", "ap_avg", "ap_projected", "map_cls", "map_avg", "map_projected", "best"):
        assert key in first, key
    assert first["task"] == "retrieval" and first["best"] in ("cls", "avg") and 0 < first["ap_cls"] < 100
    assert (tmp_path / "log.txt").read_text().count("encoded  AP") == 1

    out, _ = run("--load-features", tmp_path / "features.pt", "--output-dir", tmp_path)
    assert "features of mocov3" in out and "SHA-256 " in out and "made by run: " in out and "revision: " in out
    loaded = last_result(tmp_path)
    assert {key: loaded[key] for key in ("model", "sha256", "ap_cls", "map_avg", "ap_projected")} == {
        key: first[key] for key in ("model", "sha256", "ap_cls", "map_avg", "ap_projected")}

    run(*common, "--crop-scale", 1, "--save-features", tmp_path / "text.pt")
    assert last_result(tmp_path)["ap_cls"] != first["ap_cls"]
    run("--load-features", tmp_path / "text.pt", "--output-dir", tmp_path)
    assert last_result(tmp_path)["crop_scale"] == 1

    assert "crop_scale" in last_result(tmp_path)["args"]["changed"]

    # What made the features, and how they were ranked here.
    run("--load-features", tmp_path / "features.pt", "--exclude-query", "--output-dir", tmp_path)
    excluded = last_result(tmp_path)
    assert excluded["ap_cls"] < first["ap_cls"] and excluded["ap_chance"] < first["ap_chance"]
    assert excluded["args"]["exclude_query"] and excluded["args"]["num_images"] == 14
    assert {"weights", "num_heads", "num_images", "exclude_query"} <= {*excluded["args"]["changed"]}

    out, _ = run("--load-features", tmp_path / "features.pt", "--num-queries", 20, "--output-dir", tmp_path)
    sampled = last_result(tmp_path)
    assert sampled["num_queries"] == 20 and "standard error" in out
    assert abs(sampled["ap_cls"] - first["ap_cls"]) < 5 * sampled["ap_cls_standard_error"]

    content = torch.load(tmp_path / "features.pt", weights_only=True)
    ap = scikit_learn(content["features"]["cls"], content["labels"])
    assert first["ap_cls"] == pytest.approx(100 * float(ap.mean()), abs=1e-4)


def test_the_standard_error_is_of_the_queries_that_have_an_average_precision():
    """Not of one alone in its class, which has none when it is left out; and a single query has no error."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    source = {"features": {"cls": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}, "labels": labels,
              "ids": torch.arange(8), "classes": ["a", "b", "c", "d"],
              "line": {"model": "m", "weights": "w", "dataset": "cub", "precision": "fp32"}}
    found = retrieval.retrieval_metrics(source, True, 7, 0, torch.device("cpu"), print)
    asked = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:7]
    ap = scikit_learn(source["features"]["cls"], labels, True)[asked]
    ap = ap[~ap.isnan()].numpy()
    assert len(ap) < 7
    error = 100 * np.std(ap, ddof=1) / len(ap) ** 0.5 * (1 - 7 / 8) ** 0.5
    assert found["ap_cls_standard_error"] == pytest.approx(error)
    assert "ap_cls_standard_error" not in retrieval.retrieval_metrics(source, False, 1, 0, torch.device("cpu"), print)


def test_a_random_ranking_is_what_random_features_get():
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 9, 27]
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    for exclude_query in (False, True):
        expected = [random_ranking_ap(len(labels), count, exclude_query) for count in counts]
        found = torch.stack([average_precision(torch.randn(len(labels), 200, generator=generator), labels,
                                               exclude_query=exclude_query) for _ in range(300)]).mean(0)
        means = [found[labels == label].nanmean().item() for label in range(4)]
        assert means == pytest.approx(expected, abs=0.02, nan_ok=True) and np.isnan(means[1]) == exclude_query
    assert random_ranking_ap(2, 2, True) == random_ranking_ap(1, 1, False) == 1


@needs_real
def test_the_real_cub_sample_and_the_table(run, tmp_path):
    run(*golden("ibot"), "--dataset", "cub", "--data-path", REAL / "CUB_200_2011", "--output-dir", tmp_path)
    result = last_result(tmp_path)
    assert result["num_patches"] == 914
    assert result["patches_per_class"] == {"right eye": 173, "right leg": 231, "left wing": 199, "tail": 311}
    out, _ = run("--table", "--output-dir", tmp_path)
    ours = result[f"ap_{result['best']}"]
    row = next(line for line in out.splitlines() if f"{ours:.1f}" in line)
    assert row.startswith("ibot (weights")
    assert row.split()[-8:-4] == ["49.3", f"{ours:.1f}", f"{ours - 49.3:+.1f}", "31.2"]
    assert row.split()[-2:] == [result["best"], "914"] and "914 of 30543 patches" in " ".join(out.split())
    # 27.5 was measured with independent code.
    assert result["ap_chance"] == pytest.approx(27.5, abs=0.05) and "random ranking" in out


@needs_real
def test_picture_sheets(run, tmp_path):
    folder, out = REAL / "coco/images/val2017", tmp_path / "out"
    named = sorted(folder.iterdir())[0].name
    for model in ("ibot", "mae"):
        run(*golden(model), "--dataset", "imagenet", "--data-path", folder, "--num-images", 6, "--seed", 1, "--queries",
            1, "--output-dir", out, "--save-features", tmp_path / f"{model}.pt", processes=2)
    before = set(out.glob("*.png"))
    assert len(before) == 1
    assert last_result(out)["task"] == "retrieval-sheets"
    run("--load-features", tmp_path / "ibot.pt", tmp_path / "mae.pt", "--queries", 2, "--seed", 5, "--output-dir", out)
    sheets = sorted(set(out.glob("*.png")) - before)
    assert [path.name for path in sheets] == last_result(out)["sheets"] and len(sheets) == 2
    with Image.open(sheets[0]) as sheet:
        red = (np.asarray(sheet) == (255, 0, 0)).all(2).sum()
        assert red >= 4 * 3 * 50 and sheet.height > 2 * 4 * 64
    for words, marked in (([], True), (["--other-images"], False)):
        run("--load-features", tmp_path / "ibot.pt", "--queries", 1, "--output-dir", out, *words)
        with Image.open(out / last_result(out)["sheets"][0]) as sheet:
            assert (np.asarray(sheet) == (255, 140, 0)).all(2).any() == marked
    _, err = run("--load-features", tmp_path / "ibot.pt", "--query", f"{named}:99", "--output-dir", out, status=2)
    assert "POSITION 0 to 48" in err


def test_authors_defects_change_the_figures(run, tmp_path):
    for model in ("mae", "dino"):
        results = []
        for words in ((), ("--authors-defects",)):
            run(*golden(model), "--num-images", 6, "--output-dir", tmp_path, *words)
            results.append(last_result(tmp_path))
        assert [result["authors_defects"] for result in results] == [False, True]
        assert results[0]["ap_avg"] != results[1]["ap_avg"]


def one_line(err, *parts):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    for part in parts:
        assert part in lines[0], err


def test_mistakes_get_one_line_and_no_result(run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/results.jsonl").write_text('{"task": "retrieval"}\n')
    content = {**dict.fromkeys(retrieval.FEATURE_FILE, "x"), "features": {"cls": torch.full((4, 3), float("nan"))},
               "ids": torch.arange(4), "labels": torch.zeros(4, dtype=torch.int64), "classes": ["a"], "paths": []}
    line = {"name": "x", "model": "x", "weights": "x", "dataset": "x", "precision": "x", "sha256": "x",
            "features_made_by": "x", "args": {"changed": []}}
    save_checked(tmp_path / "nan.pt", content | {"data": {}, "line": line})
    save_checked(tmp_path / "part.pt", {name: content[name] for name in ("features", "ids")})
    for words, parts in (
        (("--model", "dinov9", "--weights", "random"), ["dinov9", "deit"]),
        (("--dataset", "cup"), ["--dataset", "cup", "synthetic"]),
        (("--dataset", "cub"), ["--data-path"]),
        (("--dataset", "cub", "--data-path", tmp_path / "empty"), ["empty", "images.txt"]),
        (("--dataset", "coco", "--data-path", tmp_path / "none"), ["none", "person_keypoints_train2017.json"]),
        (("--dataset", "imagenet", "--data-path", tmp_path / "empty"), ["empty", "no image"]),
        (("--weights", tmp_path / "none.pth"), ["none.pth", "does not exist"]),
        (("--weights", tmp_path / "file"), ["file", "truncated"]),
        ((*golden("dino", "checkpoint_backbone"), "--features", "projected"), ["no projector", "full checkpoint"]),
        ((*golden("deit"), "--authors-defects"), ["--authors-defects", "mae and dino"]),
        (("--model", "dino", "--weights", "random", "--authors-defects"), ["--authors-defects", "no student"]),
        (("--load-features", tmp_path / "file"), ["--load-features", "not a whole feature file"]),
        (("--load-features", tmp_path / "part.pt"), ["--load-features", "not a whole feature file"]),
        (("--load-features", tmp_path / "nan.pt"), ["not finite", "--precision fp32"]),
        ((*golden("ibot"), "--save-features", tmp_path / "none/x.pt"), ["--save-features", "folder does not exist"]),
        (("--weights", "http://[bad"), ["http://[bad", "--weights PATH"]),
        (("--batch-size", "0"), ["--batch-size"]),
        (("--table",), ["results.jsonl", "run without --table first"]),
        (("--model", "beit"), ["Google Drive", "--weights PATH"]),
    ):
        _, err = run(*words, "--output-dir", out, status=2)
        one_line(err, *parts)
        assert not out.exists() or not list(out.iterdir())
    _, err = run("--table", "--output-dir", tmp_path / "odd", status=2)
    one_line(err, "results.jsonl, line 1, is not a results line")
    _, err = run(*golden("ibot"), "--output-dir", tmp_path / "file" / "out", status=2)
    one_line(err, "cannot be written", "--output-dir")


def test_by_torchrun_and_by_python(tmp_path):
    """As a user starts it: the same figures, and exit status 2 with one line for a mistake."""
    words = ["retrieval.py", *map(str, golden("mae")), "--num-images", "3", "--workers", "1", "--device", "cpu",
             "--output-dir", str(tmp_path)]
    for launcher in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, check=True, timeout=600)
    several, one = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert several["world_size"] == 2 and one["world_size"] == 1
    assert several["ap_cls"] == pytest.approx(one["ap_cls"], abs=1e-3)
    done = subprocess.run([sys.executable, *words, "--weights", "none.pth"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    one_line(done.stderr, "none.pth does not exist")


@needs_real
def test_bad_images(run, tmp_path):
    cub = tmp_path / "CUB_200_2011"
    cub.mkdir()
    for entry in (REAL / "CUB_200_2011").iterdir():
        (cub / entry.name).symlink_to(entry.resolve())
    (cub / "images").unlink()
    broken = None
    for folder in sorted((REAL / "CUB_200_2011/images").iterdir()):
        (cub / "images" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir()):
            (cub / "images" / folder.name / image.name).symlink_to(image.resolve())
            broken = broken or cub / "images" / folder.name / image.name
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[:len(content) // 2])
    options = (*golden("mae"), "--dataset", "cub", "--data-path", cub, "--output-dir", tmp_path / "out")
    _, err = run(*options, status=2)
    one_line(err.splitlines()[-1], broken.name, "--skip-bad-images")
    assert not list((tmp_path / "out").iterdir())
    out, _ = run(*options, "--skip-bad-images")
    result = last_result(tmp_path / "out")
    assert result["num_patches"] + result["skipped_patches"] == 914 and 1 <= result["skipped_patches"] <= 4
    assert f"{result['skipped_patches']} patches of images that could not be decoded" in out
