"""What made a result and the files that later runs use: recorded whole, and compared whole."""

import json
import re
import subprocess
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import retrieval
from models.attention.__main__ import main as attention

ROOT = Path(__file__).parents[1]
IBOT = ("--model", "ibot", "--weights", ROOT / "tests/golden/ibot/checkpoint.pth", "--num-heads", 3)


def test_every_results_line_says_which_run_it_is_of(launch, tmp_path):
    words = (*IBOT, "--device", "cpu", "--workers", 0, "--output-dir", tmp_path)
    started = datetime.now(timezone.utc) - timedelta(seconds=1)
    for main, more in ((retrieval.main, ("--num-images", 2)),
                       (retrieval.main, ("--dataset", "synthetic-pairs", "--num-pairs", 2)),
                       (attention, ("--dataset", "synthetic", "--queries", 0, "--num-images", 2))):
        launch(main, [*words, *more])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["retrieval", "transfer", "attention"]
    assert len({line["run"] for line in lines}) == 3
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for line in lines:
        assert started <= datetime.fromisoformat(line["date"]) <= datetime.now(timezone.utc)
        assert line["revision"].removesuffix("+changes") == (head.strip() or "unknown")
        assert line["versions"] == {name: metadata.version(name) for name in
                                    ("torch", "torchvision", "timm", "numpy", "pillow")}
        assert re.search(f"run {line['run']}, ", (tmp_path / "log.txt").read_text())
