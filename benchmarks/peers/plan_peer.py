"""One case of `python -m benchmarks planning`: plan_peer.py SPEC.json [run|probe OUT.json]; alone it makes a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from tunesmith.evaluation.predict_rows import predict_rows, sample_rows
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import resolved
from tunesmith.training.loop import training_steps
from tunesmith.training.probe import probe
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>")


def model_folder(spec: dict[str, Any]) -> Path:
    """A model of the shape, with random weights, and a tokenizer in which a letter is a token."""
    arch, hidden, layers, heads, groups, inner, vocabulary = spec["shape"]
    folder = Path(spec["folder"]) / spec["model"].replace(" ", "-")
    if folder.exists():
        return folder
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    more: dict[str, Any] = {"intermediate_size": inner, "max_position_embeddings": 8192}
    if arch == "gpt2":
        more = {"n_positions": 8192, "n_inner": inner}
    elif arch != "bert":
        more |= {"num_key_value_heads": groups, "tie_word_embeddings": True}
    config = AutoConfig.for_model(arch, **sizes, **more, pad_token_id=0, eos_token_id=5, bos_token_id=5)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    auto = AutoModelForMaskedLM if arch == "bert" else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = {word: i for i, word in enumerate((*SPECIALS, *"abcdefgh", " "))}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="</s>", clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def recipe_of(spec: dict[str, Any], model: str) -> Any:
    per_step = max(1, round(2 * spec["tokens"] / spec["length"]))
    longest = 512 if spec["task"] != "generate" else 8192
    layers = {"none": 0, "half": "half", "all": "all"}[spec["layers"]]
    if layers:
        config = AutoConfig.from_pretrained(model) if not model.endswith(".gguf") else None
        num = 30 if config is None else config.num_hidden_layers
        layers = num if layers == "all" else num // 2
    return validate(
        {
            "model": model,
            "task": spec["task"],
            "method": {"name": spec["method"]},
            "precision": spec["precision"],
            "device": "cpu",
            "threads": spec["threads"],
            "memory": "warn",
            "evaluation": {"samples": 0, "general": False},
            "data": {"train": [spec["data"]], "held_out": 0.1, "max_tokens": min(spec["length"] * 2, longest)},
            "train": {
                "max_steps": spec["steps"],
                "epochs": 100,
                "rows_per_step": per_step,
                "tokens_per_pass": spec["tokens"],
                "checkpointed_layers": layers,
            },
        }
    )


def main(spec_path: str, what: str = "", out_path: str = "") -> None:
    spec = json.loads(Path(spec_path).read_text("utf-8"))
    model = spec["real"] or str(model_folder(spec))
    if what:
        found = {"run": run, "probe": probed}[what](recipe_of(spec, model), Path(spec["folder"]) / "runs")
        Path(out_path).write_text(json.dumps(found), "utf-8")


def run(recipe: Any, root: Path) -> dict[str, Any]:
    """Predicted, then done. The second of a step is that of a mean one, by the tokens of all but the first."""
    setup = prepare(recipe, root=root)
    assert setup.forecast is not None, setup.notes
    assert setup.forecast.duration is not None
    plan = setup.sampler
    events = list(training_steps(setup))
    seen = sample_rows(setup.rows.store, setup.rows.train_rows, resolved(setup.recipe.evaluation.surprising))
    for collator, rows in (
        (setup.held_collator, setup.rows.held_rows),
        (setup.collator, seen),
    ):
        tokens = resolved(setup.recipe.train.tokens_per_pass)
        predict_rows(setup.model, setup.task, collator, [int(i) for i in rows], tokens_per_pass=tokens)
    later = events[1:]
    per_token = sum(event.timing["seconds"] for event in later) / sum(event.values["tokens"] for event in later)
    return {
        "predicted_bytes": setup.forecast.memory.total,
        "parts": setup.forecast.memory.parts(),
        "predicted_seconds": setup.forecast.duration.prices["training"],
        "measured_seconds": per_token * float(plan.lengths_I @ plan.weights_I) / plan.steps_per_epoch,
        "seconds": [event.timing["seconds"] for event in events],
        "layout": plan.layout,
    }


def probed(recipe: Any, root: Path) -> dict[str, Any]:
    """The estimates of `tunesmith plan` after its probe."""
    resolved = resolve_run(recipe, root=root)
    found = probe(resolved.recipe, root=root, offline=True, on_progress=lambda what, done, total: None)
    assert resolved.forecast is not None, resolved.notes
    plan = resolved.forecast.sampler
    duration = found.duration(resolved.forecast, float(plan.lengths_I @ plan.weights_I) / plan.steps_per_epoch)
    assert duration is not None, found.ended
    return {"probe_bytes": found.peak, "probe_seconds": duration.prices["training"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
