"""The published recipes of probing, and K heads of one kind in training: steps, what is measured, what is chosen."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from utils.distributed import all_reduce, world_size

from .features import Batch
from .probes import HeadSGD, build_heads, cosine_learning_rate


class Recipe(NamedTuple):
    """How a probe is trained; lr is for batch_size, and scales with the batch. Warm-up is a share of all epochs."""
    lr: float
    batch_size: int
    warmup: float = 0.0
    minimum_lr: float = 0.0
    trust_coefficient: float | None = None  # LARS in place of SGD
    batch_norm: bool = False  # before the linear head
    every_step: bool = False  # the schedule moves every step, and incomplete batches are dropped; else every epoch


RECIPES = {
    "parts": {"linear": Recipe(0.4, 1024), "attentive": Recipe(0.04, 1024)},
    "images": {"linear": Recipe(6.4, 16384, 1 / 9, 0.0, 0.001, True, True),
               "attentive": Recipe(0.4, 8192, 1 / 9, 1e-6, every_step=True)},
}


class Probe:
    """K heads of one kind in training, one for every pair of a learning rate and a seed, and what has been measured."""

    def __init__(self, kind: str, recipe: Recipe, batch_size: int, rates: Sequence[float], seeds: Sequence[int],
                 epochs: int, width: int, num_classes: int, num_heads: int, device: torch.device):
        self.kind, self.recipe, self.batch_size, self.epochs = kind, recipe, batch_size, epochs
        self.rates, self.seeds = [rate for rate in rates for _ in seeds], [*seeds] * len(rates)
        self.names = [f"lr {rate:g}, seed {seed}" for rate in rates for seed in seeds]
        self.heads = build_heads(kind, len(self.rates), width, num_classes, num_heads, recipe.batch_norm)
        self.heads.initialise(self.seeds)
        self.heads.to(device)
        self.optimizer = HeadSGD(self.heads.parameters(), trust_coefficient=recipe.trust_coefficient)
        self.best = {name: tensor.clone() for name, tensor in self.heads.state_dict().items()}
        self.scores, self.test = [], []  # by epoch: percent of every head on the selection set and on the test set

    def steps(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The global batches of an epoch, one at least."""
        steps = list(ids.split(self.batch_size))
        drop = self.recipe.every_step and len(steps) > 1 and len(steps[-1]) < self.batch_size
        return steps[:-1] if drop else steps

    def step(self, batch: Batch, epoch: float) -> None:
        """One update from a global batch, of which batch is this process's part. epoch: may be a fraction."""
        tokens, rows, labels = batch
        recipe, epoch = self.recipe, epoch if self.recipe.every_step else int(epoch)
        logits = self.heads.classify(tokens, rows).flatten(0, 1)
        count = all_reduce(torch.full((1,), len(labels), device=labels.device))
        # A sum over heads: each head's gradient is that of its own mean loss.
        (F.cross_entropy(logits, labels.repeat(len(self.rates)), reduction="sum") / count).backward()
        if world_size() > 1:
            gradients = [parameter.grad for parameter in self.heads.parameters()]
            vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)
        rates = torch.tensor([cosine_learning_rate(rate, epoch, self.epochs, recipe.warmup * self.epochs,
                                                   recipe.minimum_lr) for rate in self.rates])
        # A copy that blocks would wait for the device in every step.
        self.optimizer.step(rates.to(labels.device, non_blocking=True))

    def record(self, score: torch.Tensor, test: torch.Tensor) -> None:
        """Notes an epoch's percentages, [K] each, and keeps a copy of the heads whose score is their best so far."""
        before = torch.tensor(self.scores or [[-1.0] * len(score)], dtype=score.dtype).amax(0)
        better = score > before
        for name, tensor in self.heads.state_dict().items():
            self.best[name][better.to(tensor.device)] = tensor[better.to(tensor.device)]
        self.scores.append(score.tolist())
        self.test.append(test.tolist())

    def state(self) -> dict:
        return {"heads": self.heads.state_dict(), "momentum": self.optimizer.buffers, "best": self.best,
                "scores": self.scores, "test": self.test}

    def load_state(self, state: dict) -> None:
        self.heads.load_state_dict(state["heads"])
        for name in self.best:
            self.best[name].copy_(state["best"][name])
        for buffer, saved in zip(self.optimizer.buffers, state["momentum"], strict=True):
            buffer.copy_(saved)
        self.scores, self.test = state["scores"], state["test"]

    def summary(self) -> dict:
        """Chooses the learning rate, and for every head the epoch, by the scores; percentages on the test set.

        acc1 and best_acc1 are means over the seeds at that rate, best_epoch (from 1) and index those of its best head.
        """
        scores, test = (torch.tensor(rows, dtype=torch.float64) for rows in (self.scores, self.test))
        best = scores.max(0)
        heads = [{"lr": self.rates[k], "seed": self.seeds[k], "acc1": test[-1, k].item(),
                  "best_acc1": test[epoch, k].item(), "best_epoch": epoch + 1, "best_score": best.values[k].item()}
                 for k, epoch in enumerate(best.indices.tolist())]
        num_seeds = len(set(self.seeds))
        first = int(best.values.view(-1, num_seeds).mean(1).argmax()) * num_seeds
        index = first + int(best.values[first:first + num_seeds].argmax())
        result = {"lr": self.rates[first], "index": index, "best_epoch": heads[index]["best_epoch"]}
        for name in ("acc1", "best_acc1"):
            of_seeds = [head[name] for head in heads[first:first + num_seeds]]
            result[name] = mean(of_seeds)
            if num_seeds > 1:
                result[f"{name}_std"] = stdev(of_seeds)
        return result | {"heads": heads}
