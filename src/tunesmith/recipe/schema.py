"""Every option of a run, each declared once: name, type, default, unit and doc.

The command line, `tunesmith recipe` and docs/reference/recipe.md are all derived from this file. "auto" is
decided from model, data and machine before the run starts, printed with its reason, and written resolved into
the run's recipe.yaml.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.methods import (
    Auto,
    AutoMethod,
    Day,
    Fraction,
    LoraMethod,
    MethodOptions,
    OptionGroup,
    Positive,
    Words,
)
from tunesmith.recipe.objectives import Embed, Prefer, Rank, Reward
from tunesmith.recipe.origin import Base
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.types import TASK_NAMES, Record

T = TypeVar("T")


class DataFile(OptionGroup):
    """One file of rows and how often each of its rows is seen in an epoch."""

    path: str
    """Rows as JSONL, JSON, CSV, TSV, Excel, Parquet or CoNLL, may be gzipped; .txt or .md documents; a folder
    of either; or an address: hf://datasets/owner/name."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Times each row is seen per epoch. 0.5: a different half each epoch. 2: every row twice."""
    _at: str | None = PrivateAttr(None)
    _source: str | None = PrivateAttr(None)

    @property
    def source(self) -> str:
        """The place that the user named: this file, or the folder or address that holds it; not an option."""
        return self._source or self.path

    @property
    def at(self) -> str:
        """Place where it is read: its path, or the place of a run's file now; not an option."""
        return self._at or self.path

    def at_place(self, place: str, *, path: str = "") -> DataFile:
        """This file, read from another place; with a path a file that it names and whose source it is."""
        copy = self.model_copy(update={"path": path or self.path})
        copy._at, copy._source = place, self.source if path else self._source
        return copy


class Limits(OptionGroup):
    """Bounds that keep one hostile or broken row from taking the machine down."""

    line_bytes: Positive = 8 * 1024 * 1024
    """Longest line or record, in bytes."""
    depth: Positive = 32
    """Deepest nesting of JSON objects and arrays."""
    messages: Positive = 1000
    """Most messages in one row."""
    problems: Positive = 1000
    """Most problems listed one by one; all are counted."""
    images: Positive = 64
    """Most images in one row."""
    image_bytes: Positive = 20 * 1024 * 1024
    """Largest file of an image, in bytes."""
    image_pixels: Positive = 24_000_000
    """Most pixels of an image: decoded, each takes 4 bytes of memory."""


class Reading(NamedTuple):
    """Settings for reading files, as far as their content does not say it."""

    encoding: str = "auto"
    suffixes: tuple[str, ...] = ()


AS_IT_IS = Reading()


def _known_encoding(name: str) -> str:
    try:
        if name != "auto" and not codecs.lookup(name)._is_text_encoding:
            raise LookupError
    except (LookupError, ValueError):
        raise ValueError(f"{name}: no encoding of text has this name. Use cp1252, latin-1, utf-16, ...") from None
    return name


class Data(OptionGroup):
    """Datasets, and how rows become tokens."""

    train: tuple[DataFile, ...] = ()
    """Training files. Each entry is a path, or {path, weight}."""
    mix: Literal["times", "shares"] = "times"
    """Meaning of the weights of `train`. times: how often each row is seen per epoch. shares: the share of each
    file in the rows of every epoch, as weights to each other; an epoch ends where the first file is used up."""
    eval: tuple[DataFile, ...] = ()
    """Held-out files. Empty: a part of `train` is split off, see `held_out`."""
    held_out: Fraction | Auto = "auto"
    """Share of `train` held out when `eval` is empty: the rows with the smallest hashes of their inputs, so
    that few move when rows are added. auto: a fifth of a small file, 50 to 100 rows of a larger one, a
    twentieth of a large one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names of fields, ours to yours: {prompt: question, completion: answer}. A name that no row has is
    an error."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] = "auto"
    """Encoding of files that are not UTF-8: cp1252, latin-1, cp1251, shift_jis, ... auto: UTF-8, or UTF-16 and
    UTF-32 by their byte order marks."""
    suffixes: Words = ()
    """Ends of names of documents, besides .txt and .md, before .gz: [".1", ".rst"]. Text without a suffix is a
    document in a folder without others."""
    template: str | None = None
    """A Jinja chat template file, for models that have none. Saved with the result."""
    date: Day | Auto | None = "auto"
    """Day (2026-11-27) for chat templates that write a date, as Llama 3.2's do: in training and wherever the
    run is used here. auto: the day on which the run is made, null for other templates."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become one token each, with rows of their own in the embedding: names, tags, notation that the
    model spells in many pieces. With adapters, only these rows of the embedding are trained. Causal models
    only."""
    max_tokens: Positive | Auto = "auto"
    """Longest row, in tokens. auto: what the model can attend to."""
    too_long: Literal["error", "drop", "cut"] | Auto = "auto"
    """A row over max_tokens: refuse the data, drop the row (counted), or cut the end of what is read (counted).
    auto: cut for classify, tag, summarize and embed, error otherwise. Documents of task text are cut in windows
    instead."""
    stride: Positive | Auto = "auto"
    """Task text: tokens from the start of one window of a long document to the start of the next. auto: windows
    of a causal model overlap by one token, an encoder's do not. Smaller: each window begins with context that
    is read but not trained."""
    prompt: str | None = None
    """Task summarize: the prompt, with {document} in place of the document. null: a default that is printed."""
    labels: tuple[str, ...] = ()
    """Tasks classify and tag: the classes in the order of their ids. Empty: as in the training rows, whole
    numbers first by value, then words by code point. A class that is not in the list is an error."""
    label_kind: Literal["one", "many", "number"] | Auto = "auto"
    """Task classify: one class a row, any number of classes a row, or a number. auto: lists are many, numbers
    with a decimal point are a number, all else is one class."""
    replay: tuple[DataFile, ...] = ()
    """Files of general rows mixed into training against forgetting; never held out."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used: refuse the data, or skip the row (counted and listed)."""
    control_tokens: Literal["error", "allow"] = "error"
    """Text of a row that contains one of the template's control tokens, such as <|im_end|>: a bad row, or
    trusted."""
    overlap: Literal["error", "warn"] = "warn"
    """Held-out rows that are also in the training files: refuse, or train and report how many."""
    image_folder: str | None = None
    """Folder where paths of images begin, which they may not leave. null: the folder of the data file."""
    num_proc: Positive | None = None
    """Processes that encode rows. null: one, or for files of 8 MiB and more together one a core, at most 8.
    Rows, counts and errors are the same."""
    limits: Limits = Limits()
    _template_at: str | None = PrivateAttr(None)

    @property
    def reading(self) -> Reading:
        """Settings for reading its files."""
        return Reading(self.encoding, self.suffixes)

    def with_options(self, options: Mapping[str, Any]) -> Data:
        """These options with others in their place; each of the `limits` that was set wins by itself."""
        limits = options.get("limits", Limits())
        set_limits = {key: getattr(limits, key) for key in limits.model_fields_set}
        return self.model_copy(update={**options, "limits": self.limits.model_copy(update=set_limits)})

    @property
    def template_at(self) -> str | None:
        """Place where the template is read, see `DataFile.at`."""
        return self._template_at or self.template

    def with_template_at(self, place: str) -> Data:
        """These options, with the template read from another place."""
        copy = self.model_copy()
        copy._template_at = place
        return copy

    @field_validator("train", "eval", "replay", mode="before")
    @classmethod
    def _paths_are_files(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, (str, dict)) else value
        if isinstance(entries, (list, tuple)):
            return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)
        return value


OptimizerName = Literal["adamw", "adamw_8bit", "lion", "adafactor", "muon"]
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
USUAL: Mapping[str, Record] = MappingProxyType(
    {
        "adamw": _ADAM,
        "adamw_8bit": _ADAM,
        "lion": {"betas": (0.9, 0.99)},
        "adafactor": {},
        "muon": {**_ADAM, "momentum": 0.95},
    }
)
"""Options that only some optimizers have, with the values that null means."""


class Optim(OptionGroup):
    """The update: the optimizer and the rate of each step."""

    name: OptimizerName = "adamw"
    """Optimizer. adamw_8bit keeps its state in 8 bits, lion and adafactor keep less of it, muon makes the
    updates of the matrices inside the layers orthogonal."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Peak learning rate. LoRA wants roughly ten times the rate of full tuning."""
    lr_times: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the learning rate that lr: auto takes: 2 is twice the usual one."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the rate after warm-up; linear and cosine end at zero after the last step."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up: below 1 a share of all steps, from 1 up a number of steps. The first step's rate is not zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; never on norms, biases and embeddings."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay of the running means of the gradient and of its square. null: 0.9 and 0.999, of lion 0.9 and 0.99;
    adafactor has none."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the root of the second mean, so that no update divides by zero. null: 1e-8; lion and adafactor
    have none."""
    momentum: Fraction | None = None
    """muon only: decay of the running mean of the gradient that is made orthogonal. null: 0.95."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null never clips."""

    @model_validator(mode="before")
    @classmethod
    def _as_usual(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name, betas = data.get("name", "adamw"), data.get("betas")
        usual = USUAL.get(name, {}) if isinstance(name, str) else {}
        filled = {key: value for key, value in usual.items() if data.get(key) is None}
        return {**data, **({"betas": tuple(betas)} if isinstance(betas, list) else {}), **filled}

    @model_validator(mode="after")
    def _has_what_it_is_given(self) -> Optim:
        if self.lr != "auto" and self.lr_times != 1:
            raise ValueError("optim.lr_times: is a factor of the usual rate, and optim.lr is given: drop one of them")
        for option in ("betas", "eps", "momentum"):
            if getattr(self, option) is not None and option not in USUAL[self.name]:
                raise ValueError(f"optim.{option}: {self.name} has none: drop it or set optim.name: adamw")
        return self


class Loss(OptionGroup):
    """Additions to the loss in training. It stays a sum over targets divided once; held-out rows are measured
    without them."""

    label_smoothing: Fraction = 0.0
    """Share of each target that is spread evenly over all tokens or classes."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting; 1e-4 is
    usual."""


class Train(OptionGroup):
    """Length of training, and sizes of steps and micro-batches."""

    epochs: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Passes over the training rows; fractions are allowed."""
    max_steps: Positive | None = None
    """Stop after this many updates even if epochs are left; the schedule ends there too."""
    rows_per_step: Positive | Auto = "auto"
    """Rows in one update. The loss is divided by the targets of the whole step, however it is divided into
    micro-batches."""
    tokens_per_pass: Positive | Auto = "auto"
    """Most tokens in one micro-batch (one forward and backward), padding included, shared prefixes counted
    once. Smaller needs less memory and gives the same update, apart from dropout. auto: enough to use the
    machine well, or less if memory requires it."""
    checkpointed_layers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Layers whose activations are recomputed in the backward pass instead of kept. auto: as many as memory
    requires."""
    class_weights: Literal["equal", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "equal"
    """Task classify and tag: weight of each class. balanced: rare classes count as much as frequent ones; or a
    weight by name."""
    masked: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Task text on an encoder: share of the tokens that are masked and learnt, drawn anew at every step."""


class EvaluationOptions(OptionGroup):
    """Measuring on held-out rows."""

    every: Positive | Literal["epoch"] | Auto | None = "auto"
    """Steps between evaluations; epoch: at the end of each; null: before the first step and after the last
    only. auto: epoch, or a few of them, where a classifier or embedder of less than a billion weights learns
    its rows more than once and that takes at most a tenth of the training; else null."""
    max_rows: Positive | Auto | None = "auto"
    """Most held-out rows measured, chosen by content hash, of each class its share; null: all. auto: 1000."""
    metric: str = "auto"
    """Held-out measure that says which evaluation was best, and of equal ones the lower loss: loss, accuracy,
    macro_f1, span_f1, ... auto: where rows have labels, the one that the report leads with; else loss."""
    patience: Positive | None = None
    """Stop after this many evaluations in a row without a new best; needs `every`. null: go to the end."""
    keep: Literal["last", "best"] | Auto = "auto"
    """Whose weights are the result. auto: the best evaluation's where `every` is set, else the last step's."""
    samples: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Held-out prompts answered before and after. auto: 16; all, up to 256, where answers are as short as a
    class, a name or a date; fewer in a short run."""
    samples_before: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Number of these prompts, the first ones, that the untouched model answers too. auto: all, or as many
    as take it at most a tenth of the training."""
    samples_on_the_way: Annotated[int, Field(ge=0)] = 0
    """Number of these prompts, the first ones, that are answered at each evaluation on the way
    too, for those who watch the run."""
    sample_tokens: Positive = 64
    """Most new tokens in such an answer; 16 at most where answers are short."""
    general: bool | Auto = "auto"
    """Measure before and after how well a causal model still does on general text. auto: true, except
    in a short run."""
    surprising: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Most training rows to search for the rows of highest loss; 0: none. auto: all of the last epoch, by the
    losses that training saw. Rows that are compared with others are measured for it at the end: a third of the
    rows trained on, each counted as often as it was seen, or 200 of them if that is more; fewer in a short
    run."""

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> EvaluationOptions:
        if self.every in (None, "auto") and (self.patience is not None or self.keep == "best"):
            option = "patience" if self.patience is not None else "keep: best"
            raise ValueError(f"{option}: needs evaluations on the way: set evaluation.every too")
        return self


class CheckpointOptions(OptionGroup):
    """Checkpoints, from which a run resumes."""

    every: Positive | Auto = "auto"
    """Steps between checkpoints. auto: a tenth of all steps, at most 500; more where these take less than two
    minutes, and where saving would take more than a tenth of the training."""
    keep: Positive = 2
    """Newest checkpoints kept; the best by evaluation.metric is kept too."""
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Number of epochs, the newest before the end of the run, whose results are kept too, in snapshots/step-N:
    each is a run's folder for predict, chat, serve and export. If not 0, a run that is stopped keeps its result
    too."""


class ResultExportOptions(OptionGroup):
    """Exports of the result when the run is done."""

    to: Words = ()
    """Exports to make, each TARGET or TARGET:KIND: merged, gguf:q4_k_m."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """The words that an option takes, from a list that can grow."""

    words: list[str]


def _known_task(name: str) -> str:
    if name not in TASK_NAMES:
        raise PydanticCustomError("literal_error", "no such task")
    return name


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|(cpu|mps|cuda)(:(0|[1-9]\d?))?", name):
        raise ValueError(f"device: {name}: not a device. Use auto, cpu, cuda, cuda:1 or mps")
    return name


class Recipe(OptionGroup):
    """A run, completely.

    Examples:
        >>> recipe = tunesmith.Recipe(model="./model", data={"train": ["a.jsonl"]}, train={"epochs": 2})
    """

    model: str = ""
    """A folder, a hub id (owner/name or owner/name@revision) or a .gguf file."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; in a run's recipe the commit."""
    name: str | None = None
    """Name of the run; its folder is runs/<name>-<4 hex digits>. null: the data file's name."""
    task: Annotated[str, AfterValidator(_known_task), OneOf(TASK_NAMES)] = "auto"
    """Task: answers of the assistant in a chat, completions of prompts, plain text, summaries, classes of
    texts, a tag for each word, the better of two answers, a number for an answer, what a grader rewards, what a
    teacher finds likely, vectors of texts, or a score for a document. auto: detected from the rows, but for
    reinforce and distil."""
    method: MethodOptions = AutoMethod()
    """Method of training: LoRA and its relatives, or full fine-tuning."""
    data: Data = Data()
    optim: Optim = Optim()
    loss: Loss = Loss()
    prefer: Prefer = Prefer()
    reward: Reward = Reward()
    reinforce: Reinforce = Reinforce()
    distil: Distil = Distil()
    embed: Embed = Embed()
    ranking: Rank = Rank()
    train: Train = Train()
    evaluation: EvaluationOptions = EvaluationOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    export: ResultExportOptions = ResultExportOptions()
    precision: Auto | Literal["float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; trained weights are always kept in float32. float16 is for NVIDIA cards
    of capability 7 (T4, V100); its loss is scaled, so that small gradients do not become zero."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest there is."""
    devices: Positive | Auto = "auto"
    """Devices that train together, a process each: CUDA cards, or parts of a processor. auto: all cards of this
    machine, else one. Another number changes rounding and the random numbers of dropout only. Where torchrun or
    its like starts the processes, it is their number."""
    shard: bool | Auto = "auto"
    """Split the weights of the layers over the devices, so that each keeps a part of them only. auto: where a
    whole model does not fit each device."""
    memory: Literal["refuse", "warn"] = "refuse"
    """A run that is predicted to need more memory than there is: refuse it before the model is loaded, or
    warn."""
    threads: Annotated[int, Field(gt=0, le=1_024)] | Auto = "auto"
    """CPU threads; part of what makes a run repeat bit for bit."""
    kernels: Literal["fast", "plain"] = "fast"
    """fast: token loss and attention of short rows by functions of this package, on a processor and on a card
    norms, gated MLPs and LoRA layers of one input too, on a card rotations, and shared prefixes computed once,
    where that gives the model's own answer; plain: torch's and the model's own, slower, for comparison."""
    repeatable: bool = False
    """On CUDA, take only kernels that give the same bits each time, which makes a run slower. A processor
    repeats a run without it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Order of rows, fresh adapter weights and dropout all follow from it."""
    track: Words = ()
    """Experiment trackers that get the run: tensorboard, wandb, mlflow, trackio. They change nothing about
    it."""
    _base: Base | None = PrivateAttr(None)

    @property
    def base(self) -> Base | None:
        """Place of the model now, in the recipe of a run that was made from it; not an option."""
        return None if self._base is None or self._base.model != self.model else self._base

    @property
    def place(self) -> str:
        """Place of the model: as typed, or where a run's model is now."""
        return self.model if self.base is None else self.base.place

    @property
    def grader_at(self) -> str:
        """Place of the grader: as typed, or where a run's grader is now."""
        return (self.base and self.base.grader) or self.reinforce.grader or ""

    @property
    def teacher_at(self) -> str:
        """Place of the teacher: as typed, or where a run's teacher is now."""
        return (self.base and self.base.teacher) or self.distil.teacher or ""

    def on_base(self, base: Base) -> Recipe:
        """This recipe, with its model at another place."""
        copy = self.model_copy()
        copy._base = base
        return copy

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name_or_option(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        lora_options = set(LoraMethod.model_fields) - {"name"}
        if isinstance(value, dict) and value.get("name", "auto") == "auto" and set(value) & lora_options:
            return {**value, "name": "lora"}
        return value

    @model_validator(mode="after")
    def _files_once(self) -> Recipe:
        paths = [file.path for file in self.data.train]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"data.train: {twice[0]} is there twice: give it once with a weight")
        return self


def resolved(value: T | Auto) -> T:
    """The value of an option after "auto" was resolved."""
    if value == "auto":
        raise AssertionError("an option is still auto: planning resolves every auto before a run")
    return value
