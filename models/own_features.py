"""Linear probing of features that come from elsewhere, by our recipe (models/probe_training.py)."""

import torch

from .features import Features
from .probe_training import RECIPES, Probe, accuracy, batch_and_epochs, confusion_of_heads, shuffled
from .probes import LinearHeads


def linear_accuracy(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor,
                    seed: int = 0) -> float:
    """Percent of the test features that a linear head of our recipe has right; its learning rate is chosen on a tenth
    of the training features, drawn by the seed.

    train [N, D] with labels [N], whole numbers from 0; test [M, D] with test_labels [M]: tensors or arrays.
    """
    train, labels, test, test_labels = map(torch.as_tensor, (train, labels, test, test_labels))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, fit = order.tensor_split([max(1, len(train) // 10)])
    features, recipe = Features(fit, 0, labels.long(), train.float()), RECIPES["ours"]["linear"]
    size, epochs = batch_and_epochs(recipe, len(fit))
    heads = LinearHeads(len(recipe.rates), train.shape[1], int(labels.max()) + 1, batch_norm=True).to(train.device)
    heads.norm.fix(features.cls[features.rows(fit)])
    probe = Probe(heads, recipe, size, recipe.rates, [seed], epochs)
    for epoch in range(epochs):
        probe.train(features, shuffled(fit, seed, epoch), epoch)
    testing = Features(torch.arange(len(test)), 0, test_labels.long(), test.float())
    probe.record(*(accuracy(confusion_of_heads(heads, part, probe.names))
                   for part in (features._replace(ids=held), testing)))
    return probe.summary()[0]["best_acc1"]
