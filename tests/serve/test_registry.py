"""Nothing is served that is not what was trained: prompts, adapters and bases are compared before the first ask."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from serve.batches import Heard, hear, sharp
from serve.engines import OPTIONS, UNMEASURED, says, two_runs
from tiny_run import model_folder, tiny_recipe
from tiny_tasks import encoder_folder, task_recipe, write_pooling
from tunesmith.data.dataset import open_kept
from tunesmith.errors import InputError, ModelError, RunError
from tunesmith.generation import kv_cache
from tunesmith.generation.adapters import AdapterSet
from tunesmith.generation.decoder import BatchedDecoder, SequentialDecoder, why_unlike
from tunesmith.generation.padded import generate
from tunesmith.generation.scheduler import Scheduler
from tunesmith.inference import load as loading
from tunesmith.inference.predict import Predictor
from tunesmith.models.modes import silence_transformers
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import GenerationRequest, RequestError
from tunesmith.serve.registry import Registry, open_registry
from tunesmith.serve.served_model import ServedModel
from tunesmith.training import trainer as training
from tunesmith.types import Example, Part, Source


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    two_runs(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """A copy of the first run, to be broken."""
    shutil.copytree(made / "runs" / "first", tmp_path / "first")
    return Run(tmp_path / "first")


def opened(*names: Any, notes: list[str] | None = None) -> Registry:
    heard = [] if notes is None else notes
    return open_registry([str(name) for name in names], root=Path("runs"), options=OPTIONS, note=heard.append)


# trap: T1, T7, T10
def assert_served(run: Run) -> None:
    try:
        opened(run.path)
    except RunError as error:
        raise AssertionError(str(error)) from error


def test_a_run_is_served_with_its_base(run: Run) -> None:
    notes: list[str] = []
    serving = opened(run.path, notes=notes)
    assert list(serving.models) == ["first", "model-llama"]
    assert notes == []
    assert [type(decoder) for decoder in serving.decoders] == [BatchedDecoder]
    assert_served(run)


def with_another_template(run: Run) -> None:
    path = run.adapter_path / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("<|im_start|>", "<|im_start|> "), "utf-8")


def with_two_bos(run: Run) -> None:
    path = run.adapter_path / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text("utf-8"), "utf-8")


def with_another_tokenizer(run: Run) -> None:
    path = run.adapter_path / "tokenizer.json"
    saved = json.loads(path.read_text("utf-8"))
    saved["model"]["merges"] = saved["model"]["merges"][:20]
    path.write_text(json.dumps(saved), "utf-8")


@pytest.mark.parametrize("planted", [with_another_template, with_two_bos, with_another_tokenizer])
def test_other_prompts_than_those_of_training_are_refused(run: Run, planted: Callable[[Run], None]) -> None:
    """The planted bugs: a template that writes one blank more, one more BOS, a tokenizer that was saved otherwise."""
    planted(run)
    (run.path / "result.json").unlink()  # which would refuse the file itself
    with pytest.raises(AssertionError) as refusal:
        assert_served(run)
    assert f"{run.path}: its tokenizer or chat template makes other tokens" in str(refusal.value)


def assert_trained_prompts_are_served(run: Run, data: Path) -> None:
    voice, store = opened(run.path).models["first"], open_kept(run.rows_path / "train", run.identity()["rows"])
    assert store is not None
    chats = [json.loads(line)["messages"] for line in data.read_text("utf-8").splitlines()]
    for i in range(len(store)):
        prompt = voice.prompt_ids(GenerationRequest("first", messages=chats[int(store.lines[i]) - 1][:-1]))
        assert store.row(i).ids.tolist()[: len(prompt)] == prompt


def test_a_request_has_the_tokens_of_the_rows(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a token is put in front on the way from a request to the model, behind the renderer."""
    assert_trained_prompts_are_served(run, made / "chats.jsonl")
    own = ServedModel.prompt_ids
    monkeypatch.setattr(ServedModel, "prompt_ids", lambda voice, ask: [0, *own(voice, ask)])
    with pytest.raises(AssertionError):
        assert_trained_prompts_are_served(run, made / "chats.jsonl")


# trap: A6
def test_an_adapter_that_changes_nothing_is_refused(run: Run) -> None:
    path = run.adapter_path / "adapter_model.safetensors"
    save_file({name: t * (0 if "lora_B" in name else 1) for name, t in load_file(path).items()}, path)
    (run.path / "result.json").unlink()  # which would refuse the file itself
    with pytest.raises(RunError, match="its adapter changes nothing"):
        opened(run.path)


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """A file of the shared base, put back afterwards."""
    content = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(content)


# trap: A8


def test_another_base_is_refused(run: Run, made: Path) -> None:
    base = made / "model-llama"
    with kept(base / "model.safetensors"), kept(base / "config.json"), kept(base / "generation_config.json"):
        sharp("llama", seed=9).save_pretrained(base)
        with pytest.raises(RunError, match=r"model.safetensors: not the file that .* was tuned on"):
            opened(run.path)


def test_a_base_whose_generation_settings_were_edited_is_the_same_base(run: Run, made: Path) -> None:
    """No weight depends on them, and how answers end is the run's own."""
    with kept(made / "model-llama" / "generation_config.json") as settings:
        settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "temperature": 0.3}), "utf-8")
        opened(run.path)


def test_two_runs_of_one_name_and_runs_on_several_bases_are_refused(run: Run, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have the same name"):
        opened(run.path, made / "runs" / "first")
    other = model_folder(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match=r"these are on 2: .*other.*; .*first.*Serve them separately"):
        opened(other, run.path)


# trap: T3, A9
def assert_answers_end(serving: Registry, name: str) -> None:
    """With the turn's end of the template, whatever the model's own settings say."""
    voice = serving.models[name]
    batch = Scheduler(voice.decoder, streams=1)
    job = voice.prepare(0, says(name, "hello", max_tokens=30), OPTIONS)
    assert job.stop_ids == {voice.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    batch.add(job)
    heard: dict[int, Heard] = defaultdict(Heard)
    while batch.is_busy:
        hear(batch.step(), heard)
    assert heard[0].ended[0].reason == "stop"


def overfit(folder: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes please"}]}] * 4
    recipe = tiny_recipe(folder, optim={"lr": 1e-2}, train={"epochs": 40}, evaluation={"samples": 0})
    # The head of a fresh model gives all tokens nearly one chance, whatever an adapter does before it.
    weights = load_file(Path(recipe.model) / "model.safetensors")
    louder = {name: tensor * 30 if "lm_head" in name else tensor for name, tensor in weights.items()}
    save_file(louder, Path(recipe.model) / "model.safetensors", metadata={"format": "pt"})
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": 0})})
    settings = {"do_sample": False, "temperature": 0.9, "eos_token_id": 3, "max_length": 2, "repetition_penalty": 9.0}
    (Path(recipe.model) / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    run = training.train(recipe, root=folder / "runs", offline=True)
    assert [event.values["loss"] for event in run.events() if event.kind == "step"][-1] < 0.1
    return run.path


def test_an_answer_ends_with_its_turn_whatever_the_base_says(tmp_path: Path) -> None:
    path = overfit(tmp_path)
    assert_answers_end(opened(path), path.name)
    planted = opened(path)
    planted.models[path.name].renderer.stop_ids = (3,)  # that of the base's own settings
    with pytest.raises(AssertionError):
        assert_answers_end(planted, path.name)


ALONE: list[tuple[str, dict[str, Any], str]] = [
    (
        "dora",
        {"method": {"name": "dora", "rank": 4, "alpha": 16}},
        "method dora is more than low-rank paths on layers",
    ),
    (
        "rows",
        {"method": {"name": "lora", "rank": 4, "also_train": ["embed_tokens"]}},
        "embed_tokens were trained whole",
    ),
    ("full", {"method": "full"}, "every weight of it was tuned"),
    ("tokens", {"data": {"new_tokens": ["quick brown"]}}, "it has tokens that its base has not"),
]


def test_a_run_that_cannot_share_its_base_has_a_model_of_its_own(made: Path, tmp_path: Path) -> None:
    """Beside one that can: each answers in the batch what its own model answers alone."""
    paths = [made / "runs" / "first"]
    for name, changed, _ in ALONE:
        recipe = tiny_recipe(made, optim={"lr": 3e-3}, train={"epochs": 1}, **UNMEASURED, **changed)
        sharp("llama").save_pretrained(recipe.model)
        paths.append(training.train(recipe, root=tmp_path, out=tmp_path / name, offline=True).path)
    notes: list[str] = []
    serving = opened(*paths, notes=notes)
    assert list(serving.models) == ["dora", "rows", "full", "tokens", "first", "model-llama"]
    assert [name for name, model in serving.models.items() if model.card.is_base] == ["model-llama"]
    assert len(serving.decoders) == 5
    for name, _, why in ALONE:
        assert any(
            note.startswith(f"{tmp_path / name}: {why}, so it is loaded apart from the others, ") for note in notes
        ), notes
    answers = set()
    for path in paths:
        voice = serving.models[path.name]
        batch, heard = Scheduler(voice.decoder, streams=2), defaultdict(Heard)
        for key, text in enumerate(("hello", "the quick brown fox jumps")):
            batch.add(voice.prepare(key, says(path.name, text), OPTIONS))
        while batch.is_busy:
            hear(batch.step(), heard)
        speaker = loading.load_run(Run(path), offline=True)
        for key, text in enumerate(("hello", "the quick brown fox jumps")):
            prompt = speaker.renderer.prompt_ids([Part("user", text, trained=False)])
            [expected] = generate(speaker.model, speaker.renderer, [prompt], 12)
            assert heard[key].answer() == expected, path.name
            answers.add(expected.text)
    assert len(answers) > 4, "runs that answer alike would prove nothing"


@pytest.mark.parametrize("arch", ["bloom", "falcon"])
def test_a_model_with_an_attention_of_its_own_is_run_apart(arch: str) -> None:
    model = sharp(arch)
    own = model.config._attn_implementation
    assert why_unlike(BatchedDecoder, model, AdapterSet(model))
    assert model.config._attn_implementation == own


def test_texts_that_read_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: rows of a pool read what lies behind them."""
    monkeypatch.setattr(kv_cache.DecodeRows, "mask", lambda rows, window, dtype: None)
    assert "others beside a text change its logits" in why_unlike(
        BatchedDecoder, sharp("llama"), AdapterSet(sharp("llama"))
    )


def test_an_encoder_decoder_is_run_apart(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "summarize", "encoder_decoder", train={"max_steps": 2}, **UNMEASURED)
    run = training.train(recipe, root=tmp_path / "runs", offline=True)
    notes: list[str] = []
    serving = opened(run.path, notes=notes)
    assert [type(decoder) for decoder in serving.decoders] == [SequentialDecoder]
    assert any("one by one" in note for note in notes)
    voice = serving.models[run.path.name]
    assert voice.prepare(0, GenerationRequest(run.path.name, prompt="red apple"), OPTIONS).prompt


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_classes_are_those_of_predict(tmp_path: Path, kind: str) -> None:
    recipe = task_recipe(tmp_path, "classify", kind, train={"max_steps": 2}, **UNMEASURED)
    run = training.train(recipe, root=tmp_path / "runs", offline=True)
    serving = opened(run.path)
    labeller = serving.models[run.path.name]
    assert labeller.card.answers == "labels"
    assert labeller.card.labels == labeller.loaded.labels.names  # type: ignore[union-attr]
    texts = ["red apple", "Ada eats the big plum in Rome"]
    examples = [Example((Part("text", text, False),), Source("x", i), "text_label") for i, text in enumerate(texts)]
    expected = Predictor(loading.load_run(run, offline=True))(examples, lambda num: None, lambda problem: None)
    assert labeller.classify(texts) == expected
    with pytest.raises(RequestError, match=r"input\[1\]: .*empty"):
        labeller.classify(["red", " "])


def test_vectors_are_means_of_tokens(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    embedder = opened(folder).models["encoder"]
    texts = ["red apple", "Ada eats the big old plum in Rome", "red apple"]
    vectors, num_tokens = embedder.embed(texts)
    model, tokenizer = embedder.loaded.model, embedder.loaded.renderer.tokenizer
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden_TD = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        # float32, and padding beside it adds nothing but rounding
        torch.testing.assert_close(torch.tensor(vector), hidden_TD.mean(0), rtol=1e-5, atol=1e-5)
    assert num_tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    for text, said in ((" ", "empty"), ("red " * 600, "at most")):
        with pytest.raises(RequestError, match=said):
            embedder.embed(["red", text])


def test_a_head_that_is_not_asked_is_not_spoken_of(tmp_path: Path) -> None:
    """Encoders that were made for vectors have none for masked words."""
    folder = encoder_folder(tmp_path / "encoder")
    with silence_transformers():
        BertModel.from_pretrained(folder).save_pretrained(folder)
    notes: list[str] = []
    assert list(opened(folder, notes=notes).models) == ["encoder"]
    assert notes == []


def test_files_of_sentence_transformers_say_how_tokens_are_pooled(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    write_pooling(folder, {"pooling_mode_cls_token": True})
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}), "utf-8")
    embedder = opened(folder).models["encoder"]
    [[*vector]], _ = embedder.embed(["red apple"])
    with torch.no_grad():
        inputs = embedder.loaded.renderer.tokenizer("red apple", return_tensors="pt")
        first_D = embedder.loaded.model.base_model(**inputs).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.tensor(vector), first_D / first_D.norm(), rtol=1e-5, atol=1e-5)  # as above
    with pytest.raises(RequestError, match="at most 6"):
        embedder.embed(["red " * 6])
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": ""}]), "utf-8")
    with pytest.raises(ModelError, match="Dense"):
        opened(folder)


def test_tools_are_refused_where_the_template_does_not_show_them(made: Path) -> None:
    voice = opened(made / "runs" / "first").models["first"]
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(RequestError, match="the chat template of first does not show tools"):
        voice.prepare(0, says("first", "hello", tools=(tool,)), OPTIONS)
    voice.prepare(0, says("first", "hello"), OPTIONS)


def test_a_name_that_is_nothing_gets_the_runs_there_are(tmp_path: Path) -> None:
    Run.create(tmp_path, "x", "")
    with pytest.raises(ModelError, match=r"lats: no such run in .*: did you mean last"):
        open_registry(["lats"], root=tmp_path, options=replace(OPTIONS, offline=True), note=print)
