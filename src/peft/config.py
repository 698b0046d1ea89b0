"""Configs: what a method is told, in memory and in `adapter_config.json`. Knows JSON, never torch.

Every config is a dataclass. `PeftConfig` holds what all share, `TargetedConfig` how modules are chosen (for methods
that change layers), `PromptLearningConfig` the shape of a prompt. A method adds its own fields in its own file and is
found by its `PeftType`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from peft import registry, typecheck
from peft.checkpoint import files
from peft.errors import ConfigError, PeftWarning, UnknownOptionError, nearest
from peft.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "adapter_config.json"
_RUN_ONLY = ("allow_unmatched",)
"""Fields that steer one call and are no part of an adapter."""


class PeftType(str, Enum):
    """The methods. Third-party methods become members when they register (entry point `peft.methods`)."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"

    @classmethod
    def _missing_(cls, value: object) -> PeftType | None:
        """Members for methods that this list does not name, ours or other packages'; the enum itself is closed."""
        if not isinstance(value, str) or not value:
            return None
        name = value.upper()
        if name in cls._value2member_map_:
            return cls(name)
        if name not in registry.names():
            return None
        member = str.__new__(cls, name)
        member._name_, member._value_ = name, name
        cls._value2member_map_[name] = member
        return member


class TaskType(str, Enum):
    """What the base model's head is for; chooses the `PeftModel` subclass."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfigMixin:
    """Fields that stand in every adapter file, and the way in and out of JSON."""

    task_type: str | TaskType | None = field(default=None, metadata={"help": "Task of the base model's head."})
    peft_type: str | PeftType | None = field(default=None, metadata={"help": "Method; set by each config class."})
    auto_mapping: dict | None = field(default=None, metadata={"help": "Base class and module, when no task is given."})
    peft_version: str | None = field(default=None, metadata={"help": "Version that wrote the file."})

    # Lists of a config that comes from a file may be those of a sibling model: entries without a match only warn.
    _from_file: ClassVar[bool] = False
    # Fields left out of the file while they have their default, since HF PEFT's config of the method lacks them.
    _optional: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        unknown = [name for name in kwargs if name not in cls.__dataclass_fields__]
        if unknown and "__init__" in cls.__dict__:  # of a dataclass, or of a subclass with one of its own
            taken = inspect.signature(cls.__init__).parameters
            if unknown[0] not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                options = [f.name for f in dataclasses.fields(cls) if f.init]
                raise UnknownOptionError(
                    f"{cls.__name__} has no option {unknown[0]!r}.{nearest(unknown[0], options)} Options: "
                    f"{', '.join(options)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.task_type = _enum(TaskType, self.task_type, "task_type")
        self.peft_type = _enum(PeftType, getattr(self, "_peft_type", self.peft_type), "peft_type")
        if self.peft_version is None:
            self.peft_version = __version__

    @property
    def is_prompt_learning(self) -> bool:
        """True for methods that put something before the input and leave the layers alone."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """True for the adaption prompt, which has its own place inside attention."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields as a plain dict, nested dataclasses included; `type(config)(**config.to_dict())` gives it back."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in _RUN_ONLY or value}

    def to_file_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: JSON types only, sets sorted, enums as strings."""
        defaults = {f.name: _default(f) for f in dataclasses.fields(self)}
        return {
            key: _plain(value)
            for key, value in self.to_dict().items()
            if key not in ("runtime_config", *_RUN_ONLY) and not (key in self._optional and value == defaults.get(key))
        }

    def to_json_string(self) -> str:
        """The text of `adapter_config.json`."""
        return json.dumps(self.to_file_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory` (made if missing), atomically.

        Args:
            save_directory: A folder.
            **kwargs: `auto_mapping_dict` sets `auto_mapping` in the file; `push_to_hub=True` uploads the folder.
        """
        if os.path.isfile(save_directory):
            raise ConfigError(f"{os.fspath(save_directory)!r} is a file; give a folder to save the config into.")
        config = self
        if (auto_mapping := kwargs.pop("auto_mapping_dict", None)) is not None:
            config = dataclasses.replace(self, auto_mapping=auto_mapping)
        files.save(save_directory, {CONFIG_NAME: config.to_json_string()})
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload `adapter_config.json` to the hub; returns the URL. Keywords as in `huggingface_hub.upload_folder`."""
        from peft.checkpoint import hub

        return hub.push(lambda folder: self.save_pretrained(folder), repo_id, **kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config of the class that `peft_type` names (or of this class, if none is named).

        Keys that the class does not know are left out: quietly when they are unset, with a `PeftWarning` otherwise.
        """
        peft_type = kwargs.get("peft_type")
        if not isinstance(peft_type, (str, type(None))):
            raise ConfigError(f"peft_type is {peft_type!r}; it must be the name of a method.")
        target: Any = registry.config_class(str(getattr(peft_type, "value", peft_type))) if peft_type else cls
        if issubclass(cls, target) or not issubclass(target, cls):
            target = cls if cls not in (PeftConfig, PeftConfigMixin) else target
        config: Any = target(**typecheck.fitted(target, target.check_kwargs(**kwargs)))
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Keep the keys that are fields of this class; warn of those that are not and hold something."""
        known = set(inspect.signature(cls).parameters)
        unknown = {key: value for key, value in kwargs.items() if key not in known}
        meaningful = sorted(
            key for key, value in unknown.items() if value not in (None, False, "none") and value != {} and value != []
        )
        if meaningful:
            version = kwargs.get("peft_version") or "an unknown version"
            hints = "".join(nearest(key, known) for key in meaningful[:1])
            warnings.warn(
                f"{CONFIG_NAME} was written by peft {version} and sets {meaningful}, which {cls.__name__} does not "
                f"know; they are ignored, and the adapter may behave differently.{hints}",
                PeftWarning,
                stacklevel=3,
            )
        return {key: value for key, value in kwargs.items() if key in known}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the config of a saved adapter, as an instance of its method's class.

        Args:
            pretrained_model_name_or_path: A folder, or a repository on the hub.
            subfolder: Folder inside it.
            **kwargs: Hub options (`revision`, `token`, `cache_dir`, …); others override fields of the config.

        Raises:
            LoadError: no such folder or repository, or no `adapter_config.json` in it.
            CorruptFileError: the file is not a config.
        """
        hub_options = {k: kwargs.pop(k) for k in list(kwargs) if k in files.HUB_OPTIONS}
        path = files.locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_options)
        loaded = files.read_config(path)
        config = cls.from_peft_type(**{**loaded, **kwargs})
        config._from_file = True  # type: ignore[attr-defined]
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """Read a config file as a dict. Nothing in it is interpreted."""
        return files.read_config(path_json_file)


@dataclass
class PeftConfig(PeftConfigMixin):
    """Base of all configs.

    Example:
        >>> from peft import LoraConfig, PeftConfig
        >>> LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained("/tmp/peft-doc-config")
        >>> PeftConfig.from_pretrained("/tmp/peft-doc-config").r
        4
    """

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Name or folder of the base model."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    inference_mode: bool = field(default=False, metadata={"help": "True in files: loaded adapters start frozen."})


@dataclass
class TargetedConfig(PeftConfig):
    """Base of the configs of methods that change layers: which modules, which parameters, what else is trained."""

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (a module matches if its name equals an entry or ends with '.' + entry), a regex "
            "(full match), 'all-linear', or None for the default of the model's architecture."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Matched like target_modules; wins over it."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, besides the adapter (a new head, say)."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only layers of these indices; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that the indices count, if not the usual ones."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "nn.Parameters to adapt by name (expert stacks of a mixture of experts)."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embedding rows are trained, or {embedding name: ids}."}
    )
    ensure_weight_tying: bool | None = field(
        default=None,
        metadata={
            "help": "Weights that the base model ties: True keeps them tied in the adapter, False trains them apart, "
            "None (new adapters) ties them and writes down what was done."
        },
    )
    allow_unmatched: bool = field(
        default=False,
        metadata={
            "help": "Accept entries of the lists above (and of patterns) that match nothing, for one list that "
            "serves several models. Never saved."
        },
    )
    bias: str = field(
        default="none", metadata={"help": "Base biases to train: 'none', 'all', or '<method>_only' (adapted layers)."}
    )

    _optional: ClassVar[frozenset[str]] = frozenset(
        {"target_parameters", "trainable_token_indices", "ensure_weight_tying", "bias"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} counts layers of a list of target_modules, but target_modules is the regex "
                        f"{self.target_modules!r}. Put the layer indices into the regex, or give a list of names."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "layers_pattern says where layers are counted; set layers_to_transform to say which ones."
            )
        _check_regexes(self)

    def to_file_dict(self) -> dict[str, Any]:
        found = super().to_file_dict()
        if found.get("ensure_weight_tying", True) is None:  # nothing was tied; files know only yes and no
            found["ensure_weight_tying"] = False
        return found


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base of the configs of prompt methods. Sizes left None are read off the base model."""

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Length of the prompt, in tokens."})
    token_dim: int | None = field(default=None, metadata={"help": "Width of a token (hidden size)."})
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "2 for encoder-decoders, else 1."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention (key/value) heads."})
    num_layers: int | None = field(default=None, metadata={"help": "Transformer layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})

    @property
    def is_prompt_learning(self) -> bool:
        return True


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config object that a dict describes; `config_dict["peft_type"]` names the method.

    >>> get_peft_config({"peft_type": "LORA", "r": 2}).r
    2
    """
    return registry.config_class(str(config_dict["peft_type"]))(**config_dict)


def nested(value: Any, cls: type, name: str) -> Any:
    """`value` as an instance of the dataclass `cls`: files hold nested configs as dicts."""
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a {cls.__name__} or a dict of its fields, not {type(value).__name__}.")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - known):
        raise ConfigError(f"{name} has no field {unknown[0]!r}.{nearest(unknown[0], known)} Fields: {sorted(known)}.")
    return cls(**typecheck.fitted(cls, value))


def choice(config: Any, name: str, allowed: tuple) -> None:
    """Raise unless `config.<name>` is one of `allowed`."""
    value = getattr(config, name)
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        hint = nearest(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{type(config).__name__}.{name} is {value!r}; it must be one of {list(allowed)}.{hint}")


def positive(config: Any, *names: str) -> None:
    """Raise unless each of the fields is a whole number above zero."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{type(config).__name__}.{name} is {value!r}; it must be a whole number above 0.")


def _check_regexes(config: TargetedConfig) -> None:
    from peft import patterns

    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value != "all-linear":
            patterns.check(value, where=f"{type(config).__name__}.{name}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name, None) or ():
            patterns.check(key, where=f"{type(config).__name__}.{name}")


def _enum(cls: type[Enum], value: Any, name: str) -> Any:
    if value is None or isinstance(value, cls):
        return value
    try:
        return cls(value)
    except ValueError:
        names = [m.value for m in cls]
        raise ConfigError(f"{name} {value!r} is unknown.{nearest(str(value), names)} Known: {names}.") from None


def _default(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
