"""The linear probe of segmentation: encoder and head, training, checkpoints, the choice among several heads.

Protocol: paper, sections 4.1 and 4.2, appendix A.4, numbers as in its authors' configurations.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from utils import UserError
from utils.distributed import all_reduce
from utils.ending import Checkpoint, ending, uninterrupted
from utils.provenance import check_same
from utils.run import Progress, autocast
from utils.storage import load_checked

from .encoder import Encoder
from .features import encoder_identity
from .probes import BatchNorm
from .segmentation_head import LinearHead, PatchSegmenter, upsampled_cross_entropy

# The study decays the bias too, but not in its configurations of these methods.
NO_BIAS_DECAY = ("mae", "beit", "cae")
CHECKPOINT, KEYS = "a checkpoint of segment.py", ("head", "heads", "optimizer", "batch_norm", "class_names")
# Heads in one pass over the test images, whose logits at full resolution exist together.
HEADS_TOGETHER = 8
HEAD_INPUT = ("layers", "norm", "batch_norm")
CHOSEN_BY = {"test": "the test images", "held-out": "a held-out tenth of the training images"}


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


def linear_learning_rate(iteration: int, lr: float, total: int, warmup: int, warmup_ratio: float = 1e-6) -> float:
    """Linear to 0 over total iterations, times a linear rise from warmup_ratio over the first warmup ones."""
    regular = lr * (1 - iteration / total)
    return regular * (1 - (1 - iteration / warmup) * (1 - warmup_ratio)) if iteration < warmup else regular


def summary(metrics: dict) -> str:
    return (f"mIoU {metrics['mIoU']:.2f}, mAcc {metrics['mAcc']:.2f}, aAcc {metrics['aAcc']:.2f} "
            f"({metrics['num_images']} images)")


def train(segmenter: Segmenter, heads: Sequence[LinearHead], names: Sequence[str],
          optimizer: torch.optim.Optimizer, batches: Iterator, iterations: range, batch_size: int, warmup: int,
          save: Callable[[int], None], save_every: int, test: Callable[[], list[dict]], test_every: int | None,
          log: Callable[[str], None]) -> None:
    """Trains all heads on the same features, from iterations.start to the end of the schedule, iterations.stop.

    names: of the heads, for the log. The optimiser's groups hold their base rate as initial_lr. save(iterations done)
    is called every save_every iterations, at the end and when a signal stops the run, test() of every head every
    test_every before the end. Raises UserError when a loss is not finite.
    """
    progress, losses = Progress(len(iterations), "training", "iterations"), []
    segmenter.train()
    for iteration, (images, labels) in zip(iterations, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = linear_learning_rate(iteration, group["initial_lr"], iterations.stop, warmup)
        with uninterrupted():
            optimizer.zero_grad()
            features, pixels = segmenter.features(images), batch_size * labels.shape[1] * labels.shape[2]
            for head in heads:
                loss = upsampled_cross_entropy(head(features), labels, total_pixels=pixels)
                loss.backward()
                losses.append(loss.detach())
            # The loss is divided by the pixels of the global batch, so that the processes' gradients add up.
            for head in heads:
                for parameter in head.parameters():
                    all_reduce(parameter.grad)
            optimizer.step()
            done = iteration + 1
            ending.save = partial(save, done)
        if len(losses) == 50 * len(heads) or done == iterations.stop:
            means = all_reduce(torch.stack(losses).view(-1, len(heads)).mean(0)).tolist()
            shown = [f"{mean:.4f} ({name})" for mean, name in zip(means, names, strict=True)]
            log(f"iteration {done}/{iterations.stop}: loss {', '.join(shown)}; learning rates at "
                f"{optimizer.param_groups[0]['lr'] / optimizer.param_groups[0]['initial_lr']:.3g} of these")
            if not np.isfinite(means).all():
                raise UserError(f"the loss is {shown[int(np.isfinite(means).argmin())]} near iteration {done}; "
                                "lower --lr, or use --precision fp32")
            losses = []
        progress.update()
        if done % save_every == 0 or done == iterations.stop:
            save(done)
        if test_every and done % test_every == 0 and done < iterations.stop:
            for name, metrics in zip(names, test(), strict=True):
                log(f"after iteration {done}: {summary(metrics)}, {name}")
            segmenter.train()
    ending.save = None


def make_heads(width: int, num_classes: int, rates: Sequence[float], decays: Sequence[float], decay_bias: bool,
               seed: int, device: torch.device) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    """A new head for every pair of a learning rate and a weight decay, all with the same weights, and one optimiser for
    them (appendix A.4)."""
    heads, groups = nn.ModuleList(), []
    for lr in rates:
        for decay in decays:
            head = LinearHead(width, num_classes, torch.Generator().manual_seed(seed)).to(device)
            heads.append(head)
            for parameter, amount in ((head.weight, decay), (head.bias, decay * decay_bias)):
                groups.append({"params": [parameter], "lr": lr, "initial_lr": lr, "weight_decay": amount})
    return heads, torch.optim.AdamW(groups, fused=device.type == "cuda")


def metrics_of_heads(segmenter: Segmenter, heads: nn.ModuleList, test: Callable[..., list[dict]]) -> list[dict]:
    """The metrics of each head, HEADS_TOGETHER in one pass of the encoder. test: of a segmenter and num_heads."""
    found = []
    for first in range(0, len(heads), HEADS_TOGETHER):
        some = heads[first:first + HEADS_TOGETHER]
        joint = LinearHead(some[0].in_channels, sum(head.out_channels for head in some))
        joint.weight.data = torch.cat([head.weight.data for head in some])
        joint.bias.data = torch.cat([head.bias.data for head in some])
        together = Segmenter(segmenter.encoder, joint, segmenter.layers, segmenter.precision, segmenter.norm)
        together.batch_norm = segmenter.batch_norm
        found += test(together, num_heads=len(some))
    return found


def choose_head(segmenter: Segmenter, heads: Sequence[LinearHead], pairs: Sequence[tuple[float, float]],
                names: Sequence[str], test: Callable[[], list[dict]], select: str, log: Callable[[str], None]) -> dict:
    """Gives the segmenter the head of the best mIoU. pairs, names: (learning rate, weight decay) of each head, and in
    words. Returns those of the chosen one and, where there are several, the mIoU of each, for the results line."""
    grid = [{"lr": lr, "weight_decay": decay} for lr, decay in pairs]
    if len(heads) == 1:
        return grid[0]
    for name, entry, metrics in zip(names, grid, test(), strict=True):
        log(f"{name}: {summary(metrics)}")
        entry["mIoU"] = float(np.nan_to_num(metrics["mIoU"]))
    best = int(np.argmax([entry["mIoU"] for entry in grid]))
    segmenter.head = heads[best]
    log(f"{names[best]}: chosen on {CHOSEN_BY[select]}")
    return {"lr": grid[best]["lr"], "weight_decay": grid[best]["weight_decay"], "heads": grid}


def restore(checkpoint: dict, segmenter: Segmenter) -> None:
    segmenter.head.load_state_dict(checkpoint["head"])
    if segmenter.batch_norm is not None:
        segmenter.batch_norm.load_state_dict(checkpoint["batch_norm"])


def load_segmenter(path: Path, encoder: Encoder, names: Sequence[str], precision: str) -> tuple[Segmenter, dict]:
    """The head of a checkpoint, for --evaluate: what linear_probe returns. names: of the classes. Raises UserError for
    the head of another encoder or of other classes."""
    checkpoint = load_checked(path, CHECKPOINT, (*KEYS, "settings", "iteration"), "--evaluate ")
    settings, identity = checkpoint["settings"], encoder_identity(encoder)
    saved = {name: settings.get(name) for name in identity}
    check_same(path, saved | {"the list of classes": checkpoint["class_names"]},
               identity | {"the list of classes": list(names)}, "--evaluate",
               f"use the encoder and the classes it was trained on, {settings['model']} and {settings['dataset']}")
    head = LinearHead(len(settings["layers"]) * encoder.embed_dim, len(names))
    segmenter = Segmenter(encoder, head, settings["layers"], precision, settings["norm"], settings["batch_norm"])
    restore(checkpoint, segmenter)
    about = {"probe": "linear", "iterations": checkpoint["iteration"]} | {name: settings[name] for name in HEAD_INPUT}
    return segmenter.to(encoder.mean.device), about


def linear_probe(encoder: Encoder, batches: Callable[[range], Iterator], names: Sequence[str], settings: dict,
                 test: Callable[..., list[dict]], choose: Callable[..., list[dict]], path: Path, resume: bool,
                 save_every: int, test_every: int | None, log: Callable[[str], None]) -> tuple[Segmenter, dict]:
    """Trains a head for every pair of a learning rate and a weight decay, and chooses one.

    batches: training batches of a range of iterations. settings: the arguments by name, and the identities of encoder
    and training set, all of which must be those of a checkpoint that is resumed. test, choose: segmenter and num_heads
    -> metrics of each head, on the test images and on those that choose. path: of the checkpoint. Returns a segmenter
    with the chosen head, and what a results line says of it. Raises UserError.
    """
    device, rates, decays = encoder.mean.device, settings["lr"], settings["weight_decay"]
    heads, optimizer = make_heads(len(settings["layers"]) * encoder.embed_dim, len(names), rates, decays,
                                  settings["model"] not in NO_BIAS_DECAY, settings["seed"], device)
    segmenter = Segmenter(encoder, heads[0], settings["layers"], settings["precision"], settings["norm"],
                          settings["batch_norm"]).to(device)
    total, pairs = settings["iterations"], list(itertools.product(rates, decays))
    labels = [f"lr {lr:g}, weight decay {decay:g}, seed {settings['seed']}" for lr, decay in pairs]
    checkpoint = Checkpoint(path, CHECKPOINT, "iteration", settings)
    saved = checkpoint.load(resume, KEYS, log)
    if saved:
        restore(saved, segmenter)
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
    done = saved.get("iteration", 0)

    def save(done):
        """"head" is the segmenter's."""
        checkpoint.save(done, {
            "head": segmenter.head.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict(),
            "batch_norm": segmenter.batch_norm and segmenter.batch_norm.state_dict(), "class_names": list(names)})

    of_heads = partial(metrics_of_heads, segmenter, heads)
    if done < total:
        train(segmenter, heads, labels, optimizer, batches(range(done, total)), range(done, total),
              settings["batch_size"], settings["warmup_iterations"], save, save_every, partial(of_heads, test),
              test_every, log)
    line = choose_head(segmenter, heads, pairs, labels, partial(of_heads, choose), settings["select"], log)
    if len(heads) > 1:
        save(total)
    checkpoint.close()
    return segmenter, line | {"probe": "linear", "iterations": total} | {name: settings[name] for name in HEAD_INPUT}
