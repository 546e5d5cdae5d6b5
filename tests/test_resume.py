"""Runs that are killed at any moment go on with --resume to the same bits. KILLS=10: so many, in place of two."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESSES, call_main
from PIL import Image

import classify
import segment

DINO = ["--model", "dino", "--weights", Path(__file__).parent / "golden/dino/checkpoint.pth", "--num-heads", 3,
        "--device", "cpu", "--workers", 0, "--dataset", "folder"]
KILLS = int(os.environ.get("KILLS", 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and two test images, in class folders and with label maps."""
    root, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            pixels = chance.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            for path, content in ((f"classes/{split}/{number % 2}", pixels), (f"maps/images/{split}", pixels),
                                  (f"maps/labels/{split}", pixels[..., 0] % 2 + 1)):
                (root / path).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(root / path / f"{number}.png")
    (root / "maps" / "names.txt").write_text("one\ntwo\n")
    return root


def checkpoint_after_every_epoch():
    classify.CHECKPOINT_SECONDS = 0
    classify.main()


RUNS = {
    "classify": (checkpoint_after_every_epoch,
                 ["--data-path", "classes", "--image-size", 64, "--probe", "linear", "attentive", "--epochs", 80],
                 "dino_folder_checkpoint.pth", "dino_folder_attentive_head.pth"),
    "segment": (segment.main,
                ["--data-path", "maps", "--base-scale", 64, 64, "--test-scale", 64, 64, "--crop-size", 64, "--stride",
                 64, "--layers", 0, "--batch-norm", "--batch-size", 2, "--iterations", 100, "--checkpoint-every", 3],
                "dino_folder_segment.pt", "dino_folder_segment.pt")}


def seconds_of(main, words, checkpoint, limit=None):
    """Starts a run and, if its training has not ended by then, kills it limit seconds after its first checkpoint.
    Returns the seconds from there to its end."""
    process = PROCESSES.Process(target=call_main, args=(main, words))
    process.start()
    while process.is_alive() and not checkpoint.exists():
        time.sleep(0.002)
    started = time.monotonic()
    process.join(limit)
    process.kill()
    process.join()
    return time.monotonic() - started


@pytest.mark.parametrize("script", RUNS)
def test_killed_at_random_and_resumed_to_the_same_bits(launch, data, tmp_path, script):
    main, words, checkpoint, head = RUNS[script]
    words = [*DINO, *words]
    words[words.index("--data-path") + 1] = data / words[words.index("--data-path") + 1]
    whole = tmp_path / "whole"
    seconds = seconds_of(main, [*words, "--output-dir", whole], whole / checkpoint)
    expected, moments = torch.load(whole / head, weights_only=True)["head"], []
    for number in range(20 * KILLS):
        out, moment = tmp_path / str(number), random.random() * seconds
        seconds_of(main, [*words, "--output-dir", out], out / checkpoint, moment)
        if (out / "results.jsonl").exists():
            seconds /= 2  # the machine became faster since, and the run ended before
            continue
        said, _ = launch(main, [*words, "--output-dir", out, "--resume"])
        done = [int(line.split()[-1]) for line in said.splitlines() if line.startswith("resumed after")]
        moments += done
        found = torch.load(out / head, weights_only=True)["head"]
        assert done and all(torch.equal(value, found[key]) for key, value in expected.items()), (moment, seconds, done)
        assert len((out / "results.jsonl").read_text().splitlines()) == len(
            (whole / "results.jsonl").read_text().splitlines())
        assert not [path for path in out.iterdir() if path.suffix == ".pth" and "checkpoint" in path.name]
        if len(moments) == KILLS:
            break
    print(f"{script}: killed and resumed after {moments}")
    assert len(moments) == KILLS
