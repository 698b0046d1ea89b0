"""Adapter algebra: weighted sums, TIES, DARE, pruning, and conversion to LoRA.

Tensors:
    factored     sums of low-rank matrices that stay factored, and the best cut of one to a rank
    prune merge  pruning and merging of task tensors
    terms        a term, a recipe, a result, a report
    weighted     the eleven combination types over {layer: terms}; `reference`: HF PEFT's numbers for them
    layouts      LoRA's tensors as factors, for linear, convolution, embedding and expert layers
Adapters:
    lora linear  which adapters can be added, and the config of the sum: LoRA, and methods linear in their tensors
    files        `combine_files`: adapter files, without a base model
    changes      what an adapter changes on an adapted layer
    models       `model.add_weighted_adapter`
    convert      `convert_to_lora`, `save_as_lora`: any mergeable adapter as LoRA
"""
