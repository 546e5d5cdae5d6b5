"""Checkpoint files: download, hashes, errors. A server on 127.0.0.1 replaces the official ones."""

import argparse
import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import models
from models import CheckpointError, build_model
from models.checkpoints import fetch, file_hash, open_checkpoint
from models.mocov3 import build_projector

GOLDEN = Path(__file__).parent / "golden"


class Server(BaseHTTPRequestHandler):
    """Serves the golden checkpoints as METHOD/FILE; /short/ ends after half the bytes, /noranges/ ignores Range, /slow/
    waits before it answers. version: headers of every answer; honest: whether If-Range is compared with them."""

    requests, version, honest = [], {}, True

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Range")))
        *mode, method, name = self.path.strip("/").split("/")
        path = GOLDEN / method / name
        if not path.is_file():
            return self.send_error(404)
        if mode == ["slow"]:
            time.sleep(3)
        content, start = path.read_bytes(), 0
        wanted = self.headers.get("If-Range")
        if self.headers.get("Range") and mode != ["noranges"] and (
                not wanted or not self.honest or wanted in self.version.values()):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
        else:
            self.send_response(200)
        for name, value in self.version.items():
            self.send_header(name, value)
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
    monkeypatch.setattr(Server, "version", {})
    monkeypatch.setattr(Server, "honest", True)
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


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("first, second", [
    ({"ETag": '"1"'}, {"ETag": '"2"'}), ({"ETag": '"1"'}, {"Last-Modified": "Fri, 27 Nov 2026 02:00:00 GMT"}),
    ({}, {"ETag": '"2"'}), ({"ETag": 'W/"1"', "Last-Modified": "Fri, 27 Nov 2026 01:00:00 GMT"},
                            {"ETag": 'W/"1"', "Last-Modified": "Fri, 27 Nov 2026 02:00:00 GMT"})])
def test_no_file_is_made_of_two_versions(server, tmp_path, monkeypatch, first, second, honest):
    """The part is of another file than what the server has under that address when the download goes on."""
    monkeypatch.setattr(Server, "version", first)
    monkeypatch.setattr(Server, "honest", honest)
    with pytest.raises(CheckpointError, match="ended after"):
        fetch(f"{server}/short/mae/checkpoint_full.pth", "a.pth")
    monkeypatch.setattr(Server, "version", second)
    path = fetch(f"{server}/ibot/checkpoint.pth", "a.pth")
    assert path.read_bytes() == (GOLDEN / "ibot/checkpoint.pth").read_bytes()
    assert cached(tmp_path) == ["a.pth", "a.pth.sha256"]


def test_damaged_records_beside_a_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "version", {"ETag": '"1"'})
    path = fetch(f"{server}/mae/checkpoint.pth", "a.pth")
    (path.parent / "a.pth.sha256").write_bytes(b"\xff\x00")
    with pytest.raises(CheckpointError, match="no longer the one recorded"):
        fetch(f"{server}/mae/checkpoint.pth", "a.pth")
    (path.parent / "b.pth.part").write_bytes(b"another file")
    (path.parent / "b.pth.part.version").write_bytes(b"\xff\n")
    assert fetch(f"{server}/mae/checkpoint.pth", "b.pth").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", [{"ETag": '"1"'}, {"Last-Modified": "Fri, 27 Nov 2026 01:00:00 GMT"}])
def test_a_download_of_one_version_goes_on(server, tmp_path, monkeypatch, version):
    monkeypatch.setattr(Server, "version", version)
    with pytest.raises(CheckpointError, match="ended after"):
        fetch(f"{server}/short/ibot/checkpoint.pth", "a.pth")
    assert cached(tmp_path) == ["a.pth.part", "a.pth.part.version"]
    path = fetch(f"{server}/ibot/checkpoint.pth", "a.pth")
    assert path.read_bytes() == (GOLDEN / "ibot/checkpoint.pth").read_bytes()
    assert [asked for _, asked in Server.requests] == [None, f"bytes={len(path.read_bytes()) // 2}-"]
    assert cached(tmp_path) == ["a.pth", "a.pth.sha256"]


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


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "text", "zip", "legacy", "safetensors"])
def test_files_that_are_no_checkpoints_are_one_line(tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    elif kind == "legacy":
        torch.save({"model": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text("" if kind == "empty" else "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:/bin/false\n")
    words = "is not a regular file" if kind in ("folder", "pipe") else "truncated or no PyTorch checkpoint"
    for model in ("mae", "timm/vit_tiny_patch16_224"):
        with pytest.raises(CheckpointError, match=words) as caught:
            build_model(model, str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["archive", "legacy", "safetensors"])
def test_damaged_files_are_one_line_or_the_same_weights(tmp_path, form):
    """Of 40 damages of each kind. The format before archives and safetensors have no checksum: only what is cut off."""
    content = torch.load(GOLDEN / "mae/checkpoint.pth", weights_only=True)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file({key: value.clone(memory_format=torch.contiguous_format)
                   for key, value in content["model"].items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    whole, image, drawn = path.read_bytes(), torch.randn(1, 3, 32, 32), random.Random(0)
    tokens = build_model("mae", str(path), 3)(image)
    for number in range(40):
        damaged = bytearray(whole)
        if form != "archive" or number % 4 == 0:
            del damaged[drawn.randrange(len(whole)):]
        else:
            for _ in range(1 if number % 2 else 20):
                # Anywhere, or in the list of members at the end.
                place = drawn.randrange(len(whole)) if number % 4 < 3 else -drawn.randrange(1, 5000)
                damaged[place] ^= drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            assert torch.equal(build_model("mae", str(path), 3)(image), tokens), number
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error), number


@pytest.mark.parametrize("changes, words", [
    ({"cls_token": torch.zeros(1, 1, 21_000)}, "it holds .* values, of about .* of a ViT of . blocks and width 21000"),
    ({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, "TypeError"), ({7: torch.zeros(1)}, "a dictionary of tensors"),
    ({"norm.weight": torch.zeros(48, dtype=torch.int64)}, "not floating-point: norm.weight"),
    ({"norm.weight": torch.zeros(48, dtype=torch.complex64)}, "not floating-point: norm.weight"),
    ({"patch_embed.proj.weight": torch.tensor(1.0)}, "IndexError"), ({"pos_embed": torch.zeros(1)}, "IndexError"),
])
def test_weights_that_cannot_be_are_one_line(tmp_path, changes, words):
    state = torch.load(GOLDEN / "mae/checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": state | changes}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"odd.pth is not a file of mae: .*{words}") as caught:
        build_model("mae", str(tmp_path / "odd.pth"), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [torch.ones(64, 1, dtype=torch.int64), torch.ones(1, 64, 1), torch.ones(16), None])
def test_lengths_of_a_projectors_rows_that_cannot_be(tmp_path, length):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(GOLDEN / "dino/checkpoint.pth", weights_only=True)
    name = "head.last_layer.weight_g"
    content["teacher"] = {key: value for key, value in content["teacher"].items() if key != name}
    content["teacher"] |= {} if length is None else {name: length}
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="last_layer.weight_g is not a number for each of its outputs"):
        build_model("dino", str(tmp_path / "odd.pth"), 3)


@pytest.mark.parametrize("method, file", [("deit", "checkpoint"), ("mocov3", "checkpoint"), ("beit", "checkpoint"),
                                          ("dino", "checkpoint_backbone"), ("mae", "checkpoint_full"),
                                          ("cae", "checkpoint"), ("ibot", "checkpoint_teacher")])
def test_safetensors_of_the_methods(tmp_path, method, file):
    """The state dictionary of an official file, without what lies around it."""
    nesting = __import__(f"models.{method}", fromlist=["NESTING"]).NESTING
    content = open_checkpoint(GOLDEN / method / f"{file}.pth")
    state = content[nesting] if nesting else content
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()},
              tmp_path / "model.safetensors")
    official, loaded = (build_model(method, str(path), 3) for path in (
        GOLDEN / method / f"{file}.pth", tmp_path / "model.safetensors"))
    image = torch.randn(1, 3, 2 * official.patch_size, 2 * official.patch_size)
    assert torch.equal(loaded(image), official(image)) and loaded.has_projector == official.has_projector
    assert loaded.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="--weights-key nowhere: it has ''"):
        build_model(method, str(tmp_path / "model.safetensors"), 3, weights_key="nowhere")


def test_safetensors_of_timm_and_under_a_key(tmp_path):
    made, image = build_model("timm/vit_tiny_patch16_224", "random", seed=5), torch.randn(1, 3, 64, 64)
    state, path = made.vit.state_dict(), tmp_path / "model.safetensors"
    save_file(state, path)
    assert torch.equal(build_model("timm/vit_tiny_patch16_224", str(path))(image), made(image))
    other = build_model("timm/vit_tiny_patch16_224", "random", seed=6).vit.state_dict()
    save_file({f"{name}.{key}": value.clone() for name, one in (("module", state), ("encoder", other))
               for key, value in one.items()}, path)
    with pytest.raises(CheckpointError, match="several of its state dictionaries fit: 'module', 'encoder'"):
        build_model("timm/vit_tiny_patch16_224", str(path))
    assert torch.equal(build_model("timm/vit_tiny_patch16_224", str(path), weights_key="module")(image), made(image))


def test_many_wrong_keys_are_one_short_line(tmp_path):
    state = torch.load(GOLDEN / "mae/checkpoint.pth", weights_only=True)["model"]
    odd = {f"blocks.{block}.{key}": torch.zeros(3) for block in range(3) for key in ("a", "b")}
    torch.save({"model": state | odd}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        build_model("mae", str(tmp_path / "odd.pth"), 3)
    message = str(caught.value).removeprefix(str(tmp_path / "odd.pth"))
    assert "unexpected keys: blocks.0.a, blocks.0.b, blocks.1.a and 3 more" in message and len(message) < 230
    assert message.endswith("which --weights-key can name; another --model or --num-heads may help")


def test_where_the_number_of_heads_comes_from(tmp_path):
    """As the log says it; a wrong number gives plausible figures."""
    vit = VisionTransformer(embed_dim=384, depth=1, num_heads=12, num_classes=0, img_size=32)
    state = {f"module.base_encoder.{key}": value for key, value in vit.state_dict().items()}
    for key, value in build_projector(384, 8, 4).state_dict().items():
        state[f"module.base_encoder.head.{key}"] = value
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "small.pth")
    torch.save({"arch": "vit_other", "state_dict": state}, tmp_path / "other.pth")
    save_file(state, tmp_path / "small.safetensors")
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    (tmp_path / "own.py").write_text(OWN)
    for model, weights, given, number, source in (
            ("mocov3", "small.pth", None, 12, "MoCo v3's architecture"), ("mocov3", "other.pth", None, 6, "width / 64"),
            ("mocov3", "small.safetensors", None, 12, "MoCo v3's architecture"),
            ("mocov3", "small.pth", 6, 6, "the given number"), ("mae", "mae.pth", None, 6, "width / 64"),
            ("mae", "mae.pth", 12, 12, "the given number"), ("dino", "random", None, 12, "its architecture"),
            ("timm/vit_tiny_patch16_224", "random", None, 3, "its architecture"),
            (f"{tmp_path}/own.py:with_heads", "random", None, 2, "its attribute num_heads"),
            (f"{tmp_path}/own.py:Own", "random", None, 1, "width / 64")):
        args, lines = run_arguments(model, weights if weights == "random" else str(tmp_path / weights), given), []
        encoder = models.load_encoder(args, torch.device("cpu"), lines.append)
        assert encoder.num_heads == number and f"{number} heads ({source}), " in lines[0]
    for model in ("dino", "timm/vit_tiny_patch16_224", f"{tmp_path}/own.py:Own"):
        with pytest.raises(CheckpointError, match="has [0-9]+ heads; leave --num-heads out"):
            build_model(model, "random", num_heads=8)


OWN = """
import torch
class Own(torch.nn.Module):
    class_token = False
    def __init__(self, weights):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 64, 16, 16)
    def forward(self, images):
        return self.embed(images).flatten(2).transpose(1, 2)
def with_heads(weights):
    network = Own(weights)
    network.num_heads = 2
    return network
"""


def run_arguments(model, weights, num_heads):
    return argparse.Namespace(model=model, weights=weights, num_heads=num_heads, seed=0, weights_key=None, debug=False,
                              compile=False)


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
