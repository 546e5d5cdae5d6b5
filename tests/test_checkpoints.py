"""Checkpoint files: download, hashes, errors. A server on 127.0.0.1 replaces the official ones."""

import argparse
import hashlib
import os
import pickle
import random
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models import CheckpointError, build_model, load_encoder
from models.checkpoints import fetch, file_hash, open_checkpoint
from utils.distributed import init_processes

GOLDEN = Path(__file__).parent / "golden"


class Server(BaseHTTPRequestHandler):
    """Serves the golden checkpoints as METHOD/FILE; short/ ends after half the bytes, slow/ waits before it answers."""

    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        *mode, method, name = self.path.strip("/").split("/")
        path = GOLDEN / method / name
        if not path.is_file():
            return self.send_error(404)
        if mode == ["slow"]:
            time.sleep(2)
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content[:len(content) // 2] if mode == ["short"] else content)

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
    md5 = file_hash(GOLDEN / "mae/checkpoint.pth", "md5")[:6]
    for _ in range(2):
        path = fetch(f"{server}/mae/checkpoint.pth", "mae.pth", md5)
    assert path.read_bytes() == (GOLDEN / "mae/checkpoint.pth").read_bytes()
    assert cached(tmp_path) == ["mae.pth"] and len(Server.requests) == 1
    assert "100%" in capfd.readouterr().err
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=f"its MD5 begins with .*, published is {md5}; delete it"):
        fetch(f"{server}/mae/checkpoint.pth", "mae.pth", md5)


def test_official_weights_end_to_end(server, monkeypatch):
    """--weights official with the published addresses and hashes replaced by those of the golden files."""
    for method, role, file in (("deit", "backbone", "checkpoint.pth"), ("dino", "backbone", "checkpoint_backbone.pth"),
                               ("dino", "full", "checkpoint.pth"), ("mae", "backbone", "checkpoint.pth")):
        module = __import__(f"models.{method}", fromlist=["OFFICIAL"])
        entry = dict(module.OFFICIAL[role], url=f"{server}/{method}/{file}", file=f"{method}_{role}.pth",
                     md5=file_hash(GOLDEN / method / file, "md5")[:6])
        monkeypatch.setitem(module.OFFICIAL, role, entry)
    assert build_model("deit", num_heads=3).weights == "deit_backbone.pth"
    assert not build_model("dino", num_heads=3).has_projector
    assert build_model("dino", num_heads=3, projector=True).has_projector
    encoder = build_model("mae", num_heads=3)
    assert encoder.sha256 == hashlib.sha256((GOLDEN / "mae/checkpoint.pth").read_bytes()).hexdigest()


def test_hash_in_the_file_name_is_torch_hubs_convention(server, tmp_path, monkeypatch):
    digits = file_hash(GOLDEN / "mae/checkpoint.pth")[:8]
    (tmp_path / "golden/mae").mkdir(parents=True)
    for name in (f"vit-{digits}.pth", "vit-00000000.pth"):
        (tmp_path / "golden/mae" / name).write_bytes((GOLDEN / "mae/checkpoint.pth").read_bytes())
    monkeypatch.setattr(f"{__name__}.GOLDEN", tmp_path / "golden")
    assert fetch(f"{server}/mae/vit-{digits}.pth").is_file()
    with pytest.raises(CheckpointError, match="published is 00000000"):
        fetch(f"{server}/mae/vit-00000000.pth")


@pytest.mark.parametrize("file", ["ibot/checkpoint.pth", "dino/checkpoint_backbone.pth"])
def test_a_download_that_ended_early_is_refused(server, file):
    with pytest.raises(CheckpointError, match="is truncated or no PyTorch.* delete it and download it again"):
        build_model(file.split("/")[0], f"{server}/short/{file}", num_heads=3)


def test_no_such_file_and_no_network(server, tmp_path):
    for url, reason in ((f"{server}/mae/nothing.pth", "HTTP Error 404"), ("http://127.0.0.1:9/a.pth", "refused")):
        with pytest.raises(CheckpointError, match=f"could not be downloaded .*{reason}.* --weights PATH") as caught:
            build_model("mae", url)
        assert "\n" not in str(caught.value)
    assert not [name for name in cached(tmp_path) if name.endswith(".pth")]


def load_from(url):
    encoder = load_encoder(run_arguments("mae", url, 3), init_processes("cpu"), print)
    assert encoder.weights.endswith("_checkpoint.pth")


def test_one_download_for_all_processes(server, launch):
    launch(partial(load_from, f"{server}/slow/mae/checkpoint.pth"), [], processes=2)
    assert len(Server.requests) == 1


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


@pytest.mark.parametrize("kind", ["folder", "text", "zip", "safetensors"])
def test_files_that_are_no_checkpoints_are_one_line(tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    else:
        path.write_text("root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1::/:/bin/false\n")
    words = "there is no weights file" if kind == "folder" else "truncated or no PyTorch checkpoint"
    with pytest.raises(CheckpointError, match=words) as caught:
        build_model("mae", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["archive", "legacy", "safetensors"])
def test_damaged_files_are_one_line_or_the_same_weights(tmp_path, form):
    """Of 20 that are cut off, and, of archives, which alone have checksums, 20 with another byte."""
    content = torch.load(GOLDEN / "mae/checkpoint.pth", weights_only=True)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file({key: value.clone(memory_format=torch.contiguous_format)
                   for key, value in content["model"].items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    whole, image, drawn = path.read_bytes(), torch.randn(1, 3, 32, 32), random.Random(0)
    tokens = build_model("mae", str(path), 3)(image)
    for number in range(40 if form == "archive" else 20):
        damaged, place = bytearray(whole), drawn.randrange(len(whole))
        if number < 20:
            del damaged[place:]
        else:
            damaged[place] ^= drawn.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert torch.equal(build_model("mae", str(path), 3)(image), tokens), number
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error), number


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
    with pytest.raises(CheckpointError, match="missing keys: 'nowhere'; it has weights at ''"):
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


def run_arguments(model, weights="random", num_heads=None, **others):
    return argparse.Namespace(model=model, weights=weights, num_heads=num_heads, seed=0, weights_key=None,
                              precision="fp32", compile=False, **others)


FILES = {method: f"{method}/checkpoint" for method in models.METHODS} | {"ibot": "ibot/checkpoint_teacher"}


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


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_a_file_of_transformers_says_what_it_is(tmp_path, prefix):
    keys = ("embeddings.cls_token", "encoder.layer.0.norm1.weight", "layernorm.weight")
    save_file({prefix + key: torch.zeros(1, 1, 64) for key in keys}, tmp_path / "model.safetensors")
    for model in ("timm/vit_small_patch14_dinov2", "dino"):
        with pytest.raises(CheckpointError, match="Hugging Face's transformers wrote it: --model FILE.py:FUNCTION"):
            build_model(model, str(tmp_path / "model.safetensors"))


def test_a_projector_a_decoder_or_heads_that_are_not_there():
    for method, file in (("dino", "checkpoint_backbone.pth"), ("mae", "checkpoint.pth")):
        with pytest.raises(CheckpointError, match=f"{file} has no projector; the full checkpoints of mocov3, dino, "):
            build_model(method, str(GOLDEN / method / file), num_heads=3, projector=True)
    with pytest.raises(CheckpointError, match="has no decoder; mae_pretrain_vit_base_full.pth has one"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"), num_heads=3, decoder=True)
    with pytest.raises(CheckpointError, match="width 48 is not a multiple of 64, .*; give --num-heads"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"))
    with pytest.raises(CheckpointError, match="should be divisible by num_heads"):
        build_model("mae", str(GOLDEN / "mae/checkpoint.pth"), num_heads=7)
    for model in ("dino", "timm/vit_tiny_patch16_224"):
        with pytest.raises(CheckpointError, match="has [0-9]+ heads; leave --num-heads out"):
            build_model(model, "random", num_heads=8)


def test_unknown_model():
    with pytest.raises(CheckpointError, match="unknown model 'dinov9': take one of deit, .*, timm/NAME or"):
        build_model("dinov9")
