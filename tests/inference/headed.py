"""Folders of tiny models with heads, as a person would have them on disk."""

from pathlib import Path

from tiny_model import tiny_model
from tiny_tasks import word_tokenizer
from tunesmith.types import Labels

ONE = Labels("one", ("10", "bad", "good"))
MANY = Labels("many", ("bad", "good", "odd"))
NUMBER = Labels("number")
TAGS = Labels("tags", ("O", "B-PER", "B-LOC"))


def headed(path: Path, labels: Labels, *, arch: str = "bert") -> Path:
    """A model that answers with `labels`, its weights so large that different texts get different answers."""
    tokenizer = word_tokenizer()
    head = "tokens" if labels.kind == "tags" else "sequence"
    sizes = {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64}
    model = tiny_model(arch, vocab_size=len(tokenizer), head=head, labels=labels, hidden=32, **sizes)
    for weight in model.parameters():
        weight.data.copy_((5.0 * weight.data).bfloat16())  # what a model that is loaded in bfloat16 keeps
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
