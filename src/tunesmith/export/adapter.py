"""The adapter alone: `adapter` in PEFT's format, and `gguf-adapter`, which llama.cpp loads on any GGUF of the base.

A GGUF adapter holds `<weight>.lora_a` [R, I] and `<weight>.lora_b` [O, R] for each layer, and one alpha for all:

    W x + alpha / rank · B (A x)

Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

# O outputs, I inputs, R rank, T tokens, V vocabulary

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.data.renderer import Renderer
from tunesmith.errors import ModelError, RunError
from tunesmith.export.card import base_id
from tunesmith.export.gguf import QUANT_TYPES, file_stem, gguf_writer, quantized, read_tensors
from tunesmith.export.gguf_models import ARCHITECTURES, find_architecture, model_names, tensor_names
from tunesmith.export.llama_cpp import TEMPLATE
from tunesmith.export.run_result import RunResult, auto_class, read_config
from tunesmith.export.target import (
    EXACT,
    ROUNDED,
    ExportedModel,
    ExportOptions,
    ExportTarget,
    Tolerances,
    TorchModel,
    run_dtype,
)
from tunesmith.inference.load import run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import CONFIG, PREFIX, WEIGHTS, by_patterns, check_patterns
from tunesmith.methods.lora import LoraAttachment
from tunesmith.models.gguf import read_gguf
from tunesmith.models.heads import LABELS_FILE
from tunesmith.models.load import TOKENIZER_FILES, load_config, load_model, load_tokenizer, model_kind, new_tokens_of
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.models.save import save_generation_config
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import to_json
from tunesmith.types import Batch

BASE_FILE = "base.json"
"""SHA-256 of the files of the base that the adapter was made for."""
COPIED = {WEIGHTS, CONFIG, LABELS_FILE, *TOKENIZER_FILES, "additional_chat_templates"}
"""Files of a run's result that are exported; anything else there is left out."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank. Source: vLLM, config/lora.py."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe")


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    if not result.is_adapter:
        raise RunError(f"{result.run.path}: every weight was tuned, so there is no adapter. Use --to merged.")
    notes = []
    if result.base.kind != "hub":
        name = result.base.path.name
        notes.append(f"the base is not on the hub: others need the same {name}; its SHA-256 is in {BASE_FILE}")
    if options.bake_scale and not result.adapter_config.get("use_rslora"):
        notes.append("--bake-scale changed nothing: the scale already is alpha / rank, which every program computes")
    if result.planned_config is not None:
        return notes
    _copied(result)
    if left := sorted({path.name for path in result.folder.iterdir()} - COPIED):
        notes.append(f"left out, since it is no part of an adapter: {', '.join(left)}")
    return notes


def _copied(result: RunResult) -> list[Path]:
    """The files to copy. Raises RunError for a link, whose target would be published under another name."""
    found = [path for path in sorted(result.folder.iterdir()) if path.name in COPIED]
    for path in (inside for one in found for inside in (one, *one.rglob("*"))):
        if path.is_symlink():
            raise RunError(f"{path}: a link, and what it points to would be published. Put the file itself there.")
    return found


def _write(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    for path in _copied(result):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    config = dict(result.adapter_config)
    check_patterns(config)
    config["base_model_name_or_path"] = base_id(result) or result.base.path.name
    if config.get("tokenizer_name_or_path"):  # a prompt that was initialized from a text
        config["tokenizer_name_or_path"] = config["base_model_name_or_path"]
    if options.bake_scale:
        config = bake_scale(config, result.folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if result.renderer.stop_ids:
        save_generation_config(result.without_weights(), folder, stop_ids=result.renderer.stop_ids)
    write_base_facts(result, folder)
    return []


def write_base_facts(result: RunResult, folder: Path) -> None:
    """Write the name of the base and the SHA-256 of its files."""
    name = base_id(result) or result.base.path.name
    facts = {"model": name, "revision": result.base.revision, "sha256": result.base_hashes}
    (folder / BASE_FILE).write_bytes(to_json(facts, indent=True) + b"\n")


def bake_scale(config: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The config with the same scale but without use_rslora: alpha / √rank = alpha' / rank with alpha' = alpha · √rank.

    `weights`: the adapter's file, which names its layers. Two patterns for one layer may be written differently.
    """
    if not config.get("use_rslora"):
        return config
    rank, alpha = config["r"], config["lora_alpha"]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    layers = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names if ".lora_" in name}
    scaled = {name: by_patterns(alphas, name, alpha) * by_patterns(ranks, name, rank) ** 0.5 for name in layers}
    own = {f"^{name}": value for name, value in sorted(scaled.items()) if value != alpha * rank**0.5}
    return {**config, "lora_alpha": alpha * rank**0.5, "alpha_pattern": own, "use_rslora": False}


@dataclass(frozen=True)
class PromptModel(TorchModel):
    """A model behind peft's virtual tokens, computed by peft's own forward."""

    wrapped: Any = None

    def logits(self, batch: Batch) -> Tensor:
        logits_BTV = self._logits(input_ids=batch.ids_BT, attention_mask=batch.mask_BT)
        return logits_BTV[:, -batch.ids_BT.shape[1] :].flatten(0, 1)[batch.predict_N].float().cpu()

    def next_logits(self, ids: list[int]) -> Tensor:
        ids_1T = torch.tensor([ids])
        return self._logits(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))[0, -1]

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        return ExportedModel.answers(self, renderer, prompts, num_tokens=num_tokens)

    def _logits(self, **inputs: Tensor | None) -> Tensor:
        with eval_mode(self.wrapped):
            logits: Tensor = self.wrapped(**inputs).logits
        return logits


def _load(folder: Path, recipe: Recipe) -> TorchModel:
    """The adapter on the base of the recipe: by peft if that is installed."""
    located = resolve_base(recipe, offline=True)
    kind = model_kind(located)
    head = find_head(recipe, located, kind)
    tokenizer = load_tokenizer(ModelRef("folder", folder, str(folder)), None)
    model = load_model(
        located, dtype=run_dtype(recipe), device="cpu", head=head, labels=run_labels(recipe), seed=recipe.seed,
        tokenizer=tokenizer,
    )  # fmt: skip
    resize_embeddings(model, new_tokens_of(recipe, located))
    if find_spec("peft") is None:
        METHODS["lora"].load_result(model, folder)
        return TorchModel(tokenizer, kind, head, "tunesmith (peft is not installed)", model, is_plain=False)
    from peft import PeftModel

    with silence_transformers():
        wrapped = PeftModel.from_pretrained(model, str(folder)).eval()  # puts its layers into the model itself
    by = f"peft {version('peft')}"
    if wrapped.active_peft_config.is_prompt_learning:
        return PromptModel(tokenizer, kind, head, by, model, is_plain=False, wrapped=wrapped)
    return TorchModel(tokenizer, kind, head, by, model, is_plain=False)


def _card(result: RunResult, folder: Path, options: ExportOptions) -> dict[str, Any]:
    name, base = auto_class(result.head, result.kind), base_id(result) or result.base.path.name
    labels = f", num_labels={result.labels.num_outputs}" if result.labels is not None else ""
    resize = "base.resize_token_embeddings(len(tokenizer))\n" if result.recipe.data.new_tokens else ""
    code = (
        f"from peft import PeftModel\nfrom transformers import AutoTokenizer, {name}\n\n"
        f'base = {name}.from_pretrained("{base}"{labels})\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'{resize}model = PeftModel.from_pretrained(base, "PATH")'
    )
    lines = "\n".join(f"- {line}" for line in compatibility(result, read_config(folder)))
    return {"library": "peft", "relation": "adapter", "use": [("python", code)], "servers": f"Loads in:\n\n{lines}"}


def compatibility(result: RunResult, config: Mapping[str, Any]) -> list[str]:
    """A line for each of peft, vLLM and llama.cpp: whether the adapter loads there, and how."""
    whole = ", ".join(config.get("modules_to_save") or ())
    if why := not_for_vllm(result, config):
        vllm = f"no: {why}. Export merged and serve that."
    else:
        vllm = (
            f"yes: `vllm serve {config['base_model_name_or_path']} --enable-lora --max-lora-rank {vllm_rank(config)} "
            "--lora-modules tuned=PATH`."
        )
        if config.get("use_rslora"):
            vllm += " Old versions ignore use_rslora (vLLM #10798): for them use --bake-scale."
    if why := more_than_low_rank(result, config):
        cpp = f"no: {why}. Export merged or gguf."
    elif result.config.model_type not in ARCHITECTURES:
        cpp = f"not known for a {result.config.model_type}. Export merged, and convert that."
    else:
        cpp = (
            "export gguf-adapter for `llama-server -m base.gguf --lora adapter.gguf`; or gguf, with the adapter merged."
        )
    return [f"peft: yes{f'; it brings {whole} whole' if whole else ''}.", f"vLLM: {vllm}", f"llama.cpp: {cpp}"]


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The smallest --max-lora-rank that fits an adapter; None if it is larger than all."""
    return next((rank for rank in VLLM_RANKS if rank >= int(config["r"])), None)


def not_for_vllm(result: RunResult, config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot load an adapter on its base; None if it can."""
    if config["peft_type"] == "LORA":
        if result.base.is_gguf:
            return "its base is a GGUF file, and vLLM loads adapters on model folders"
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            return "its rank or alpha differs from layer to layer, and vLLM reads one for all"
        if vllm_rank(config) is None:
            return f"its rank is {config['r']}, and vLLM takes {VLLM_RANKS[-1]} at most"
    return more_than_low_rank(result, config)


def more_than_low_rank(result: RunResult, config: Mapping[str, Any]) -> str | None:
    """The part of an adapter that is no low-rank path of a decoder-only model, in words; None if there is none."""
    whole = ", ".join(config.get("modules_to_save") or ())
    unread = {
        f"it is {config['peft_type']}, which only peft reads": config["peft_type"] != "LORA",
        "it rescales rows of weights (DoRA), which is not computed there": config.get("use_dora"),
        "it brings rows of the embedding (trainable_token_indices), which are not read there": config.get(
            "trainable_token_indices"
        ),
        f"it brings {whole} whole (modules_to_save), which is not read there": whole,
        "it brings biases, which are not read there": config.get("bias", "none") != "none",
        f"it is tuned for the task {result.recipe.task} on an {result.kind.replace('_', '–')} model": (
            result.head != "next_token" or result.kind != "causal"
        ),
    }
    if why := next((why for why, is_so in unread.items() if is_so), None):
        return why
    targets = config.get("target_modules") or []
    names = result.adapted if isinstance(targets, str) else targets  # a string is an expression
    touched = [name for name in names if name.rpartition(".")[2] in _EMBEDDINGS]
    return f"it adapts {', '.join(touched)}" if touched else None


def gguf_adapter_file(result: RunResult, options: ExportOptions) -> str:
    """Name of the file of a GGUF adapter."""
    return f"{file_stem(result)}-lora-{options.quant}.gguf"


def _check_gguf(result: RunResult, options: ExportOptions) -> list[str]:
    if not result.is_adapter:
        raise RunError(f"{result.run.path}: every weight was tuned, so there is no adapter. Use --to gguf.")
    if why := more_than_low_rank(result, result.adapter_config):
        raise ModelError(f"gguf-adapter: llama.cpp reads low-rank paths only, and this adapter has more: {why}.")
    architecture = find_architecture(result.config, result.weights.name)
    tensor_names(architecture, [f"{name}.weight" for name in result.adapted], result.config.num_hidden_layers)
    if result.base.is_gguf:
        return []
    return ["it needs a GGUF of the base, which is not written here: the card says how to make one"]


def _write_gguf(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    attachment = cast(LoraAttachment, result.load(result.stored_dtype)[1])  # other methods were refused
    architecture = find_architecture(result.config, result.weights.name)
    weights = [f"{name}.weight" for name in attachment.layers]
    names = tensor_names(architecture, weights, result.config.num_hidden_layers)
    name, layer = next(iter(attachment.layers.items()))
    alpha = float(layer.scale * attachment.matrices(name)[0].shape[0])
    path = folder / gguf_adapter_file(result, options)
    with gguf_writer(path, result, options, architecture=architecture.name, kind=gguf.GGUFType.ADAPTER) as writer:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, layer in attachment.layers.items():
            a_RI, b_OR = attachment.matrices(name)
            b_OR = scaled_b(b_OR, layer.scale, a_RI.shape[0], alpha)
            b_OR = architecture.lora_b_to_gguf(f"{name}.weight", b_OR, result.config)
            for end, matrix in ((".lora_a", a_RI), (".lora_b", b_OR)):
                number = QUANT_TYPES[options.quant].ggml
                writer.add_tensor(names[f"{name}.weight"] + end, quantized(matrix, number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    if isinstance(result.tokenizer.chat_template, str):
        (folder / TEMPLATE).write_text(result.tokenizer.chat_template, encoding="utf-8", newline="")
    write_base_facts(result, folder)
    return []


def scaled_b(b_OR: Tensor, scale: float, rank: int, alpha: float) -> Tensor:
    """B with the part of a layer's scale that is not alpha / rank: a file has one alpha for all layers."""
    return b_OR * (scale * rank / alpha)


def _load_gguf(folder: Path, recipe: Recipe) -> TorchModel:
    """The base with the deltas of the file added, its tokenizer, and the template next to the file."""
    located = resolve_base(recipe, offline=True)
    template = folder / TEMPLATE
    tokenizer = load_tokenizer(located, str(template) if template.is_file() else None)
    model = load_model(located, dtype=run_dtype(recipe), device="cpu", head="next_token", tokenizer=tokenizer)
    add_gguf_adapter(model, next(folder.glob("*.gguf")), load_config(located))
    return TorchModel(tokenizer, "causal", "next_token", "tunesmith, by llama.cpp's rule", model)


@torch.no_grad()
def add_gguf_adapter(model: PreTrainedModel, path: Path, config: PreTrainedConfig) -> None:
    """Add the deltas of a GGUF adapter to the weights of its base.

    Raises ModelError for a tensor that belongs to no weight, or has another size.
    """
    header, architecture = read_gguf(path), find_architecture(config, path.name)
    if header.metadata.get("general.type") != "adapter" or header.architecture != architecture.name:
        raise ModelError(f"{path.name}: not an adapter of a {architecture.name}")
    weights, alpha, found = model.state_dict(), float(header.metadata["adapter.lora.alpha"]), dict(read_tensors(path))
    for name, other in model_names(architecture, model).items():
        a_RI, b_OR = (found.pop(other + end, None) for end in (".lora_a", ".lora_b"))
        if a_RI is not None and b_OR is not None:
            delta_OI = (b_OR @ a_RI) * (alpha / b_OR.shape[1])
            weights[name].copy_(weights[name].float() + architecture.from_gguf(name, delta_OI, config))
    if found:
        raise ModelError(f"{path.name}: {len(found)} tensors belong to no weight, such as {next(iter(found))}")


def _gguf_card(result: RunResult, folder: Path, options: ExportOptions) -> dict[str, Any]:
    base = result.base.path.name if result.base.is_gguf else "base.gguf"
    template = f" --chat-template-file {TEMPLATE}" if (folder / TEMPLATE).is_file() else ""
    which = f"`{base}`, whose SHA-256 is in {BASE_FILE}"
    if not result.base.is_gguf:
        which = f"a GGUF of the base, made by `python convert_hf_to_gguf.py BASE --outfile {base}` of llama.cpp"
    use = f"llama-server -m {base} --lora {gguf_adapter_file(result, options)} --jinja{template}"
    servers = (
        f"It was compared on the weights it was tuned on, and loads on {which}. It works on a quantized base too, but "
        "nobody has compared that."
    )
    return {"library": "gguf", "relation": "adapter", "use": [("sh", use)], "servers": servers}


def _num_bytes(result: RunResult, options: ExportOptions) -> int:
    return (result.folder / WEIGHTS).stat().st_size


def _tolerances(result: RunResult, options: ExportOptions) -> Tolerances:
    return EXACT if result.recipe.precision == "float32" else ROUNDED


ADAPTER = ExportTarget(
    name="adapter",
    doc="The adapter alone, in PEFT's format, with the hashes of the base that it needs.",
    check=_check,
    write=_write,
    load=_load,
    num_bytes=_num_bytes,
    tolerances=_tolerances,
    card=_card,
    reads=("bake_scale",),
)

GGUF_ADAPTER = ExportTarget(
    name="gguf-adapter",
    doc="The adapter alone, for llama.cpp to load on a GGUF of its base.",
    check=_check_gguf,
    write=_write_gguf,
    load=_load_gguf,
    num_bytes=_num_bytes,
    tolerances=lambda result, options: QUANT_TYPES[options.quant].tolerances,
    card=_gguf_card,
    reads=("quant",),
    quants=("f32", "f16", "bf16"),
    in_llama_cpp=True,
    finer=lambda options: "" if options.quant == "f32" else "--quant f32",
)
