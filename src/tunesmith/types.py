"""The types that travel between modules: one example's way from a line of a file to a weight update.

    train.jsonl:812 → Example → Row → Batch → Event

Standard library only at run time; arrays and tensors are named for the type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Size, Tensor, nn

    from tunesmith.errors import WayOut

# B rows, T tokens, N targets, C classes, L lines, K branches of a row, V values

T = TypeVar("T")
JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON or YAML file: values by name."""
Record: TypeAlias = Mapping[str, Any]
"""Values by name, to be read only: a row of a file or table, a part of a recipe or report."""

OnProgress = Callable[[str, int, int], None]
"""Gets (phase, done, total) of anything that takes seconds."""
REWARD_KEY = "reward"  # in the values of a step, among measures, in the record of an answer
IGNORE = -100
"""Target id where nothing is trained, as in torch.nn.functional.cross_entropy."""

Shape = str
"""A key of `data.formats.FORMATS`."""
Layout = Literal["packed", "padded", "encoder_decoder"]
"""Layout of a micro-batch: rows end to end; padded to one length; or sources and targets each padded."""
TaskName = str
"""A key of `tasks.TASKS`."""
TASK_NAMES = [
    "auto", "chat", "generate", "text", "summarize", "classify", "tag", "prefer", "reward", "reinforce",
    "distil", "embed", "rank",
]  # fmt: skip
"""Values of a recipe's `task`; `tasks.register` adds to them."""
EXPORT_NAMES = ("merged", "adapter", "gguf", "ollama", "onnx")
ModelKind = Literal["causal", "encoder", "encoder_decoder"]
HeadName = Literal["next_token", "masked_token", "sequence", "tokens", "vector"]
"""A head predicts the next token, a masked token, something about a whole text, or about each of its words;
`vector`: there is none, and the hidden states of a text are pooled."""
PoolingKind = Literal["mean", "cls", "max", "last"]
"""The mean or maximum over all tokens of a text, or its first or last token."""
LabelKind = Literal["one", "many", "number", "tags"]
"""One class a row, any number of classes a row, a number a row, or one class a word."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes or numbers that a head learns."""

    kind: LabelKind
    names: tuple[str, ...] = ()
    """Classes by id; empty for numbers."""
    weights_C: NDArray[np.float64] | None = None
    """Weight of an example of each class; None: all the same."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return 1 if self.kind == "number" else len(self.names)


@dataclass(frozen=True, slots=True)
class Pooling:
    """The way from the token vectors of a text to its vector."""

    kind: PoolingKind = "mean"
    normalizes: bool = False
    """Scale a vector to length 1."""
    max_tokens: int | None = None
    """Most tokens of a text, where that is less than the model reads."""
    query_prompt: str = ""
    """Put in front of a text that searches."""
    document_prompt: str = ""
    """Put in front of a text that is found."""
    include_prompt: bool = True
    """Pool the tokens of a prompt too."""


@dataclass(frozen=True, slots=True)
class Source:
    """The file and 1-based line that a row was read from (JSON arrays, Parquet: the row; 0: the file)."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding about one row. An `error` makes the row unusable, a `warning` does not."""

    source: Source
    code: str
    message: str
    fix: str = ""
    severity: Literal["error", "warning"] = "error"
    ways: tuple[WayOut, ...] = ()
    """The ways on that `fix` names, where options are ways."""

    def __str__(self) -> str:
        return f"{self.source}: {self.code}: {self.message}" + (f" {self.fix}" if self.fix else "")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image of a row: where it is, and, once `data.images.look_at` has seen it, what it is."""

    path: str = ""
    """Empty: it came with the row, as `data`."""
    data: bytes = b""
    """The file's own bytes, not pixels."""
    sha256: str = ""
    """The hash of these bytes; empty: nobody has looked yet."""
    width: int = 0
    """In pixels, as it is shown: after the turn that its EXIF asks for."""
    height: int = 0

    @property
    def number(self) -> int:
        """The first 64 bits of its hash, by which rows name it."""
        return int(self.sha256[:16], 16)

    def __str__(self) -> str:
        return self.path or "an image"


@dataclass(frozen=True, slots=True)
class Part:
    """One turn of a conversation, or the prompt or completion of a pair."""

    role: str
    text: str
    trained: bool
    fields: Record = field(default_factory=dict)
    """Further keys of the message (`tool_calls`, `name`, ...), handed to the template unchanged."""
    images: tuple[tuple[int, ImageRef], ...] = ()
    """Images of a user's turn, in order, each with the character of `text` before which it stands."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data in the one shape every task understands."""

    parts: tuple[Part, ...]
    source: Source
    shape: Shape
    tools: tuple[Record, ...] = ()
    """Tool definitions that came with the row, handed to the template as they are."""
    plain: bool = False
    """Text and its continuation, which no template is put around, rather than a conversation."""
    labels: tuple[str, ...] = ()
    """classify: the row's classes, or its number as it is written; tag: one for each part, which is a word."""
    many: bool = False
    """`labels` came as a list: any number of them can hold, none too."""
    kept: Record = field(default_factory=dict, compare=False)
    """Keys of a row to be answered that its answer repeats unchanged, such as an id; of a prompt whose answers
    are graded all fields of its row."""
    branches: tuple[tuple[Part, ...], ...] = ()
    """Answers to `parts` that are compared with each other, preferred first; empty: `parts` hold the answer."""
    values: tuple[float, ...] = ()
    """Numbers that come with the branches, such as the margin of a preference."""

    @property
    def first_line(self) -> tuple[Part, ...]:
        """The parts with the first of the branches, or as they are."""
        return (*self.parts, *self.branches[0]) if self.branches else self.parts

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images of its parts, in order."""
        return images_of(self.parts)

    @property
    def last_prompt(self) -> tuple[Part, ...]:
        """The parts before the last trained one of `first_line`: none where nothing is trained."""
        last = max((i for i, part in enumerate(self.first_line) if part.trained), default=0)
        return self.first_line[:last]


def images_of(parts: Sequence[Part]) -> tuple[ImageRef, ...]:
    """The images of some parts, in order."""
    return tuple(image for part in parts for _, image in part.images)


class Placeholders(Protocol):
    """A model's processor of images: what it writes into a text in the place of one, and its pixels."""

    @property
    def token(self) -> str:
        """The word that a chat template writes for an image."""
        ...

    @property
    def token_id(self) -> int:
        """The token that the model replaces with a vector of an image."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that pixels and numbers of tokens follow from."""
        ...

    @property
    def sees_several(self) -> bool:
        """Whether an image is read in another way where it is one of several in a row."""
        ...

    def expand(self, width: int, height: int, *, several: bool = False) -> str:
        """The text that takes the place of `token` for an image of this size, one of `several` in a row.

        Raises ValueError, in words for a person, for a shape that the model does not read.
        """
        ...

    def pixels(self, picture: Image, *, several: bool = False) -> Mapping[str, Tensor]:
        """One image as the arguments of the model's `get_image_features`."""
        ...


@dataclass(frozen=True, slots=True)
class BatchImage:
    """An image of a micro-batch."""

    key: tuple[int, bool]
    """`ImageRef.number`, and whether the image is read as one of several."""
    pixels: Callable[[], Mapping[str, Tensor]]
    """Reads it and prepares it as the model's processor does; the arguments of its `get_image_features`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded example: T token ids and, for each, whether something is learnt there. Not yet shifted.

    Without `labels` the trained tokens themselves are learnt, each predicted from the tokens before it. For an
    encoder–decoder the tokens before the first trained one are the source, the others the target.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    source: Source
    labels: NDArray[np.generic] | None = None
    """Targets at the trained positions, in their order, instead of the tokens themselves: class ids int64 [N],
    numbers float32 [N], 0 or 1 for each class float32 [1, C], or the token under a mask int64 [N]."""
    second: int = 0
    """Index at which the second text of a pair begins (token type 1); 0: there is none."""
    num_bytes: int = 0
    """UTF-8 bytes of the text that the trained tokens of a document spell; 0 for other tasks."""
    branches: tuple[int, ...] = ()
    """Tokens of each branch: the ids are a stem, which all have in common, and the branches one after the
    other. The stem with each of them is a line, which is computed as a row of its own; see `data.branches`."""
    values: tuple[float, ...] = ()
    """Numbers that the row brings along with its tokens: `Example.values`."""
    keys: tuple[int, ...] = ()
    """A number for each text that becomes a vector, equal for equal texts whatever prompt precedes them."""
    values_NC: NDArray[np.float32] | None = None
    """Numbers of each trained token: of an answer that the model drew `tasks.policy_losses.COLUMNS`; of an
    answer that a teacher has read `data.teacher_rows.columns`."""
    images: tuple[int, ...] = ()
    """`ImageRef.number` of each image that its tokens have places for, in order."""


LEAST_PREFIX = 8
"""Tokens of the shortest shared prefix that is worth computing once."""


Span = tuple[int, int]
"""(index of the first, number) of tokens in a packed micro-batch."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a packed micro-batch: a row, a shared prefix, or what follows it in a row."""

    tokens: int
    before: tuple[Span, ...] = ()
    """Tokens that precede these in their row and are computed by other pieces."""

    @property
    def keys(self) -> int:
        """Number of tokens that the last of these attends to."""
        return self.tokens + sum(num for _, num in self.before)


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one pass, packed (one flat row of whole examples) or padded (one row an example).

    The shift to next-token targets has happened: the logits at flat position `predict_N[n]` predict
    `targets_N[n]`. No target crosses from one example into the next.
    """

    layout: Layout
    ids_BT: Tensor
    """int64; packed: [1, T], padded: [B, T]; of an encoder–decoder the sources."""
    positions_BT: Tensor
    """int64, restarting at 0 with every example."""
    mask_BT: Tensor | None
    """int64, 1 on real tokens; None when packed: a mask with restarting positions would join examples."""
    lengths: tuple[int, ...]
    """Tokens of each example, in order, or of each line of rows with branches."""
    predict_N: Tensor
    """int64, positions in flattened [B * T] tokens; encoder–decoder: in the decoder's [B * U]."""
    targets_N: Tensor
    """int64 token or class ids; float32 numbers; or float32 [N, C], 0 or 1 for each class."""
    row_of_N: Tensor
    """int64, which row of the pass each target belongs to."""
    row_indices: tuple[int, ...]
    """Rows of the store that this pass holds, in order."""
    copies_B: tuple[int, ...] = ()
    """For each row, how many copies of it precede it in its step; empty: each occurs once."""
    types_BT: Tensor | None = None
    """int64, 1 in the second text of a pair; None for models without token types."""
    pieces: tuple[Segment, ...] = ()
    """Segments of a packed micro-batch whose rows share prefixes, in order; empty: the rows are whole."""
    decoder_ids_BU: Tensor | None = None
    """int64, what the decoder of an encoder–decoder reads: start token, then the target but for its last."""
    filling: int = 0
    """Padding tokens after the rows of a packed micro-batch: see `data.collate.pad_to_multiple`."""
    line_of_N: Tensor | None = None
    """int64, which line each target belongs to; None: rows have no branches."""
    values_BV: Tensor | None = None
    """float64, the numbers of each row with branches: its own values, then the reference of each branch."""
    losses: list[Tensor] = field(default_factory=list, compare=False)
    """The loss of each target, float32 [N] without gradient: a task with `sees_rows` leaves it here."""
    keys_L: Tensor | None = None
    """int64, `Row.keys` of each line; None: the texts have none."""
    values_NC: Tensor | None = None
    """float32, the numbers of each target, `Row.values_NC`; None: rows have none."""
    images: tuple[BatchImage, ...] = ()
    """The images of its rows, in order."""

    @property
    def num_tokens(self) -> int:
        """Real tokens: padding does not count."""
        return sum(self.lengths)

    @property
    def num_computed(self) -> int:
        """Places that the model computes, padding and filling among them; a shared beginning counts once."""
        return self.ids_BT.numel() + (0 if self.decoder_ids_BU is None else self.decoder_ids_BU.numel())

    @property
    def num_targets(self) -> int:
        return int(self.targets_N.shape[0])


@dataclass(frozen=True, slots=True)
class Measured:
    """Losses and outputs of a model for one batch, target by target."""

    losses_N: Tensor
    """float32, each target's share of the batch's loss sum."""
    outputs_N: Tensor
    """The most likely token or class, int64 [N]; of a sequence head what it answered, float32 [N, C]."""
    results: tuple[Record, ...] = ()
    """Findings for each row with branches, which has one loss, JSON-ready; `outputs_N` is empty then."""


class LossSum(Protocol):
    """The loss of a micro-batch: the sum of its targets' losses, a scalar with gradient, undivided."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Tensor: ...


class Attachment(Protocol):
    """A method's hold on a model: the tensors that are trained, and their way into the model and out again.

    Methods derive from it and override the defaults that do not fit them.
    """

    method: str
    trained: Mapping[str, Tensor]
    """float32 leaves that the optimizer updates, by stable name, in a stable order."""
    notes: tuple[str, ...] = ()
    """Facts about what is trained that a person should know, such as layers that could not be adapted."""
    details: tuple[str, ...] = ()
    """Facts about it that nobody has to act on, for the report."""
    rate_factors: Mapping[str, float] = MappingProxyType({})
    """Factors of the learning rate, by name, of the tensors whose rate differs from the schedule's."""
    shards: Mapping[str, Size] = MappingProxyType({})
    """Shapes of the whole, by name, of the tensors of which this process has a piece, see `parallel.fsdp`."""

    @property
    def shared(self) -> Mapping[str, Tensor]:
        """The trained tensors that every process has whole."""
        return {name: tensor for name, tensor in self.trained.items() if name not in self.shards}

    @property
    def num_trained(self) -> int:
        """Trained weights of all processes together."""
        return sum(self.shards.get(name, tensor.shape).numel() for name, tensor in self.trained.items())

    @property
    def keeps_base(self) -> bool:
        """Whether the model without the adapter is the untouched base, so that `adapter_disabled` gives it."""
        return False

    @property
    def trains_token_rows(self) -> bool:
        """Whether single rows of the input embedding are trained, as tensors outside of the model."""
        return False

    def collect_gradients(self) -> None:
        """Add the gradients of one micro-batch to `trained`'s, in float32. Call after every backward."""
        ...

    def publish(self) -> None:
        """Copy `trained` into the model that computes. Call after an update or a load."""
        ...

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Run the model without its adapter inside the block; modules trained whole stay as trained."""
        return nullcontext()

    def perturbed(self) -> AbstractContextManager[None]:
        """Move a fresh adapter away from its start inside the block, if that would hide how it computes."""
        return nullcontext()

    def merge(self) -> None:
        """Add the adapter to the weights of its base and remove it, which leaves a plain model.

        Raises InputError or ModelError if it is not a change of weights, or the base cannot hold it.
        """
        return None

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the tuned model by its name in a plain model, float32 and never rounded; tied ones
        under each name. Removes the adapter. Empty if it is not a change of weights."""
        return iter(())


@dataclass(frozen=True, slots=True)
class Event:
    """One line of events.jsonl. `values` repeat bit for bit when a run is repeated; `timing` does not."""

    kind: Literal[
        "start", "plan", "evaluation", "step", "checkpoint", "sample", "answers", "general", "note", "resume",
        "stopped", "failed", "end", "snapshot",
    ]  # fmt: skip
    step: int
    time: float
    """Seconds since the epoch."""
    values: Record
    timing: Record = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting that was decided for the user, and why."""

    key: str
    value: Any
    reason: str


class Aside(str):
    """A note on what is usual, which needs no action: left out of a run's first lines, not of its report."""

    __slots__ = ()


def required(value: T | None) -> T:
    """The value of an option that its section fills in if it is null."""
    if value is None:
        raise AssertionError("an option without a value here")
    return value
