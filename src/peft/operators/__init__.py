"""Matrices that act: each knows its shape, how to multiply a vector, and how to become dense. Torch only."""

from peft.operators.base import Operator, Transposed, act, scaled
from peft.operators.blocks import BlockCirculant, BlockDiagonal, Fold, LowRankGrid
from peft.operators.compose import Product, Scaled, Sum
from peft.operators.kronecker import HadamardLowRank, Kronecker, Modulated
from peft.operators.lowrank import Bilinear, DiagonalLowRank, LowRank
from peft.operators.plain import Dense, Diagonal, Identity, Zero
from peft.operators.rotations import Butterfly, Cayley, Givens, Householder, Neumann, cayley, neumann, skew
from peft.operators.sparse import Fourier, LoneSparse, Sparse, Wavelet, WaveletSynthesis, kept

__all__ = [
    "Bilinear",
    "BlockCirculant",
    "BlockDiagonal",
    "Butterfly",
    "Cayley",
    "Dense",
    "Diagonal",
    "DiagonalLowRank",
    "Fold",
    "Fourier",
    "Givens",
    "HadamardLowRank",
    "Householder",
    "Identity",
    "Kronecker",
    "LoneSparse",
    "LowRank",
    "LowRankGrid",
    "Modulated",
    "Neumann",
    "Operator",
    "Product",
    "Scaled",
    "Sparse",
    "Sum",
    "Transposed",
    "Wavelet",
    "WaveletSynthesis",
    "Zero",
    "act",
    "cayley",
    "kept",
    "neumann",
    "scaled",
    "skew",
]
