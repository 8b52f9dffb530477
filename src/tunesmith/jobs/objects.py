"""Rows of the store as the objects of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.jobs.names import derived_id
from tunesmith.types import JsonObject, Record

_COMMON = ("n_epochs", "batch_size", "learning_rate_multiplier")
"""Hyperparameters of every method."""
NO_ERROR = {"code": None, "message": None, "param": None}
"""`error` of a job that has not failed: scripts read `job.error.code` without looking."""


def file_object(row: Record) -> JsonObject:
    columns = {name: row[name] for name in ("id", "bytes", "created_at", "filename", "purpose")}
    expiry = {} if row["expires_at"] is None else {"expires_at": row["expires_at"]}
    return {"object": "file", **columns, **expiry, "status": "processed", "status_details": None}


def upload_object(row: Record, file: Record | None) -> JsonObject:
    columns = {name: row[name] for name in ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status")}
    return {"object": "upload", **columns, **({} if file is None else {"file": file_object(file)})}


def job_object(row: Record) -> JsonObject:
    request = row["request"]
    has_ended = row["status"] == "succeeded"
    method = request.get("method", "supervised")
    common = {name: row["numbers"][name] for name in _COMMON if name in row["numbers"]}
    options = {"hyperparameters": row["numbers"]}
    if method == "reinforcement":
        options = {"grader": request["grader"], **options}
    same = {name: row[name] for name in ("id", "created_at", "finished_at", "status", "model", "trained_tokens")}
    sent = {name: request[name] for name in ("training_file", "validation_file", "seed", "metadata")}
    return {
        "object": "fine_tuning.job",
        **same,
        **sent,
        "estimated_finish": None,
        "fine_tuned_model": row["tuned_name"] if has_ended else None,
        "organization_id": f"org-{row['project']}",
        "result_files": [row["result_file"]] if row["result_file"] else [],
        "hyperparameters": common,
        "method": {"type": method, method: options},
        "integrations": request["integrations"],
        "error": row["error"] or NO_ERROR,
        "user_provided_suffix": request["suffix"],
        "usage_metrics": None,
        "shared_with_openai": False,
        "tunesmith": {
            "base": request.get("starts_from") or row["base"],
            "run": row["id"],
            "report": f"/v1/fine_tuning/jobs/{row['id']}/report.html" if has_ended else None,
        },
    }


def event_object(row: Record) -> JsonObject:
    columns = {name: row[name] for name in ("id", "created_at", "level", "message", "type", "data")}
    return {"object": "fine_tuning.job.event", **columns}


def checkpoint_object(row: Record) -> JsonObject:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": derived_id("ftckpt_", row["name"]),
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["name"],
        "fine_tuning_job_id": row["job"],
        "metrics": row["metrics"],
        "step_number": row["step"],
    }


def list_object(data: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    return {"object": "list", "data": list(data), "has_more": has_more}


def list_with_ends(data: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    """A list as OpenAI sends it for files and checkpoints."""
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {**list_object(data, has_more=has_more), **ends}
