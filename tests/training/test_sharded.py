"""Training with parameters sharded over processes (FSDP2): the same steps as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from peft.autograd import costs
from peft.errors import SaveError

pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
WORLD = 2
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    "DoRA": lambda: LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "LoHa": lambda: LoHaConfig(r=2, target_modules="all-linear"),
    "OFT": lambda: OFTConfig(oft_block_size=8, target_modules="all-linear"),
}


def build(config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), config)


def steps(model: nn.Module, ids: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def process(rank: int, meeting: str, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    mesh, ids = init_device_mesh("cpu", (WORLD,)), torch.arange(24).view(2, 12)
    for small in (costs.SMALL, 0):
        costs.SMALL = small
        for name, config in CONFIGS.items():
            whole, sharded = build(config()), build(config())
            for layer in sharded.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            torch.testing.assert_close(steps(sharded, ids), steps(whole, ids), msg=lambda m, name=name: f"{name}: {m}")
            wanted, parts = get_peft_model_state_dict(whole), get_peft_model_state_dict(sharded)
            gathered = {key: part.full_tensor() for key, part in parts.items()}  # type: ignore[union-attr]
            torch.testing.assert_close(gathered, wanted, rtol=1e-3, atol=1e-4)
            with pytest.raises(SaveError, match="full_tensor"):
                sharded.save_pretrained(folder)
            dist.barrier()
    dist.destroy_process_group()


def test_sharded_training_takes_the_same_steps(tmp_path: Path):
    mp.spawn(process, args=(str(tmp_path / "meeting"), str(tmp_path / "out")), nprocs=WORLD)
