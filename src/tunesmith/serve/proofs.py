"""What is proved before the first ask is taken: prompts are those of training, adapters act, and texts that are decoded
together are what the model itself says."""

# T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.dataset import RowStore, open_kept
from tunesmith.data.examples import examples
from tunesmith.data.read import expand_folders
from tunesmith.data.renderer import Encoded, Renderer
from tunesmith.errors import DataError, RunError
from tunesmith.inference.load import assumed_date
from tunesmith.models.attention import UnsupportedAttentionError, longrope_conflict, packed_forward
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.packing_check import TOLERANCES, leak_tolerance, normalized_error, recurrent_layer
from tunesmith.recipe.schema import resolved
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.folder import Run
from tunesmith.serve.adapters import Adapters
from tunesmith.serve.decoder import Apart, Together
from tunesmith.serve.protocol import Ask, Refused
from tunesmith.serve.voices import Voice
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Problem, Row

MOST_ROWS = 32
PROBES = ((37, 23), (11, 5), (64, 40))
"""Tokens of each text that is tried, and how many of them are read as its prompt: the others as if it wrote them."""
_REFUSALS = (UnsupportedAttentionError, NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, IndexError)
"""Whatever a foreign model says when it is called this way, the answer is to run it alone."""

Note = Callable[[str], None]


def prove(voices: Iterable[Voice], note: Note) -> None:
    """Raise RunError for a run whose prompts are not those of its training, or whose adapter changes nothing."""
    for voice in voices:
        if voice.run is not None:
            prove_prompts(voice, voice.run, note)
            if voice.adapter is not None:
                _prove_adapter(voice, voice.run)


def prove_prompts(voice: Voice, run: Run, note: Note) -> None:
    """The ids of the first training prompts are those that would be fed, each by the way of an ask."""
    num = num_cut = 0
    for example, row, again in _rows(run, voice.renderer, note):
        if again is not None:  # cut to fit: what is served is not cut, so that its row is compared
            if again != row.ids.tolist():
                raise RunError(f"{run.path}: {example.source}: read as other tokens than it was trained on. {_WAY_OUT}")
            num_cut += 1
            continue
        try:
            served = voice.prompt_ids(_ask(voice, example))
        except Refused as refusal:
            raise RunError(f"{run.path}: {example.source}: trained on, but refused now: {refusal}") from refusal
        trained = row.ids.tolist()
        if voice.renderer.task_name == "text":
            served, trained = served[: len(trained)], trained[: len(served)]
        place = next((i for i, (a, b) in enumerate(zip(served, trained, strict=False)) if a != b), None)
        if place is None and len(served) > len(trained):
            place = len(trained)
        if place is not None:
            raise RunError(_difference(voice, run, example, served=served, trained=trained, place=place))
        num += 1
    if num:
        note(f"{run.path}: {num} training prompts are the same tokens when they are served")
    if num_cut:
        note(
            f"{run.path}: {num_cut} rows that were cut to data.max_tokens are the same tokens when they are read again"
        )
    if voice.renderer.date is not None:
        what = assumed_date(run, voice.renderer)
        note(f"{run.path}: {what or f'its chat template writes the date: {voice.renderer.date}, as in training'}")


def prove_rows(run: Run | None, renderer: Renderer, note: Note) -> None:
    """The ids of the first training rows are those that a model with a head would read."""
    if run is None:
        return
    num = 0
    for example, row, _ in _rows(run, renderer, note):
        [encoded] = renderer.encode([replace(example, labels=())])
        first = encoded[0]
        if not isinstance(first, Row) or first.ids.tolist() != row.ids.tolist():
            raise RunError(f"{run.path}: {example.source}: read as other tokens than it was trained on. {_WAY_OUT}")
        num += 1
    if num:
        note(f"{run.path}: {num} training rows are the same tokens when they are served")


_WAY_OUT = "Its tokenizer or template has changed since: put back what it was tuned with, or tune it again."


def _difference(
    voice: Voice, run: Run, example: Example, *, served: Sequence[int], trained: Sequence[int], place: int
) -> str:
    def shown(ids: Sequence[int]) -> str:
        if place >= len(ids):
            return "nothing"
        return f"{ids[place]} ({voice.renderer.tokenizer.decode([ids[place]])!r})"

    return (
        f"{run.path}: {example.source}: token {place} of its prompt was trained as {shown(trained)}, but would be "
        f"served as {shown(served)}. {_WAY_OUT}"
    )


def _ask(voice: Voice, example: Example) -> Ask:
    """The ask that has an example's last answer written."""
    last = max((i for i, part in enumerate(example.parts) if part.trained), default=0)
    before = example.parts[:last] or example.parts[:1]
    if not TASKS[voice.renderer.task_name].is_chat:
        return Ask(voice.served.name, prompt=before[0].text)
    messages = tuple({**part.fields, "role": part.role, "content": part.text} for part in before)
    return Ask(voice.served.name, messages=messages, tools=example.tools)


def _rows(run: Run, renderer: Renderer, note: Note) -> Iterator[tuple[Example, Row, list[int] | None]]:
    """The first training rows of a run, as they were read and as they were trained on, and of a row that is cut the ids
    that it has now. A row whose earlier turns the template rewrites was not trained on what is served, as a warning
    said: it is left out."""
    store = open_kept(run.rows_path / "train", run.identity().get("rows"))
    if store is None:
        note(f"{run.path}: its rows are gone: whether prompts are served as they were trained was not compared")
        return
    rows: dict[tuple[int, int], int] = {}
    for i in range(min(len(store), 50 * MOST_ROWS)):  # of the windows of a document the first, where a prompt begins
        rows.setdefault((int(store.file_index[i]), int(store.lines[i])), i)
    try:
        found = list(islice(_examples(run, store), 4 * MOST_ROWS))
    except (DataError, OSError) as error:
        note(f"{run.path}: whether prompts are served as they were trained was not compared: {error}")
        return
    found = [(file, example) for file, example in found if (file, example.source.line) in rows]
    heard: dict[str, set[str]] = {"context_rewritten": set(), "cut": set()}

    def hear(problem: Problem) -> None:
        heard.get(problem.code, set()).add(str(problem.source))

    now: list[Encoded] = [[] for _ in found]
    if TASKS[resolved(run.recipe().task)].writes_answers:
        now = renderer.encode([example for _, example in found], on_warning=hear)
    kept_rows = (
        (example, store.row(rows[file, example.source.line]), _ids(encoded) if source in heard["cut"] else None)
        for (file, example), encoded in zip(found, now, strict=True)
        if (source := str(example.source)) not in heard["context_rewritten"]
    )
    yield from islice(kept_rows, MOST_ROWS)


def _ids(encoded: Encoded) -> list[int]:
    first = encoded[0]
    return first.ids.tolist() if isinstance(first, Row) else []


def _examples(run: Run, store: RowStore) -> Iterator[tuple[int, Example]]:
    """Of the files as they were when they were trained on. Raises DataError, OSError."""
    recipe = run.recipe()
    files = expand_folders((*recipe.data.train, *recipe.data.replay), lambda problem: None)
    first = files[:1]
    if sha256_file(Path(first[0].at)) != store.summary.data_sha256[0]:
        raise DataError(f"{first[0].path} is not the file that it was tuned on any more")
    return examples(first, recipe.data, lambda problem: None, task=resolved(recipe.task))


def _prove_adapter(voice: Voice, run: Run) -> None:
    """What the model says of a probe is another thing with the adapter than without."""
    decoder, told = voice.decoder, []
    for adapter in (None, voice.adapter):
        lane = decoder.begin(adapter, PROBES[0][0])
        _, logits_NV = decoder.step({}, [(lane, _probe(voice.vocab_size, PROBES[0][0]))])
        decoder.leave(lane)
        told.append(logits_NV)
    if torch.equal(*told):
        raise RunError(
            f"{run.path}: its adapter changes nothing: the base alone would answer in its name. Look at its report, "
            "and train it longer."
        )


def why_apart(model: PreTrainedModel, adapters: Adapters, *, longest: int = 0) -> str:
    """Why the texts of this model cannot be decoded in one pass; "" where what it says is the same together and alone.

    Texts of different lengths are read in parts and then gone on with together, and the logits compared with those of
    the model's own attention, each text alone and whole; and those of one text beside others with those beside others
    again. `longest`: tokens of the longest text that may come.
    """
    if reason := recurrent_layer(model) or longrope_conflict(model.config, longest):
        return reason
    own = model.config._attn_implementation
    texts = [_probe(int(model.config.get_text_config().vocab_size), num) for num, _ in PROBES]
    with eval_mode(model):
        alone = [_whole(model, ids) for ids in texts]
        try:
            with (
                silence_transformers(),
                packed_forward() as trace,
            ):  # transformers warns of attention that cannot be replaced
                together = _together(Together(model, adapters), texts)
                again = _together(Together(model, adapters), [texts[0], *(ids[::-1] for ids in texts[1:])])
        except _REFUSALS as refusal:
            return str(refusal) or type(refusal).__name__
        finally:
            with silence_transformers():
                model.set_attn_implementation(own)
    if trace.calls == 0:
        return "its attention is its own and cannot be replaced"
    if missing := trace.local_masks - trace.windows:
        return f"its attention is limited to {min(missing)} tokens by a mask alone"
    error = max(normalized_error(ours_V[None], own_V[None]) for ours_V, own_V in zip(together, alone, strict=True))
    leak = normalized_error(again[0][None], together[0][None])
    if error <= TOLERANCES[model.dtype] and leak <= leak_tolerance(model):
        return ""
    return f"others beside a text change its logits, by {max(error, leak):.2g}"


def why_not_apart(model: PreTrainedModel, adapters: Adapters) -> str:
    """Why texts that are decoded in turn, each with a cache of its own, are not answered as each alone; "" if they are.

    Some models keep the state of a text in themselves, where another text finds it.
    """
    texts = [_probe(int(model.config.get_text_config().vocab_size), num) for num, _ in PROBES[1:]]
    with eval_mode(model):
        alone = [_whole(model, ids) for ids in texts]
        try:
            in_turn = _apart(Apart(model, adapters), texts)
            one_by_one = [_apart(Apart(model, adapters), [ids])[0] for ids in texts]
        except _REFUSALS as refusal:
            return str(refusal) or type(refusal).__name__

    def away(others: Sequence[Tensor]) -> float:
        return max(normalized_error(ours_V[None], own_V[None]) for ours_V, own_V in zip(in_turn, others, strict=True))

    if not (leak := away(one_by_one)) <= leak_tolerance(model):
        return f"a text changes the logits of another, by {leak:.2g} of their spread: it keeps the state of one"
    error = away(alone)
    return "" if error <= TOLERANCES[model.dtype] else f"its cache changes its logits, by {error:.2g} of their spread"


def _apart(decoder: Apart, texts: Sequence[list[int]]) -> list[Tensor]:
    """[V] of the last token of each text, which are read in turn, the last two tokens one by one."""
    lanes = [decoder.begin(None, len(ids)) for ids in texts]
    said: list[Tensor] = []
    for part in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        _, logits_NV = decoder.step({}, [(lane, ids[part]) for lane, ids in zip(lanes, texts, strict=True)])
        said = list(logits_NV)
    return said


def _whole(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[V], of the last token."""
    logits_V: Tensor = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, -1]
    return logits_V.float()


def _together(decoder: Together, texts: Sequence[list[int]]) -> list[Tensor]:
    """[V] of the last token of each text."""
    filling = [decoder.begin(None, num) for num, _ in PROBES]
    for half in (0, 1):
        parts = [
            ids[num_prompt // 2 * half : num_prompt if half else num_prompt // 2]
            for ids, (_, num_prompt) in zip(texts, PROBES, strict=True)
        ]
        decoder.step({}, list(zip(filling, parts, strict=True)))
    writing = {decoder.join(lane, 1)[0]: i for i, lane in enumerate(filling)}
    found: dict[int, Tensor] = {}
    while writing:
        lanes, logits_NV = decoder.step({lane: texts[i][lane.length] for lane, i in writing.items()}, [])
        for lane, logits_V in zip(lanes, logits_NV, strict=True):
            if lane.length == len(texts[writing[lane]]):
                found[writing.pop(lane)] = logits_V
                decoder.leave(lane)
    return [found[i] for i in range(len(texts))]


def _probe(vocab_size: int, num: int) -> list[int]:
    """Tokens that are the same for every call."""
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, vocab_size, (num,), generator=generator).tolist()
