"""`adapter`: PEFT's format, complete, and for whom it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from tunesmith.errors import RunError
from tunesmith.export.card import base_id
from tunesmith.export.merged import auto_class
from tunesmith.export.options import EXACT, ROUNDED, Bounds, Export, Options
from tunesmith.export.servers import server_lines
from tunesmith.export.source import Source, read_config
from tunesmith.methods.patterns import CONFIG, spelled_out
from tunesmith.methods.peft_config import by_patterns
from tunesmith.methods.peft_format import PREFIX, WEIGHTS
from tunesmith.models.heads import LABELS_FILE
from tunesmith.models.load import TOKENIZER_FILES
from tunesmith.models.modes import silence_transformers
from tunesmith.models.save import save_generation_config
from tunesmith.runs.atomic import to_json

BASE_FILE = "base.json"
"""Which weights the adapter was made for, byte for byte."""
CARRIED = {WEIGHTS, CONFIG, LABELS_FILE, *TOKENIZER_FILES, "additional_chat_templates"}
"""What of a run's result goes out; what else somebody put there does not."""


def _check(source: Source, options: Options) -> list[str]:
    if not source.is_adapter:
        raise RunError(f"{source.run.path}: every weight was tuned, so there is no adapter. Use --to merged.")
    notes = []
    if source.base.kind != "hub":
        notes.append(
            f"the base is not of the hub: others need the same {source.base.path.name}; its SHA-256 is in {BASE_FILE}"
        )
    if options.bake_scale and not source.adapter_config.get("use_rslora"):
        notes.append("--bake-scale changed nothing: the scale is alpha / rank already, which every program computes")
    if not source.result.is_dir():  # planned
        return notes
    _carried(source)
    if left := sorted({path.name for path in source.result.iterdir()} - CARRIED):
        notes.append(f"left out, since it is no part of an adapter: {', '.join(left)}")
    return notes


def _carried(source: Source) -> list[Path]:
    """Raises RunError for a link: what it points to would go out under another name."""
    found = [path for path in sorted(source.result.iterdir()) if path.name in CARRIED]
    for path in (inside for one in found for inside in (one, *one.rglob("*"))):
        if path.is_symlink():
            raise RunError(f"{path}: a link, and what it points to would be published. Put the file itself there.")
    return found


def _write(source: Source, folder: Path, options: Options) -> list[str]:
    for path in _carried(source):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    config = spelled_out(source.adapter_config, source.adapted) if source.adapted else dict(source.adapter_config)
    config["base_model_name_or_path"] = base_id(source) or source.base.path.name
    if config.get("tokenizer_name_or_path"):  # of a prompt that began as a text
        config["tokenizer_name_or_path"] = config["base_model_name_or_path"]
    if options.bake_scale:
        config = baked(config, source.result / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source.renderer.stop_ids:
        save_generation_config(_without_weights(source), folder, stop_ids=source.renderer.stop_ids)
    write_base_facts(source, folder)
    return []


def write_base_facts(source: Source, folder: Path) -> None:
    """Which base the adapter is for, and the SHA-256 of its files."""
    name = base_id(source) or source.base.path.name
    facts = {"model": name, "revision": source.base.revision, "sha256": source.base_hashes}
    (folder / BASE_FILE).write_bytes(to_json(facts, indent=True) + b"\n")


def _without_weights(source: Source) -> PreTrainedModel:
    """The base, to ask it for how it generates."""
    with torch.device("meta"), silence_transformers():
        model: PreTrainedModel = getattr(transformers, auto_class(source)).from_config(source.config)
    if (source.base.path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.base.path)
    return model


def baked(config: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The same scale without use_rslora: alpha / √rank becomes alpha' / rank with alpha' = alpha · √rank. `weights`:
    the adapter's file, which names its layers: two patterns that mean one of them may be written differently."""
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


def _num_bytes(source: Source, options: Options) -> int:
    return (source.result / WEIGHTS).stat().st_size


def _bounds(source: Source, options: Options) -> Bounds:
    return EXACT if source.recipe.precision == "float32" else ROUNDED


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name, base = auto_class(source), base_id(source) or source.base.path.name
    grows = "base.resize_token_embeddings(len(tokenizer))\n" if source.recipe.data.new_tokens else ""
    code = (
        f"from peft import PeftModel\nfrom transformers import AutoTokenizer, {name}\n\n"
        f'base = {name}.from_pretrained("{base}"{_labels(source)})\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'{grows}model = PeftModel.from_pretrained(base, "PATH")'
    )
    lines = "\n".join(f"- {line}" for line in server_lines(source, read_config(folder)))
    return {
        "library": "peft",
        "relation": "adapter",
        "use": [("python", code)],
        "servers": f"Where it loads:\n\n{lines}",
    }


def _labels(source: Source) -> str:
    return f", num_labels={source.labels.num_outputs}" if source.labels is not None else ""


ADAPTER = Export(
    name="adapter",
    doc="The adapter alone, in PEFT's format, with the hashes of the base that it needs.",
    check=_check,
    write=_write,
    num_bytes=_num_bytes,
    bounds=_bounds,
    loader="adapter",
    rounds_less=lambda options: "",
    card=_card,
    reads=("bake_scale",),
)
