"""The path under which other libraries look for `PeftModel`."""

from peft.model import PeftModel as PeftModel
from peft.status import TunerLayerStatus as TunerLayerStatus
from peft.status import TunerModelStatus as TunerModelStatus
from peft.status import get_layer_status as get_layer_status
from peft.status import get_model_status as get_model_status
from peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from peft.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from peft.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from peft.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from peft.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from peft.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
