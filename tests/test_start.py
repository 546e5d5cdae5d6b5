"""What a script costs before it does anything."""

import subprocess
import sys
from pathlib import Path

from datasets.imagenet import IMG_EXTENSIONS

ROOT = Path(__file__).parents[1]


def test_slow_packages_are_imported_where_they_are_used():
    code = ("import sys, retrieval, classify, segment, models.attention\n"
            "print([name for name in ('timm', 'torchvision', 'matplotlib', 'scipy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_image_files_are_those_of_torchvision():
    from torchvision.datasets import folder
    assert IMG_EXTENSIONS == folder.IMG_EXTENSIONS
