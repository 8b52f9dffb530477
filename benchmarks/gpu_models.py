"""Models, rows and runs for `python -m benchmarks.gpu_acceptance`: made from configs, so that no hub is needed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "head_dim": 32},
    "mistral": {**SMALL, "head_dim": 32, "sliding_window": 16},
    "gemma2": {**SMALL, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gpt2": {
        "vocab_size": 512,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # fmt: skip
"""Sizes of a tiny model of each family: plain, normed heads, a sliding window, a softcap, dropout."""
ONE_BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "pad_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip
EIGHT_BILLION = {
    **ONE_BILLION, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_135M = {
    **ONE_BILLION, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
TINY_BERT = {
    "vocab_size": 512, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 12, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip


WALKED = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
"""Sizes on a processor, which walks through the checks."""


class CheckError(AssertionError):
    """A check that found something wrong."""


class LeftOut(Exception):
    """A check that this card cannot make, and why."""


def require(truth: bool, text: str) -> None:
    if not truth:
        raise CheckError(text)


@dataclass
class Bench:
    """A device, a folder for models and runs, and what earlier checks found."""

    device: str
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def half(self) -> str:
        """The narrow type that the card multiplies."""
        return "bfloat16" if torch.cuda.get_device_capability(self.device) >= (8, 0) else "float16"

    def why_not(self, gib: float) -> str:
        """Why something that needs so much memory is left out; empty: the card has as much."""
        has = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return "" if has >= gib else f"left out: needs {gib:.0f} GiB, and this card has {has:.1f}"

    def sizes(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """Sizes of a model, on a processor those of a tiny one."""
        return sizes if self.is_cuda else {**sizes, **{key: WALKED[key] for key in WALKED if key in sizes}}

    def num(self, on_card: int, walked: int) -> int:
        """So many on a card; fewer where a processor walks through the checks."""
        return on_card if self.is_cuda else walked

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def model(
        self,
        name: str,
        arch: str,
        *,
        dtype: torch.dtype = torch.float32,
        auto: str = "AutoModelForCausalLM",
        **sizes: Any,
    ) -> Path:
        """The folder of a model with random weights from seed 0; drawn on the device, where a billion take a second."""
        import transformers

        folder = self.folder / name
        if not folder.exists():
            config = transformers.AutoConfig.for_model(arch, **sizes)
            torch.manual_seed(0)
            with torch.device(self.device):
                made = getattr(transformers, auto).from_config(config, dtype=dtype)
            made.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    def family(self, arch: str) -> Path:
        return self.model(arch, arch, **FAMILIES[arch])

    def recipe(self, model: Path, rows: Path, **sections: Any) -> Recipe:
        """A short LoRA run; `sections` change options of a section, or the whole method."""
        data: dict[str, Any] = {
            "model": str(model),
            "data": {"train": [str(rows)], "held_out": 0.05},
            "device": self.device,
            "method": {"name": "lora", "rank": 8, "alpha": 16},
            "optim": {"lr": 1e-3},
            "memory": "warn",
            "train": {"rows_per_step": 8, "tokens_per_pass": 1024, "epochs": 8},
            "checkpoint": {"every": 3},
            "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": 8},
        }
        for name, value in sections.items():
            merged = isinstance(value, dict) and name != "method"
            data[name] = {**data.get(name, {}), **value} if merged else value
        return validate(data)

    def setup(self, model: Path, rows: Path, **sections: Any) -> Setup:
        return prepare(self.recipe(model, rows, **sections), root=self.folder / "runs")

    def chats(self, name: str, lengths: Sequence[int], *, share: float = 0.5, system: str = "", seed: int = 0) -> Path:
        """A chat of about each length in tokens, of which the answer has `share`."""
        path, draw = self.folder / f"{name}.jsonl", random.Random(seed)
        with open(path, "w", encoding="utf-8") as file:
            for length in lengths:
                room = max(8, length - 40 - len(system))
                text = "".join(draw.choices("abcdefghij klmnop qrstuv wxyz", k=room))
                cut = max(2, int(room * (1 - share)))
                turns = [{"role": "user", "content": text[:cut]}, {"role": "assistant", "content": "x" + text[cut:]}]
                turns = [{"role": "system", "content": system}, *turns] if system else turns
                file.write(json.dumps({"messages": turns}) + "\n")
        return path

    def classes(self, name: str, num: int) -> Path:
        """Short texts of two classes."""
        path, draw = self.folder / f"{name}.jsonl", random.Random(2)
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(num):
                text = "".join(draw.choices("abcdefgh ijklmnop", k=draw.randint(8, 60)))
                row = {"text": f"{text} {draw.random()}", "label": "ab"[text.count("a") > 2]}
                file.write(json.dumps(row) + "\n")
        return path


def byte_tokenizer() -> Any:
    """A tokenizer of bytes: a row of n letters has n tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIALS, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "mask_token": "[MASK]"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    made.chat_template = CHATML
    return made


def mixed_lengths(num: int, *, mean: float = 120, most: int = 800, seed: int = 1) -> list[int]:
    """Lengths of chats as they are: log-normal."""
    draw = random.Random(seed)
    return [max(48, min(most, int(draw.lognormvariate(math.log(mean), 0.7)))) for _ in range(num)]


def steps_of(setup: Setup, num: int) -> list[dict[str, Any]]:
    """Values and timing of the first steps."""
    found = []
    for event in training_steps(setup):
        found.append({**event.values, **event.timing})
        if event.step == num:
            break
    return found


@contextmanager
def memory_limit(share: float) -> Iterator[None]:
    """Let this process have only a share of the card's memory inside the block."""
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
