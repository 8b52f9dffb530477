"""A grade in the shape of OpenAI's route POST /v1/fine_tuning/alpha/graders/run."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.graders import schema
from tunesmith.graders.grade import Grade, Kind
from tunesmith.graders.strangers import RUNS_CODE
from tunesmith.types import JsonObject

ERRORS: Mapping[Kind, str] = {
    "exception": "python_grader_runtime_error", "timeout": "python_grader_server_error",
    "memory": "python_grader_server_error", "died": "python_grader_server_error",
    "not_a_number": "unresponsive_reward_error", "unknown_variable": "invalid_variable_error",
    "no_code": "invalid_variable_error", "not_json": "sample_parse_error", "formula": "formula_parse_error",
    "unreachable": "model_grader_server_error", "refused": "model_grader_refusal_error",
    "unreadable": "model_grader_parse_error",
}  # fmt: skip
"""OpenAI's name of each way in which a grade fails."""
_FLAGS = (
    "formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
    "invalid_variable_error", "other_error", "python_grader_server_error", "python_grader_runtime_error",
    "model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error",
)  # fmt: skip
_WORDS = {
    "python_grader_server_error": "python_grader_server_error_type",
    "python_grader_runtime_error": "python_grader_runtime_error_details",
    "model_grader_server_error": "model_grader_server_error_details",
}
"""Fields that say more of an error."""


def object_of(grader: schema.Grader, grade: Grade, seconds: float) -> JsonObject:
    """A grade in OpenAI's shape: it has all keys, and the reward is a number even if the grade failed."""
    parts = schema.parts_of(grader)
    errors: JsonObject = {**dict.fromkeys(_FLAGS, False), **dict.fromkeys(_WORDS.values())}
    name = ERRORS[grade.kind] if grade.kind is not None else "sample_parse_error" if grade.is_unread else ""
    if name == "python_grader_runtime_error" and not any(part.type in RUNS_CODE for part in parts.values()):
        name = "other_error"
    if name:
        errors[name] = True
    if name in _WORDS:
        errors[_WORDS[name]] = grade.error
    is_multi = grader.type == "multi"
    judges = [part.model for part in parts.values() if part.type == "score_model"]
    return {
        "reward": grade.reward or 0.0,
        "sub_rewards": {name: score for name, score in grade.scores.items() if is_multi and name in parts},
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "errors": errors,
            "execution_time": seconds,
            "scores": {name: score for name, score in grade.scores.items() if not (is_multi and name in parts)},
            "token_usage": None,
            "sampled_model_name": judges[0] if judges else None,
        },
        "model_grader_token_usage_per_model": {},
    }
