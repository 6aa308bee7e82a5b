"""What the service answers, as its OpenAPI document describes it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class View(BaseModel):
    """An answer; built once and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LabelView(View):
    """A class or region of a model."""

    name: str
    value: int
    color: str


class ModelOptionsView(View):
    """Options that change anything for this model."""

    fast: bool
    mirror: bool


class ModelView(View):
    """A model that is served."""

    name: str
    network: str
    channels: list[str]
    labels: list[LabelView]
    license: str
    mean_dice: float | None
    intended_use: str
    options: ModelOptionsView


class ModelList(View):
    """All of them."""

    models: list[ModelView]


class ErrorBody(View):
    """What went wrong."""

    type: str
    code: str
    message: str


class ErrorView(View):
    """The one shape of every error."""

    error: ErrorBody


class ResultView(View):
    """A file that a job made."""

    name: str
    format: str
    media_type: str
    bytes: int
    href: str


class OptionsView(View):
    """What was asked for."""

    mirror: bool
    fast: bool
    subset: list[str]
    step: float | None
    postprocessing: bool
    series_uid: str | None
    formats: list[str] | None


class JobView(View):
    """A job as it is now."""

    id: str
    model: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: Literal["queued", "reading", "computing", "writing"]
    progress: float
    queue_position: int | None
    created: str
    started: str | None
    ended: str | None
    expires: str | None
    attempt: int
    options: OptionsView
    error: ErrorBody | None
    volumes_ml: dict[str, float]
    flags: list[str]
    results: list[ResultView]


class JobList(View):
    """Jobs, the latest first."""

    jobs: list[JobView]
    next: str | None
    """What to give as `after` for those before; null where there are none."""


class SeriesView(View):
    """A series in a DICOM upload."""

    study_uid: str
    series_uid: str
    modality: str
    description: str
    study_description: str
    patient_key: str
    series_number: int | None
    files: int
    frames: int
    shape: list[int] | None
    spacing_mm: list[float] | None
    transfer_syntax: str
    usable: bool
    why_not: str


class SeriesList(View):
    """The series in an upload that waits for one to be chosen."""

    upload: str
    expires: str
    series: list[SeriesView]


class AliveView(View):
    """The service answers."""

    status: Literal["ok"]
    version: str


class ReadyView(View):
    """The service takes jobs."""

    status: Literal["ready"]
    workers: int
    ready_workers: int
    queued: int
    running: int
    disk_free_bytes: int
