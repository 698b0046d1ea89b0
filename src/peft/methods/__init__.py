"""Methods that change weights: one paper, one file, named by its `PeftType` in lower case. `peft.registry` finds
them."""
