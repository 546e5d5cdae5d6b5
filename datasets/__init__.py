"""Data sets, one file each, and what they share: patches and their transforms, segmentation splits and their pixels."""

from pathlib import Path

from utils import UserError


def check_data_path(name: str, data_path: Path | None) -> None:
    """Raises UserError where a data set that lies in files has no --data-path."""
    if data_path is None and name != "keypoints" and not name.startswith("synthetic"):
        raise UserError(f"--dataset {name} needs --data-path DIR; --dataset synthetic needs no files")
