"""Checkpoint files: download, hashes, errors. A server on 127.0.0.1 replaces the official ones."""

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import models
from models import CheckpointError, build_model
from models.checkpoints import fetch, file_hash, open_checkpoint

GOLDEN = Path(__file__).parent / "golden"


class Server(BaseHTTPRequestHandler):
    """Serves the golden checkpoints as METHOD/FILE; /short/ ends after half the bytes, /noranges/ ignores Range, /slow/
    waits before it answers."""

    requests = []

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        *mode, method, name = self.path.strip("/").split("/")
        path = GOLDEN / method / name
        if not path.is_file():
            return self.send_error(404)
        if mode == ["slow"]:
            time.sleep(3)
        content, start = path.read_bytes(), 0
        if self.headers.get("Range") and mode != ["noranges"]:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content) // 2 if mode == ["short"] else len(content)
        return self.wfile.write(content[start:stop])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    Server.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir())


def test_download_once_check_always(server, tmp_path, capfd):
    path = fetch(f"{server}/mae/checkpoint.pth", "mae.pth")
    assert path.read_bytes() == (GOLDEN / "mae/checkpoint.pth").read_bytes()
    assert cached(tmp_path) == ["mae.pth", "mae.pth.sha256"]
    assert "checkpoint.pth:" in capfd.readouterr().err
    assert fetch(f"{server}/mae/checkpoint.pth", "mae.pth") == path and len(Server.requests) == 1
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="no longer the one recorded"):
        fetch(f"{server}/mae/checkpoint.pth", "mae.pth")


def test_official_weights_end_to_end(server, monkeypatch):
    """--weights official with the published addresses and hashes replaced by those of the golden files."""
    for method, role, file in (("deit", "backbone", "checkpoint.pth"), ("dino", "backbone", "checkpoint_backbone.pth"),
                               ("dino", "full", "checkpoint.pth"), ("mae", "backbone", "checkpoint.pth")):
        module = __import__(f"models.{method}", fromlist=["OFFICIAL"])
        entry = dict(module.OFFICIAL[role], url=f"{server}/{method}/{file}", file=f"{method}_{role}.pth")
        for algorithm in ("sha256", "md5"):
            if algorithm in entry:
                digits = len(entry[algorithm])
                entry[algorithm] = file_hash(GOLDEN / method / file, algorithm)[:digits]
        monkeypatch.setitem(module.OFFICIAL, role, entry)
    assert build_model("deit", num_heads=3).weights == "deit_backbone.pth"
    assert not build_model("dino", num_heads=3).has_projector
    assert build_model("dino", num_heads=3, projector=True).has_projector
    encoder = build_model("mae", num_heads=3)
    assert encoder.sha256 == hashlib.sha256((GOLDEN / "mae/checkpoint.pth").read_bytes()).hexdigest()


def test_published_hash_mismatch_leaves_nothing(server, tmp_path):
    for published in ({"sha256": "00000000"}, {"md5": "8cad7c"}):
        with pytest.raises(CheckpointError, match=f"published is {next(iter(published.values()))}"):
            fetch(f"{server}/mae/checkpoint.pth", "mae.pth", published)
        assert cached(tmp_path) == []


def test_hash_in_the_file_name_is_torch_hubs_convention(server, tmp_path, monkeypatch):
    digest = file_hash(GOLDEN / "mae/checkpoint.pth")
    folder = tmp_path / "golden/mae"
    folder.mkdir(parents=True)
    for digits in (digest[:8], "0" * 8):
        (folder / f"vit-{digits}.pth").write_bytes((GOLDEN / "mae/checkpoint.pth").read_bytes())
    monkeypatch.setattr(f"{__name__}.GOLDEN", tmp_path / "golden")
    assert fetch(f"{server}/mae/vit-{digest[:8]}.pth").is_file()
    with pytest.raises(CheckpointError, match="published is 00000000"):
        fetch(f"{server}/mae/vit-00000000.pth")


@pytest.mark.parametrize("mode", ["", "/noranges"])
def test_a_truncated_download_is_refused_and_continued(server, tmp_path, mode):
    with pytest.raises(CheckpointError, match="ended after .* bytes; start again to continue"):
        fetch(f"{server}/short/ibot/checkpoint.pth", "ibot.pth")
    assert cached(tmp_path) == ["ibot.pth.part"]
    path = fetch(f"{server}{mode}/ibot/checkpoint.pth", "ibot.pth")
    assert path.read_bytes() == (GOLDEN / "ibot/checkpoint.pth").read_bytes()
    half = len(path.read_bytes()) // 2
    assert Server.requests[-1][1] == f"bytes={half}-"


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    part = tmp_path / "torch/hub/checkpoints/mae.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1_000_000)
    with pytest.raises(CheckpointError, match="the server answered 416"):
        fetch(f"{server}/mae/checkpoint.pth", "mae.pth")
    assert fetch(f"{server}/mae/checkpoint.pth", "mae.pth").is_file()


def test_no_such_file_and_no_network(server, tmp_path):
    with pytest.raises(CheckpointError, match="the server answered 404 .* --weights PATH"):
        build_model("mae", f"{server}/mae/nothing.pth")
    with pytest.raises(CheckpointError, match="cannot be reached .* --weights PATH"):
        build_model("mae", "http://127.0.0.1:9/checkpoint.pth")
    assert cached(tmp_path) == []


def test_bad_urls_and_a_cache_that_cannot_be_written_are_one_line(server, tmp_path, monkeypatch):
    for url in ("http://[::1/checkpoint.pth", "http://127.0.0.1:port/checkpoint.pth", "http://a b/checkpoint.pth"):
        with pytest.raises(CheckpointError, match="cannot be reached") as caught:
            build_model("mae", url)
        assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="mae.pth: Not a directory; set TORCH_HOME to a writable folder"):
        fetch(f"{server}/mae/checkpoint.pth", "mae.pth")


def test_a_second_process_waits_for_the_first(server, tmp_path):
    """Three processes want one file, which the server is slow to send: one request, three times the file."""
    command = f"from models.checkpoints import *; print(file_hash(fetch('{server}/slow/mae/checkpoint.pth', 'a.pth')))"
    runs = [subprocess.Popen([sys.executable, "-c", command], text=True, cwd=Path(__file__).parents[1],
                             stdout=subprocess.PIPE) for _ in range(3)]
    digest = hashlib.sha256((GOLDEN / "mae/checkpoint.pth").read_bytes()).hexdigest()
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == [digest] * 3
    assert len(Server.requests) == 1 and cached(tmp_path) == ["a.pth", "a.pth.sha256"]


def test_a_file_is_read_once_for_its_hash(server, monkeypatch):
    started, new = [], hashlib.new
    monkeypatch.setattr(hashlib, "new", lambda algorithm: started.append(algorithm) or new(algorithm))
    for _ in range(2):
        encoder = build_model("mae", f"{server}/mae/checkpoint.pth", num_heads=3)
    assert started == ["sha256"]
    assert encoder.sha256 == hashlib.sha256((GOLDEN / "mae/checkpoint.pth").read_bytes()).hexdigest()


def test_two_files_of_one_name_do_not_meet(server):
    first, second = (fetch(f"{server}/{method}/checkpoint.pth") for method in ("mae", "ibot"))
    assert first != second and first.read_bytes() != second.read_bytes()


def test_files_on_google_drive_are_named():
    for method, file in (("beit", "beit_base_standard_epoch800_checkpoint-799.pth"), ("cae", "cae_base_1600ep.pth")):
        with pytest.raises(CheckpointError, match=f"{file} .*drive.google.com.* --weights PATH"):
            build_model(method)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/executed-by-a-checkpoint",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_carries_code_is_refused(tmp_path, legacy):
    path = tmp_path / "evil.pth"
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 48)}, "extra": Evil()}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil.pth asks for (posix|os).system .* refused"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="evil.pth"):
        open_checkpoint(path)
    assert not Path("/tmp/executed-by-a-checkpoint").exists()


def test_training_arguments_are_allowed(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "file.pth")
    assert open_checkpoint(tmp_path / "file.pth")["args"].lr == 1.0


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_and_foreign_files(tmp_path, keep):
    content = (GOLDEN / "ibot/checkpoint.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(CheckpointError, match="cut.pth is truncated or no PyTorch checkpoint"):
        build_model("ibot", str(path), num_heads=3)
    path.write_text("<html>Sign in</html>")
    with pytest.raises(CheckpointError, match="cut.pth is truncated or no PyTorch checkpoint"):
        build_model("ibot", str(path), num_heads=3)
    with pytest.raises(CheckpointError, match="absent.pth does not exist"):
        build_model("ibot", str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_flipped_bits_in_the_weights_are_refused(tmp_path, place):
    """torch.load takes them: it does not look at the checksums that torch.save writes."""
    content = bytearray((GOLDEN / "mae/checkpoint.pth").read_bytes())
    content[20_000 + 500 * place] ^= 4
    path = tmp_path / "flipped.pth"
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"flipped.pth is .*Bad CRC-32 for file .*download it again"):
        build_model("mae", str(path), num_heads=3)


@pytest.mark.parametrize("checksums", [True, False])
def test_files_without_checksums_load(tmp_path, checksums):
    """The format before archives (official files of 2021), and archives written without CRC-32."""
    state = {"model": {"x": torch.arange(9.0)[2:7]}}
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    if not checksums:
        torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "archive.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("legacy.pth", "archive.pth"):
        assert torch.equal(open_checkpoint(tmp_path / name)["model"]["x"], state["model"]["x"])


FILES = {"deit": "deit/checkpoint", "mocov3": "mocov3/checkpoint", "dino": "dino/checkpoint", "beit": "beit/checkpoint",
         "mae": "mae/checkpoint", "cae": "cae/checkpoint", "ibot": "ibot/checkpoint_teacher"}


@pytest.mark.parametrize("model", models.METHODS)
def test_the_file_of_another_method_is_refused(model):
    for method, file in FILES.items():
        if method != model:
            with pytest.raises(CheckpointError, match=f"{file}.pth is not a file of {model}: "):
                build_model(model, str(GOLDEN / f"{file}.pth"), num_heads=3)


def test_keys_are_named(tmp_path):
    checkpoint = torch.load(GOLDEN / "mae/checkpoint.pth", weights_only=True)
    state = {key: value.clone() for key, value in checkpoint["model"].items()}
    del state["blocks.2.mlp.fc2.bias"]
    state["blocks.0.attn.surprise"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(47)
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        build_model("mae", str(tmp_path / "odd.pth"), num_heads=3)
    for part in ("odd.pth", "missing keys: blocks.2.mlp.fc2.bias", "unexpected keys: blocks.0.attn.surprise",
                 "wrong shapes: norm.bias [47] for [48]"):
        assert part in str(caught.value)


def test_a_projector_that_is_asked_for_and_absent():
    with pytest.raises(CheckpointError, match="checkpoint_backbone.pth has no projector; give the full checkpoint"):
        build_model("dino", str(GOLDEN / "dino/checkpoint_backbone.pth"), num_heads=3, projector=True)
    with pytest.raises(CheckpointError, match="only mocov3, dino, ibot have one"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"), num_heads=3, projector=True)


def test_heads_that_cannot_be():
    with pytest.raises(CheckpointError, match="--num-heads"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"))
    with pytest.raises(CheckpointError, match="not divisible by 7 heads"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"), num_heads=7)


def test_unknown_model():
    with pytest.raises(CheckpointError, match="unknown model 'dinov9': take one of deit, .* or timm/NAME"):
        build_model("dinov9")
