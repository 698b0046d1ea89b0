"""One `PeftModel` per task. They differ in the head that trains with every adapter and in what `forward` names."""

from __future__ import annotations

import inspect
from typing import Any

from peft.config import TaskType
from peft.model import PeftModel

_COMMON = "input_ids attention_mask inputs_embeds labels output_attentions output_hidden_states return_dict task_ids"
_SEQ2SEQ = (
    "input_ids attention_mask inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels "
    "output_attentions output_hidden_states return_dict task_ids"
)
_QUESTION = (
    "input_ids attention_mask token_type_ids position_ids inputs_embeds start_positions end_positions "
    "output_attentions output_hidden_states return_dict task_ids"
)
_FEATURES = "input_ids attention_mask inputs_embeds output_attentions output_hidden_states return_dict task_ids"


def _named_forward(names: str) -> Any:
    """`PeftModel.forward` with a signature, for those who inspect it; positional arguments go by it."""
    order = names.split()

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(order):
            raise TypeError(f"forward takes at most {len(order)} positional arguments: {', '.join(order)}.")
        kwargs.update(zip(order, args, strict=False))
        return PeftModel.forward(self, **{k: v for k, v in kwargs.items() if v is not None or k not in order})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    parameters += [inspect.Parameter(name, kind, default=None) for name in order]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    forward.__doc__ = PeftModel.forward.__doc__
    return forward


class PeftModelForCausalLM(PeftModel):
    """For language models that go on with a text.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft import LoraConfig, get_peft_model
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
        >>> type(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))).__name__
        'PeftModelForCausalLM'
    """

    forward = _named_forward(_COMMON)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The base model's own."""
        base: Any = self.get_base_model()
        return base.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoders that turn one text into another."""

    forward = _named_forward(_SEQ2SEQ)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The base model's own."""
        base: Any = self.get_base_model()
        return base.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """For models that label a text; the classification head trains with every adapter."""

    head_modules = ("classifier", "score")
    forward = _named_forward(_COMMON)


class PeftModelForTokenClassification(PeftModel):
    """For models that label each token; the classification head trains with every adapter."""

    head_modules = ("classifier", "score")
    forward = _named_forward(_COMMON)


class PeftModelForQuestionAnswering(PeftModel):
    """For models that find an answer's span; the span head trains with every adapter."""

    head_modules = ("qa_outputs",)
    forward = _named_forward(_QUESTION)


class PeftModelForFeatureExtraction(PeftModel):
    """For models that embed a text."""

    forward = _named_forward(_FEATURES)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def model_class(task: str | TaskType | None) -> type[PeftModel]:
    """The class for a task; `PeftModel` for none."""
    return PeftModel if task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task).value]
