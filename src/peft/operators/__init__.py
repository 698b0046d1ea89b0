"""Matrices that act: each knows its shape, how to multiply a vector, and how to become dense. Torch only."""

from peft.operators.base import Operator, Transposed, act
from peft.operators.compose import Product, Scaled, Sum
from peft.operators.lowrank import Bilinear, DiagonalLowRank, LowRank
from peft.operators.plain import Dense, Diagonal, Identity, Zero

__all__ = [
    "Bilinear",
    "Dense",
    "Diagonal",
    "DiagonalLowRank",
    "Identity",
    "LowRank",
    "Operator",
    "Product",
    "Scaled",
    "Sum",
    "Transposed",
    "Zero",
    "act",
]
