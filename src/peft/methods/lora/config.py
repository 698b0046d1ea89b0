"""The config of LoRA, with the configs of its variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.config import TargetedConfig, choice, nested, positive
from peft.errors import ConfigError


@dataclass
class LoraRuntimeConfig:
    """Options of this run that files don't keep."""

    ephemeral_gpu_offload: bool = False


@dataclass
class VeloraConfig:
    """VeLoRA (arXiv 2405.17991): rank-1 compression of saved activations."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"


@dataclass
class LoftQConfig:
    """LoftQ (arXiv 2310.08659): initialisation that makes up for quantisation."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class ArrowConfig:
    """Arrow (arXiv 2405.11157): routing among LoRAs without training."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA, for sharded serving."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True


@dataclass
class EvaConfig:
    """EVA (arXiv 2410.07170): initialisation from activations."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class KasaConfig:
    """KaSA (arXiv 2412.06071): singular-value adaptation of a truncated weight."""

    beta: float = 0.0001
    gamma: float = 0.001


@dataclass
class CordaConfig:
    """CorDA (arXiv 2406.05223): context-oriented decomposition."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv 2407.05000): initialisation from gradients."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class MontecloraConfig:
    """MonteCLoRA (arXiv 2411.04358): sampled mixtures of A."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150


_NESTED: dict[str, type] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "runtime_config": LoraRuntimeConfig,
}
INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")


@dataclass
class LoraConfig(TargetedConfig):
    """LoRA (arXiv 2106.09685): W + s B A with A (r, in) and B (out, r) trained, s = alpha / r.

    Raises:
        ConfigError: a value that is not legal, or two options that exclude each other.

    Example:
        >>> from peft import LoraConfig
        >>> LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).r
        16
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: int = field(default=8, metadata={"help": "Scaling numerator: the update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, while training."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is (in, out); found out by layer type."})
    bias: Literal["none", "all", "lora_only"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="none", metadata={"help": "Base biases to train."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) (arXiv 2312.03732)."})
    init_lora_weights: bool | str = field(
        default=True,
        metadata={"help": "True: A random, B zero, so training starts at the base model. False: both random."},
    )
    rank_pattern: dict | None = field(
        default_factory=dict, metadata={"help": "{name or regex: rank}; first match wins."}
    )
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "{name or regex: lora_alpha}."})
    megatron_config: dict | None = field(
        default=None, metadata={"help": "Arguments of Megatron's parallel linear layers."}
    )
    megatron_core: str | None = field(default="megatron.core", metadata={"help": "Module that has them."})
    loftq_config: LoftQConfig | dict = field(default_factory=dict, metadata={"help": "For init_lora_weights='loftq'."})
    eva_config: EvaConfig | None = field(default=None, metadata={"help": "For init_lora_weights='eva'."})
    corda_config: CordaConfig | None = field(default=None, metadata={"help": "For init_lora_weights='corda'."})
    lora_ga_config: LoraGAConfig | None = field(default=None, metadata={"help": "For init_lora_weights='lora_ga'."})
    use_dora: bool = field(
        default=False, metadata={"help": "Train row lengths apart from directions (arXiv 2402.09353)."}
    )
    velora_config: VeloraConfig | dict | None = field(default=None, metadata={"help": "Compress saved activations."})
    alora_invocation_tokens: list[int] | None = field(default=None, metadata={"help": "aLoRA (arXiv 2504.12397)."})
    use_qalora: bool = field(default=False, metadata={"help": "QA-LoRA (arXiv 2309.14717), on GPTQ layers."})
    qalora_group_size: int = field(default=16, metadata={"help": "Group size of QA-LoRA."})
    monteclora_config: MontecloraConfig | None = field(default=None, metadata={"help": "MonteCLoRA."})
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Ranges of layers to stack."}
    )
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata={"help": "Not saved."})
    lora_bias: bool = field(default=False, metadata={"help": "Give B a bias."})
    use_bdlora: BdLoraConfig | None = field(default=None, metadata={"help": "Block-diagonal factors."})
    arrow_config: ArrowConfig | None = field(default=None, metadata={"help": "Routing among several LoRAs."})
    kasa_config: KasaConfig | None = field(default=None, metadata={"help": "KaSA."})

    _optional: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        positive(self, "r")
        choice(self, "bias", ("none", "all", "lora_only"))
        if not 0 <= self.lora_dropout <= 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}; it is a probability, from 0 to 1.")
        for name, cls in _NESTED.items():
            setattr(self, name, nested(getattr(self, name), cls, name))
        if isinstance(self.init_lora_weights, str):
            self._check_init()
        if self.lora_bias and (self.use_dora or self.init_lora_weights not in (True, False)):
            raise ConfigError("lora_bias goes with init_lora_weights True or False, and without use_dora.")
        self._check_variants()

    def _check_init(self) -> None:
        name = str(self.init_lora_weights).lower()
        if name.startswith("pissa_niter_") and name.removeprefix("pissa_niter_").isdigit():
            return
        self.init_lora_weights = name
        choice(self, "init_lora_weights", (True, False, *INITS))

    def _check_variants(self) -> None:
        chosen = [name for name in variants(self) if name != "use_qalora"]
        if len(chosen) > 1:
            raise ConfigError(f"Invalid or unsupported variant combination: {tuple(chosen)}. Choose one of them.")

    @property
    def _custom_modules(self) -> Any:
        return getattr(self, "_registered_modules", None)

    def _register_custom_module(self, mapping: dict) -> None:
        """Layer classes by base class, as some libraries register; kept for them, never written to files."""
        self._registered_modules = {**(self._custom_modules or {}), **mapping}

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("runtime_config", None)
        return values


def variants(config: LoraConfig) -> list[str]:
    """The fields that ask for another forward pass than plain LoRA's."""
    names = ("use_dora", "arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config")
    chosen = [name for name in (*names, "kasa_config", "use_qalora") if getattr(config, name)]
    return [*chosen, "init_lora_weights='mica'"] if config.init_lora_weights == "mica" else chosen
