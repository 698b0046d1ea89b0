"""`PeftModel`: a base model with adapters by name. The user's façade; the work is done in the rooms below it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft import inject, integrations, persistence, prompts, routing, status, whole
from peft.auxiliary import check_name
from peft.checkpoint import files, hub, state
from peft.checkpoint.report import LoadReport
from peft.config import PeftConfig, PeftType, TaskType
from peft.errors import AdapterNameError, PeftWarning, StateError, nearest
from peft.tuner import tuner_class

WEIGHTS_NAME = files.BIN_NAME
SAFETENSORS_WEIGHTS_NAME = files.SAFETENSORS_NAME


class PeftModel(nn.Module):
    """A base model and its adapters. Attributes it lacks are those of the base model.

    Args:
        model: The base model; it is changed in place (layers are wrapped, parameters frozen).
        peft_config: The config of the first adapter.
        adapter_name: Its name.
        autocast_adapter_dtype: Train adapters of half precision models in float32.
        low_cpu_mem_usage: Create the adapter on the meta device, for a load that follows.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, PeftModel
        >>> model = PeftModel(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> model(torch.ones(1, 4)).shape
        torch.Size([1, 3])
    """

    base_model: Any
    prompt_encoder: Any
    active_adapter: Any
    head_modules: tuple[str, ...] = ()
    """Names of a task's heads, which train whole with every adapter."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.active_adapter = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._peft_config: dict[str, PeftConfig] = {}
        self._train_heads(peft_config)
        if peft_config.is_prompt_learning:
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        else:
            cls = tuner_class(inject.peft_type_name(peft_config))
            self.base_model = cls(
                model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage, state_dict, autocast_adapter_dtype
            )
        self._fit_base(model)

    def _fit_base(self, model: nn.Module) -> None:
        """Set up what the base model was told before it had adapters: checkpointing, slices of weights."""
        if any(m.__dict__.get("gradient_checkpointing", False) for _, m in whole.walk(model)):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1  # slices weights of layers that may be wrapped now

    # ---------------------------------------------------------------- what it is

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs of all adapters, by name."""
        own: dict[str, PeftConfig] = self.__dict__["_peft_config"]
        if not self._has_tuner:
            return own
        theirs: dict[str, PeftConfig] = self.base_model.peft_config
        return {**theirs, **own} if own else theirs

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        if self._has_tuner:
            self.base_model.peft_config = value
        else:
            self._peft_config = value

    @property
    def _has_tuner(self) -> bool:
        from peft.tuner import BaseTuner

        return isinstance(self._modules.get("base_model"), BaseTuner)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        names = [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)
        if self._has_tuner and not any(name in self._peft_config for name in names):
            return self.base_model.active_adapters
        return names

    @property
    def active_peft_config(self) -> PeftConfig:
        """Config of the (first) active adapter."""
        name = self.active_adapter if isinstance(self.active_adapter, str) else self.active_adapter[0]
        return self.peft_config[name]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter changes what the model computes now."""
        route = routing.current()
        if route is not None and route.rows is not None:
            return any(name != routing.BASE for name in route.rows)
        if any(name in self._peft_config for name in self.active_adapters):
            return route is None or any(name in self._peft_config for name in route.names)
        return any(layer._stack(route) for layer in whole.layers(self))

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of modules that some adapter trains whole."""
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype."""
        return getattr(self.get_base_model(), "dtype", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters that are in its layers."""
        return self.base_model.model if self._has_tuner else self.base_model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.get_base_model())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; shared ones count once, 4-bit ones as what they stand for."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """A report of each adapted layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """A report of the model as a whole."""
        return status.get_model_status(self)

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. `adapter_names`, one per sample (`"__base__"`: none), mixes adapters in the batch."""
        # Compiled code looks once, while it is traced: it would be compiled anew for what changes in a look.
        if self.training and (torch.compiler.is_compiling() or not self._trains):
            self._demand_training(args, kwargs)
        with self._routed(kwargs):
            if self._prompting():
                return prompts.forward(self, *args, **kwargs)
            kwargs.pop("task_ids", None)
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model's `generate`; takes `adapter_names` as `forward` does."""
        with self._routed(kwargs):
            if self._prompting():
                return prompts.generate(self, *args, **kwargs)
            base: Any = self.get_base_model()
            return base.generate(*args, **kwargs)

    @contextmanager
    def _routed(self, kwargs: dict[str, Any]) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        known = {*self.peft_config, routing.BASE}
        for name in names:
            if name not in known:
                raise AdapterNameError(f"adapter_names: there is no adapter {name!r}.{nearest(name, known)}")
        with routing.route(routing.Route(rows=tuple(names))):
            yield

    @contextmanager
    def use(self, *names: str) -> Iterator[PeftModel]:
        """Run the body with these adapters, in this order, whatever is active; without names, as the base model.

        The choice belongs to the current thread or async task: others don't see it.

        Example:
            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
            >>> with model.use("default"):
            ...     y = model(torch.ones(1, 4))
        """
        for name in names:
            state.config_of(self, name)
        with routing.route(routing.use(names)):
            yield self

    def _prompting(self) -> bool:
        """Whether prompts take part in this call."""
        if not self._peft_config or not len(self.prompt_encoder):
            return False
        route = routing.current()
        if route is not None:
            return any(n in self._peft_config for n in (route.rows or route.names))
        return any(n in self._peft_config for n in self.active_adapters)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the body as the base model, in this thread or async task; like `use()`, of which the innermost counts."""
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if biased:
            warnings.warn(
                f"Adapter {biased[0]!r} trains biases of the base model itself; disable_adapter() leaves them as "
                f"trained.",
                PeftWarning,
                stacklevel=3,
            )
        with routing.route(routing.use(None)):
            yield

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the output of the input embedding require a gradient, which reentrant checkpointing needs."""
        integrations.require_input_gradients(model)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's own, and what frozen embeddings need for it to work."""
        base: Any = self.get_base_model()
        base.gradient_checkpointing_enable(*args, **kwargs)
        routing.keep_routes(base)
        self.prepare_model_for_gradient_checkpointing(base)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same, by its name in newer versions of transformers."""
        base: Any = self.get_base_model()
        base.activation_checkpointing_enable(*args, **kwargs)
        routing.keep_routes(base)
        self.prepare_model_for_gradient_checkpointing(base)

    _trains = False

    def train(self, mode: bool = True) -> PeftModel:
        """Set training mode, as in `nn.Module`. The first forward then checks that anything can train."""
        self._trains = False
        return super().train(mode)

    def _demand_training(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise if this is a training step in which nothing would learn."""
        routing.keep_routes(self)
        if not torch.is_grad_enabled():
            return
        merged = next((layer for layer in whole.layers(self) if layer.merged), None)
        if merged is not None and any(p.requires_grad for p in merged.parameters()):
            raise StateError(
                f"The model is in training mode, but {merged.merged_adapters} are merged into the base weights, where "
                "they don't learn. Call model.unmerge_adapter() first; for inference, call model.eval()."
            )
        given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if any(p.requires_grad for p in self.parameters()) or any(t.requires_grad for t in given):
            if not torch.compiler.is_compiling():
                self._trains = True
            return
        loaded = [name for name, config in self.peft_config.items() if config.inference_mode]
        why = (
            f"Adapter {loaded[0]!r} was loaded for inference. Load it with is_trainable=True"
            if loaded
            else "No parameter requires a gradient"
        )
        raise StateError(
            f"The model is in training mode, but nothing in it would train. {why}, or call "
            "model.set_requires_grad(name, True). For inference, call model.eval()."
        )

    # ---------------------------------------------------------------- adapters by name

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter; it is not activated.

        Raises:
            AdapterNameError: the name is taken.
            TargetError: the config asks for what can't be adapted. The model is as it was.
        """
        self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add(
        self,
        name: str,
        config: PeftConfig,
        meta: bool,
        autocast: bool,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_name(name)
        if name in self._names():
            raise AdapterNameError(f"There is an adapter named {name!r} already. Delete it, or choose another name.")
        self._train_heads(config)
        if config.is_prompt_learning:
            self._add_prompt(name, config, meta, autocast)
            return
        if not self._has_tuner:
            self._wrap_base(name, config, meta, autocast)
            return
        tuner = self.base_model
        tuner.peft_config[name] = config
        try:
            tuner.inject_adapter(tuner.model, name, autocast, meta, state_dict)
        except BaseException:
            tuner.peft_config.pop(name, None)
            raise

    def _add_prompt(self, name: str, config: PeftConfig, meta: bool, autocast: bool) -> None:
        base, first = self.get_base_model(), not self._names()
        encoder = prompts.build(config, base, fresh=not meta)  # type: ignore[arg-type]
        inject.train_besides(base, config, name, autocast)
        if first:
            for parameter in inject.base_parameters(base):
                parameter.requires_grad_(False)
        else:  # it waits to be chosen
            encoder.requires_grad_(False)
            whole.stand_by(base, name, self.active_adapters)
        if "prompt_encoder" not in self._modules:
            self.prompt_encoder = nn.ModuleDict()
        self.prompt_encoder[name] = encoder
        self._peft_config[name] = config

    def _wrap_base(self, name: str, config: PeftConfig, meta: bool, autocast: bool) -> None:
        """The first weight adapter of a model that had prompts only."""
        base = self.base_model
        cls = tuner_class(inject.peft_type_name(config))
        prompts_held = self._modules.get("prompt_encoder")
        trainable = [p for p in prompts_held.parameters() if p.requires_grad] if prompts_held is not None else []
        self.base_model = cls(base, {name: config}, name, meta, None, autocast)
        for parameter in trainable:
            parameter.requires_grad_(True)
        if self._peft_config:  # a prompt is active, and adding an adapter changes nothing
            for module in (*whole.layers(base), *whole.wrappers(base)):
                module.set_adapter([n for n in self.active_adapters if n in self._peft_config])

    def _train_heads(self, config: Any) -> None:
        """The heads of the task train whole with the adapter."""
        if not self.head_modules or not hasattr(config, "modules_to_save") or "modules_to_save" in config._optional:
            return
        own = list(config.modules_to_save or [])
        config.modules_to_save = own + [n for n in self.head_modules if n not in own]
        config._heads = self.head_modules  # a model has one of them

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active (and trainable unless `inference_mode`); the others freeze.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            state.config_of(self, name)
        in_layers = [n for n in names if n not in self._peft_config]
        if self._has_tuner:
            self.base_model.set_adapter(in_layers, inference_mode)
        if self._peft_config:
            for name, encoder in self.prompt_encoder.items():
                encoder.requires_grad_(name in names and not inference_mode)
            for wrapper in whole.wrappers(self.get_base_model()) if not in_layers else ():
                wrapper.set_adapter(names, inference_mode)
        self.active_adapter = names[0] if len(names) == 1 else names

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others becomes active.

        Raises:
            StateError: it is merged.
        """
        state.config_of(self, adapter_name)
        if adapter_name in self._peft_config:
            del self.prompt_encoder[adapter_name], self._peft_config[adapter_name]
            for wrapper in whole.wrappers(self):
                wrapper.delete_adapter(adapter_name, [])
            if not len(self.prompt_encoder):
                prompts.detach(self.get_base_model())
        else:
            self.base_model.delete_adapter(adapter_name)
        names = [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter
        if adapter_name in names and self._names():
            left = whole.successors(names, self.peft_config, adapter_name)
            self.set_adapter(left[0] if len(left) == 1 else left)
        elif adapter_name in names:
            self.active_adapter = []

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name, keeping its place in the order.

        Raises:
            AdapterNameError: there is no such adapter, or already one of the new name.
        """
        state.config_of(self, old)
        check_name(new)
        if new in self.peft_config:
            raise AdapterNameError(f"There is an adapter named {new!r} already; delete it or choose another name.")
        if old in self._peft_config:
            self.prompt_encoder[new] = self.prompt_encoder.pop(old)
            self._peft_config = {new if name == old else name: c for name, c in self._peft_config.items()}
            for wrapper in whole.wrappers(self):
                wrapper.rename_adapter(old, new)
        else:
            self.base_model.rename_adapter(old, new)
        active = self.active_adapter
        self.active_adapter = new if active == old else active
        if not isinstance(active, str):
            self.active_adapter = [new if name == old else name for name in active]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        whole.set_requires_grad(self, adapter_names, requires_grad)
        for name in self._peft_config.keys() & ([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            self.prompt_encoder[name].requires_grad_(requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can approximate the adapter."""
        return self._has_tuner and self.base_model.supports_lora_conversion(adapter_name)

    # ---------------------------------------------------------------- prompts

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The prompt of the active adapter for a batch: virtual embeddings, or keys and values."""
        return prompts.get_prompt(self, batch_size, task_ids, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The tensor that a prompt adapter's file holds."""
        return self.prompt_encoder[adapter_name].saved_tensors()[prompts.EMBEDDINGS_KEY]

    def prompt_state_dict(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of a prompt adapter and of the modules that train with it, by their names in files."""
        return persistence.prompt_tensors(self, adapter_name)

    def load_prompt_state_dict(
        self, adapter_name: str, state_dict: Mapping[str, Tensor], strict: bool = True
    ) -> LoadReport:
        """The inverse of `prompt_state_dict`."""
        return persistence.load_prompt(self, adapter_name, state_dict, strict)

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters to a folder: the one named "default" into it, others into folders of their names.

        What is saved is what was trained. A save that fails or is killed leaves what was there before.

        Args:
            save_directory: Made if missing.
            safe_serialization: False writes the older `adapter_model.bin`.
            selected_adapters: Which; None: all.
            save_embedding_layers: True: the base model's embeddings too; `"auto"`: if they were trained or resized.
            is_main_process: In distributed training, only the main process writes.
            path_initial_model_for_weight_conversion: For initialisations that change the base weights.
            **kwargs: `state_dict`: tensors to save from, in place of the model's; `push_to_hub=True` uploads;
                `save_original_format=True` writes names and tensors for the weights as the base model's original
                checkpoints hold them, as transformers' own `save_pretrained` does: older releases read that.

        Raises:
            SaveError: nothing was changed on disk.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        for name in selected_adapters or ():
            if name not in self.peft_config:
                raise ValueError(
                    f"You passed an invalid `selected_adapters` arguments, current supported adapter names are"
                    f" {list(self.peft_config)} - got {selected_adapters}.{nearest(name, self.peft_config)}"
                )
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        given, original = kwargs.pop("state_dict", None), kwargs.pop("save_original_format", False)
        for name in names:
            if path_initial_model_for_weight_conversion is not None:
                raise StateError(
                    f"path_initial_model_for_weight_conversion: adapter {name!r} did not change the base weights, so "
                    "there is nothing to convert. Leave it out."
                )
            persistence.save_one(
                self, name, folder, given, safe_serialization, save_embedding_layers, is_main_process, original
            )
        if is_main_process:
            files.save(folder, {"README.md": persistence.card_text(self, folder)})
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write README.md, keeping what people wrote in it."""
        files.save(output_dir, {"README.md": persistence.card_text(self, Path(output_dir))})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the adapters; returns the URL. Keywords: `private`, `token`, `revision`, `commit_message`, …"""
        options = {
            k: kwargs.pop(k)
            for k in ("safe_serialization", "selected_adapters", "save_embedding_layers")
            if k in kwargs
        }
        for name in ("repo_url", "use_temp_dir", "max_shard_size"):
            kwargs.pop(name, None)
        return hub.push(lambda folder: self.save_pretrained(folder, **options), repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a saved adapter onto its base model.

        Args:
            model: The base model.
            model_id: A folder, or a repository on the hub.
            adapter_name: The name it gets.
            is_trainable: Go on training; by default the adapter is frozen, for inference.
            config: Use this config and not the file's.
            autocast_adapter_dtype: Keep half precision adapters in float32.
            ephemeral_gpu_offload: Ignored; nothing here needs it.
            low_cpu_mem_usage: Ignored; loading never fills weights that are then replaced.
            key_mapping: `{regex: replacement}` for names of tensors.
            **kwargs: `subfolder`, `revision`, `token`, …; `strict=False` accepts missing and unexpected tensors;
                `check_base=False` accepts another base model than the adapter was trained on;
                `fused={"qkv_proj": ["q_proj", "k_proj", "v_proj"]}` says which layers' rows, in order, one layer of
                the base model has, or had where the adapter was trained.

        Raises:
            LoadError: the file does not fit the model; the message says what was probably meant.
        """
        from peft.tasks import model_class

        if config is None:
            options = {k: kwargs[k] for k in (*files.HUB_OPTIONS, "subfolder") if k in kwargs}
            config = PeftConfig.from_pretrained(model_id, **options)
        config.inference_mode = not is_trainable
        target = cls if cls is not PeftModel else model_class(config.task_type)
        bare, trained = not whole.adapters_in(model), [p for p in model.parameters() if p.requires_grad]
        made = target._shell(model, config)
        try:
            made.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                key_mapping=key_mapping,
                _config=config,
                **kwargs,
            )
        except BaseException:
            if bare:
                whole.unload(model, merge=False)
                model.__dict__.pop("peft_config", None)
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        made.set_adapter(adapter_name, inference_mode=not is_trainable)
        made._fit_base(model)
        return made

    @classmethod
    def _shell(cls, model: nn.Module, config: PeftConfig) -> PeftModel:
        """A `PeftModel` of that class around a model, without an adapter yet."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.active_adapter, made.peft_type = "default", config.peft_type
        made.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        made._peft_config = {}
        made.base_model = model
        made.training = model.training
        return made

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load another adapter under a name, or reload the one of that name in place. Arguments as in
        `from_pretrained`.

        Returns:
            A report with `missing_keys` and `unexpected_keys`, both empty unless `strict=False` was given.

        Raises:
            LoadError: the file does not fit; the model is as it was.
        """
        return persistence.load(
            self, model_id, adapter_name, is_trainable, torch_device, autocast_adapter_dtype, key_mapping, **kwargs
        )

    def _names(self) -> list[str]:
        return list(self.peft_config) if self._has_tuner or self._peft_config else []

    def _add_loaded(self, name: str, config: PeftConfig, autocast: bool) -> None:
        self._add(name, config, True, autocast)
        if len(self._names()) == 1:
            self.active_adapter = name


__all__ = ["PeftModel", "PeftType", "TaskType"]
