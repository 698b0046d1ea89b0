"""The path of HF PEFT for adapter state dicts."""

from peft.checkpoint.state import get_peft_model_state_dict as get_peft_model_state_dict
from peft.checkpoint.state import load_peft_weights as load_peft_weights
from peft.checkpoint.state import set_peft_model_state_dict as set_peft_model_state_dict
