"""Encoders by name: one file per method, timm's models (timm_vit.py) and the user's own (own.py)."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn

from utils import UserError
from utils.distributed import local_main_first
from utils.results import digest
from utils.run import DTYPES

from .checkpoints import fetch, fetch_official, file_hash, one_line, open_checkpoint, state_dicts
from .encoder import CheckpointError, Encoder, encoder_signature

METHODS = ("deit", "mocov3", "dino", "beit", "mae", "cae", "ibot")
WITH_PROJECTOR = ("mocov3", "dino", "ibot")


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _load(name, weights, num_heads, bool(projector or decoder), weights_key, method_options)
    if num_heads not in (None, encoder.num_heads):
        raise CheckpointError(f"{name} has {encoder.num_heads} heads; leave --num-heads out")
    for key, parameter in encoder.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{key} of {encoder.weights} holds values that are not finite; use another file")
    if projector and not encoder.has_projector:
        raise CheckpointError(f"{encoder.weights} has no projector; the full checkpoints of "
                              f"{', '.join(WITH_PROJECTOR)} have one")
    if projector is False:
        encoder.projector = None
    if decoder and getattr(encoder, "decoder", None) is None:
        raise CheckpointError(f"{encoder.weights} has no decoder; mae_pretrain_vit_base_full.pth has one. "
                              "--encoder-only measures the encoder alone")
    return encoder


def _load(name: str, weights: str, num_heads: int | None, full: bool, weights_key: str | None,
          options: dict) -> Encoder:
    """full: of the official files the one with projector or decoder."""
    if ".py:" in name:
        return importlib.import_module(".own", __name__).load_own(name, weights)
    is_timm = name.startswith("timm/")
    if not is_timm and name not in METHODS:
        raise CheckpointError(f"unknown model {name!r}: take one of {', '.join(METHODS)}, timm/NAME or "
                              "path/to/FILE.py:FUNCTION")
    method = importlib.import_module(".timm_vit" if is_timm else f".{name}", __name__)
    if is_timm:
        options = options | {"name": name.removeprefix("timm/")}
    if weights == "random":
        encoder = method.random(**options)
        encoder.weights = "random"
    elif weights == "official" and is_timm:
        encoder = method.random(pretrained=True, **options)
        encoder.weights, encoder.sha256 = name, digest(encoder.vit.state_dict())
    else:
        if weights == "official":
            path = fetch_official(name, method.OFFICIAL, full)
        else:
            path = fetch(weights) if weights.startswith(("http://", "https://")) else Path(weights)
        options = options if is_timm else options | {"num_heads": num_heads}
        encoder = _from_file(name, path, method, weights_key, options)
        encoder.weights = path.name if weights == "official" else str(path)
        encoder.sha256 = file_hash(path)
    return encoder


def _from_file(name: str, path: Path, method: ModuleType, weights_key: str | None, options: dict) -> Encoder:
    """Methods' files are told apart by their official structure: other places are read only where weights_key names
    them, and the one of a safetensors file, which is one state dictionary."""
    checkpoint = open_checkpoint(path)
    states = state_dicts(checkpoint)
    try:
        if weights_key is not None or path.suffix == ".safetensors":
            state = states[weights_key or ""]
            checkpoint = {method.NESTING: state} if method.NESTING else state
        return method.from_checkpoint(checkpoint, **options)
    except Exception as error:  # keys or shapes that no method expects raise many kinds
        reason = f"missing keys: {error}" if isinstance(error, KeyError) else one_line(error)
        mend = "another --model, --num-heads or --weights-key may help"
        if any("embeddings." in key for state in states.values() for key in state):
            mend = "Hugging Face's transformers wrote it: --model FILE.py:FUNCTION takes it (README, own encoder)"
        raise CheckpointError(f"{path} is not a file of {name}: {reason}; it has weights at "
                              f"{', '.join(map(repr, states)) or 'no place'}; {mend}") from error


def load_encoder(args: argparse.Namespace, device: torch.device, log: Callable[[str], None], **options) -> Encoder:
    """build_model (options: its) for a script's arguments, on the device, with encoder.signature; the layers that
    autocast would convert in every call have weights of the run's precision. Logs what was loaded. Raises UserError."""
    try:
        with local_main_first():
            encoder = build_model(args.model, args.weights, args.num_heads, seed=args.seed,
                                  weights_key=args.weights_key, **options)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    size, patch = vars(args).get("image_size") or 0, encoder.patch_size
    if size % patch:
        raise UserError(f"--image-size {size} is not divisible by the patch size {patch}; "
                        f"use {max(1, round(size / patch)) * patch}")
    mean, std = (" ".join(f"{value:.3g}" for value in values.flatten()) for values in (encoder.mean, encoder.std))
    log(f"{args.model} from {encoder.weights}, SHA-256 {encoder.sha256}: {encoder.depth} blocks, width "
        f"{encoder.embed_dim}, {encoder.num_heads} heads, patch {patch}, {encoder.cls_from}, "
        f"{'with projector, ' if encoder.has_projector else ''}mean {mean}, std {std}")
    encoder.signature = encoder_signature(encoder)
    network = encoder.vit if hasattr(encoder, "vit") else encoder.network
    if hasattr(encoder, "vit"):
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(DTYPES[args.precision])
    encoder.to(device)
    if hasattr(encoder.projector, "shorten"):
        encoder.projector.shorten()
    if args.compile:
        # Blocks share one compilation, and dynamic shapes one for all sizes and batches.
        for block in getattr(network, "blocks", [network]):
            block.forward = torch.compile(block.forward, dynamic=True)
    return encoder


def choose_layers(words: Sequence[str] | None, depth: int) -> list[int]:
    """0-based blocks of an encoder of that depth: numbers, "last", "last4", "all", or None for those of the paper's
    segmentation, as shares of the depth (3 5 7 11 of 12). Raises UserError."""
    named = {"last": range(depth - 1, depth), "last4": range(max(0, depth - 4), depth), "all": range(depth)}
    if words is None:
        return sorted({max(1, round(share * depth)) - 1 for share in (4 / 12, 6 / 12, 8 / 12, 1)})
    if len(words) == 1 and words[0] in named:
        return list(named[words[0]])
    if not all(word.isdecimal() and int(word) < depth for word in words):
        raise UserError(f"--layers {' '.join(words)}: this encoder has blocks 0 to {depth - 1}; "
                        "or use last, last4, all")
    return list(dict.fromkeys(map(int, words)))
