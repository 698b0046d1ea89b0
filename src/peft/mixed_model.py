"""`PeftMixedModel`: the name under which HF PEFT mixes methods. Every `PeftModel` here can."""

from __future__ import annotations

from collections.abc import Sequence

from peft.model import PeftModel


class PeftMixedModel(PeftModel):
    """A base model with adapters of several methods, several active at once, in the order given to `set_adapter`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"]), "a", mixed=True)
        >>> model.add_adapter("b", LoraConfig(target_modules=["0"], r=2))
        >>> model.set_adapter(["a", "b"])
        >>> model.active_adapters
        ['a', 'b']
    """

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter, or several."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            super().delete_adapter(name)
