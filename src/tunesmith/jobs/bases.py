"""The models that may be tuned, by public names: from bases.yaml, or the one model on the command line."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.errors import InputError
from tunesmith.graders.strangers import GraderRules
from tunesmith.jobs.names import check_project
from tunesmith.jobs.rules import Rules
from tunesmith.recipe import load, yaml_io
from tunesmith.types import JsonObject

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PublicBase(BaseModel):
    """A model that may be tuned. No request names a folder or a hub id: this is the only way to one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    """A folder, a hub id (owner/name or owner/name@revision) or a .gguf file."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Names that programs use for it, and names that their jobs show: gpt-4o-mini, gpt-4o-mini-2024-07-18."""
    recipe: JsonObject = Field(default_factory=dict)
    """Options of every run on it."""


class Bases(Rules):
    """All models that may be tuned, and what holds for jobs and projects: the content of bases.yaml."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bases: dict[str, PublicBase] = Field(min_length=1)
    min_examples: int = Field(10, ge=1)
    """Fewest rows of a training file."""
    results_encoding: Literal["base64", "csv"] = "base64"
    """Form of results files: base64 as OpenAI has sent it since 2024, or plain text as before."""
    graders: GraderRules = GraderRules()
    """Rules of what graders of clients may use."""

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """(public name of the base, name that a job shows), by every name that a request may use."""
        owners: dict[str, tuple[str, str]] = {}
        for name, base in self.bases.items():
            shown_by = {name: name, **base.aliases, **{shown: shown for shown in base.aliases.values()}}
            for other, shown in shown_by.items():
                if not _NAME.fullmatch(other):
                    raise InputError(
                        f"{other[:60]!r}: a public name has letters, digits, dots, hyphens and underscores, no "
                        "colon and no slash: programs split names of tuned models there."
                    )
                if owners.setdefault(other, (name, shown))[0] != name:
                    raise InputError(f"{other}: a name of two bases, {owners[other][0]} and {name}. Remove one.")
        return owners

    def model_post_init(self, context: Any) -> None:
        """Raises InputError for names that cannot be used."""
        for project in self.projects:
            check_project(project)
        self.names  # noqa: B018 (which checks them)


def bases_of_file(path: Path) -> Bases:
    """Raises InputError naming the file and every fault."""
    try:
        content = yaml_io.parse(path.read_text("utf-8"), str(path))
        bases = Bases.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)
        ]
        raise InputError("\n".join(faults)) from None
    for name, base in bases.bases.items():
        recipe = load.validate({"model": base.model, **base.recipe})
        if recipe.method.name not in ("auto", "lora"):
            raise InputError(
                f"{path}: bases.{name}.recipe.method: {recipe.method.name}: a result is put on the base that "
                "is being served, which only lora can. Leave it out."
            )
    return bases


def bases_of_model(model: str) -> Bases:
    """One base, named by the last part of its folder or hub id, or by its .gguf file as `serve` names it."""
    name = Path(model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name).strip("-._")
    return Bases(bases={name or "base": PublicBase(model=model)})
