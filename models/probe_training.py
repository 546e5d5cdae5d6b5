"""The recipes of probing, published and ours, and K heads of one kind in training: steps, measures, what is chosen."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from utils import UserError
from utils.distributed import all_reduce, world_size

from .features import Features
from .probes import HeadSGD, initialise


class Recipe(NamedTuple):
    """How a probe is trained. Warm-up is a share of all epochs."""
    rates: tuple[float, ...]  # learning rates; a published one is for batch_size, in proportion at others
    batch_size: int
    warmup: float = 0.0
    minimum_lr: float = 0.0
    trust_coefficient: float | None = None  # LARS in place of SGD
    batch_norm: bool = False  # before the linear head
    every_step: bool = False  # the schedule moves every step, and incomplete batches are dropped; else every epoch
    ours: bool = False  # for training sets of any size: see batch_and_epochs
    attention_factor: float = 1.0  # of the learning rate of what attention scores are made of

    def learning_rate(self, rate: float, epoch: float, epochs: int) -> float:
        """After so many epochs, or a fraction: linear from 0 over the warm-up, then half a cosine to the minimum."""
        epoch, warmup = epoch if self.every_step else int(epoch), self.warmup * epochs
        if epoch < warmup:
            return rate * epoch / warmup
        cosine = math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
        return self.minimum_lr + (rate - self.minimum_lr) * 0.5 * (1 + cosine)


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
# Ours: measured on 162 and 421 training patches of CUB and on synthetic images. An attentive head whose scores learn no
# faster than the rest hardly attends before it has fitted a small training set: 93% in place of 96% of ten species.
RECIPES = {
    "parts": {"linear": Recipe((0.4,), 1024), "attentive": Recipe((0.04,), 1024)},
    "images": {"linear": Recipe((6.4,), 16384, 1 / 9, 0.0, 0.001, True, True),
               "attentive": Recipe((0.4,), 8192, 1 / 9, 1e-6, every_step=True)},
    "ours": {"linear": Recipe(RATES, 1024, batch_norm=True, every_step=True, ours=True),
             "attentive": Recipe(RATES[:6], 1024, every_step=True, ours=True, attention_factor=30.0)},
}
PUBLISHED_EPOCHS = 90
# Of our recipe: epochs, and bounds on the steps, of which a smaller training set makes more epochs.
EPOCHS, LEAST_STEPS, MOST_STEPS = 30, 480, 12_500


def batch_and_epochs(recipe: Recipe, num_train: int, batch_size: int | None = None) -> tuple[int, int]:
    """Batch size (unless it is given) and epochs of a recipe for that many training patches. Published: the whole set
    where the batch is larger. Ours: a sixteenth of the set, up to 1,024, but 8 where there are as many, which batch
    normalisation needs; 30 epochs, more where these are fewer than 480 steps, fewer where they are more than 12,500."""
    if not recipe.ours:
        return min(batch_size or recipe.batch_size, num_train), PUBLISHED_EPOCHS
    size = min(batch_size or min(recipe.batch_size, max(num_train // 16, 8)), num_train)
    steps = num_train // size
    return size, max(1, min(max(EPOCHS, math.ceil(LEAST_STEPS / steps)), MOST_STEPS // steps))


class Probe:
    """K heads of one kind in training, one for every pair of a learning rate and a seed, and what has been measured.

    heads: so many, on the features' device; their weights are drawn here. epochs: that the schedule is made for.
    """

    def __init__(self, heads: nn.Module, recipe: Recipe, batch_size: int, rates: Sequence[float], seeds: Sequence[int],
                 epochs: int):
        self.heads, self.kind, self.recipe, self.batch_size, self.epochs = heads, heads.kind, recipe, batch_size, epochs
        self.rates, self.seeds = [rate for rate in rates for _ in seeds], [*seeds] * len(rates)
        self.names = [f"lr {rate:g}, seed {seed}" for rate, seed in zip(self.rates, self.seeds, strict=True)]
        initialise(heads, self.seeds)
        self.initial_weight = heads.weight.detach().clone()
        self.optimizer = HeadSGD(heads.parameters(), recipe.trust_coefficient, [
            recipe.attention_factor if name in heads.attention else 1.0 for name, _ in heads.named_parameters()])
        self.best = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
        # By epoch that was measured: percent of every head on what chooses, on the test set, and in training.
        self.scores, self.test, self.trained = [], [], []
        # Training patches of this epoch that every head had right; the last number: of how many.
        self.hits = torch.zeros(len(self.rates) + 1, device=heads.weight.device)

    def steps(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The global batches of an epoch, one at least."""
        steps = list(ids.split(self.batch_size))
        drop = self.recipe.every_step and len(steps) > 1 and len(steps[-1]) < self.batch_size
        return steps[:-1] if drop else steps

    def step(self, tokens: torch.Tensor, rows: torch.Tensor | None, labels: torch.Tensor, epoch: float) -> None:
        """One update from a global batch, of which this process has a part, as Features.batches gives it. epoch: may be
        a fraction."""
        logits = self.heads.classify(tokens, rows)
        count = all_reduce(torch.full((1,), len(labels), device=labels.device))
        # A sum over heads: each head's gradient is that of its own mean loss.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(self.rates)), reduction="sum") / count
        loss.backward()
        if world_size() > 1:
            gradients = [parameter.grad for parameter in self.heads.parameters()]
            vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)
        rates = torch.tensor([self.recipe.learning_rate(rate, epoch, self.epochs) for rate in self.rates])
        # A copy that blocks would wait for the device in every step.
        self.optimizer.step(rates.to(labels.device, non_blocking=True))
        self.hits[:-1] += (logits.detach().argmax(-1) == labels).sum(1)
        self.hits[-1] += len(labels)

    def train(self, features: Features, order: torch.Tensor, epoch: int) -> None:
        """An epoch over features. order: ids of the patches, as shuffled gives them."""
        steps = self.steps(order)
        for index, batch in enumerate(features.batches(steps, self.heads.all_tokens)):
            self.step(*batch, epoch + index / len(steps))

    def record(self, score: torch.Tensor, test: torch.Tensor) -> None:
        """Notes an epoch's percentages, [K] each, and keeps a copy of the heads whose score is their best so far."""
        before = torch.tensor(self.scores or [[-1.0] * len(score)], dtype=score.dtype).amax(0)
        better = (score > before).to(self.hits.device)
        for name, tensor in self.heads.state_dict().items():
            self.best[name][better] = tensor[better]
        self.scores.append(score.tolist())
        self.test.append(test.tolist())
        hits = all_reduce(self.hits)
        self.trained.append((100 * hits[:-1] / hits[-1].clamp(min=1)).tolist())

    def state(self) -> dict:
        return {"heads": self.heads.state_dict(), "momentum": self.optimizer.buffers, "best": self.best,
                "scores": self.scores, "test": self.test, "trained": self.trained}

    def load_state(self, state: dict) -> None:
        self.heads.load_state_dict(state["heads"])
        self.optimizer.buffers = [tensor.to(self.hits.device) for tensor in state["momentum"]]
        self.best = {name: tensor.to(self.hits.device) for name, tensor in state["best"].items()}
        self.scores, self.test, self.trained = state["scores"], state["test"], state["trained"]

    def summary(self) -> tuple[dict, int, bool]:
        """Chooses the learning rate, and for every head the epoch, by the scores. Of rates that choose equally well our
        recipe takes the middle one, since a held-out tenth of a small set tells few apart.

        Returns what a results line says, the number of the best head at that rate, and whether the rate is the first or
        the last of three or more. In the line acc1 and best_acc1, on the test set, are means over the seeds at that
        rate, best_epochs (from 1) those of its seeds; of the best head are best_epoch, train_acc1, its accuracy in the
        last epoch of training, and weights_moved, how far its class weights then are from their initial ones, over the
        norm of these.
        """
        # The only epoch that our recipe measures is the last one.
        first_epoch, heads = self.epochs - len(self.scores) + 1, []
        for k, scores in enumerate(zip(*self.scores, strict=True)):
            epoch = scores.index(max(scores))
            heads.append({"lr": self.rates[k], "seed": self.seeds[k], "acc1": self.test[-1][k],
                          "best_acc1": self.test[epoch][k], "best_epoch": epoch + first_epoch,
                          "best_score": scores[epoch]})
        by_rate = [[head for head in heads if head["lr"] == rate] for rate in dict.fromkeys(self.rates)]
        scores = [mean(head["best_score"] for head in of_rate) for of_rate in by_rate]
        equal = [number for number, score in enumerate(scores) if score == max(scores)]
        number = equal[len(equal) // 2 if self.recipe.ours else 0]
        chosen = by_rate[number]
        best = max(chosen, key=lambda head: head["best_score"])
        index = heads.index(best)
        moved = (self.heads.weight.detach() - self.initial_weight).flatten(1).norm(dim=1)
        result = {"lr": best["lr"], "best_epoch": best["best_epoch"],
                  "best_epochs": [head["best_epoch"] for head in chosen], "train_acc1": self.trained[-1][index],
                  "weights_moved": (moved / self.initial_weight.flatten(1).norm(dim=1))[index].item()}
        for name in ("acc1", "best_acc1"):
            result[name] = mean(head[name] for head in chosen)
            if len(chosen) > 1:
                result[f"{name}_std"] = stdev(head[name] for head in chosen)
        return result | {"heads": heads}, index, len(by_rate) > 2 and number in (0, len(by_rate) - 1)


def shuffled(ids: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The ids in the order of an epoch, the same whatever the number of processes."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))]


@torch.no_grad()
def confusion_of_heads(heads: nn.Module, features: Features, names: Sequence[str],
                       authors_defects: bool = False) -> torch.Tensor:
    """int64 [K, classes, classes] of these patches, over all processes: row = label, column = prediction.

    names: of the K heads, in messages. authors_defects: batch norm by the statistics of test batches of 256, which also
    move the running ones. Raises UserError, on all processes, for logits that are not finite.
    """
    heads.train(authors_defects)
    count, num_classes = heads.bias.shape
    matrix = features.labels.new_zeros(count, num_classes * num_classes)
    wrong = features.labels.new_zeros(count)
    for tokens, rows, labels in features.batches(features.ids.split(256 if authors_defects else 1024),
                                                 heads.all_tokens):
        logits = heads.classify(tokens, rows)
        predicted = logits.argmax(-1)
        matrix.scatter_add_(1, labels * num_classes + predicted, torch.ones_like(predicted))
        wrong += (~logits.isfinite()).flatten(1).sum(1)
    heads.train()
    if found := all_reduce(wrong).nonzero().flatten().tolist():
        raise UserError(f"{heads.kind} head ({', '.join(names[head] for head in found)}): its logits are not finite; "
                        "lower --lr, or name another head")
    return all_reduce(matrix.view(-1, num_classes, num_classes)).cpu()


def accuracy(matrix: torch.Tensor) -> torch.Tensor:
    """Percent correct from confusion matrices [..., C, C]."""
    return 100 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1).double() / matrix.sum((-2, -1)).clamp(min=1)
