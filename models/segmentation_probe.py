"""The linear probe of segmentation: encoder and head, a step of training, the choice among several heads.

Protocol: paper, sections 4.1 and 4.2, appendix A.4, numbers as in its authors' configurations.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from utils.distributed import all_reduce
from utils.results import check_same
from utils.run import DTYPES, autocast
from utils.storage import load

from .encoder import Encoder
from .probes import BatchNorm
from .segmentation_head import LinearHead, PatchSegmenter, strip_loss_and_gradient, upsampled_cross_entropy


class Segmenter(PatchSegmenter):
    """Frozen encoder and trainable head: normalised images [B, 3, h, w] -> logits float32 [B, K, h, w], any h and w.

    norm: the encoder's final norm on every block's tokens; batch_norm: their channels normalised over all processes'
    batches, without affine parameters, which the head's own weights make needless.
    """

    def __init__(self, encoder: Encoder, head: LinearHead, layers: Sequence[int], precision: str, norm: bool = False,
                 batch_norm: bool = False):
        super().__init__(encoder)
        self.head, self.layers, self.precision, self.norm = head, layers, precision, norm
        self.batch_norm = BatchNorm(1, len(layers) * encoder.embed_dim, eps=1e-5) if batch_norm else None

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, h, w], divisible by the patch size -> the head's input, a list of [B, D, h/p, w/p]; no gradients."""
        with torch.inference_mode(), autocast(images.device, self.precision):
            blocks = self.encoder.get_intermediate_layers(images, n=self.layers, reshape=True, norm=self.norm)
        if self.batch_norm is None:
            return blocks
        tokens = torch.cat(blocks, dim=1).float().movedim(1, -1)
        with torch.no_grad():
            return [self.batch_norm(tokens.flatten(0, 2)[None])[0].view_as(tokens).movedim(-1, 1)]

    def patch_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w], divisible by the patch size -> [B, K, h/p, w/p]; gradients reach the head only."""
        return self.head(self.features(images))


class LinearProbe:
    """A head for every pair of a learning rate and a weight decay, trained on the same features from the same weights.

    segmenter: whose head is the chosen one, until one is chosen the first. decay_bias: whether weight decay takes the
    biases too. compiled: compile the loss.
    """

    def __init__(self, segmenter: Segmenter, rates: Sequence[float], decays: Sequence[float], decay_bias: bool,
                 seed: int, compiled: bool = False):
        self.segmenter, self.pairs = segmenter, list(itertools.product(rates, decays))
        self.names = [f"lr {lr:g}, weight decay {decay:g}" for lr, decay in self.pairs]
        first, device, groups = segmenter.head, segmenter.encoder.mean.device, []
        self.heads = nn.ModuleList(
            LinearHead(first.in_channels, first.out_channels, torch.Generator().manual_seed(seed))
            for _ in self.pairs).to(device)
        for head, (lr, decay) in zip(self.heads, self.pairs, strict=True):
            for parameter, amount in ((head.weight, decay), (head.bias, decay * decay_bias)):
                groups.append({"params": [parameter], "lr": lr, "initial_lr": lr, "weight_decay": amount})
        self.optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
        segmenter.head = self.heads[0]
        self.loss_dtype = DTYPES[segmenter.precision] if device.type == "cuda" else torch.float32
        self.strip = torch.compile(strip_loss_and_gradient, dynamic=True) if compiled else strip_loss_and_gradient

    def step(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int,
             schedule: Callable[[float], float]) -> torch.Tensor:
        """One update of all heads from this process's part of a global batch of batch_size crops. schedule: a head's
        learning rate -> the one of this step. Returns this part's share of the losses, [heads]."""
        for group in self.optimizer.param_groups:
            group["lr"] = schedule(group["initial_lr"])
        self.optimizer.zero_grad()
        features, losses = self.segmenter.features(images), []
        # Divided by the pixels of the global batch, so that the processes' losses and gradients add up.
        pixels = batch_size * labels.shape[1] * labels.shape[2]
        for head in self.heads:
            loss = upsampled_cross_entropy(head(features), labels, total_pixels=pixels, dtype=self.loss_dtype,
                                           strip=self.strip)
            loss.backward()
            losses.append(loss.detach())
            for parameter in head.parameters():
                all_reduce(parameter.grad)
        self.optimizer.step()
        return torch.stack(losses)

    def state(self) -> dict:
        """What a checkpoint holds: "head" is the segmenter's."""
        norm = self.segmenter.batch_norm
        return {"head": self.segmenter.head.state_dict(), "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state_dict(), "batch_norm": norm and norm.state_dict()}

    def load_state(self, state: Mapping) -> None:
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.segmenter.batch_norm is not None:
            self.segmenter.batch_norm.load_state_dict(state["batch_norm"])


def linear_learning_rate(iteration: int, total: int, warmup: int, lr: float, warmup_ratio: float = 1e-6) -> float:
    """Linear to 0 over total iterations, times a linear rise from warmup_ratio over the first warmup ones."""
    regular = lr * (1 - iteration / total)
    return regular * (1 - (1 - iteration / warmup) * (1 - warmup_ratio)) if iteration < warmup else regular


def load_segmenter(path: Path, encoder: Encoder, names: Sequence[str], precision: str) -> tuple[Segmenter, dict]:
    """(segmenter with the head of a checkpoint of segment.py, what a results line says of it). names: of the classes.
    Raises UserError for the head of another encoder or of other classes."""
    keys = ("head", "batch_norm", "class_names", "settings", "iteration")
    checkpoint = load(path, "a checkpoint of segment.py", keys, "--evaluate ")
    settings = checkpoint["settings"]
    check_same(path, {"the encoder": settings["the encoder"], "the list of classes": checkpoint["class_names"]},
               {"the encoder": encoder.signature, "the list of classes": list(names)}, "--evaluate",
               f"use the encoder and the classes it was trained on, {settings['model']} and {settings['dataset']}")
    head = LinearHead(len(settings["layers"]) * encoder.embed_dim, len(names))
    segmenter = Segmenter(encoder, head, settings["layers"], precision, settings["norm"], settings["batch_norm"])
    head.load_state_dict(checkpoint["head"])
    if segmenter.batch_norm is not None:
        segmenter.batch_norm.load_state_dict(checkpoint["batch_norm"])
    about = {name: settings[name] for name in ("layers", "norm", "batch_norm")}
    return segmenter.to(encoder.mean.device), about | {"iterations": checkpoint["iteration"]}
