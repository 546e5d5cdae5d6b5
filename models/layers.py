"""Which blocks of an encoder features are taken from."""

from collections.abc import Sequence

from utils import UserError


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
