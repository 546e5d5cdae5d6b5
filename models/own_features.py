"""Linear probing of features that come from elsewhere, by our recipe (models/probe_training.py)."""

from types import SimpleNamespace

import torch

from .features import Features
from .probe_training import RECIPES, Part, Probe, accuracy, batch_and_epochs, confusion_of_heads, shuffled


def linear_accuracy(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
                    seed: int = 0) -> float:
    """Percent of the test features that a linear head of our recipe has right; its learning rate is chosen on a tenth
    of the training features, drawn by the seed.

    train [N, D] with labels [N], whole numbers from 0; test [M, D] with test_labels [M]: tensors or arrays.
    """
    train, labels, test, test_labels = map(torch.as_tensor, (train, labels, test, test_labels))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, fit = order.tensor_split([max(1, len(train) // 10)])
    features, recipe = Features(0, labels, train.float()), RECIPES["ours"]["linear"]
    classes = int(labels.max()) + 1
    size, epochs = batch_and_epochs(recipe, len(fit))
    shape = SimpleNamespace(embed_dim=train.shape[1], num_heads=1, mean=train)
    probe = Probe("linear", recipe, size, recipe.rates, [seed], epochs, shape, classes)
    probe.fix_norm(features, fit)
    for epoch in range(epochs):
        probe.train(features, shuffled(fit, seed, epoch), epoch)
    testing = Part(Features(0, test_labels, test.float()), torch.arange(len(test)))
    probe.record(*(accuracy(confusion_of_heads(probe.heads, part, classes, probe.names))
                   for part in (Part(features, held), testing)))
    return probe.summary()["best_acc1"]
