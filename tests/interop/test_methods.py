"""Every other method against the reference, each on the layers and models where the reference has it.

A method is tested from the moment it is registered. Where the reference contradicts itself (its forward and its merge
disagree) only the right one of them is compared.
"""

from __future__ import annotations

import pytest

import peft
from tests.interop import compare
from tests.interop.method_cases import METHODS, cases

TOLERANCE = 1e-5

REGISTERED = {peft_type.value for peft_type in peft.PEFT_TYPE_TO_CONFIG_MAPPING}

#: OFT on convolutions larger than 1x1: the reference's forward folds overlapping patches, so that it is not what it
#: merges, nor the base model at the start. What it merges is right.
MERGED_ONLY = {"OFT-convlin", "OFT-L.Conv2d"}

#: BOFT with several butterfly factors: without its CUDA extension the reference trains one, whatever the config says.
ONLY_FROM_REFERENCE = {"BOFT-L.Linear-2"}

CASES = [case for case in cases() if case.name.split("-")[0] in REGISTERED]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
shared_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ONLY_FROM_REFERENCE], ids=lambda case: case.name
)


def outputs(case):
    """Which outputs are compared."""
    return ("merged",) if case.name in MERGED_ONLY else ("output", "merged")


def spelled_freely(case):
    """Config fields in which the two say the same in other words, or where the reference says nothing (HiRA)."""
    fields = ["target_modules"] if "all-linear" in case.name or case.name.startswith("OSF-") else []
    return [*fields, "fan_in_fan_out"] if case.name.startswith("HIRA-") else fields


def test_every_registered_method_has_cases():
    builtin = {name for name in REGISTERED if name not in ("LORA", "XLORA")}
    assert builtin & set(METHODS) == builtin & {peft_type.value for peft_type in peft.PeftType}


@shared_cases
def test_born_alike(pair, case):
    compare.check_birth(pair, case, start=case.name not in MERGED_ONLY)


@shared_cases
def test_written_alike(pair, case):
    compare.check_files(pair, case, ignore=spelled_freely(case))


@every_case
def test_reads_what_the_reference_wrote(pair, case):
    compare.check_transfer(pair, case, pair.reference, pair.ours, tolerance=TOLERANCE, outputs=outputs(case))


@shared_cases
def test_the_reference_reads_what_we_wrote(pair, case):
    compare.check_transfer(pair, case, pair.ours, pair.reference, tolerance=TOLERANCE, outputs=outputs(case))
