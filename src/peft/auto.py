"""`AutoPeftModel…`: base model and adapter from the adapter's name alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from peft.checkpoint import files
from peft.config import PeftConfig, TaskType
from peft.errors import AdapterNotFoundError, ConfigError, nearest
from peft.model import PeftModel
from peft.tasks import model_class

_ALLOWED = ("transformers", "diffusers", "sentence_transformers")


def get_default_import_allowlist() -> list[str]:
    """Libraries whose classes an adapter file may name as its base model's."""
    return list(_ALLOWED)


def check_import_allowlist(allowlist: list[str], parent_name: str) -> None:
    """Raise unless a module named by a file belongs to a library on the list."""
    if parent_name.partition(".")[0] not in allowlist:
        raise ConfigError(
            f"The adapter names a base model class in {parent_name!r}. A file may not choose what is imported: load "
            "the base model yourself and use PeftModel.from_pretrained, or pass "
            f"import_allowlist={[parent_name.partition('.')[0]]}."
        )


class AutoPeftModel:
    """Loads the base model that an adapter names, then the adapter."""

    _target: ClassVar[str | None] = None
    _task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(adapter).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter together with its base model.

        Args:
            pretrained_model_name_or_path: The adapter: a folder, or a repository on the hub.
            adapter_name: The name it gets.
            is_trainable: Go on training.
            config: The adapter's config, if not the file's.
            revision: Revision of the adapter.
            import_allowlist: Libraries from which the base model's class may come, besides transformers.
            **kwargs: Passed to the base model's `from_pretrained` (`torch_dtype`, `device_map`, …).

        Raises:
            LoadError: the adapter names no base model, or one that can't be found.
        """
        options = {
            k: kwargs[k]
            for k in ("subfolder", "token", "cache_dir", "local_files_only", "force_download")
            if k in kwargs
        }
        adapter = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **options)
        base_name = adapter.base_model_name_or_path
        if not base_name:
            raise AdapterNotFoundError(
                f"The adapter {os.fspath(pretrained_model_name_or_path)!r} does not say which base model it belongs "
                "to. Load the base model yourself and use PeftModel.from_pretrained(base_model, adapter)."
            )
        base_options = {k: v for k, v in kwargs.items() if k != "subfolder"}
        base = cls._base_class(adapter, import_allowlist).from_pretrained(
            base_name, revision=adapter.revision or "main", **base_options
        )
        _fit_vocabulary(base, pretrained_model_name_or_path, options)
        target = model_class(cls._task) if cls._task else model_class(adapter.task_type)
        return target.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **options,
        )

    @classmethod
    def _base_class(cls, adapter: PeftConfig, allowlist: list[str] | None) -> Any:
        if cls._target is not None:
            if cls._task and adapter.task_type and TaskType(adapter.task_type).value != cls._task:
                raise ConfigError(
                    f"Expected target PEFT class: {model_class(adapter.task_type).__name__}, but you have asked for: "
                    f"{model_class(cls._task).__name__}. Make sure that you are loading the correct model for your "
                    f"task type."
                )
            return getattr(importlib.import_module("transformers"), cls._target)
        if adapter.task_type is not None:
            name = next(
                c._target for c in AutoPeftModel.__subclasses__() if c._task == TaskType(adapter.task_type).value
            )
            return getattr(importlib.import_module("transformers"), str(name))
        mapping = adapter.auto_mapping or {}
        name, parent = mapping.get("base_model_class"), mapping.get("parent_library")
        if not name or not parent:
            raise ConfigError("The adapter's config names neither a task nor the class of its base model.")
        check_import_allowlist([*get_default_import_allowlist(), *(allowlist or [])], parent)
        library = importlib.import_module(parent)
        if not hasattr(library, name):
            raise ConfigError(f"{parent} has no class {name!r}.{nearest(name, dir(library))}")
        return getattr(library, name)


def _fit_vocabulary(base: Any, source: str | os.PathLike, options: dict[str, Any]) -> None:
    """Resize the embeddings if a tokenizer saved beside the adapter has more tokens than the base model."""
    folder = os.path.join(os.fspath(source), options.get("subfolder") or "")
    if not os.path.isdir(folder) or not files.exists(folder, "tokenizer_config.json"):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    current = base.get_input_embeddings()
    if current is not None and len(tokenizer) > current.num_embeddings:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for CAUSAL_LM."""

    _target, _task = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for SEQ_2_SEQ_LM."""

    _target, _task = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for SEQ_CLS."""

    _target, _task = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for TOKEN_CLS."""

    _target, _task = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for QUESTION_ANS."""

    _target, _task = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for FEATURE_EXTRACTION."""

    _target, _task = "AutoModel", "FEATURE_EXTRACTION"
