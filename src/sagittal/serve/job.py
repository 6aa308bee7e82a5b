"""What a job is: its options, its input, what became of it; and the words for its states."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from sagittal.plan.base import Frozen

State: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]
Stage: TypeAlias = Literal["queued", "reading", "computing", "writing"]
Format: TypeAlias = Literal["seg", "labelmap", "rtstruct", "overview", "sr"]
Source: TypeAlias = Literal["api", "monailabel", "watch"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled")
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
MAX_ATTEMPTS = 2
"""A job whose worker died is tried once more."""
_SERIES = r"[0-9][0-9.]*(@[0-9]{1,6})?"


class JobOptions(Frozen):
    """How a job's scan is predicted, and what is written of it."""

    mirror: bool = True
    """Average over mirrored copies where the model does."""
    fast: bool = False
    """The bundle's second model where it has one, else fewer windows."""
    subset: tuple[str, ...] = ()
    """Names of the only classes that are written; none: all."""
    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """Distance of neighbouring windows as a share of the window; None: the plan's."""
    postprocessing: bool = True
    """Apply the plan's rules."""
    series_uid: Annotated[str, Field(max_length=1000, pattern=rf"^{_SERIES}(,{_SERIES})*$")] | None = None
    """Which series of a DICOM upload, as its list names them; with commas one per channel. None: those that fit."""
    formats: tuple[Format, ...] | None = None
    """DICOM objects that are written of a DICOM series; None: all that can be; an empty list: none."""


class InputRef(Frozen):
    """Where a job's scan lies."""

    kind: Literal["upload", "path"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """One per channel: relative to the job's folder for an upload, else absolute."""
    dicom: bool = False
    """Whether each of them is a folder or an archive of a DICOM series."""


class JobError(Frozen):
    """Why a job failed, in the one error shape."""

    type: str
    code: str
    message: str


class ResultFile(Frozen):
    """A file that a job made."""

    name: str
    format: str
    media_type: str
    bytes: int
    sha256: str


class Outcome(Frozen):
    """What a worker made of a job."""

    volumes_ml: dict[str, float] = Field(default_factory=dict)
    flags: tuple[str, ...] = ()
    results: tuple[ResultFile, ...] = ()


class Job(Frozen):
    """A job as its row says it."""

    id: str
    model: str
    state: State
    stage: Stage
    progress: float
    """0 to 1."""
    created: str
    """UTC, ISO 8601, as all times here."""
    started: str | None
    ended: str | None
    attempt: int
    """1 for the first; 0 before it."""
    options: JobOptions
    input: InputRef
    error: JobError | None
    volumes_ml: dict[str, float]
    flags: tuple[str, ...]
    results: tuple[ResultFile, ...]
    owner: str
    """Name of the key that sent it; empty: it came without one."""
    source: Source
    worker: str | None
    """What computes it; None where nothing does."""
    queue_position: int | None = None
    """1 for the next one; None where it does not wait."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing will become of it any more."""
        return self.state in ENDED


WORKER_DIED = JobError(
    type="ResourceError",
    code="worker_died",
    message="the process that computed this job ended twice, most likely for want of memory. Use a smaller scan, fewer "
    "workers or a larger machine.",
)
