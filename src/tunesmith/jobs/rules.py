"""Rules of projects: limits, how long files and runs are kept, and who hears of jobs: a part of bases.yaml."""

from __future__ import annotations

from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator


class WebhookEndpoint(BaseModel):
    """The address that hears of jobs that have ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://[^\s/?#@]+(/\S*)?$")
    secret_file: Path
    """Holds the secret of Standard Webhooks, whsec_…"""
    private: bool = False
    """Whether the address may be on this machine or in a private network, and without TLS."""

    @model_validator(mode="after")
    def _usable(self) -> WebhookEndpoint:
        if not self.private and not self.url.startswith("https://"):
            raise ValueError("url: has to begin with https://, unless private: true")
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:  # a port that is not a number, a name that cannot be one
            raise ValueError(f"url: {self.url}: {error}") from None
        try:
            self.secret()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"secret_file: {self.secret_file}: cannot be read: {error}") from None
        return self

    def secret(self) -> str:
        secret = self.secret_file.read_text("utf-8").strip()
        if not secret.startswith("whsec_"):
            raise ValueError(f"secret_file: {self.secret_file}: a secret begins with whsec_")
        return secret


class ProjectRules(BaseModel):
    """Limits of a project; None: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    jobs_waiting: int = Field(100, ge=1)
    jobs_running: int | None = Field(None, ge=1)
    file_bytes: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    keep_files_days: float | None = Field(None, gt=0)
    keep_runs_days: float | None = Field(None, gt=0)
    """Days that runs of ended jobs are kept once no model of theirs is left."""
    webhook: WebhookEndpoint | None = None


class Rules(BaseModel):
    """The rules of all projects; each field that a project sets wins over `every_project`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_project: ProjectRules = ProjectRules()
    projects: dict[str, ProjectRules] = Field(default_factory=dict)

    def of(self, project: str) -> ProjectRules:
        project_rules = self.projects.get(project)
        if project_rules is None:
            return self.every_project
        return self.every_project.model_copy(
            update={name: getattr(project_rules, name) for name in project_rules.model_fields_set}
        )
