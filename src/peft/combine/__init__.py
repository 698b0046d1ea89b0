"""Adapter algebra: weighted sums, TIES, DARE, pruning, and conversion to LoRA.

factored     sums of low-rank matrices that stay factored, and the best cut of one to a rank
prune merge  pruning and merging of task tensors
terms        a term, a recipe, a result, a report
weighted     the eleven combination types over {layer: terms};  reference: HF PEFT's numbers for them
layouts      LoRA's tensors as factors, for linear, convolution, embedding and expert layers
files        the same on adapter files, without a base model
convert      any operator as LoRA factors
"""
