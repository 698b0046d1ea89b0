"""The path of HF PEFT for LoRA."""

from peft.methods.lora.config import ArrowConfig as ArrowConfig
from peft.methods.lora.config import BdLoraConfig as BdLoraConfig
from peft.methods.lora.config import EvaConfig as EvaConfig
from peft.methods.lora.config import LoftQConfig as LoftQConfig
from peft.methods.lora.config import LoraConfig as LoraConfig
from peft.methods.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from peft.tuners.lora.bnb import Linear4bit as Linear4bit
from peft.tuners.lora.bnb import Linear8bitLt as Linear8bitLt
from peft.tuners.lora.layer import Conv1d as Conv1d
from peft.tuners.lora.layer import Conv2d as Conv2d
from peft.tuners.lora.layer import Conv3d as Conv3d
from peft.tuners.lora.layer import Embedding as Embedding
from peft.tuners.lora.layer import Linear as Linear
from peft.tuners.lora.layer import LoraLayer as LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as MultiheadAttention
from peft.tuners.lora.layer import ParamWrapper as ParamWrapper
from peft.tuners.lora.model import LoraModel as LoraModel

from peft.tuners.lora import config as config  # isort: skip
