"""Probing heads on frozen tokens, linear and attentive (CAE's, Chen et al. 2022); SGD, LARS, kNN.

A module holds K heads of one kind, trained on the same batches with their own learning rates and initial weights: every
parameter has a leading dimension K. Sources: sections 4.1, 4.2 and A.4 of the paper and the code behind it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import UserError
from utils.distributed import all_reduce

LAYER_NORM_EPS = 1e-6
HEADS = ("linear", "attentive")
# k of the nearest neighbours.
NEIGHBOURS = (10, 20, 100, 200)


class SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors, on every process; gradients are summed in the same way."""

    @staticmethod
    def forward(ctx, value):
        return all_reduce(value.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format))


class BatchNorm(nn.Module):
    """nn.BatchNorm1d without affine parameters, of K heads, with the statistics of all processes' rows.

    [K, B, D] -> [K, B, D]; an input [1, B, D] is shared by all heads.
    """

    def __init__(self, count: int, width: int, eps: float):
        super().__init__()
        self.eps, self.fixed = eps, False
        self.register_buffer("running_mean", torch.zeros(count, width))
        self.register_buffer("running_var", torch.ones(count, width))

    def fix(self, x: torch.Tensor) -> None:
        """Takes the mean and variance of all processes' rows x [B, D] for good: no batch moves them afterwards."""
        x = x.double()
        count = all_reduce(x.new_tensor(len(x)))
        mean = all_reduce(x.sum(0)) / count
        self.running_mean.copy_(mean)
        self.running_var.copy_(all_reduce((x - mean).square().sum(0)) / count)
        self.fixed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fixed or not self.training:
            return (x - self.running_mean[:, None]) * (self.running_var[:, None] + self.eps).rsqrt()
        count = all_reduce(torch.full((), x.shape[1], dtype=x.dtype, device=x.device))
        mean = SumOverProcesses.apply(x.sum(1)) / count
        x = x - mean[:, None]
        variance = SumOverProcesses.apply(x.square().sum(1)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), 0.1)
        return x * (variance[:, None] + self.eps).rsqrt()


class LinearHeads(nn.Module):
    """K linear layers on the class token: tokens [B, N, D], class token first -> logits [K, B, classes].

    batch_norm: after a batch normalisation of it (ImageNet, eps 1e-6).
    """

    kind, all_tokens, projections, attention = "linear", False, (), ()

    def __init__(self, count: int, width: int, num_classes: int, batch_norm: bool = False):
        super().__init__()
        self.norm = BatchNorm(count, width, eps=1e-6) if batch_norm else nn.Identity()
        self.weight = nn.Parameter(torch.zeros(count, num_classes, width))
        self.bias = nn.Parameter(torch.zeros(count, num_classes))

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of tokens[rows], of all where rows is None."""
        x = (tokens[:, 0] if rows is None else tokens[rows, 0]).to(self.weight.dtype)[None]
        return self.norm(x) @ self.weight.transpose(1, 2) + self.bias[:, None]

    classify = forward


class AttentiveHeads(nn.Module):
    """K attentive heads: a learnable query attends to all tokens; projection, batch norm (eps 1e-5), linear layer.

    tokens [B, N, D], any float type, as the encoder gives them -> logits [K, B, classes].

    With one query, keys and values need not be computed. For a normalised token x, a head's query q, and its rows W_k
    and W_v of the key and value projections:
        score  = q . W_k (g_k x + b_k) = w . x + constant,   w = g_k (W_k' q)
        pooled = W_v (g_v sum_t a_t x_t + b_v) = (W_v g_v) sum_t a_t x_t + W_v b_v
    Softmax does not see the constant, so b_k has no effect (as a key bias has none) and is left out.
    """

    kind, all_tokens = "attentive", True
    projections = ("query", "q_weight", "k_weight", "v_weight", "proj_weight")
    # What attention scores are made of.
    attention = ("query", "norm_q_weight", "norm_q_bias", "norm_k_weight", "q_weight", "q_bias", "k_weight")

    def __init__(self, count: int, width: int, num_classes: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise UserError(f"the tokens' width, {width}, is not divisible by {num_heads} attention heads; give your "
                            "network an attribute num_heads")
        self.num_heads = num_heads

        def parameter(*shape, value=0.0):
            return nn.Parameter(torch.full((count, *shape), value))

        self.query = parameter(width)
        self.norm_q_weight, self.norm_q_bias = parameter(width, value=1.0), parameter(width)
        self.norm_k_weight = parameter(width, value=1.0)
        self.norm_v_weight, self.norm_v_bias = parameter(width, value=1.0), parameter(width)
        self.q_weight, self.q_bias = parameter(width, width), parameter(width)
        self.k_weight = parameter(width, width)
        self.v_weight, self.v_bias = parameter(width, width), parameter(width)
        self.proj_weight, self.proj_bias = parameter(width, width), parameter(width)
        self.norm = BatchNorm(count, width, eps=1e-5)
        self.weight, self.bias = parameter(num_classes, width), parameter(num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classify(normalise(tokens.to(self.weight.dtype)))

    def classify(self, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of tokens[rows], read in place, of all where rows is None; tokens are normalised already."""
        count, width = self.query.shape
        heads, head_width = self.num_heads, width // self.num_heads

        query = F.layer_norm(self.query, (width,), eps=LAYER_NORM_EPS) * self.norm_q_weight + self.norm_q_bias
        query = (torch.einsum("kd,ked->ke", query, self.q_weight) + self.q_bias) * head_width**-0.5
        direction = torch.einsum("khe,khed->khd", query.unflatten(1, (heads, head_width)),
                                 self.k_weight.unflatten(1, (heads, head_width))) * self.norm_k_weight[:, None]
        pooled = AttentionPool.apply(tokens, rows, direction.flatten(0, 1))

        value = (self.v_weight * self.norm_v_weight[:, None]).view(count * heads, head_width, width)
        value_bias = torch.einsum("ked,kd->ke", self.v_weight, self.norm_v_bias) + self.v_bias
        x = torch.bmm(pooled.transpose(0, 1), value.transpose(1, 2))  # [K heads, B, head width]
        x = x.unflatten(0, (count, heads)).transpose(1, 2).flatten(2) + value_bias[:, None]
        x = x @ self.proj_weight.transpose(1, 2) + self.proj_bias[:, None]
        return self.norm(x) @ self.weight.transpose(1, 2) + self.bias[:, None]


def initialise(heads: nn.Module, seeds: Sequence[int]) -> None:
    """Draws the weights of head k by seeds[k]: an attentive head's query and projections truncated normal 0.02, the
    linear layer N(0, 0.01). Biases are 0 as they are made."""
    for k, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for weight in (getattr(heads, name) for name in heads.projections):
            weight.data[k].copy_(nn.init.trunc_normal_(torch.empty(weight.shape[1:]), std=0.02, generator=generator))
        heads.weight.data[k].copy_(torch.empty(heads.weight.shape[1:]).normal_(std=0.01, generator=generator))


def normalise(tokens: torch.Tensor) -> torch.Tensor:
    """[..., D] -> the same with mean 0 and variance 1 over D, eps 1e-6: a layer norm's first half."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=LAYER_NORM_EPS)


class AttentionPool(torch.autograd.Function):
    """For every direction w: sum_t a_t x_t, where a = softmax_t(w . x_t); gradients for w only.

    tokens x [M, N, D], of which rows [B] are chosen (None: all), directions w [H, D] -> [B, H, D]. Rows are read in
    chunks that stay in the processor's cache for both of their products; the batch is never copied or converted whole.
    """

    @staticmethod
    def forward(ctx, tokens, rows, directions):
        batch = len(tokens) if rows is None else len(rows)
        pooled = directions.new_empty(batch, *directions.shape)
        weights = directions.new_empty(batch, len(directions), tokens.shape[1])
        for part, x in row_chunks(tokens, rows, directions.dtype):
            scores = (x.flatten(0, 1) @ directions.T).view(*x.shape[:2], -1).transpose(1, 2)
            torch.softmax(scores, dim=2, out=weights[part])
            torch.bmm(weights[part], x, out=pooled[part])
        ctx.save_for_backward(tokens, rows, weights)
        return pooled

    @staticmethod
    def backward(ctx, gradient):
        tokens, rows, weights = ctx.saved_tensors
        result = gradient.new_zeros(gradient.shape[1:])
        for part, x in row_chunks(tokens, rows, gradient.dtype):
            a = weights[part]
            by_weight = torch.bmm(gradient[part], x.transpose(1, 2))
            by_score = a * (by_weight - (a * by_weight).sum(2, keepdim=True))
            result.addmm_(by_score.transpose(0, 1).flatten(1), x.flatten(0, 1))
        return None, None, result


def row_chunks(tokens: torch.Tensor, rows: torch.Tensor | None,
               dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (slice of rows, tokens[rows] in dtype [b, N, D]); each tokens overwrite the last."""
    batch = len(tokens) if rows is None else len(rows)
    # Bytes of a copy in float32: about a GPU's level-2 cache, or a CPU core's.
    limit = 64 << 20 if tokens.is_cuda else 3 << 20
    size = max(1, min(batch, limit // max(1, 4 * tokens.shape[1:].numel())))
    # Allocated once: new memory for every chunk costs a CPU more than the arithmetic.
    chosen = None if rows is None else tokens.new_empty(size, *tokens.shape[1:])
    converted = None if tokens.dtype == dtype else tokens.new_empty(size, *tokens.shape[1:], dtype=dtype)
    for start in range(0, batch, size):
        part = slice(start, min(start + size, batch))
        count = part.stop - start
        x = tokens[part] if rows is None else torch.index_select(tokens, 0, rows[part], out=chosen[:count])
        yield part, x if converted is None else converted[:count].copy_(x)


class HeadSGD:
    """SGD with momentum 0.9, without weight decay, for K heads at once, each with its learning rate.

    trust_coefficient: makes it LARS (You et al. 2017, as in MAE's linear probing): a head's gradient of a matrix is
    first scaled by coefficient * |parameter| / |gradient|. factors: of the learning rate, by parameter (default 1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], trust_coefficient: float | None = None,
                 factors: Sequence[float] | None = None):
        self.parameters, self.trust_coefficient = list(parameters), trust_coefficient
        self.factors = factors or [1.0] * len(self.parameters)
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, lr: torch.Tensor) -> None:
        """lr: [K]. Takes the parameters' gradients and clears them."""
        for parameter, buffer, factor in zip(self.parameters, self.buffers, self.factors, strict=True):
            gradient, shape = parameter.grad, (-1, *[1] * (parameter.ndim - 1))
            if self.trust_coefficient is not None and parameter.ndim > 2:
                size, change = parameter.flatten(1).norm(dim=1), gradient.flatten(1).norm(dim=1)
                ratio = self.trust_coefficient * size / change
                gradient = gradient * torch.where((size > 0) & (change > 0), ratio, 1.0).view(shape)
            buffer.mul_(0.9).add_(gradient)
            parameter.sub_((factor * lr).view(shape) * buffer)
            parameter.grad = None


def knn_predict(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, num_classes: int,
                ks: Sequence[int] = NEIGHBOURS, temperature: float = 0.07) -> dict[int, torch.Tensor]:
    """Nearest neighbours by cosine similarity s, with votes exp(s / temperature) (facebookresearch/dino, eval_knn.py).

    train [N, D] with labels [N], test [M, D], tensors or arrays -> {k: predicted classes [M]}; a k above N counts all.
    """
    train, labels, test = map(torch.as_tensor, (train, labels, test))
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    predictions = {k: [] for k in ks}
    for part in test.split(max(1, (1 << 27) // max(1, len(train)))):
        similarity, index = (part @ train.T).topk(min(max(ks), len(train)), dim=1)
        # Relative to the nearest, so that exp cannot overflow; the order of the votes is the same.
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        for k in ks:
            scores = votes.new_zeros(len(part), num_classes).scatter_add_(1, labels[index[:, :k]], votes[:, :k])
            predictions[k].append(scores.argmax(1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def build_heads(kind: str, count: int, width: int, num_classes: int, num_heads: int, batch_norm: bool) -> nn.Module:
    """batch_norm: before the linear heads; attentive ones have their own."""
    if kind == "linear":
        return LinearHeads(count, width, num_classes, batch_norm)
    return AttentiveHeads(count, width, num_classes, num_heads)


def head_of(content: Mapping) -> nn.Module:
    """The head in a file that classify.py saved (its content), in evaluation mode: tokens [B, 1 + N, D] -> logits
    [1, B, classes]."""
    state = content["head"]
    _, num_classes, width = state["weight"].shape
    heads = build_heads(content["kind"], 1, width, num_classes, content["num_heads"], "norm.running_mean" in state)
    heads.load_state_dict(state)
    return heads.eval().requires_grad_(False)


def load_head(path: str | Path) -> nn.Module:
    """head_of the file at path."""
    return head_of(torch.load(path, map_location="cpu", weights_only=True))
