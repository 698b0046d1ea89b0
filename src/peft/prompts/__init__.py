"""What is put before the input: virtual tokens, or keys and values for every attention layer.

One method is one file: prompt tuning, P-tuning, multitask prompt tuning and CPT make virtual tokens (`VirtualTokens`);
prefix tuning and cartridges make keys and values (`KeyValues`). Where prompts attach is written once, in `_attach`.

This is all that a model with prompts has to call. `model` is anything with `get_base_model()`, `prompt_encoder` (a
ModuleDict by adapter name), `peft_config` (configs by adapter name) and `active_adapters` (a list of names):

    encoder = prompts.build(config, base_model, fresh=True)   # fills in the config's sizes; fresh=False before loading
    prompts.forward(model, *args, **kwargs)           # understands adapter_names=, task_ids=, input_type_mask=
    prompts.generate(model, *args, **kwargs)
    prompts.get_prompt(model, batch_size, task_ids)   # the prompt alone, as HF PEFT's method of that name
    encoder.saved_tensors()                           # {"prompt_embeddings": …, …} to write
    encoder.load_tensors(tensors)                     # what was written, here or by HF PEFT
    encoder.rows()                                    # "prompt_embeddings", with gradients
    prompts.detach(base_model)                        # takes the hooks off, with the last prompt adapter

With adapters disabled, call the base model itself; it is as it was.
"""

from __future__ import annotations

from peft.prompts._attach import detach
from peft.prompts._calls import build, forward, generate, get_prompt
from peft.prompts._encoder import EMBEDDINGS_KEY, BasePromptEncoder, KeyValues, VirtualTokens

__all__ = [
    "EMBEDDINGS_KEY",
    "BasePromptEncoder",
    "KeyValues",
    "VirtualTokens",
    "build",
    "detach",
    "forward",
    "generate",
    "get_prompt",
]
