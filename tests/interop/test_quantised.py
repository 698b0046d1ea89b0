"""Adapters on bitsandbytes' layers against the reference, where it has them right."""

from __future__ import annotations

import pytest

from tests.interop import compare
from tests.reference.actions import Case, Config

pytest.importorskip("bitsandbytes")

CONFIGS = {
    "lora": Config("LoraConfig", {"r": 4, "target_modules": ["tgt"]}),
    "rslora": Config("LoraConfig", {"r": 4, "target_modules": ["tgt"], "use_rslora": True, "bias": "lora_only"}),
    "ia3": Config("IA3Config", {"target_modules": ["tgt"], "feedforward_modules": []}),
    "adalora": Config("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["tgt"]}),
    "oft": Config("OFTConfig", {"oft_block_size": 8, "target_modules": ["tgt"]}),
    "vera": Config("VeraConfig", {"r": 8, "target_modules": ["tgt"]}),
    "road": Config("RoadConfig", {"group_size": 8, "target_modules": ["tgt"]}),
    "miss": Config("MissConfig", {"r": 4, "target_modules": ["tgt"]}),
    "loha": Config("LoHaConfig", {"r": 4, "target_modules": ["tgt"]}),
}
MERGED_RIGHT = ("lora", "rslora", "vera", "road", "miss")
"""In 8 bits; in 4 the reference reads the weight as if bitsandbytes had not laid it out anew for the CPU."""
CASES = [
    Case(f"{name}-bnb{bits}", f"L.bnb{bits}", config, mergeable=bits == 8 and name in MERGED_RIGHT)
    for bits in (8, 4)
    for name, config in CONFIGS.items()
    if (bits, name) != (4, "loha")  # the reference raises
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestBitsandbytes:
    def test_born_alike(self, pair, case):
        compare.check_birth(pair, case)

    def test_written_alike(self, pair, case):
        compare.check_files(pair, case)

    def test_each_reads_the_other(self, pair, case):
        for writer, reader in ((pair.ours, pair.reference), (pair.reference, pair.ours)):
            compare.check_transfer(pair, case, writer, reader, 1e-4)
