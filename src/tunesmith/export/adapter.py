"""`adapter`: the adapter alone in PEFT's format, with the hashes of the base that it needs."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.export.hub import base_id
from tunesmith.export.run_result import RunResult, read_config
from tunesmith.export.target import EXACT, Computing, ExportOptions, ExportTarget, TorchModel
from tunesmith.inference.load import run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import CONFIG, WEIGHTS, check_patterns
from tunesmith.models.heads import LABELS_FILE
from tunesmith.models.load import TOKENIZER_FILES, load_model, load_tokenizer, model_kind, new_tokens_of
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef, resolve_base
from tunesmith.models.save import save_generation_config
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.models.vision import PROCESSOR_FILES
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import to_json
from tunesmith.types import JsonObject, Record

BASE_FILE = "base.json"
"""SHA-256 of the files of the base that the adapter was made for."""
COPIED = {WEIGHTS, CONFIG, LABELS_FILE, *TOKENIZER_FILES, *PROCESSOR_FILES, "additional_chat_templates"}
"""Files of a run's result that are exported; anything else there is left out."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank. Source: vLLM, config/lora.py."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe")


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    notes = []
    if result.base.kind != "hub":
        name = result.base.path.name
        notes.append(f"the base is not on the hub: others need the same {name}; its SHA-256 is in {BASE_FILE}")
    _copied(result)
    if left := sorted({path.name for path in result.folder.iterdir()} - COPIED):
        notes.append(f"left out, since it is not part of an adapter: {', '.join(left)}")
    return notes


def _copied(result: RunResult) -> list[Path]:
    """The files to copy. Raises RunError for a link, whose target would be published under another name."""
    copied = [path for path in sorted(result.folder.iterdir()) if path.name in COPIED]
    for path in (inside for entry in copied for inside in (entry, *entry.rglob("*"))):
        if path.is_symlink():
            raise RunError(f"{path}: a link, and what it points to would be published. Put the file itself there.")
    return copied


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


def _load(folder: Path, recipe: Recipe, computing: Computing) -> TorchModel:
    """The adapter on the base of the recipe: by peft if that is installed."""
    located = resolve_base(recipe, offline=True)
    kind = model_kind(located)
    head, labels = find_head(recipe.task, located, kind), run_labels(recipe.task, recipe.data)
    tokenizer = load_tokenizer(ModelRef("folder", folder, str(folder)), None)
    model = load_model(
        located, dtype=computing.dtype, device=computing.device, head=head, labels=labels, seed=recipe.seed,
        tokenizer=tokenizer,
    )  # fmt: skip
    resize_embeddings(model, new_tokens_of(recipe.data.new_tokens, located))
    if find_spec("peft") is None:
        METHODS["lora"].load_result(model, folder)
        return TorchModel(tokenizer, kind, head, "tunesmith (peft is not installed)", model)
    from peft import PeftModel

    with silence_transformers():
        PeftModel.from_pretrained(model, str(folder)).eval()  # puts its layers into the model itself
    return TorchModel(tokenizer, kind, head, f"peft {version('peft')}", model)


def _card(result: RunResult, folder: Path, options: ExportOptions) -> JsonObject:
    name, base = result.auto_class, f'"{base_id(result) or result.base.path.name}"'
    if result.base.is_gguf:
        base = f'".", gguf_file="{result.base.path.name}"'
    labels = f", num_labels={result.labels.num_outputs}" if result.labels is not None else ""
    rows = "max(len(tokenizer), base.get_input_embeddings().num_embeddings)"  # padded tables are longer
    resize = f"base.resize_token_embeddings({rows})\n" if result.recipe.data.new_tokens else ""
    code = (
        f"from peft import PeftModel\nfrom transformers import AutoTokenizer, {name}\n\n"
        f"base = {name}.from_pretrained({base}{labels})\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'{resize}model = PeftModel.from_pretrained(base, "PATH")'
    )
    use = [("python", code)]
    programs = servers(result, read_config(folder))
    return {"library": "peft", "relation": "adapter", "use": use, "servers": programs}


def servers(result: RunResult, config: Record) -> str:
    """Programs that load the adapter: besides peft they read low-rank paths of decoders alone."""
    rank = next((rank for rank in VLLM_RANKS if rank >= int(config.get("r", 0))), None)
    more = (
        "use_dora", "trainable_token_indices", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters",
    )  # fmt: skip
    is_low_rank = config["peft_type"] == "LORA" and not any(config.get(key) for key in more)
    is_low_rank = is_low_rank and config.get("bias", "none") == "none"
    on_embeddings = any(name.rpartition(".")[2] in _EMBEDDINGS for name in result.adapted)
    writes = result.head == "next_token" and result.kind == "causal"
    if rank is None or not is_low_rank or on_embeddings or not writes or result.base.is_gguf:
        return "Loads in peft. For other programs export merged."
    vllm = f"vllm serve {config['base_model_name_or_path']} --enable-lora --max-lora-rank {rank}"
    vllm += " --lora-modules tuned=PATH"
    return f"Loads in peft, in llama.cpp after its convert_lora_to_gguf.py, and in vLLM: `{vllm}`"


ADAPTER = ExportTarget(
    name="adapter",
    doc="The adapter alone, in PEFT's format, with the hashes of the base that it needs.",
    check=_check,
    write=_write,
    load=_load,
    tolerances=lambda result, options: EXACT,
    card=_card,
    reads=(),
)
