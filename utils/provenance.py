"""What a figure depends on: the arguments that matter, and what made each file that a later run uses."""

import secrets
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")

# Arguments of all scripts that no figure depends on: where things lie, what is written, where it runs. A run may be
# resumed with others (what lies in a data set is compared apart), and tables do not mark them.
NO_EFFECT = frozenset((
    "cache", "cache_dir", "checkpoint_every", "checkpoint_seconds", "columns", "data_path", "debug", "device",
    "eval_every", "figure6", "name", "output_dir", "pictures", "query", "resume", "save_features", "save_pictures",
    "save_plots", "table", "top", "workers"))


@cache
def this_run() -> dict:
    """What every results line says of its run: id, date and time of its start (UTC), revision, versions of packages."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"run": secrets.token_hex(6), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "revision": revision(), "versions": versions}


def revision() -> str:
    """The commit of this code, with "+changes" where the files differ from it; "unknown" outside a checkout."""
    def git(*words):
        return subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
