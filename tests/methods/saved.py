"""An adapter on disk without the tokenizer of a run."""

from pathlib import Path

from tunesmith.methods import adapter_format
from tunesmith.methods.lora import LoraAttachment
from tunesmith.runs.atomic import writing_folder


def save_adapter(attachment: LoraAttachment, folder: Path, *, base: str, revision: str | None = None) -> None:
    with writing_folder(folder) as staged:
        adapter_format._write(attachment, adapter_format.to_config(attachment, base=base, revision=revision), staged)
