"""The grammar of graders: OpenAI's JSON and further types. docs/guide/grade.md has an example of each."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from tunesmith.errors import InputError
from tunesmith.graders import formula, templates
from tunesmith.phrases import did_you_mean, near_file
from tunesmith.types import JsonObject, Record

GRADER_SECONDS, JUDGE_SECONDS, MEMORY_GIB = 60.0, 120.0, 2.0
MOST_SOURCE = 256 * 1024
"""Bytes of a Python grader's text."""
_NEEDS_MORE = "it needs {what}. Take rouge_l, bleu or fuzzy_match, or compute it in a `python` grader."
RUN_PREFIX = "run:"
REFUSED = {
    "label_model": "a judge that gives classes is not offered. Let a `score_model` grader give a number.",
}
"""Types of OpenAI's that are not offered, with the way out."""


class _Grader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = ""


class StringCheck(_Grader):
    type: Literal["string_check"]
    input: str
    reference: str
    operation: Literal["eq", "ne", "neq", "like", "ilike"]


class TextSimilarity(_Grader):
    type: Literal["text_similarity"]
    input: str
    reference: str
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ]
    pass_threshold: float | None = None
    """Read because older examples have it, and not used: the reward is the similarity itself."""
    seconds: ClassVar[float] = GRADER_SECONDS  # no option, so that grades that were kept before still count
    memory_gib: ClassVar[float] = MEMORY_GIB

    @field_validator("evaluation_metric", mode="before")
    @classmethod
    def _refused(cls, value: Any) -> Any:
        what = {"cosine": "a second model that makes vectors", "meteor": "a corpus of synonyms"}.get(str(value))
        if what:
            raise ValueError(f"{value}: {_NEEDS_MORE.format(what=what)}")
        return value


class _Limited(_Grader):
    """Base of graders that compute in a process of their own."""

    seconds: float = Field(GRADER_SECONDS, gt=0, le=3600)
    memory_gib: float = Field(MEMORY_GIB, gt=0)


class _Coded(_Limited):
    """Base of graders that run code."""

    env: tuple[str, ...] = ()
    """Names of environment variables that the code gets; all others are hidden from it."""


class Python(_Coded):
    type: Literal["python"]
    source: str = Field(max_length=MOST_SOURCE)
    image_tag: None = None

    @field_validator("image_tag", mode="before")
    @classmethod
    def _refused(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(f"{value}: images are not offered: the code runs in the Python of tunesmith. Leave it out")
        return value


class Function(_Coded):
    type: Literal["function"]
    file: str
    function: str = "grade"


class UnitTests(_Coded):
    type: Literal["unit_tests"]
    seconds: float = Field(10.0, gt=0, le=3600)
    """Seconds of each test."""
    tests: str = "tests"
    """Field of the row: a list of texts, or one."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["user", "assistant", "system", "developer"]
    content: str
    type: Literal["message"] = "message"

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, Mapping) else value
        if not isinstance(parts, list):
            return value
        if any(
            not isinstance(part, (str, Mapping)) or (isinstance(part, Mapping) and "text" not in part) for part in parts
        ):
            raise ValueError("only text is taken, no image or sound")
        return "".join(part if isinstance(part, str) else str(part["text"]) for part in parts)


class SamplingParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    max_completions_tokens: int | None = None
    reasoning_effort: str | None = None


class ScoreModel(_Grader):
    type: Literal["score_model"]
    model: str
    input: tuple[Message, ...] = Field(min_length=1)
    range: tuple[float, float] = (0.0, 1.0)
    sampling_params: SamplingParams = SamplingParams()
    address: str
    key_env: str = ""
    """Name of the environment variable that has the key."""
    seconds: float = Field(JUDGE_SECONDS, gt=0, le=3600)

    @field_validator("address")
    @classmethod
    def _http(cls, value: str) -> str:
        if not re.match(r"https?://[^/\s]+", value):
            raise ValueError(f"{value!r} is not an address such as http://localhost:8000/v1")
        return value.rstrip("/")

    @field_validator("range")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("the first number has to be below the second")
        return value


class Regex(_Limited):
    type: Literal["regex"]
    pattern: str | tuple[str, ...]
    """The reward is the share of patterns that the text has somewhere."""
    input: str = "{{sample.output_text}}"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for part in [value] if isinstance(value, str) else value:
            if "{{" in part:
                continue
            try:
                re.compile(part)
            except re.error as error:
                raise ValueError(f"{part!r} is no regular expression: {error}") from None
        return value


class Number(_Grader):
    type: Literal["number"]
    reference: str
    input: str = "{{sample.output_text}}"
    tolerance: float = Field(1e-6, ge=0)
    """Largest difference, as a share of the reference where that is above 1."""
    last: bool = False
    """True: the last number in the text counts; else the text has to be a number."""


class Length(_Grader):
    type: Literal["length"]
    low: float = Field(0, ge=0)
    high: float = Field(gt=0)
    unit: Literal["words", "characters", "tokens"] = "words"
    input: str = "{{sample.output_text}}"

    @model_validator(mode="after")
    def _rises(self) -> Length:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high, {self.high:g}")
        return self


class JsonSchema(_Limited):
    type: Literal["json_schema"]
    json_schema: JsonObject = Field(alias="schema")
    input: str = "{{sample.output_text}}"
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RewardRun(_Grader):
    type: Literal["reward_run"]
    run: str = Field(min_length=1)
    """A run of task reward: its name in the folder of runs, or its own folder."""
    input: str = "{{sample.output_text}}"


TextGrader = StringCheck | TextSimilarity | Regex | Number | Length | JsonSchema
"""Compares the texts of an answer and of a row."""
OfflineGrader = Python | UnitTests
"""Runs code of others, in its own text or in answers: without network where the system allows that."""
CodeGrader = Function | OfflineGrader
"""Runs code: its own, or the answer's."""
LimitedGrader = CodeGrader | Regex | JsonSchema | TextSimilarity
"""Computes in a process of its own, within limits: code, and what long texts can keep busy."""
Single = TextGrader | CodeGrader | ScoreModel | RewardRun
"""A grader that is not made of others."""


class Multi(_Grader):
    type: Literal["multi"]
    graders: dict[str, Annotated[Single, Field(discriminator="type")]] = Field(min_length=1)
    calculate_output: str

    @field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """OpenAI's guide has a mapping, its client a single grader, some scripts a list."""
        if isinstance(value, Mapping) and "type" in value and isinstance(value["type"], str):
            value = [value]
        if isinstance(value, list):
            names = [str(part.get("name") or "") if isinstance(part, Mapping) else "" for part in value]
            if "" in names or len(set(names)) < len(names):
                raise ValueError("each grader of a list needs a name of its own, by which the formula calls it")
            value = dict(zip(names, value, strict=True))
        if isinstance(value, Mapping) and any(
            isinstance(part, Mapping) and part.get("type") == "multi" for part in value.values()
        ):
            raise ValueError("a multi grader within another is not offered. Put its graders and formula into this one")
        return value

    @model_validator(mode="after")
    def _formula(self) -> Multi:
        try:
            formula.parse(self.calculate_output, tuple(self.graders), "calculate_output")
        except InputError as error:
            raise ValueError(str(error)) from None
        return self


Grader = Single | Multi


def types_in(graders: Any) -> tuple[str, ...]:
    """The value of `type` of each grader of a union."""
    return tuple(str(name) for kind in get_args(graders) for name in get_args(kind.model_fields["type"].annotation))


TYPES = types_in(Grader)
_GRADER: TypeAdapter[Grader] = TypeAdapter(Annotated[Grader, Field(discriminator="type")])


def parts_of(grader: Grader) -> dict[str, Single]:
    """The parts of a multi grader by name; of any other grader the grader itself, under the name ""."""
    return dict(grader.graders) if isinstance(grader, Multi) else {"": grader}


def load(word: str) -> Grader:
    """The grader that `--grader` names: file.py[:function], a .json or .yaml file,
    or run:RUN. Raises InputError."""
    if word.startswith(RUN_PREFIX):
        return from_value({"type": "reward_run", "run": word.removeprefix(RUN_PREFIX)}, place=f"--grader: {word}")
    path, _, name = word.rpartition(":")
    if Path(word).exists() or not name.isidentifier() or not path:
        path, name = word, ""
    file = Path(path).expanduser()
    if file.suffix not in (".py", ".json", ".yaml", ".yml"):
        raise InputError(
            f"--grader: {word}: takes file.py, file.py:FUNCTION, a grader in a .json or .yaml file, or run:RUN."
        )
    if not file.is_file():
        raise InputError(f"--grader: {path}: there is no such file.{near_file(path)}")
    if file.suffix == ".py":
        return Function(type="function", file=str(file.resolve()), function=name or "grade")
    if name:
        raise InputError(f"--grader: {word}: :{name} is a function of a .py file. Leave it out.")
    try:
        content = file.read_bytes().removeprefix(BOM_UTF8)  # which editors on Windows write
        value = orjson.loads(content) if file.suffix == ".json" else yaml.safe_load(content)
    except (orjson.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{file}: cannot be read as {file.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from error
    return from_value(value, place=str(file), folder=file.resolve().parent)


def from_value(value: Any, *, place: str = "grader", folder: Path = Path(), types: Sequence[str] = TYPES) -> Grader:
    """The grader that a JSON value describes; files that it names are in `folder`. Raises InputError, which names
    these `types` where there is no such type."""
    inner = value.get("graders") if isinstance(value, Mapping) else None
    for part in [value, *(inner.values() if isinstance(inner, Mapping) else ())]:
        if isinstance(part, Mapping) and str(part.get("type")) in REFUSED:
            raise InputError(f"{place}: type {part['type']}: {REFUSED[str(part['type'])]}")
    try:
        grader = _GRADER.validate_python(value)
    except ValidationError as error:
        raise InputError("\n".join(f"{place}: {text}" for text in _problems(error, types))) from None
    if isinstance(grader, Multi):
        parts = {name: _placed(part, folder, place) for name, part in grader.graders.items()}
        return grader.model_copy(update={"graders": parts})
    return _placed(grader, folder, place)


def _placed(grader: Single, folder: Path, place: str) -> Single:
    """The grader with the whole path of a file that it names. Raises InputError where there is none."""
    if not isinstance(grader, Function):
        return grader
    file = (folder / Path(grader.file).expanduser()).resolve()
    if not file.is_file():
        raise InputError(f"{place}: file: {file}: there is no such file.{near_file(file)}")
    return grader.model_copy(update={"file": str(file)})


def _problems(error: ValidationError, types: Sequence[str]) -> Iterator[str]:
    for part in error.errors():
        where = ".".join(str(step) for step in part["loc"] if step not in ("", *TYPES))
        context = part.get("ctx", {})
        message = str(context.get("error") or part["msg"])
        match part["type"]:
            case "extra_forbidden":
                message = "there is no such option of this type. Leave it out"
            case "missing":
                message = "is missing"
            case "union_tag_invalid":
                near = did_you_mean(context["tag"], types)
                message = f"type {context['tag']}: there is no such type.{near} One of {', '.join(types)}"
            case "union_tag_not_found":
                message = f"type: is missing. One of {', '.join(types)}"
            case "model_attributes_type":
                message = "is no object with a type, as every grader is"
        yield f"{where + ': ' if where else ''}{message}".rstrip(".") + "."


def texts_of(grader: Grader) -> Iterator[tuple[str, str]]:
    """(place, text) of every text of a grader that may contain variables."""
    for name, part in parts_of(grader).items():
        before = f"graders.{name}." if name else ""
        for key in ("input", "reference", "pattern"):
            value = getattr(part, key, None)
            if isinstance(value, str):
                yield before + key, value
            elif value is not None:
                yield from ((f"{before}{key}[{i}]", getattr(part, "content", part)) for i, part in enumerate(value))


def check_variables(grader: Grader, item: Record | None, place: str = "grader") -> None:
    """Raise InputError for variables that `item`, the first row, does not have; see `templates.check`."""
    for inside, text in texts_of(grader):
        templates.check(text, item, f"{place}: {inside}")
