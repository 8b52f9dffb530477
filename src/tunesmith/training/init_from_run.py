"""A run's result as the start of another run: adapt to a domain first, then tune for a task.

What a full run leaves is a model already. An adapter is merged into its base once, beside it in its run's folder, and
the next run starts from that: its own adapter then has a base that others can load too.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.inference.load import load_run
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.save import save_model
from tunesmith.runs.atomic import remove
from tunesmith.runs.folder import Run, is_run

MERGED = "merged"


def start_from(model: str, *, root: Path, offline: bool) -> tuple[str, str | None]:
    """The model that `model` names, and what to say of it where it is a run: its folder, its name in `root`, "last".

    The beginning of a name is not enough here: `gpt2` is a model, whatever runs begin so. Raises RunError for a run
    without a result.
    """
    is_whole_name = model == "last" or Path(model).exists() or (root / model / "run.json").is_file()
    if not (is_whole_name and is_run(model, root)):
        return model, None
    run = Run.open(model, root)
    if run.model_path.exists():
        run.check_result(run.model_path)
        return str(run.model_path), f"starts from the result of {run.path}"
    if not run.adapter_path.exists():
        raise RunError(
            f"{run.path}: it has no result yet, so nothing can start from it. Go on with `tunesmith resume`."
        )
    merged = run.path / MERGED
    if not _is_current(merged, run.adapter_path):
        _merge(run, merged, offline=offline)
    return str(merged), f"starts from the result of {run.path}, its adapter merged into its base in {merged}"


def _is_current(merged: Path, adapter: Path) -> bool:
    """Whether the merged model is there whole, and not older than its adapter."""
    config = merged / "config.json"
    return config.is_file() and config.stat().st_mtime >= (adapter / "adapter_config.json").stat().st_mtime


def _merge(run: Run, merged: Path, *, offline: bool) -> None:
    with run.lock():
        remove(merged)
        speaker = load_run(run, offline=offline, as_trained=False)  # a merge is never written into quantised weights
        speaker.attachment.merge()
        adapter = ModelRef("folder", run.adapter_path, str(run.adapter_path))
        save_model(
            speaker.model, speaker.renderer.tokenizer, merged, located=adapter, stop_ids=speaker.renderer.stop_ids
        )
