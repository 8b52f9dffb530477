"""Any method of the peft library: put on a model by peft itself, trained by our loop, saved in peft's format."""

# B rows, T tokens, V vocabulary

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import InputError, RecipeError
from tunesmith.methods.adalora import KIND, RankAllocation, freeze_scales
from tunesmith.methods.masters import Masters
from tunesmith.methods.peft_kinds import MERGES, import_peft, is_prompt, make_config, resolved
from tunesmith.methods.peft_trial import base_sums, difference_by_mates, plain_name, probe, try_out
from tunesmith.methods.targets import Target, shared_weights
from tunesmith.methods.virtual_tokens import VirtualTokens
from tunesmith.models import heads
from tunesmith.models.forward import body_of
from tunesmith.models.modes import silence_transformers
from tunesmith.recipe.methods import PeftMethod
from tunesmith.types import Attachment

ADAPTER = "default"
"""What peft calls the only adapter there is."""
INSIDE = "base_model.model."
"""What peft puts before the names of the model's own modules."""
PROMPT = "prompt_encoder"
"""Where a prompt lies in the model."""
MATES = 1e-3
"""Most that the rows beside it may move the answer to a row, over the spread of its logits: experts that share a
product with other rows' tokens round otherwise, LILY moves by 0.01 and more."""


class PeftAttachment(Attachment):
    """What peft put on a model, by the names that peft's files give it, in the order of the model."""

    method = "peft"

    def __init__(self, model: PreTrainedModel, wrapped: Any, kind: str) -> None:
        """`wrapped`: peft's own model around `model`."""
        if is_prompt(kind):  # peft leaves the weights that stand outside the model's submodules as they are
            model.requires_grad_(False)
        if kind == KIND:
            freeze_scales(wrapped)
        self.model = model
        self.wrapped = wrapped
        self.kind = kind
        self._full_names = {
            short_name(name): name for name, weight in wrapped.named_parameters() if weight.requires_grad
        }
        parameters = dict(wrapped.named_parameters())
        self._masters = Masters({name: parameters[full] for name, full in self._full_names.items()}, free_early=False)
        self.trained: Mapping[str, Tensor] = self._masters.trained
        self._prompt: VirtualTokens | None = None
        if is_prompt(kind):
            self._prompt = VirtualTokens(
                body_of(model),
                num=self.config.num_virtual_tokens,
                prompt=wrapped.get_prompt,
                is_cached=kind in ("PREFIX_TUNING", "CARTRIDGE"),
            )
            # Inside the model, so that it changes mode and device with it.
            model.add_module(PROMPT, wrapped.prompt_encoder)

    @property
    def config(self) -> Any:
        """peft's config of it."""
        return self.wrapped.peft_config[ADAPTER]

    @property
    def keeps_base(self) -> bool:
        """Whether the model without it is the base: a module that is trained whole is looked past too."""
        return not getattr(self.config, "modules_to_save", None)

    @property
    def can_merge(self) -> bool:
        """Whether what it does can be put into the model's own weights."""
        return self.kind in MERGES

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside the block the model answers without it."""
        with self._prompt.without() if self._prompt is not None else self.wrapped.disable_adapter():
            yield

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Inside the block all that is trained has moved, each tensor by a tenth of its size and a little more: what a
        fresh adapter does not show yet is seen."""
        kept = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
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
                    tensor.copy_(kept[name])
                self.publish()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that peft's file holds, masters instead of what computes, each with a storage of its own."""
        masters = {full: self.trained[name] for name, full in self._full_names.items()}
        return tensors_of(self.wrapped, None if self._prompt is not None else {**self.wrapped.state_dict(), **masters})

    def steer(self) -> None:
        """Begin what the method does at every step beside learning from its rows."""
        if self.kind == KIND:
            inside = {name: full.removeprefix(INSIDE) for name, full in self._full_names.items()}
            self.step_hook = RankAllocation(self.wrapped, inside)
            self.notes = (*self.notes, self.step_hook.note())

    def merge(self) -> None:
        """Put what it does into the model's own weights, in float32 and rounded once, and take it off: what is left is
        a plain model.

        Raises InputError for a kind that is no change of weights.
        """
        if not self.can_merge:
            raise InputError(
                f"{self.kind}: what it does is no change of the model's weights, so it cannot be merged into them. "
                "Use it as an adapter."
            )
        dtypes = {plain_name(name): tensor.dtype for name, tensor in self.model.state_dict().items()}
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
        """Modules trained whole take their places: peft looks for a weight in each, which a pooler has not."""
        from peft.utils import ModulesToSaveWrapper

        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.modules_to_save[ADAPTER])


def attach(model: PreTrainedModel, settings: PeftMethod, *, seed: int) -> PeftAttachment:
    """Freeze `model` and put what peft's method trains on it, drawn from `seed`.

    A forward and a backward are run at once, so that what does not fit is told before the first row.

    Raises:
        RecipeError: settings that do not fit the method or the model, a model that carries adapters already, or a
            method that does not answer each row by itself or leave the base as it is.
    """
    method = resolved(settings)
    peft = import_peft()
    if any(isinstance(module, _layer_class()) for module in model.modules()):
        raise RecipeError("method: the model carries adapters already. Merge them or take them off first.")
    _check_head(model, method)
    before, base, training = probe(model), base_sums(model), model.training
    config = make_config(method, **_given(model, method))
    with torch.random.fork_rng(devices=[]), silent():
        torch.manual_seed(seed)
        try:
            attachment = PeftAttachment(model, peft.get_peft_model(model, config), method.kind)
            model.train(training)  # some kinds leave their layers in training mode
            try_out(attachment)
            mates = difference_by_mates(attachment)
        except RecipeError:
            raise
        except Exception as error:  # whatever peft or the model says of what does not fit
            why = str(error) or type(error).__name__
            raise RecipeError(f"method.kind: {method.kind} does not fit {type(model).__name__}: {why}") from error
    if mates > MATES:
        raise RecipeError(
            f"method.kind: {method.kind} answers a row otherwise when other rows stand beside it (by {mates:.2g} of "
            "the spread of its logits): what it learns would depend on how rows are batched. Use another kind."
        )
    if moved := [name for name, sum_ in base_sums(model).items() if base.get(name, sum_) != sum_]:
        raise RecipeError(
            f"method.settings: {method.kind}: they change the base itself ({moved[0]}), so that the adapter would not "
            "fit the base that others have. Choose another way to begin."
        )
    if shared := _shared(model, method.kind):
        raise RecipeError(f"method.settings.target_modules: {shared[0]}")
    attachment.notes = _notes(attachment, before)
    attachment.steer()
    return attachment


def short_name(name: str) -> str:
    """The name of a weight as peft's file has it: without its wrappers and the adapter's own name."""
    return ".".join(part for part in name.removeprefix(INSIDE).split(".") if part != ADAPTER)


def tensors_of(wrapped: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Everything that peft's file of a model holds, each with a storage of its own. `state`: its tensors by their own
    names; None: those that it computes with."""
    from peft import get_peft_model_state_dict

    with silent(), torch.no_grad():
        found = get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def _layer_class() -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


@contextmanager
def silent() -> Iterator[None]:
    """What a person should know comes as an error or a note; peft's own words are for its own users."""
    with silence_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _given(model: PreTrainedModel, method: PeftMethod) -> dict[str, Any]:
    """What peft's config is told of the model."""
    task = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "masked_token": None}
    usual = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    given: dict[str, Any] = {"task_type": task.get(heads.head_of(model), usual)}
    if head := _head_modules(model):
        given["modules_to_save"] = list(dict.fromkeys([*(method.settings.get("modules_to_save") or ()), *head]))
    if method.settings.get("prompt_tuning_init") == "TEXT" and "tokenizer_name_or_path" not in method.settings:
        given["tokenizer_name_or_path"] = model.name_or_path
    return given


def _head_modules(model: PreTrainedModel) -> list[str]:
    """The modules of a head that answers with classes or numbers, which are trained whole."""
    inside, pooler = f"{model.base_model_prefix}.", ".pooler"
    names = (
        name[: name.index(pooler) + len(pooler)] if name.startswith(inside) else name.partition(".")[0]
        for name in heads.new_head_names(model)
    )
    return list(dict.fromkeys(names))


def _check_head(model: PreTrainedModel, method: PeftMethod) -> None:
    head = heads.new_head_names(model)
    if drawn := [name for name in heads.new_param_names(model) if name not in head]:
        raise RecipeError(
            f"method.kind: {method.kind}: {drawn[0]} is new, and beside an adapter it would stay the random numbers "
            "that it is. Use method: full, or a model whose masked-language head comes with it."
        )
    if is_prompt(method.kind) and (heads.head_of(model) != "next_token" or model.config.is_encoder_decoder):
        raise RecipeError(
            f"method.kind: {method.kind} puts virtual tokens before a text that a causal model goes on with; this is "
            f"{type(model).__name__}. Use IA3, LORA or another kind that changes layers."
        )


def _notes(attachment: PeftAttachment, before: Tensor) -> tuple[str, ...]:
    config, notes = attachment.config, []
    layers = [name for name, module in attachment.model.named_modules() if isinstance(module, _layer_class())]
    if layers:
        notes.append(f"peft puts {attachment.kind} on {len(layers)} modules, such as {layers[0]}")
    else:
        notes.append(f"{config.num_virtual_tokens} virtual tokens stand before every row and take so much of its room")
    moved = float((probe(attachment.model) - before).abs().max() / before.abs().max())
    if moved > 1e-3:
        notes.append(
            f"before the first update it changes the answers already, logits by up to {moved:.2g} of the largest"
        )
    if not attachment.can_merge:
        notes.append(f"{attachment.kind} is no change of weights, so the result is an adapter that cannot be merged")
    return tuple(notes)


def _shared(model: PreTrainedModel, kind: str) -> list[str]:
    """Why some of what carries an adapter must not: a weight that another module has too."""
    if kind == "TRAINABLE_TOKENS":  # peft trains the rows of all modules that share them
        return []
    base_layers = [
        Target((f"{name}.base_layer",), module.get_base_layer())
        for name, module in model.named_modules()
        if isinstance(module, _layer_class()) and hasattr(module.get_base_layer(), "weight")
    ]
    return shared_weights(model, base_layers)
