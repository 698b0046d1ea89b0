"""The only room that knows other libraries by name. Each is imported when it is used."""

from peft.integrations.kbit import prepare_model_for_kbit_training, require_input_gradients

__all__ = ["prepare_model_for_kbit_training", "require_input_gradients"]
