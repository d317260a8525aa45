"""Orthogonal matrices whose entries are all of one size: Hadamard matrices over the square root of their order.

The order is k 2^m: the Kronecker product of a matrix of order k, after Paley (1933) from the squares of a finite field,
with Sylvester's of order 2^m, so that a vector is multiplied in n (k + m) operations.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor


def split_order(n: int) -> tuple[int, int]:
    """(k, 2^m) with n = k 2^m, k the least order with a matrix here. Raises ValueError where there is none."""
    if n < 1:
        raise ValueError(f"no Hadamard matrix of order {n}")
    power = n & -n
    odd = n // power
    k = 1 if odd == 1 else odd * 4
    while k <= n and n % k == 0:
        if k == 1 or _field_for(k) is not None:
            return k, n // k
        k *= 2
    raise ValueError(f"no Hadamard matrix of order {n} is known here")


def rotate(x: Tensor) -> Tensor:
    """x [..., n] times R, the orthogonal matrix of order n, in x's dtype. R^T undoes it. Raises ValueError as above."""
    k, power = split_order(x.shape[-1])
    y = x.reshape(-1, k, power)
    step = 1
    while step < power:
        pairs = y.reshape(-1, k, power // (2 * step), 2, step)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2)
        step *= 2
    y = y.reshape(-1, k, power)
    if k > 1:
        base = torch.tensor(base_matrix(k), dtype=x.dtype, device=x.device)
        y = torch.einsum("bis,ij->bjs", y, base)
    result: Tensor = (y / x.shape[-1] ** 0.5).reshape(x.shape)
    return result


@cache
def base_matrix(k: int) -> tuple[tuple[int, ...], ...]:
    """A matrix of order k with entries 1 and -1 and orthogonal rows. Raises ValueError where none is known here."""
    field = _field_for(k)
    if k == 1:
        return ((1,),)
    if field is None:
        raise ValueError(f"no Hadamard matrix of order {k} is known here")
    prime, degree = field
    size = prime**degree
    squares = _Field(prime, degree)
    q = [[squares.character(a, b) for b in range(size)] for a in range(size)]
    if size == k - 1:
        # Paley I: I + S, S the Jacobsthal matrix Q with a border that makes it skew.
        rows = [[1] * k] + [[-1, *((1 if a == b else q[a][b]) for b in range(size))] for a in range(size)]
        return tuple(map(tuple, rows))
    # Paley II: the symmetric matrix C of order q + 1 with a zero diagonal; its entries become blocks of two by two.
    c = [[0] + [1] * size] + [[1, *q[a]] for a in range(size)]
    one, zero = ((1, 1), (1, -1)), ((1, -1), (-1, -1))
    matrix = [[0] * k for _ in range(k)]
    for i, j in product(range(size + 1), repeat=2):
        for a, b in product(range(2), repeat=2):
            matrix[2 * i + a][2 * j + b] = c[i][j] * one[a][b] + (zero[a][b] if i == j else 0)
    return tuple(map(tuple, matrix))


def _field_for(k: int) -> tuple[int, int] | None:
    """Prime and degree of the field that gives a matrix of order k: k - 1 elements (3 mod 4) or k / 2 - 1 (1 mod 4)."""
    if k % 4:
        return None
    for size, rest in ((k - 1, 3), (k // 2 - 1, 1)):
        field = _prime_power(size)
        if field is not None and size % 4 == rest:
            return field
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """(p, 1) or (p, 2): of other powers no field is built here."""
    for degree in (1, 2):
        prime = round(size ** (1 / degree))
        if prime > 2 and prime**degree == size and all(prime % i for i in range(2, int(prime**0.5) + 1)):
            return prime, degree
    return None


class _Field:
    """The field of p or p^2 elements a + b t, numbered a + p b, with t^2 a number that is no square mod p."""

    def __init__(self, prime: int, degree: int) -> None:
        self._p, self._degree = prime, degree
        numbers = {i * i % prime for i in range(1, prime)}
        self._no_square = next(i for i in range(2, prime + 2) if i % prime not in numbers and i % prime)
        self._squares = {self._times(x, x) for x in range(1, prime**degree)}

    def _times(self, x: int, y: int) -> int:
        p = self._p
        a, b, c, d = x % p, x // p, y % p, y // p
        return (a * c + b * d * self._no_square) % p + p * ((a * d + b * c) % p)

    def character(self, x: int, y: int) -> int:
        """1 if x - y is a square, -1 if it is none, 0 if it is zero."""
        p = self._p
        difference = (x % p - y % p) % p + p * ((x // p - y // p) % p)
        return 0 if difference == 0 else 1 if difference in self._squares else -1
