"""Division of work among the ranks of a group: a pure function of costs, so that each knows all shares."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of `costs` for each of `size` ranks, ascending: the costliest first, to whoever has least.

    Every index is in one share. The largest share costs at most the mean and the costliest index more. Equal
    costs go by index, equal loads by rank. Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies",
    section 4.
    """
    loads = [(0.0, rank) for rank in range(size)]
    heapify(loads)
    members: list[list[int]] = [[] for _ in range(size)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        members[rank].append(i)
        heapreplace(loads, (load + costs[i], rank))
    return [sorted(share) for share in members]
