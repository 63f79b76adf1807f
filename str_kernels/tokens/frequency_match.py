"""Draw tokens that are as frequent in a corpus as given ones, for a matched control."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

NEAREST = 4  # candidates of each draw: with 1, every seed gives nearly the same set


def count_ids(corpus: Iterable[Iterable[int]]) -> Counter[int]:
    """Count how often each id occurs.

    Args:
        corpus: rows of ids; read once, so it may be a generator.

    Returns:
        Occurrences by id; 0 for an id that does not occur.

    Raises:
        ValueError: the corpus has no ids.
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
    """Draw, for each wanted id, another id that is nearly as frequent.

    With f(v) the occurrences of v, the distance of two ids is

        d(v, w) = | log(1 + f(v)) - log(1 + f(w)) |

    The wanted ids are matched from the most frequent to the least, because a frequent id has the
    fewest candidates near it (equally frequent ids in their given order). For each, the remaining
    ids of the pool are sorted by d, ties in random order; one of the first NEAREST is drawn
    uniformly and removed from the pool.

    Args:
        counts: occurrences by id; an id that is missing counts 0.
        wanted: the ids to be matched.
        pool: ids to draw from, distinct.
        seed: of the draw.

    Returns:
        As many distinct ids as wanted; entry k matches wanted[k].

    Raises:
        ValueError: the pool has fewer ids than wanted.

    Notes:
        The match is as close as the corpus allows: close for rare ids, which have many candidates,
        and least close for the most frequent ids, which have few.
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
        place = draw.randrange(reach)  # from len(nearer) on, all are at the limit: draw any
        chosen = nearer[place] if place < len(nearer) else draw.choice(at_limit)
        taken[chosen] = True
        drawn[k] = ordered[chosen]
    return drawn
