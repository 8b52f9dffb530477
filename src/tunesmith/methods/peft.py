"""Every method of the installed peft library, by its name: peft builds it and writes it, our loop trains it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.environment.packages import import_bitsandbytes, install_command
from tunesmith.errors import InputError, ModelError, RecipeError
from tunesmith.methods.adapter_format import (
    WEIGHTS,
    base_reference,
    check_patterns,
    head_modules,
    task_type,
    tensor_problems,
    writing_adapter,
)
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.methods.targets import Target, refuse_frozen_new, tied_reasons
from tunesmith.models import heads
from tunesmith.models.modes import silence_transformers
from tunesmith.models.save import writing_weights
from tunesmith.phrases import did_you_mean
from tunesmith.recipe.methods import PeftMethod
from tunesmith.types import Attachment, JsonObject

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.models.resolve_model import ModelRef

ADAPTER_NAME = "default"
"""peft's name of the only adapter that there is."""
INSIDE = "base_model.model."
"""peft's prefix of the names of the model's own modules."""
OWN_KEYS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
"""Settings that follow from the model and the run."""
UNSUPPORTED = (
    "ADALORA", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
"""Kinds that need inputs, a loss or a schedule of their own, replace the model's code, or let the rows of a
batch change each other's answers (LILY)."""
LEARNING_RATES: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "IA3": (3e-3, "Liu et al. 2022, section 3.4"),
        "LN_TUNING": (1e-3, "few numbers, each of which has far to go"),
        "VERA": (4e-3, "Kopiczko et al. 2023, table 7"),
    }
)
"""Rates, with AdamW, of kinds that learn at other rates than LoRA, and their sources."""
MERGEABLE = frozenset(
    {
        "ADAMSS", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
        "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA",
        "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
"""Kinds that are a change of weights, which `merge_and_unload` puts into the model's own."""


def import_peft() -> Any:
    """The library. Raises RecipeError where it is not installed."""
    if find_spec("peft") is None:
        raise RecipeError(
            "method.name: peft needs the package peft, which is not installed. "
            f"Install it with: {install_command('peft')}, or use method.name: lora."
        )
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    import peft

    return peft


def config_class(kind: str) -> Any:
    """peft's config class of a kind. Raises RecipeError for one that does not exist or is not supported."""
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(peft_type.value): config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    usable = sorted(kinds.keys() - set(UNSUPPORTED))
    if kind in usable:
        return kinds[kind]
    if kind in UNSUPPORTED:
        raise RecipeError(
            f"method.kind: {kind}: it needs inputs, code or a loss that only peft's own training gives it. Use "
            f"one of: {', '.join(usable)}."
        )
    raise RecipeError(
        f"method.kind: {kind!r}: peft has no such method.{did_you_mean(kind, usable)} There are: {', '.join(usable)}."
    )


def make_config(method: PeftMethod, **given: Any) -> Any:
    """peft's config of a method.

    Raises:
        RecipeError: peft is not installed, the kind does not exist or is unsupported, or peft refuses settings.
    """
    if reserved := [key for key in OWN_KEYS if key in method.settings]:
        raise RecipeError(f"method.settings.{reserved[0]}: follows from the model and the run. Leave it out.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*will be ignored")
            return config_class(method.kind)(**{**method.settings, **given})
    except RecipeError:
        raise
    except Exception as error:  # each config has checks and errors of its own
        raise RecipeError(f"method.settings: {method.kind}: peft refuses them: {error}") from error


def learning_rate(method: PeftMethod, kind: str, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate with AdamW, and why."""
    if method.kind in LEARNING_RATES:
        rate, source = LEARNING_RATES[method.kind]
        return rate, f"usual for {method.kind}: {source}"
    return 5e-4 if num_parameters < 1e9 else 2e-4, f"as for LoRA: for {method.kind} none is known here, try others too"


def randomness(method: PeftMethod) -> str | None:
    """The option that makes a forward pass random in training; None: nothing does."""
    if method.kind == "PVERA":
        return "PVERA"
    return next(
        (f"method.settings.{key}" for key, value in method.settings.items() if "dropout" in key and value), None
    )


class PeftAttachment(Attachment):
    """peft's adapter on a model. `trained` has the names of peft's files, in the order of the model."""

    method = "peft"

    def __init__(self, model: PreTrainedModel, wrapped: Any, kind: str) -> None:
        """`wrapped`: the PeftModel around `model`."""
        self.model = model
        self.wrapped = wrapped
        self.kind = kind
        parameters = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
        self._full_names = {short_name(name): name for name in parameters}
        masters = {short_name(name): weight for name, weight in parameters.items()}
        self._masters = MasterWeights(masters, free_early=False)
        self.trained: Mapping[str, Tensor] = self._masters.trained

    @property
    def config(self) -> Any:
        """peft's config."""
        return self.wrapped.peft_config[ADAPTER_NAME]

    @property
    def keeps_base(self) -> bool:
        """Whether disabling gives the base: it disables modules trained whole too, and a head is one."""
        return not getattr(self.config, "modules_to_save", None)

    @property
    def can_merge(self) -> bool:
        return self.kind in MERGEABLE

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        with self.wrapped.disable_adapter():
            yield

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Move everything that is trained by a tenth of its size inside the block: new ones often add zero."""
        before = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.trained.values():
                size = 0.1 * float(tensor.square().mean().sqrt()) + 0.01
                tensor.add_(torch.randn(tensor.shape, generator=draw).to(tensor.device), alpha=size)
            self.publish()
            try:
                yield
            finally:
                for name, tensor in self.trained.items():
                    tensor.copy_(before[name])
                self.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights for peft to save, with masters instead of what computes."""
        masters = {full: self.trained[name].detach() for name, full in self._full_names.items()}
        return {**self.wrapped.state_dict(), **masters}

    def merge(self) -> None:
        """Merge in float32, rounded once. Raises InputError for a kind that is not a change of weights."""
        if not self.can_merge:
            raise InputError(
                f"{self.kind}: it is not a change of the model's weights, so it cannot be merged into them. "
                "Use it as an adapter."
            )
        dtypes = {_plain_name(name): tensor.dtype for name, tensor in self.model.state_dict().items()}
        with silent():
            self.model.float()
            self._unwrap_whole_modules()
            self.wrapped.merge_and_unload(safe_merge=True)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(dtypes[name])

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.can_merge:
            self.model.float()
            self.merge()
            yield from ((name, weight.detach().float()) for name, weight in self.model.state_dict().items())

    def _unwrap_whole_modules(self) -> None:
        """Put modules that are trained whole in their places: peft fails without a weight, as of a pooler."""
        from peft.utils import ModulesToSaveWrapper

        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.modules_to_save[ADAPTER_NAME])


def attach(model: PreTrainedModel, method: PeftMethod, *, seed: int) -> PeftAttachment:
    """Freeze `model` and let peft put its method on it, drawn from `seed`. One forward shows that it runs.

    Raises:
        RecipeError: settings that do not fit the method or the model, a model that carries adapters already, or
            settings that change the base itself.
    """
    config = make_config(method, **_given(model, method))
    peft = import_peft()
    if any(isinstance(module, _layer_class()) for module in model.modules()):
        raise RecipeError("method: the model carries adapters already. Merge them or take them off first.")
    refuse_frozen_new(model, f"method.kind: {method.kind}")
    before, training = _checksums(model), model.training
    with torch.random.fork_rng(devices=[]), silent():
        torch.manual_seed(seed)
        try:
            attachment = PeftAttachment(model, peft.get_peft_model(model, config), method.kind)
            _run_once(model)
        except Exception as error:  # peft and the model have errors of every kind for what does not fit
            why = str(error) or type(error).__name__
            raise RecipeError(f"method.kind: {method.kind} does not fit {type(model).__name__}: {why}") from error
    model.train(training)
    after = _checksums(model)
    if moved := [name for name, checksum in before.items() if after.get(name, checksum) != checksum]:
        raise RecipeError(
            f"method.settings: {method.kind}: they change the base itself ({moved[0]}), so that the adapter "
            "would not fit the base that others have. Choose another initialisation."
        )
    layers = [name for name, module in model.named_modules() if isinstance(module, _layer_class())]
    bases = {f"{name}.base_layer": model.get_submodule(name).get_base_layer() for name in layers}
    targets = [Target((name,), base) for name, base in bases.items() if hasattr(base, "weight")]
    if method.kind != "TRAINABLE_TOKENS" and (tied := tied_reasons(model, targets)):  # it trains tied ones
        raise RecipeError(f"method.settings.target_modules: {tied[0]}")
    attachment.notes = _notes(attachment, layers)
    return attachment


def short_name(name: str) -> str:
    """The name of a weight in peft's files: without its wrappers and the adapter's own name."""
    return ".".join(part for part in name.removeprefix(INSIDE).split(".") if part != ADAPTER_NAME)


@contextmanager
def silent() -> Iterator[None]:
    """Drop peft's messages: what a person should know comes as an error or a note."""
    with silence_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_result(
    attachment: PeftAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> None:
    """Write the adapter as peft saves it, the labels of a head, and the tokenizer; completely or not at all."""
    config = attachment.config
    config.base_model_name_or_path, config.revision = base_reference(located), located.revision
    for key, value in vars(config).items():
        if isinstance(value, set):  # in another order in each process, and equal runs write equal bytes
            setattr(config, key, sorted(value))
    num_bytes = sum(tensor.nbytes for tensor in attachment.trained.values())
    with writing_adapter(folder, num_bytes, model=model, renderer=renderer, located=located) as staged, silent():
        state = attachment.state_dict()
        with writing_weights(folder, num_bytes):
            attachment.wrapped.save_pretrained(staged, state_dict=state, save_embedding_layers=False)
        (staged / "README.md").unlink(missing_ok=True)


def load_result(model: PreTrainedModel, folder: Path) -> PeftAttachment:
    """Put a saved adapter on `model`, its base, by peft's own functions, but strictly.

    Raises:
        ModelError: a file that is missing or broken, other labels, or tensors that do not quite fit the method.
    """
    heads.check_labels(model, folder)
    peft = import_peft()
    training = model.training
    try:
        tensors = load_file(folder / WEIGHTS)
        with silent():
            config = peft.PeftConfig.from_pretrained(str(folder))
            check_patterns(config.to_dict())
            kind = str(config.peft_type.value)
            if kind in UNSUPPORTED:
                raise ModelError(f"{folder}: {kind}: not loaded by this version. Load it with peft itself.")
            config.inference_mode = False
            wrapped = peft.get_peft_model(model, config)
            expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            if misfits := tensor_problems(tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}):
                raise ModelError(f"{folder}: does not fit: {'; '.join(misfits[:5])}")
            peft.set_peft_model_state_dict(wrapped, tensors)
            attachment = PeftAttachment(model, wrapped, kind)  # last: some kinds make their tensors anew above
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be read as an adapter of peft: {error}") from error
    model.train(training)
    return attachment


def _layer_class() -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def _given(model: PreTrainedModel, method: PeftMethod) -> JsonObject:
    """Settings that follow from the model."""
    settings: dict[str, Any] = {"task_type": task_type(model)}
    if head := head_modules(model, heads.new_head_names(model)):
        saved = method.settings.get("modules_to_save") or ()
        settings["modules_to_save"] = list(dict.fromkeys([*saved, *head]))
    return settings


def _notes(attachment: PeftAttachment, layers: list[str]) -> tuple[str, ...]:
    note = f"peft puts {attachment.kind} on {len(layers)} modules, such as {layers[0]}"
    alone = f"{attachment.kind} is not a change of weights, so the result is an adapter that cannot be merged"
    return (note,) if attachment.can_merge else (note, alone)


def _run_once(model: PreTrainedModel) -> None:
    """One forward of a few tokens, so that what does not fit is an error before the first row."""
    ids_BT = torch.arange(min(8, int(model.get_input_embeddings().weight.shape[0])), device=model.device)[None]
    decoder = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
    model.eval()
    with torch.no_grad():
        model(input_ids=ids_BT, **decoder)


def _plain_name(name: str) -> str:
    """The name that a weight of the base has in the plain model."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _checksums(model: PreTrainedModel) -> dict[str, int]:
    """A sum over the bits of every weight of the base, by its name there."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        _plain_name(name): int(weight.detach().contiguous().view(integers[weight.element_size()]).sum())
        for name, weight in model.named_parameters()
    }
