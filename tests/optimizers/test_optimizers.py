"""LoRA+, LoRA-FA and Riemannian preconditioning: the steps that their papers give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.errors import ConfigError
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.lin(self.emb(ids)))


def model(**options):
    torch.manual_seed(0)
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["lin"], "init_lora_weights": False, **options}
    return get_peft_model(Net(), LoraConfig(**config))


def train(net, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(torch.arange(7)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def factors(net):
    layer = net.get_base_model().lin
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def test_loraplus_groups():
    net = model(target_modules=["emb", "lin"], modules_to_save=["head"])
    options = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5, "betas": (0.8, 0.9)}
    optimizer = create_loraplus_optimizer(net, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, **options)
    names = {id(p): n.split("base_model.model.")[-1] for n, p in net.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "emb.lora_embedding_A.default": (1e-5, 0.1),
        "emb.lora_embedding_B.default": (1e-5, 0.1),
        "lin.lora_A.default.weight": (1e-3, 0.1),
        "lin.lora_B.default.weight": (8e-3, 0.1),
        "head.modules_to_save.default.weight": (1e-3, 0.1),
        "head.modules_to_save.default.bias": (8e-3, 0.0),
    }
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    before = train(net, optimizer)
    assert train(net, optimizer, 20) < before


def test_lorafa_moves_the_weight_along_its_own_gradient():
    net = model()
    down, up, scaling = factors(net)
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=1e-2)
    assert not down.requires_grad
    net(torch.arange(7)).square().mean().backward()
    grad = up.grad.clone()
    before, kept = up.detach().clone(), down.detach().clone()
    optimizer.step()
    assert torch.equal(down, kept)
    wanted = grad @ torch.linalg.inv(down @ down.mT) / scaling**2
    moment, square = 0.1 * wanted, 0.001 * wanted.square()
    step = 1e-2 * (1 - 0.999) ** 0.5 / (1 - 0.9) * moment / (square.sqrt() + 1e-6)
    torch.testing.assert_close(up.detach(), before - step, rtol=1e-4, atol=1e-5)


def test_lorafa_does_not_keep_the_input_of_a():
    net = model()
    create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=1e-2)
    before = train(net, optimizer := create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=1e-2))
    assert train(net, optimizer, 20) < before


def test_lorafa_state_survives_saving():
    net = model()
    optimizer = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=1e-2)
    train(net, optimizer, 3)
    twin = create_lorafa_optimizer(net, r=2, lora_alpha=6, lr=1e-2)
    twin.load_state_dict(optimizer.state_dict())
    up = factors(net)[1]
    assert torch.equal(twin.state[up]["exp_avg"], optimizer.state[up]["exp_avg"])


def test_lorafa_holds_callers_to_the_config():
    with pytest.raises(ValueError, match="says"):
        create_lorafa_optimizer(model(), r=4, lora_alpha=6, lr=1e-2)
    with pytest.raises(ValueError, match="use_rslora"):
        create_lorafa_optimizer(model(), r=2, lora_alpha=6, lr=1e-2, use_rslora=True)


def test_riemannian_gradients():
    net = model()
    down, up, _ = factors(net)
    optimizer = create_riemannian_optimizer(net, torch.optim.SGD, lr=1.0, reg=0.5)
    net(torch.arange(7)).square().mean().backward()
    eye, grads = torch.eye(2), (down.grad.clone(), up.grad.clone())
    before = down.detach().clone(), up.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before[0] - down, torch.linalg.inv(before[1].mT @ before[1] + 0.5 * eye) @ grads[0])
    torch.testing.assert_close(before[1] - up, grads[1] @ torch.linalg.inv(before[0] @ before[0].mT + 0.5 * eye))


@pytest.mark.parametrize("target", ["lin", "emb"])
def test_riemannian_steps_do_not_depend_on_how_the_factors_share_their_size(target):
    """The reason of the method: scaling A by c and B by 1/c changes nothing that the model computes, nor its path."""
    outputs = []
    for c in (1.0, 10.0):
        net = model(target_modules=[target]).double()
        layer = getattr(net.get_base_model(), target)
        held = [p for p in layer.parameters() if p.requires_grad]
        with torch.no_grad():
            held[0].mul_(c)
            held[1].div_(c)
        train(net, create_riemannian_optimizer(net, torch.optim.SGD, lr=1e-3, reg=1e-9), 3)
        outputs.append(net(torch.arange(7)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "create",
    [
        lambda net: create_loraplus_optimizer(net, torch.optim.SGD, lr=1, loraplus_lr_ratio=2),
        lambda net: create_riemannian_optimizer(net, torch.optim.SGD, lr=1),
        lambda net: create_lorafa_optimizer(net, 2, 2, 1),
    ],
)
def test_models_without_lora_are_refused(create):
    with pytest.raises(ConfigError, match="no active LoRA"):
        create(Net())
