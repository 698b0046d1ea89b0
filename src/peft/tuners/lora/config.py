"""The path of HF PEFT for LoRA's configs."""

from peft.methods.lora.config import ArrowConfig as ArrowConfig
from peft.methods.lora.config import BdLoraConfig as BdLoraConfig
from peft.methods.lora.config import CordaConfig as CordaConfig
from peft.methods.lora.config import EvaConfig as EvaConfig
from peft.methods.lora.config import KasaConfig as KasaConfig
from peft.methods.lora.config import LoftQConfig as LoftQConfig
from peft.methods.lora.config import LoraConfig as LoraConfig
from peft.methods.lora.config import LoraGAConfig as LoraGAConfig
from peft.methods.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
from peft.methods.lora.config import MontecloraConfig as MontecloraConfig
from peft.methods.lora.config import VeloraConfig as VeloraConfig
