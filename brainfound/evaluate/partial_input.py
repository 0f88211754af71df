"""Which contrasts to withhold: the subsets of partial-input experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def non_empty_subsets(contrasts: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2ⁿ − 1 non-empty subsets, the full set first, then by falling size, each in the given order.

    >>> non_empty_subsets(("T1w", "FLAIR"))
    [('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)]
    """
    return [subset for size in range(len(contrasts), 0, -1) for subset in combinations(contrasts, size)]
