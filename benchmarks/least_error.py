"""The parameters with the least error, found by the simplex of Nelder and Mead; no derivatives, no randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Point = list[float]


def least(error: Callable[[Point], float], start: Sequence[float], *, step: float = 0.3, rounds: int = 300) -> Point:
    """Where `error` is least near `start`, after so many rounds."""
    first = list(start)
    corners = [first, *([x + step * (i == j) for j, x in enumerate(first)] for i in range(len(first)))]
    simplex = [(error(corner), corner) for corner in corners]
    for _ in range(rounds):
        simplex.sort()
        (best, lowest), (second, _), (worst, highest) = simplex[0], simplex[-2], simplex[-1]
        centre = [sum(xs) / len(first) for xs in zip(*(corner for _, corner in simplex[:-1]), strict=True)]
        mirrored = _towards(highest, centre, 2.0)
        found = error(mirrored)
        if found < best:
            further = _towards(highest, centre, 3.0)
            simplex[-1] = min((error(further), further), (found, mirrored))
        elif found < second:
            simplex[-1] = found, mirrored
        else:
            nearer = _towards(highest, centre, 0.5)
            found = error(nearer)
            if found < worst:
                simplex[-1] = found, nearer
            else:
                halved = [_towards(corner, lowest, 0.5) for _, corner in simplex[1:]]
                simplex = [simplex[0], *((error(corner), corner) for corner in halved)]
    return min(simplex)[1]


def _towards(a: Point, b: Point, share: float) -> Point:
    """a at share 0, b at 1, beyond it above."""
    return [x + share * (y - x) for x, y in zip(a, b, strict=True)]
