"""Encoders by name: one file per method, timm's models (timm_vit.py) and the user's own (own.py)."""

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from utils import UserError
from utils.distributed import local_main_first
from utils.run import autocast

from . import own
from .checkpoints import SAFETENSORS, as_official, fetch, file_hash, open_checkpoint, state_dicts
from .encoder import CheckpointError, Encoder
from .features import encoder_identity

METHODS = ("deit", "mocov3", "dino", "beit", "mae", "cae", "ibot")
WITH_PROJECTOR = ("mocov3", "dino", "ibot")
# The blocks whose features the paper's segmentation uses, as shares of the depth.
DEPTH_SHARES = (4 / 12, 6 / 12, 8 / 12, 1)

__all__ = ["METHODS", "WITH_PROJECTOR", "CheckpointError", "Encoder", "build_model", "choose_layers", "load_encoder"]


def build_model(name: str, weights: str = "official", num_heads: int | None = None, *, projector: bool | None = None,
                decoder: bool = False, seed: int = 0, weights_key: str | None = None, **method_options) -> Encoder:
    """A frozen encoder: evaluation mode, requires_grad False, float32, on the CPU.

    name: one of METHODS, timm/NAME, or path/to/file.py:function (models/own.py). weights: "official" (the full file
    where projector or decoder is True), "random" (untrained ViT-B/16 of the method, from the seed), a path or a URL.
    num_heads: by default the file's, else width / 64. projector, decoder (MAE): True = required; projector False =
    dropped, None = kept where the file has one. weights_key: which weights of a file (as checkpoints.state_dicts names
    them; None: the only ones that fit). method_options: of the method's from_checkpoint or random. encoder.weights and
    encoder.sha256 say what was loaded. Raises CheckpointError.
    """
    method = None
    if name.startswith("timm/"):
        method = importlib.import_module(".timm_vit", __name__)
        method_options["name"] = name.removeprefix("timm/")
    elif name in METHODS:
        method = importlib.import_module(f".{name}", __name__)
    elif ".py:" not in name:
        from .timm_vit import suggestion
        raise CheckpointError(f"unknown model {name!r}: take one of {', '.join(METHODS)}, FILE.py:FUNCTION or timm/NAME"
                              f"{suggestion(name, METHODS)}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method is None:
            encoder = own.load_own(name, weights)
            encoder.weights, encoder.sha256 = weights, file_hash(Path(name.rpartition(":")[0]))
        elif weights == "random" and not hasattr(method, "random"):
            raise CheckpointError(f"{name} has no untrained form: there is no function random in models/{name}.py")
        elif weights == "random":
            encoder = method.random(**method_options)
            encoder.weights = "random"
        elif weights == "official" and name.startswith("timm/"):
            encoder = method.pretrained(**method_options)
            encoder.weights = name
        else:
            path = _weights_file(name, weights, method, full=bool(projector or decoder))
            encoder = _from_file(name, method, path, num_heads, weights_key, method_options)
            encoder.weights, encoder.sha256 = str(path) if weights != "official" else path.name, file_hash(path)

    if num_heads not in (None, encoder.num_heads):
        raise CheckpointError(f"{name} has {encoder.num_heads} heads; leave --num-heads out")
    if num_heads:
        encoder.heads_from = "the given number"
    elif method is not None and (weights == "random" or name.startswith("timm/")):
        encoder.heads_from = "its architecture"
    for key, parameter in encoder.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{key} of {encoder.weights} holds values that are not finite; use another file")
    encoder.method = name.rpartition(":")[0] if method is None else method.__file__
    if projector and not encoder.has_projector:
        raise CheckpointError(f"{encoder.weights} has no projector; give the full checkpoint of the method"
                              if name in WITH_PROJECTOR else
                              f"{name} has no projector; only {', '.join(WITH_PROJECTOR)} have one")
    if projector is False:
        encoder.projector = None
    if decoder and getattr(encoder, "decoder", None) is None:
        raise CheckpointError(f"{encoder.weights} has no decoder; mae_pretrain_vit_base_full.pth has one. "
                              "--encoder-only measures the encoder alone")
    return encoder


def choose_layers(words: Sequence[str] | None, depth: int) -> list[int]:
    """0-based blocks of an encoder of that depth: numbers, "last", "last4", "all", or None for the paper's shares of
    the depth (3 5 7 11 of 12). Raises UserError."""
    named = {"last": range(depth - 1, depth), "last4": range(max(0, depth - 4), depth), "all": range(depth)}
    if not depth:
        raise UserError("this network has no attribute blocks, and depth is not given: its layers cannot be looked at")
    if words is None:
        return sorted({round(share * depth) - 1 for share in DEPTH_SHARES})
    if len(words) == 1 and words[0] in named:
        return list(named[words[0]])
    if not all(word.isdecimal() and int(word) < depth for word in words):
        raise UserError(f"--layers {' '.join(words)}: this encoder has blocks 0 to {depth - 1}; "
                        "or use last, last4, all")
    return list(dict.fromkeys(map(int, words)))


def load_encoder(args: argparse.Namespace, device: torch.device, log: Callable[[str], None], **options) -> Encoder:
    """build_model (options: its) for a script's arguments, on the device. Logs what was loaded. Raises UserError."""
    try:
        with local_main_first():
            encoder = build_model(args.model, args.weights, args.num_heads, seed=args.seed,
                                  weights_key=args.weights_key, **options)
    except CheckpointError as error:
        if args.debug:
            raise
        raise UserError(str(error)) from None
    size, patch = vars(args).get("image_size") or 0, encoder.patch_size
    if size % patch:
        raise UserError(f"--image-size {size} is not divisible by the patch size {patch}; "
                        f"use {max(1, round(size / patch)) * patch}")
    what = [f"{encoder.depth} blocks", f"width {encoder.embed_dim}",
            f"{encoder.num_heads} heads ({encoder.heads_from})", f"patch {patch}", encoder.cls_from]
    if encoder.has_projector:
        what.append("with projector")
    if any("relative_position_bias_table" in name for name, _ in encoder.named_parameters()):
        what.append("relative position bias, which flash attention does not take")
    digest = f", SHA-256 {encoder.sha256}" if encoder.sha256 else ""
    log(f"{args.model} from {encoder.weights}{digest}: {', '.join(what)}")
    encoder.to(device)
    if args.compile:
        encoder_identity(encoder)  # before it runs: a timm model fits its tables to the images
        compile_blocks(encoder, size or 14 * patch, args.precision, log)
    return encoder


def compile_blocks(encoder: Encoder, size: int, precision: str, log: Callable[[str], None]) -> None:
    """torch.compile for every block, or for the whole of a network without blocks. Logs what it cost and what it gave
    at eight images of that size. Raises UserError where it fails."""
    device = encoder.mean.device
    images = torch.zeros(8, 3, size, size, device=device)

    def seconds():
        start = time.monotonic()
        with torch.inference_mode(), autocast(device, precision):
            encoder(images).sum().item()  # waits for the device
        return time.monotonic() - start

    eager = [seconds() for _ in range(2)][1]
    network = getattr(encoder, "vit", None) or encoder.network
    # Blocks share one compilation, and dynamic shapes one for all sizes and batches.
    for block in getattr(network, "blocks", None) or [network]:
        block.forward = torch.compile(block.forward, dynamic=True)
    try:
        first = seconds()
    except Exception as error:  # of the compiler, or of a C++ compiler that is not there
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"--compile: {reason}; leave --compile out") from error
    log(f"--compile: the first call took {first:.1f} s; a batch of 8 images of {size} x {size} took "
        f"{1000 * eager:.1f} ms before and takes {1000 * seconds():.1f} ms now")


def _from_file(name: str, method, path: Path, num_heads: int | None, weights_key: str | None,
               options: dict) -> Encoder:
    """The encoder in a file. Methods' files are told apart by their official structure: other places are read only
    where weights_key names them."""
    checkpoint = open_checkpoint(path)
    try:
        if name.startswith("timm/"):
            return method.from_checkpoint(checkpoint, weights_key=weights_key, **options)
        if weights_key is not None or path.suffix == SAFETENSORS:
            # A safetensors file is one state dictionary.
            checkpoint = as_official(checkpoint, weights_key or "", method.NESTING)
        return method.from_checkpoint(checkpoint, num_heads=num_heads, **options)
    except Exception as error:  # keys or shapes that no method expects raise many kinds
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        places = ", ".join(filter(None, state_dicts(checkpoint)))
        hint = f"; it has weights at {places}, which --weights-key can name" if places and not weights_key else ""
        other = "--model or --num-heads" if name in METHODS else "--model"
        raise CheckpointError(f"{path} is not a file of {name}: {kind}{' '.join(str(error).split())[:400]}{hint}; "
                              f"another {other} may help") from error


def _weights_file(name: str, weights: str, method, full: bool) -> Path:
    if weights.startswith(("http://", "https://")):
        return fetch(weights)
    if weights != "official":
        return Path(weights)
    if not hasattr(method, "OFFICIAL"):
        raise CheckpointError(f"models/{name}.py names no official file; give --weights PATH")
    entry = method.OFFICIAL["full" if full and "full" in method.OFFICIAL else "backbone"]
    if "url" not in entry:
        raise CheckpointError(f"{name}: scripts cannot download the official file {entry['file']} from Google Drive; "
                              f"download it from {entry['where']} and give --weights PATH")
    published = {key: entry[key] for key in ("sha256", "md5") if key in entry}
    return fetch(entry["url"], entry.get("file") or entry["url"].rsplit("/", 1)[-1], published)
