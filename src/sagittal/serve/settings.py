"""What a service is told when it starts; nothing of it changes while it runs."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from sagittal.errors import DataError, PlanError
from sagittal.inference.engines.engine import Precision
from sagittal.plan.base import Frozen, describe_validation_error

GIB = 1 << 30
LEAST_KEY_LENGTH = 16
LONGEST_KEEP_S = 876_000 * 3600.0
"""A hundred years; the dates of many more can't be written."""
_BASE_URL = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class Limits(Frozen):
    """How much a service takes."""

    upload_bytes: Positive = 4 * GIB
    """Of one request's body."""
    unpacked_bytes: Positive = 16 * GIB
    """Of what a request's files hold once they are unpacked."""
    files: Positive = 20_000
    """In an archive or a folder."""
    queued: Positive = 1000
    """Jobs that wait."""
    job_s: Seconds = 3600.0
    """For one attempt at a job."""
    result_ttl_s: Annotated[float, Field(gt=0, le=LONGEST_KEEP_S)] = 7 * 86400.0
    """After its end a job and its files are deleted."""
    series_ttl_s: Seconds = 3600.0
    """For an upload whose series was not chosen yet."""
    upload_idle_s: Seconds = 60.0
    """Between two pieces of a request's body."""
    stop_s: Annotated[float, Field(ge=0)] = 30.0
    """For the jobs in progress when the service is told to stop."""
    free_bytes: Annotated[int, Field(ge=0)] = GIB
    """Of the disk, which stay free: no job is taken below."""


class ApiKey(Frozen):
    """A key that opens the service; only its hash is kept."""

    name: Annotated[str, Field(pattern=rf"^{_KEY_NAME.pattern}$")]
    """What the audit log calls it; its jobs belong to this name."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WatchSettings(Frozen):
    """What new series are looked for, and where."""

    rule: str
    """Which of them are segmented; see `arrivals.parse_rule`."""
    dicomweb: str | None = None
    """Address of a DICOMweb service: http://pacs:8042/dicom-web."""
    credentials: Annotated[str | None, Field(repr=False)] = None
    """USER:PASSWORD for it."""
    folder: Path | None = None
    """Folder that DICOM files come into, instead."""
    every_s: Seconds = 30.0
    """Between two looks; a series is begun when two of them found the same."""
    since_days: Annotated[int, Field(ge=0)] | None = None
    """Only studies of the last days; None: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dicomweb is None) == (self.folder is None):
            raise ValueError("expected either an address (--watch-dicomweb) or a folder (--watch-folder) to watch")
        if self.dicomweb is not None:
            where = urlsplit(self.dicomweb)
            if where.scheme not in ("http", "https") or not where.hostname or where.username or where.query:
                raise ValueError(
                    "--watch-dicomweb: expected an address like http://pacs:8042/dicom-web; credentials go into a file"
                )
        return self


class ServeSettings(Frozen):
    """Where a service listens, computes and keeps its jobs."""

    folder: Path
    """jobs.sqlite, jobs/JOBID/, uploads/, audit.jsonl."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[ApiKey, ...] = ()
    insecure: bool = False
    """Whether anybody who reaches the host may use the service."""
    base_url: str = ""
    """Path below which a proxy offers the service: `/seg`; empty: the root."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered beside those of loopback, where the service listens on loopback."""
    allowed_origins: tuple[str, ...] = ()
    """Origins (`https://viewer.example`) whose pages may call the service from a browser."""
    allowed_folders: tuple[Path, ...] = ()
    """Folders below which a request may name scans."""
    devices: Annotated[tuple[str, ...], Field(min_length=1)] = ("auto",)
    """A worker process for each."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    precision: Precision = "fp32"
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Of all workers together; None: four fifths of what is available."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """Of all workers together; None: as many as there are processors."""
    cache_folder: Path | None = None
    """Where compiled networks are kept for the next process."""
    limits: Limits = Limits()
    watch: WatchSettings | None = None
    """A PACS or a folder whose new series are segmented."""
    debug: bool = False
    """Whether workers tell on standard error where an error was raised; that may name files."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _BASE_URL.fullmatch(self.base_url):
            raise ValueError(f"base_url '{self.base_url}': expected nothing or a path like /seg, without a slash after")
        names = [key.name for key in self.api_keys]
        if len(set(names)) != len(names):
            raise ValueError(f"names of API keys must differ, got {names}")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the service."""
        return is_loopback(self.host)

    @property
    def database(self) -> Path:
        """The file that the jobs live in."""
        return self.folder / "jobs.sqlite"

    @property
    def jobs_folder(self) -> Path:
        """Holds a folder per job."""
        return self.folder / "jobs"

    @property
    def uploads_folder(self) -> Path:
        """Holds what is arriving, and what waits for a series to be chosen."""
        return self.folder / "uploads"

    @property
    def audit_file(self) -> Path:
        """Who did what."""
        return self.folder / "audit.jsonl"

    def job_folder(self, job: str) -> Path:
        """Return the folder of a job's files."""
        return self.jobs_folder / job


Settings = TypeVar("Settings", ServeSettings, WatchSettings)


def settings_of(kind: type[Settings], **given: Any) -> Settings:
    """Return settings made of what a person gave.

    Raises:
        PlanError: a value that makes no sense.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, "serve"), code="usage") from None


def is_loopback(host: str) -> bool:
    """Whether a name or an address stands for this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_safe(settings: ServeSettings) -> None:
    """Refuse to be reached by others without a key.

    Raises:
        PlanError: the host is not loopback, and there is neither a key nor the word that none is wanted.
    """
    if settings.is_loopback or settings.api_keys or settings.insecure:
        return
    raise PlanError(
        f"--host {settings.host}: others can reach this address, and no API key was given. Give --api-key-file FILE "
        "(or the variable SAGITTAL_API_KEY), or say --insecure where everybody may send scans and read results.",
        code="usage",
    )


def keys_in(text: str, source: str) -> tuple[ApiKey, ...]:
    """Return the keys of a file: one a line, `NAME: KEY` or `KEY`; empty lines and those that begin with # are none.

    Args:
        text: of the file.
        source: what messages call it.

    Raises:
        DataError: no key, a short one, one given twice, or a name that can't be one. No key is ever repeated in it.
    """
    found: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        before, colon, after = line.partition(":")
        name, key = (before.strip(), after.strip()) if colon else (f"key{number}", line)
        if not _KEY_NAME.fullmatch(name) or name in {each.name for each in found}:
            raise DataError(f"{source}: line {number}: the key's name is no new word. Write NAME: KEY.", code="api_key")
        if len(key) < LEAST_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise DataError(
                f"{source}: line {number}: the key is too short or holds blanks. Expected at least {LEAST_KEY_LENGTH} "
                "letters and digits, for example from 'openssl rand -hex 32'.",
                code="api_key",
            )
        found.append(ApiKey(name=name, sha256=hash_of_key(key)))
    if not found or len({key.sha256 for key in found}) != len(found):
        raise DataError(f"{source}: holds no API key, or the same one twice. Write one a line.", code="api_key")
    return tuple(found)


def hash_of_key(key: str) -> str:
    """Return what is kept of a key. Keys are long and random, so a plain hash can't be guessed from."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
