"""`adapter`: the adapter alone in PEFT's format, with the hashes of the base that it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.export.gguf_models import ARCHITECTURES
from tunesmith.export.hub import base_id
from tunesmith.export.run_result import RunResult, auto_class, read_config
from tunesmith.export.target import EXACT, ROUNDED, ExportOptions, ExportTarget, TorchModel, run_dtype
from tunesmith.inference.load import run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, check_patterns
from tunesmith.models.heads import LABELS_FILE
from tunesmith.models.load import TOKENIZER_FILES, load_model, load_tokenizer, model_kind, new_tokens_of
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.models.save import save_generation_config
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import to_json

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
        return TorchModel(tokenizer, kind, head, "tunesmith (peft is not installed)", model)
    from peft import PeftModel

    with silence_transformers():
        PeftModel.from_pretrained(model, str(folder)).eval()  # puts its layers into the model itself
    return TorchModel(tokenizer, kind, head, f"peft {version('peft')}", model)


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
    if why := more_than_low_rank(result, config):
        cpp = f"no: {why}. Export merged or gguf."
    elif result.config.model_type not in ARCHITECTURES:
        cpp = f"not known for a {result.config.model_type}. Export merged, and convert that."
    else:
        cpp = "by its convert_lora_to_gguf.py on this folder; or export gguf, with the adapter merged."
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


ADAPTER = ExportTarget(
    name="adapter",
    doc="The adapter alone, in PEFT's format, with the hashes of the base that it needs.",
    check=_check,
    write=_write,
    load=_load,
    num_bytes=lambda result, options: (result.folder / WEIGHTS).stat().st_size,
    tolerances=lambda result, options: EXACT if result.recipe.precision == "float32" else ROUNDED,
    card=_card,
    reads=(),
)
