"""Fused forms of what layers compute: fewer passes over memory, and little kept for backward.

A fused form never changes meaning: it stands in for the plain path where everything is a plain dense tensor, and tests
hold the two equal, gradients too. Under `torch.compile` and `torch.func` the plain path runs.

Adapters are cast to the dtype of the activations inside the nodes, so the casts are not kept, and of what has the size
of the activations only the input is (and for DoRA the product that its magnitude scales), or in its place what comes
after a first factor that is not trained (LoRA-FA, VeRA, TinyLoRA). Dropout masks are made again from their seeds.
Inputs that are little beside the weight run by as few of autograd's own nodes as it takes, and small ones, where calls
cost more than arithmetic, in the dtype of the adapter.

From the bottom up: `dropout` (repeatable ones), `guards` (where a form may run), `costs` (which way is cheaper),
`products` (with weights and operators, and their gradients), `nodes` (the autograd functions) and `over` (those that
write over an output that is there), `forms` (which runs), `overlay` (the same over the output of a layer that runs
itself), `batches` (an adapter for each sample).
"""

from peft.autograd.batches import Stack, mixed, stack
from peft.autograd.dropout import Dropout
from peft.autograd.forms import Form, form
from peft.autograd.guards import can_fuse, computes_in, no_autocast, plain
from peft.autograd.over import LowRankOnto, low_rank_onto
from peft.autograd.products import linear

__all__ = [
    "Dropout",
    "Form",
    "LowRankOnto",
    "Stack",
    "can_fuse",
    "computes_in",
    "form",
    "linear",
    "low_rank_onto",
    "mixed",
    "no_autocast",
    "plain",
    "stack",
]
