"""Part retrieval: exact average precision, the same figures on any number of processes, sheets, errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

import retrieval
from retrieval import average_precision, random_ranking_ap, ranked_precision, ranked_precision_cpu
from utils.storage import save

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


def test_some_rows_as_queries_and_none():
    _, features, labels = CASES[0]
    for queries in (torch.tensor([200, 3, 77]), np.array([5, 9]), torch.empty(0, dtype=torch.int64)):
        torch.testing.assert_close(average_precision(features, labels, queries=queries),
                                   average_precision(features, labels)[queries])
    assert average_precision(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_chunks_of_queries(monkeypatch):
    generator, seen = torch.Generator().manual_seed(0), []
    features, labels = torch.randn(90, 500, generator=generator), torch.randint(0, 3, (90,), generator=generator)
    monkeypatch.setattr(retrieval, "ranked_precision_cpu",
                        lambda similarity, *rest, **more: seen.append(len(similarity)) or
                        ranked_precision(similarity, *rest, **more))
    monkeypatch.setattr(retrieval, "rows_per_chunk", lambda count, device: 7)
    torch.testing.assert_close(average_precision(features, labels), scikit_learn(features, labels), atol=1e-6, rtol=0)
    assert max(seen) == 7 and sum(seen) == len(features)


def test_features_that_are_not_finite():
    for bad in (float("nan"), float("inf")):
        features = torch.ones(10, 4)
        features[3, 2] = bad
        with pytest.raises(ValueError, match="not finite"):
            average_precision(features, torch.zeros(10, dtype=torch.int64))


def test_means():
    ap, labels = torch.tensor([1.0, 0.5, 0.25, float("nan")]).double(), torch.tensor([0, 0, 1, 2])
    assert retrieval.mean_average_precision(ap, labels) == pytest.approx((100 * 1.75 / 3, 100 * (0.75 + 0.25) / 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_average_precision_on_the_gpu():
    for _, features, labels in CASES:
        for exclude_query in (False, True):
            ours = average_precision(features.cuda(), labels, exclude_query=exclude_query)
            torch.testing.assert_close(ours, scikit_learn(features, labels, exclude_query), atol=1e-5, rtol=0,
                                       equal_nan=True)


@pytest.fixture
def run(launch):
    def run_retrieval(*words, **options):
        return launch(retrieval.main, ["--workers", "0", "--device", "cpu", *words], **options)
    return run_retrieval


def golden(model, form="checkpoint"):
    return "--model", model, "--weights", GOLDEN / model / f"{form}.pth", "--num-heads", 3


def read_results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def last_result(folder):
    return read_results(folder)[-1]


@pytest.mark.parametrize("processes, num_images", [(2, 14), (3, 2)])
def test_processes_do_not_change_the_figures(run, tmp_path, processes, num_images):
    """Nor does the batch size; a process may have no image."""
    for number in (1, processes):
        run(*golden("dino"), "--num-images", num_images, "--batch-size", 16 + number, "--output-dir", tmp_path,
            processes=number)
    one, several = read_results(tmp_path)
    assert several["world_size"] == processes
    for key in ("num_patches", "best", "patches_per_class"):
        assert several[key] == one[key]
    for key in ("ap_cls", "ap_avg", "ap_projected", "map_cls", "map_avg", "map_projected"):
        assert several[key] == pytest.approx(one[key], abs=1e-3)


def test_a_whole_run_and_its_options(run, tmp_path):
    common = (*golden("mocov3"), "--num-images", 14, "--output-dir", tmp_path)
    out, _ = run(*common, "--save-features", tmp_path / "new/features.pt")
    first = last_result(tmp_path)
    assert "synthetic data" in out and "random weights" not in out
    for key in ("weights", "world_size", "precision", "seed", "seconds", "args", "num_patches", "num_outside"):
        assert key in first, key
    assert first["task"] == "retrieval" and first["best"] in ("cls", "avg") and 0 < first["ap_cls"] < 100
    assert (tmp_path / "log.txt").read_text().count("encoded  AP") == 1
    content = torch.load(tmp_path / "new/features.pt", weights_only=True)
    ap = scikit_learn(content["features"]["cls"], content["labels"])
    assert first["ap_cls"] == pytest.approx(100 * float(ap.mean()), abs=1e-4)

    # From the file, also on several processes: the same figures, and what made the features.
    figures = ("model", "sha256", "ap_cls", "map_avg", "ap_projected", "features_made_by")
    for processes in (1, 3):
        out, _ = run("--load-features", tmp_path / "new/features.pt", "--output-dir", tmp_path, processes=processes)
        assert f"features of mocov3 on synthetic (synthetic data): weights {first['weights']}, SHA-256 " in out
        assert f"made by run {first['run']}" in out
        loaded = last_result(tmp_path)
        assert {key: loaded[key] for key in figures} == {key: first[key] for key in figures}
        assert loaded["world_size"] == processes and loaded["run"] != first["run"]
    run("--load-features", tmp_path / "new/features.pt", "--exclude-query", "--output-dir", tmp_path)
    excluded = last_result(tmp_path)
    assert excluded["ap_cls"] < first["ap_cls"] and excluded["ap_chance"] < first["ap_chance"]
    assert excluded["args"]["exclude_query"] and excluded["args"]["num_images"] == 14
    assert {"weights", "num_heads", "num_images", "exclude_query"} <= {*excluded["args"]["changed"]}


def test_features_of_several_models(run, tmp_path):
    """A line for each; how patches were cut stands in it; files of other patches are refused."""
    files = {name: tmp_path / f"{name}.pt" for name in ("ibot", "mae", "text")}
    for name, words in (("ibot", []), ("mae", []), ("text", ["--crop-scale", 1])):
        run(*golden("ibot" if name == "text" else name), "--num-images", 6, "--save-features", files[name], *words,
            "--output-dir", tmp_path)
    run("--load-features", files["ibot"], files["mae"], "--output-dir", tmp_path)
    run("--load-features", files["text"], "--output-dir", tmp_path)
    lines = read_results(tmp_path)
    assert [line["model"] for line in lines] == ["ibot", "mae", "ibot"] * 2
    assert [line["ap_avg"] for line in lines[:3]] == [line["ap_avg"] for line in lines[3:]]
    assert lines[5]["crop_scale"] == 1 and "crop_scale" in lines[5]["args"]["changed"]
    assert lines[0]["ap_avg"] != lines[2]["ap_avg"]
    _, err = run("--load-features", files["ibot"], files["text"], "--output-dir", tmp_path, status=2)
    one_line(err, "--load-features: ", "name files of one data set")


OWN = """
import torch

def network(weights):
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 48, 16, 16)
"""


def test_where_there_is_no_class_token_there_is_one_feature(run, tmp_path):
    """A model of timm without one, and a network of one's own that gives a feature map."""
    (tmp_path / "own.py").write_text(OWN)
    for model in ("timm/test_vit2", f"{tmp_path / 'own.py'}:network"):
        run("--model", model, "--weights", "random", "--image-size", 64, "--num-images", 4, "--output-dir", tmp_path)
        found = last_result(tmp_path)
        assert found["cls_from"] == "mean" and found["best"] == "avg" and "ap_cls" not in found
        assert 0 < found["ap_avg"] <= 100


def test_a_random_ranking_is_what_random_features_get():
    generator = torch.Generator().manual_seed(0)
    counts = [3, 1, 9, 27]
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    for exclude_query in (False, True):
        expected = [random_ranking_ap(len(labels), count, exclude_query) for count in counts]
        found = torch.stack([average_precision(torch.randn(len(labels), 200, generator=generator), labels,
                                               exclude_query=exclude_query) for _ in range(150)]).mean(0)
        means = [found[labels == label].nanmean().item() for label in range(4)]
        assert means == pytest.approx(expected, abs=0.03, nan_ok=True) and np.isnan(means[1]) == exclude_query
    assert random_ranking_ap(2, 2, True) == random_ranking_ap(1, 1, False) == 1


@needs_real
def test_the_real_cub_sample_and_the_table(run, tmp_path):
    run(*golden("ibot"), "--dataset", "cub", "--data-path", REAL / "CUB_200_2011", "--output-dir", tmp_path)
    result = last_result(tmp_path)
    assert result["num_patches"] == 914
    assert result["patches_per_class"] == {"right eye": 173, "right leg": 231, "left wing": 199, "tail": 311}
    out, _ = run("--table", "--output-dir", tmp_path)
    ours = result[f"ap_{result['best']}"]
    row = next(line for line in out.splitlines() if f"{ours:.1f}" in line).split()
    assert row[:5] == ["ibot", "49.3", f"{ours:.1f}", f"{ours - 49.3:+.1f}", "31.2"]
    assert row[-3:] == [result["best"], "914", "[1]"] and "914 of 30543 patches" in " ".join(out.split())
    # 27.5 was measured with independent code.
    assert result["ap_chance"] == pytest.approx(27.5, abs=0.05) and "random ranking" in out


@pytest.fixture
def folder(tmp_path):
    """Five images with a gradient and noise, for sheets."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((300, 240 + 20 * number), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"images/{number}.png")
    return tmp_path / "images"


def test_sheets_are_the_same_from_several_processes(run, folder, tmp_path):
    """Two and three processes have uneven shares of five images."""
    words = (*golden("ibot"), "--dataset", "imagenet", "--data-path", folder, "--image-size", 64,
             "--queries", 3, "--top", 12)
    found = {}
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        run(*words, "--output-dir", out, processes=processes)
        result = last_result(out)
        assert result["world_size"] == processes and result["task"] == "retrieval-sheets"
        found[processes] = {name: (out / name).read_bytes() for name in result["sheets"]}
    assert len(found[1]) == 3 and found[1] == found[2] == found[3]


def test_sheets_of_several_models(run, folder, tmp_path):
    out = tmp_path / "out"
    common = ("--dataset", "imagenet", "--data-path", folder, "--image-size", 64, "--output-dir", out)
    for model in ("ibot", "mae"):
        run(*golden(model), *common, "--queries", 1, "--save-features", tmp_path / f"{model}.pt")
    run("--load-features", tmp_path / "ibot.pt", tmp_path / "mae.pt", "--query", "3.png:24", "--output-dir", out)
    result = last_result(out)
    assert result["sheets"] == ["sheet_000_3_24.png"] and result["models"] == ["ibot", "mae"]
    with Image.open(out / "sheet_000_3_24.png") as sheet:
        red = (np.asarray(sheet)[..., :3] == (255, 0, 0)).all(2).sum()
        assert red >= 2 * 4 * 2 * 50 and sheet.height > 2 * 4 * 112
    for words, marked in (([], True), (["--other-images"], False)):
        run("--load-features", tmp_path / "ibot.pt", "--query", "3.png:24", "--output-dir", out, *words)
        with Image.open(out / "sheet_000_3_24.png") as sheet:
            assert ((np.asarray(sheet)[..., :3] == (255, 140, 0)).all(2).sum() > 1000) == marked
    _, err = run("--load-features", tmp_path / "ibot.pt", "--query", "3.png:99", "--output-dir", out, status=2)
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
    save(tmp_path / "part.pt", {"features": {}, "labels": torch.zeros(4)})
    for words, parts in (
        (("--dataset", "imagenet", "--data-path", tmp_path / "empty"), ["empty", "no image"]),
        ((*golden("dino", "checkpoint_backbone"), "--features", "projected"), ["no projector", "full checkpoint"]),
        ((*golden("deit"), "--authors-defects"), ["--authors-defects", "mae, and for full checkpoints of dino"]),
        (("--load-features", tmp_path / "file"), ["--load-features", "not a whole feature file"]),
        (("--load-features", tmp_path / "part.pt"), ["--load-features", "not a whole feature file"]),
        (("--load-features", tmp_path / "part.pt", "--weights", "random"), ["--weights has no effect"]),
    ):
        _, err = run(*words, "--output-dir", out, status=2)
        one_line(err, *parts)
        assert not (out / "results.jsonl").exists()


def test_a_damaged_picture_is_an_error_that_names_it(run, folder, tmp_path):
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[:len(content) // 2])
    _, err = run(*golden("mae"), "--dataset", "imagenet", "--data-path", folder, "--image-size", 64, "--output-dir",
                 tmp_path / "out", status=2)
    one_line(err, str(folder / "2.png"))
    assert not (tmp_path / "out/results.jsonl").exists()
