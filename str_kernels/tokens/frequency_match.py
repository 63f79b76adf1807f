"""Tokens as frequent in a corpus as given ones: the draw behind a matched control."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

NEAREST = 4  # among how many of the nearest is drawn: with 1 every seed gives nearly the same set


def count_ids(corpus: Iterable[Iterable[int]]) -> Counter[int]:
    """Count how often each id occurs.

    Args:
        corpus: rows of ids; read once, so a generator will do.

    Returns:
        Occurrences by id; 0 for any id that is not there.

    Raises:
        ValueError: there is no id in it.
    """
    counts: Counter[int] = Counter()
    for row in corpus:
        counts.update(int(token) for token in row)
    if not counts:
        raise ValueError("`corpus` must hold at least one id; got none")
    return counts


def draw_matched(
    counts: Mapping[int, int], wanted: Sequence[int], pool: Sequence[int], *, seed: int
) -> list[int]:
    """Draw for each wanted id another one that is nearly as frequent.

    With f(v) the occurrences of v, the distance of two ids is

        d(v, w) = | log(1 + f(v)) - log(1 + f(w)) |

    The wanted ids are served from the most frequent to the least, since a frequent one has the
    fewest near it (of equals, the first listed goes first). For each, the free ids of the pool are
    put in the order of d, those of equal d in random order; one of the first NEAREST is drawn
    uniformly and is no longer free.

    Args:
        counts: occurrences by id; an id that is missing counts 0.
        wanted: the ids to be matched.
        pool: ids to draw from, distinct.
        seed: of the draw.

    Returns:
        As many distinct ids as wanted; entry k stands for wanted[k].

    Raises:
        ValueError: the pool is smaller than what is wanted.

    Notes:
        The match is as near as the corpus allows. Few tokens are as frequent as its most frequent
        ones, so there the frequencies differ most; of what never occurs there is plenty.
    """
    if len(pool) < len(wanted):
        raise ValueError(
            f"`like` must have at most as many tokens as there are others to draw, {len(pool)}; "
            f"got {len(wanted)}"
        )
    draw = random.Random(seed)
    ordered = sorted(pool)
    level = torch.tensor([counts.get(token, 0) for token in ordered], dtype=torch.float64).log1p()
    taken = torch.zeros(len(ordered), dtype=torch.bool)
    drawn = [0] * len(wanted)
    by_frequency = sorted(range(len(wanted)), key=lambda k: -counts.get(wanted[k], 0))
    for done, k in enumerate(by_frequency):
        here = torch.tensor(float(counts.get(wanted[k], 0)), dtype=torch.float64).log1p()
        distance = (level - here).abs().masked_fill(taken, torch.inf)
        reach = min(NEAREST, len(ordered) - done)
        limit = distance.kthvalue(reach).values
        nearer = (distance < limit).nonzero().flatten().tolist()
        at_limit = (distance == limit).nonzero().flatten().tolist()
        place = draw.randrange(reach)  # from len(nearer) on these are equals: any of them
        chosen = nearer[place] if place < len(nearer) else draw.choice(at_limit)
        taken[chosen] = True
        drawn[k] = ordered[chosen]
    return drawn
