"""Which way costs less: what is small, what is little beside the weight, and when an operator is better made dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft.operators import Operator
from peft.operators.base import SMALL, gemm

_BESIDE = 16
"""How many times the elements of input and output a weight has that they are little beside."""
_FRESH = 32.0
"""What an element of a new matrix costs, in operations of a product (measured on a CPU)."""
_THIN = 16
"""A projection of the input is kept for backward where it is so many times smaller than the input."""


def is_small(elements: int) -> bool:
    """Whether calls cost more than what they compute on so many elements (of input and output together)."""
    return elements <= SMALL


def _tiny(op: Operator, x: Tensor) -> bool:
    return math.prod(op.shape) <= SMALL and x.shape[0] * sum(op.shape) <= SMALL


def beside(x: Tensor, weight: Tensor) -> bool:
    """Whether x and y are little beside W: what nodes of torch's own keep of them is, too."""
    out, inner = weight.shape
    return x.shape[0] * (out + inner) * _BESIDE <= out * inner


def thin_enough(hidden: Tensor, x: Tensor) -> Tensor | None:
    """What is kept of s x Aᵀ."""
    return hidden if _THIN * hidden.shape[1] <= x.shape[1] else None


def denser(op: Operator, x: Tensor) -> bool:
    """Whether a step with the dense form costs less: built twice and differentiated, but no part of it run twice."""
    if type(op).apply is Operator.apply:
        return True
    tokens = x.shape[0]
    if _tiny(op, x):
        return op.brief
    if op.rounds and x.element_size() == 2:
        return True
    runs = 2 if op.keeps(x) else 4  # what is kept for backward does not run again
    return runs * op.flops(tokens) > 3 * op.flops_dense(tokens) + op.flops_dense(0)


def cheaper_whole(op: Operator, x: Tensor) -> bool:
    """Whether making W + op, in place of which W need not run, costs less than op x."""
    if type(op).apply is Operator.apply or (op.brief and _tiny(op, x)):
        return True
    return op.flops(x.shape[0]) > op.flops_dense(0) + _FRESH * math.prod(op.shape)


def summed(op: Operator, x: Tensor, dropped: bool) -> bool:
    """Whether W + op runs as one matrix where op is dense anyway: if the sum is not rounded to 16 bits (or is, by
    definition of the method)."""
    return not dropped and (x.element_size() >= 4 or op.rounds)


def narrowed(op: Operator, x: Tensor, apart: bool) -> tuple[Tensor, Operator] | None:
    """The parts of an operator whose first one is not trained and no wider than x, unless the dense form costs less;
    `apart` if that can't be one matrix with W."""
    parts = op.narrowed() if torch.is_grad_enabled() else None
    if parts is None or parts[0].shape[0] > parts[0].shape[1]:
        return None
    (first, rest), tokens = parts, x.shape[0]
    whole = 3 * op.flops_dense(tokens) + op.flops_dense(0)
    if summed(op, x, apart):
        whole -= 2 * gemm(tokens, *op.shape)  # W need not run beside it
    return parts if 2 * gemm(tokens, *first.shape) + 3 * rest.flops(tokens) <= whole else None
