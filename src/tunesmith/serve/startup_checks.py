"""Checks before the first request: tokenizer and template are those of training, adapters have an effect, and sequences
that are decoded together get the logits that each gets alone."""

# T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.renderer import Renderer
from tunesmith.errors import ModelError, RunError
from tunesmith.inference.load import LoadedModel
from tunesmith.models.attention import packed_forward
from tunesmith.models.modes import eval_mode, silence_transformers
from tunesmith.models.packing_check import TOLERANCES, leak_tolerance, normalized_error, recurrent_layer
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.runs.folder import Run
from tunesmith.serve.adapters import AdapterSet
from tunesmith.serve.decoder import BatchedDecoder, Decoder, SequentialDecoder
from tunesmith.serve.served_model import ServedModel

PROBES = ((37, 23), (11, 5), (64, 40))
"""Length of each probe text, and of its part that is read as a prompt; the rest is read as if it were written."""
_MODEL_ERRORS = (UnsupportedAttentionError, RuntimeError, TypeError, ValueError, LookupError)
"""A model that cannot be called in this way raises any of these."""

Note = Callable[[str], None]


def check_writers(models: Sequence[ServedModel], note: Note) -> None:
    """Raises RunError for a run whose tokenizer or template has changed, or whose adapter has no effect."""
    for model in models:
        if model.run is not None:
            check_renderer(model.run, model.renderer, note)
            if model.adapter is not None:
                check_adapter(model, model.run)


def check_renderer(run: Run, renderer: Renderer, note: Note) -> None:
    """Tokenizer and chat template are those of training, by their fingerprint in the run's first event.

    Raises RunError.
    """
    if run.identity().get("tokenizer and template", renderer.fingerprint) != renderer.fingerprint:
        raise RunError(
            f"{run.path}: its tokenizer or chat template makes other tokens than in training: its files or the "
            "installed transformers have changed. Put them back, or tune it again."
        )
    if renderer.date is not None:
        note(f"{run.path}: its chat template writes the date: {renderer.date}, as in training")


def check_adapter(model: ServedModel, run: Run) -> None:
    """The logits of a probe are others with the adapter than without."""
    decoder, logits = model.decoder.another(), []
    for adapter in (None, model.adapter):
        slot = decoder.open(adapter, PROBES[0][0])
        logits.append(decoder.step({}, [(slot, _probe(model.vocab_size, PROBES[0][0]))])[1])
        decoder.close(slot)
    if torch.equal(*logits):
        raise RunError(
            f"{run.path}: its adapter changes nothing: the base alone would answer in its name. Look at its report, "
            "and train it longer."
        )


def choose_decoder(loaded: LoadedModel, adapters: AdapterSet, note: Note, *, streams: int | None = None) -> Decoder:
    """A decoder of many sequences at once if the model gives them the logits that it gives each alone.

    `streams`: number of sequences at a time; None: several. Raises ModelError for a model that keeps the state of a
    sequence in itself, if there are several.
    """
    model = loaded.model
    is_encoder_decoder = model.config.is_encoder_decoder
    reason = "it is an encoder–decoder" if is_encoder_decoder else why_sequential(model, adapters)
    if not reason:
        return BatchedDecoder(model, adapters)
    note(f"answers are decoded one by one, not together: {reason}")
    if streams != 1 and not is_encoder_decoder and (problem := why_single(model, adapters)):
        raise ModelError(
            f"{loaded.located.name}: cannot be served: {problem}. Use `tunesmith chat` or `tunesmith predict`."
        )
    return SequentialDecoder(model, adapters)


def why_sequential(model: PreTrainedModel, adapters: AdapterSet) -> str:
    """The reason why sequences cannot be decoded in one pass; "" if their logits are the same together and alone.

    Texts of different lengths are read in parts and then continued together, and their logits compared with those of
    the model's own attention, each text alone; and those of one text beside others with those beside others again.
    """
    if reason := recurrent_layer(model):
        return reason
    own = model.config._attn_implementation
    texts = _probes(model)
    with eval_mode(model):
        alone = [_whole(model, ids) for ids in texts]
        try:
            with (
                silence_transformers(),
                packed_forward() as trace,
            ):  # transformers warns of attention that cannot be replaced
                together = _batched(BatchedDecoder(model, adapters), texts)
                again = _batched(BatchedDecoder(model, adapters), [texts[0], *(ids[::-1] for ids in texts[1:])])
        except _MODEL_ERRORS as refusal:
            return str(refusal) or type(refusal).__name__
        finally:
            with silence_transformers():
                model.set_attn_implementation(own)
    if trace.calls == 0:
        return "its attention is its own and cannot be replaced"
    if missing := trace.local_masks - trace.windows:
        return f"its attention is limited to {min(missing)} tokens by a mask alone"
    error, leak = _distance(together, alone), _distance(again[:1], together[:1])
    if error <= TOLERANCES[model.dtype] and leak <= leak_tolerance(model):
        return ""
    return f"others beside a text change its logits, by {max(error, leak):.2g}"


def why_single(model: PreTrainedModel, adapters: AdapterSet) -> str:
    """The reason why sequences cannot even be decoded in turn, each with a cache of its own; "" if they can.

    Some models keep the state of a sequence in themselves, where another one finds it.
    """
    texts = _probes(model)[1:]
    with eval_mode(model):
        alone = [_whole(model, ids) for ids in texts]
        try:
            in_turn = _sequential(SequentialDecoder(model, adapters), texts)
            one_by_one = [_sequential(SequentialDecoder(model, adapters), [ids])[0] for ids in texts]
        except _MODEL_ERRORS as refusal:
            return str(refusal) or type(refusal).__name__
    if not (leak := _distance(in_turn, one_by_one)) <= leak_tolerance(model):
        return f"a text changes the logits of another, by {leak:.2g} of their spread: it keeps the state of one"
    error = _distance(in_turn, alone)
    return "" if error <= TOLERANCES[model.dtype] else f"its cache changes its logits, by {error:.2g} of their spread"


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(normalized_error(a_V[None], b_V[None]) for a_V, b_V in zip(some, others, strict=True))


def _whole(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[V] of the last token, by the model itself."""
    logits_V: Tensor = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, -1]
    return logits_V.float()


def _sequential(decoder: SequentialDecoder, texts: Sequence[list[int]]) -> list[Tensor]:
    """[V] of the last token of each text, which are read in turn, the last two tokens one by one."""
    slots = [decoder.open(None, len(ids)) for ids in texts]
    for part in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        _, logits_NV = decoder.step({}, [(slot, ids[part]) for slot, ids in zip(slots, texts, strict=True)])
    return list(logits_NV)


def _batched(decoder: BatchedDecoder, texts: Sequence[list[int]]) -> list[Tensor]:
    """[V] of the last token of each text."""
    slots = [decoder.open(None, num) for num, _ in PROBES]
    prompts = [ids[:num] for ids, (_, num) in zip(texts, PROBES, strict=True)]
    for parts in ([ids[: len(ids) // 2] for ids in prompts], [ids[len(ids) // 2 :] for ids in prompts]):
        decoder.step({}, list(zip(slots, parts, strict=True)))
    decoding = {decoder.fork(slot, 1)[0]: i for i, slot in enumerate(slots)}
    found: dict[int, Tensor] = {}
    while decoding:
        slots, logits_NV = decoder.step({slot: texts[i][slot.length] for slot, i in decoding.items()}, [])
        for slot, logits_V in zip(slots, logits_NV, strict=True):
            if slot.length == len(texts[decoding[slot]]):
                found[decoding.pop(slot)] = logits_V
                decoder.close(slot)
    return [found[i] for i in range(len(texts))]


def _probes(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = int(model.config.get_text_config().vocab_size)
    return [_probe(vocab_size, num) for num, _ in PROBES]


def _probe(vocab_size: int, num: int) -> list[int]:
    """Random tokens, alike at every call."""
    return torch.randint(0, vocab_size, (num,), generator=torch.Generator().manual_seed(num)).tolist()
