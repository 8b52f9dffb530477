"""A recipe from a file, dotted settings (method.rank=8) and what the caller knows, checked as a whole."""

from __future__ import annotations

import difflib
import json
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tunesmith.errors import RecipeError
from tunesmith.phrases import near_file
from tunesmith.recipe import other_tools, yaml_io
from tunesmith.recipe.docs import Option, options, sections
from tunesmith.recipe.methods import METHOD_OPTIONS
from tunesmith.recipe.reinforcement import NAMES_OF_LOSSES
from tunesmith.recipe.schema import Recipe
from tunesmith.types import JsonObject, Record

OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.rows_per_step",
    "per_device_train_batch_size": "train.rows_per_step",
    "gradient_accumulation_steps": "train.tokens_per_pass",
    "lora_r": "method.rank",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "layers_to_transform": "method.targets",
    "modules_to_save": "method.also_train",
    "use_dora": "method.name",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "dtype": "precision",
    "num_generations": "reinforce.samples",
    "max_completion_length": "reinforce.max_new_tokens",
    "gradient_checkpointing": "train.checkpointed_layers",
}
"""Names of options in other tools that are not like ours, for suggestions."""
SETTING_OPTION = "--set"


def load(path: str | None, overrides: Sequence[str] = (), base: Record | None = None) -> Recipe:
    """The recipe of a YAML or JSON file, over `base`, with `overrides` such as "method.rank=8" over both.

    Mappings are merged key by key; an override replaces the value of its key. Values of overrides are YAML.
    Raises RecipeError with a line for every problem.
    """
    data: JsonObject = _merged({}, base or {})
    problems: list[str] = []
    if path is not None:
        try:
            content = _read_file(path)
            if tool := other_tools.tool_of(content):
                raise RecipeError(_translation(path, content, tool))
            data = _merged(data, content)
        except RecipeError as error:
            problems.append(str(error))
    settings: list[str] = []
    for override in overrides:
        try:
            settings.append(_apply(data, override))
        except RecipeError as error:
            problems.append(str(error))

    def where(key: str) -> str:
        from_setting = any(_within(key, setting) or _within(setting, key) for setting in settings)
        return SETTING_OPTION if from_setting else path or "recipe"

    recipe, faults = _checked(data, where)
    problems += faults
    if recipe is None or problems:
        raise RecipeError("\n".join(problems))
    return recipe


def validate(data: Record, where: str = "recipe") -> Recipe:
    """The recipe of plain values. Raises RecipeError with a line for every problem."""
    recipe, problems = _checked(data, lambda key: where)
    if recipe is None:
        raise RecipeError("\n".join(problems))
    return recipe


def _translation(path: str, theirs: Record, tool: str) -> str:
    """A recipe of ours for the configuration file of another tool, ready to save, and what it leaves out."""
    ours, left = other_tools.translate(theirs, tool)
    tree: JsonObject = {}
    for key, value in ours.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    _, problems = _checked(tree, lambda key: path)
    lines = [
        f"{path}: this is a configuration of {tool}. Save this as a recipe of ours, correct the files, and give that:",
        *("  " + line for line in yaml_io.dump(tree).splitlines()),
        *(f"not translated: {key}: {why}" for key, why in left.items()),
        *(f"to be corrected: {problem}" for problem in problems),
    ]
    return "\n".join(lines)


def _read_file(path: str) -> JsonObject:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}.{near_file(path)}") from error
    try:
        value = yaml_io.parse(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text: save the recipe as UTF-8.") from error
    except RecipeError as error:
        raise RecipeError(f"{error}\n`tunesmith recipe` prints a whole recipe to compare it with.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {_shown(value)} is not a recipe: write one `key: value` a line.")
    return _without_empty(value, "")


def _without_empty(data: JsonObject, prefix: str) -> JsonObject:
    """Without sections under which everything is commented out: YAML reads those as null."""
    filled = {key: value for key, value in data.items() if value is not None or prefix + key not in sections()}
    return {k: _without_empty(v, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in filled.items()}


def _merged(old: Record, new: Record) -> JsonObject:
    result = {key: _merged(value, {}) if isinstance(value, Mapping) else value for key, value in old.items()}
    for key, value in new.items():
        before = result.get(key)
        is_section = isinstance(value, Mapping)
        result[key] = _merged(before if isinstance(before, Mapping) else {}, value) if is_section else value
    return result


def _apply(data: JsonObject, override: str) -> str:
    """Set what "a.b=value" says in `data`; returns the key."""
    key, equals, value_text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{SETTING_OPTION} {override}: not of the form key=value, such as method.rank=8.")
    if key.count(".") >= yaml_io.MAX_YAML_DEPTH:
        raise RecipeError(f"{SETTING_OPTION} {key[:40]}…: nested deeper than {yaml_io.MAX_YAML_DEPTH}: no option is.")
    try:
        value = yaml_io.parse(value_text, SETTING_OPTION)
    except RecipeError as error:
        rule = str(error).splitlines()[0].removeprefix(f"{SETTING_OPTION}:1: ")
        raise RecipeError(f"{SETTING_OPTION} {override}: {rule}. Put text in quotes: '{key}=\"...\"'.") from error
    section = data
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        inner = section.get(parent)
        if parent == "method" and isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            name = ".".join(parents[:depth])
            raise RecipeError(f"{SETTING_OPTION} {key}: {name} has no options below it: set {name} as a whole.")
        section[parent] = inner
        section = inner
    section[last] = value
    return key


def _checked(data: Record, where: Callable[[str], str]) -> tuple[Recipe | None, list[str]]:
    # Strict, so that true is not 1 and "8" is not 8; by way of JSON, in which a list may become a tuple.
    written = json.dumps(data, default=_plain)
    try:
        return Recipe.model_validate_json(written, strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    placed = [(*_place(detail["loc"]), detail) for detail in details]
    problems = []
    groups = [(place, list(group)) for place, group in groupby(placed, key=lambda item: item[:2])]
    for (shown, known), group in groups[: yaml_io.MOST_RECIPE_PROBLEMS]:
        key, problem = _problem(shown, known, [detail for _, _, detail in group])
        problems.append(f"{where(key)}: {key}: {problem}" if key else f"{where(key)}: {problem}")
    if more := len(groups) - len(problems):
        problems.append(f"and {more:,} more like these")
    return None, problems


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise RecipeError(f"recipe: {_shown(value)} of type {type(value).__name__}: give text, a number or a list.")


def _place(location: Iterable[int | str]) -> tuple[str, str]:
    """The key as a person writes it, and the key of the option table; without branches of unions."""
    shown = known = ""
    skip_method = False
    for part in location:
        option = options().get(known)
        if isinstance(part, int):
            if f"{known}[].path" not in options():
                break  # a list of plain values is shown as a whole
            shown, known = f"{shown}[{part}]", f"{known}[]"
        elif known == "method" and part in METHOD_OPTIONS and not skip_method:
            skip_method = True
        elif option is not None and "mapping" not in option.allowed:
            break  # which member of a union was tried
        else:
            shown = f"{shown}.{part}" if shown else part
            known = shown if option is None or not known else known
            known = re.sub(r"\[\d+\]", "[]", known)
    return shown, known


def _problem(shown: str, known: str, errors: Sequence[ErrorDetails]) -> tuple[str, str]:
    """(key, what is wrong and what would be right) of all that was found about one key."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return shown, _unknown(shown, first["loc"])
    if first["type"] == "value_error":
        key, _, rest = str(first["ctx"]["error"]).partition(": ")
        return (key, rest) if rest else (shown, key)
    if first["type"] == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        return f"{shown}.name", _refused(_shown(tag), options()[f"{shown}.name"], tag)
    return shown, _wrong_value(shown, options().get(known), errors)


def _wrong_value(shown: str, option: Option | None, errors: Sequence[ErrorDetails]) -> str:
    value_given = errors[0]["input"]
    value = _shown(value_given)
    if option is None:
        return f"{value} is not a section: write its options below it, or as {shown}.<option>"
    if errors[0]["type"] == "missing" and "list" not in option.allowed:
        return f"missing: {option.doc}"
    if "mapping" in option.allowed and shown != option.key:
        way = ": write {name: value}, with a space after the colon" if value_given is None else ""
        return f"{value} does not belong in {option.allowed}{way}"
    return _refused(value, option, value_given)


def _refused(value: str, option: Option, given: object) -> str:
    near = difflib.get_close_matches(str(given), option.choices, n=1)
    way = f", did you mean {near[0]}?" if near else ""
    if option.key == "reinforce.loss" and (name := re.sub(r"[^a-z]", "", str(given).lower())) in NAMES_OF_LOSSES:
        way = f": {given} is written {NAMES_OF_LOSSES[name]} here"
    if "text" in option.allowed.split() and isinstance(given, (int, float)):
        way = ": put it in quotes"
    elif "below 1" in option.allowed and isinstance(given, (int, float)) and given >= 1:
        way = ": it is a share, 0.2 for a fifth"
    return f"{value} is not {option.allowed}{way}"


def _unknown(shown: str, location: Sequence[int | str]) -> str:
    other = next((option for option in options().values() if option.methods and option.key == shown), None)
    if other is not None:
        return f"has no meaning for method {location[1]}: drop it or set method.name: {' or '.join(other.methods)}"
    plain = re.sub(r"\[\d+\]", "[]", shown)
    near = similar(plain)
    section = shown.rpartition(".")[0]
    if section != plain.rpartition(".")[0]:  # below an entry of a list: name that entry
        near = [f"{section}.{key.rpartition('.')[2]}" if "[]" in key else key for key in near]
    hint = f", did you mean {' or '.join(near[:2])}?" if near else ": see `tunesmith recipe` for all"
    return f"unknown key{hint}"


def similar(name: str) -> list[str]:
    """Keys that a person may mean who writes `name`: a dotted key, or what another tool calls an option."""
    section, _, last = name.rpartition(".")
    everything = [*options(), *sections()]
    in_section = {key.rpartition(".")[2]: key for key in options() if key.rpartition(".")[0] == section}
    near_in_section = difflib.get_close_matches(last, in_section if section else (), n=1, cutoff=0.8)
    same_name = [key for key in everything if key.rpartition(".")[2] == last and last != "name"]
    return (
        [in_section[word] for word in near_in_section]
        or same_name
        or ([OTHER_NAMES[last]] if last in OTHER_NAMES else [])
        or difflib.get_close_matches(name, everything, n=1, cutoff=0.7)
        or [key for key in everything if difflib.get_close_matches(last, [key.rpartition(".")[2]], cutoff=0.75)]
    )


def _shown(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))
