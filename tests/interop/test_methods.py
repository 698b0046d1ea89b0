"""Every other method against the reference, each on the layers and models where the reference has it.

A method is tested from the moment it is registered. Where the reference contradicts itself (its forward and its merge
disagree) only the forward is compared.
"""

from __future__ import annotations

import dataclasses

import pytest

import peft
from tests.interop import compare
from tests.interop.method_cases import METHODS, cases

TOLERANCE = 1e-5

REGISTERED = {peft_type.value for peft_type in peft.PEFT_TYPE_TO_CONFIG_MAPPING}

#: OFT on convolutions larger than 1x1: the reference merges another weight than its forward applies.
FORWARD_ONLY = {"OFT-convlin", "OFT-L.Conv2d"}

CASES = [
    dataclasses.replace(case, mergeable=case.mergeable and case.name not in FORWARD_ONLY)
    for case in cases()
    if case.name.split("-")[0] in REGISTERED
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_registered_method_has_cases():
    builtin = {name for name in REGISTERED if name not in ("LORA", "XLORA")}
    assert builtin & set(METHODS) == builtin & {peft_type.value for peft_type in peft.PeftType}


@every_case
def test_born_alike(pair, case):
    compare.check_birth(pair, case)


@every_case
def test_written_alike(pair, case):
    compare.check_files(pair, case)


@every_case
def test_reads_what_the_reference_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.reference, reader=pair.ours, tolerance=TOLERANCE)


@every_case
def test_the_reference_reads_what_we_wrote(pair, case):
    compare.check_transfer(pair, case, writer=pair.ours, reader=pair.reference, tolerance=TOLERANCE)
