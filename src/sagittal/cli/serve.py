"""`sagittal serve`: models as an HTTP service on this machine."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from sagittal.cli.options import networks_folder, parse_devices, parse_duration_s, threads_given
from sagittal.cli.predict_options import Precision

if TYPE_CHECKING:
    from sagittal.serve.settings import ApiKey, Limits, WatchSettings

KEY_VARIABLE = "SAGITTAL_API_KEY"
PACS_VARIABLE = "SAGITTAL_PACS_CREDENTIALS"
RESEARCH_USE = "for research use; not a medical device"
_Flag = Annotated[bool, Parameter(negative="")]
_Gib = Annotated[float, Parameter(validator=validators.Number(gt=0))]
_Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_Texts = Annotated[tuple[str, ...], Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Access:
    """Who reaches the service.

    Attributes:
        api_key_file: file with a key a line, KEY or NAME: KEY; the variable SAGITTAL_API_KEY holds one too
        insecure: serve others without a key; by itself a key is needed where the host is not this machine alone
        base_url: path below which a proxy offers the service, /seg for example
        allow_host: a name in the Host header to answer beside localhost, for a proxy on this machine; may be repeated
        allow_origin: origin of a page that may call the service, https://viewer.example; may be repeated
        allow_folder: folder below which requests may name scans by path; may be repeated
    """

    api_key_file: Path | None = None
    insecure: _Flag = False
    base_url: str = ""
    allow_host: _Texts = ()
    allow_origin: _Texts = ()
    allow_folder: Annotated[tuple[Path, ...], Parameter(negative="")] = ()

    def keys(self) -> tuple[ApiKey, ...]:
        """Return the keys of the file, or of the variable."""
        from sagittal.errors import DataError
        from sagittal.serve.settings import keys_in

        if self.api_key_file is not None:
            try:
                text = self.api_key_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                raise DataError(
                    f"{self.api_key_file}: can't be read. Expected a text file with a key a line.", code="api_key"
                ) from None
            return keys_in(text, str(self.api_key_file))
        given = os.environ.get(KEY_VARIABLE, "")
        return keys_in(given, KEY_VARIABLE) if given.strip() else ()


@Parameter(name="*")
@dataclass(frozen=True)
class Allowance:
    """How much it takes.

    Attributes:
        max_upload_gib: of one request
        max_unpacked_gib: of the scan in it
        max_files: in an archive or a folder
        max_queued: jobs that wait
        max_job_time: for one attempt at a job: 90s, 15m, 1h
        keep: results for this long after the end of their job: 15m, 24h
        stop_time: for the jobs in progress when the service is told to stop: 30s
    """

    max_upload_gib: _Gib = 4.0
    max_unpacked_gib: _Gib = 16.0
    max_files: _Count = 20_000
    max_queued: _Count = 1000
    max_job_time: str = "1h"
    keep: str = "168h"
    stop_time: str = "30s"

    def limits(self) -> Limits:
        """Return what the service is told."""
        from sagittal.errors import PlanError
        from sagittal.serve.settings import GIB, LONGEST_KEEP_S, Limits

        keep_s = parse_duration_s(self.keep, "--keep")
        if keep_s > LONGEST_KEEP_S:
            raise PlanError(f"--keep {self.keep}: longer than 876000h, a hundred years. Give less.", code="usage")
        return Limits(
            upload_bytes=int(self.max_upload_gib * GIB),
            unpacked_bytes=int(self.max_unpacked_gib * GIB),
            files=self.max_files,
            queued=self.max_queued,
            job_s=parse_duration_s(self.max_job_time, "--max-job-time"),
            result_ttl_s=keep_s,
            stop_s=parse_duration_s(self.stop_time, "--stop-time"),
        )


@Parameter(name="*")
@dataclass(frozen=True)
class Watching:
    """Which new series are segmented by themselves.

    Attributes:
        watch_dicomweb: address of a PACS, http://pacs:8042/dicom-web; segmentations are stored back to it
        watch_folder: folder that DICOM files come into; segmentations go to the folder sagittal in it
        watch_rule: which series, modality=CT,description~liver,model=NAME
        watch_every: between two looks: 30s; a series is begun when two of them found the same images
        watch_since_days: only studies of the last days; by itself all that the PACS has
        watch_credentials: file with USER:PASSWORD for the PACS; the variable SAGITTAL_PACS_CREDENTIALS holds them too
    """

    watch_dicomweb: str | None = None
    watch_folder: Path | None = None
    watch_rule: str | None = None
    watch_every: str = "30s"
    watch_since_days: Annotated[int | None, Parameter(validator=validators.Number(gte=0))] = None
    watch_credentials: Path | None = None

    def settings(self) -> WatchSettings | None:
        """Return what the service is told, None where nothing is watched."""
        from sagittal.errors import PlanError
        from sagittal.serve.arrivals import EXAMPLE, parse_rule
        from sagittal.serve.settings import WatchSettings, settings_of

        self._require_sensible()
        if self.watch_dicomweb is None and self.watch_folder is None:
            return None
        if self.watch_rule is None:
            raise PlanError(f"no rule says which series are segmented. Give --watch-rule {EXAMPLE}.", code="usage")
        parse_rule(self.watch_rule)
        return settings_of(
            WatchSettings,
            rule=self.watch_rule,
            dicomweb=self.watch_dicomweb,
            credentials=self._credentials() if self.watch_dicomweb is not None else None,
            folder=None if self.watch_folder is None else self.watch_folder.resolve(),
            every_s=parse_duration_s(self.watch_every, "--watch-every"),
            since_days=self.watch_since_days,
        )

    def _require_sensible(self) -> None:
        """Refuse what would be left aside without a word: options of a watch without one, a PACS's with a folder."""
        from sagittal.errors import PlanError

        for_pacs = {
            "--watch-since-days": self.watch_since_days is not None,
            "--watch-credentials": self.watch_credentials is not None,
        }
        given = {
            "--watch-rule": self.watch_rule is not None,
            "--watch-every": self.watch_every != Watching.watch_every,
            **for_pacs,
        }
        if self.watch_dicomweb is not None:
            return
        if self.watch_folder is None and any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise PlanError(f"{names}: nothing to watch. Give --watch-dicomweb or --watch-folder.", code="usage")
        if any(for_pacs.values()):
            names = ", ".join(name for name, is_given in for_pacs.items() if is_given)
            raise PlanError(f"{names}: for --watch-dicomweb alone. Leave it out, or watch a PACS.", code="usage")

    def _credentials(self) -> str | None:
        from sagittal.errors import DataError

        given = os.environ.get(PACS_VARIABLE, "").strip()
        if self.watch_credentials is not None:
            try:
                given = self.watch_credentials.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                raise DataError(
                    f"{self.watch_credentials}: can't be read. Expected a text file with USER:PASSWORD.",
                    code="pacs_credentials",
                ) from None
        if given and (":" not in given or len(given.splitlines()) != 1):
            where = self.watch_credentials or PACS_VARIABLE
            raise DataError(f"{where}: not of the form USER:PASSWORD in one line.", code="pacs_credentials")
        return given or None


def serve(
    bundles: Annotated[list[Path], Parameter(help="folders that `sagittal train` wrote, or packages of them")],
    /,
    *,
    folder: Path,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65535))] = 8000,
    device: str = "auto",
    engine: Literal["auto", "torch", "openvino"] = "auto",
    precision: Precision = "fp32",
    memory_gib: float | None = None,
    access: Access = Access(),
    allowance: Allowance = Allowance(),
    watching: Watching = Watching(),
) -> int:
    """Serve models over HTTP: scans in, label maps out, with a page for people and an API for programs.

    Jobs are kept on the disk: the same command goes on with them after anything that ended the service.

    Args:
        folder: for jobs, uploads, results and the audit log
        host: address to listen on; others than this machine's own need an API key
        port: to listen on; 0 takes a free one
        device: auto, cpu, cuda, cuda:1 or mps; a worker for each of several with commas: cpu,cpu
        engine: what computes; auto takes OpenVINO on a CPU where it is installed and knows the network
        precision: of the products; bf16 (a GPU or OpenVINO), fp16 (a GPU) and int8 (OpenVINO) cost accuracy
        memory_gib: memory that all workers together stay within
        access: see Access
        allowance: see Allowance
        watching: see Watching
    """
    devices = parse_devices(device)
    from sagittal.inference.engines.choice import require_sensible
    from sagittal.plan.base import require_writable
    from sagittal.serve.models import ServedModels
    from sagittal.serve.running import keep_private, locked, run
    from sagittal.serve.settings import ServeSettings, require_safe, settings_of

    require_sensible(engine, precision, devices)
    settings = settings_of(
        ServeSettings,
        folder=folder,
        host=host,
        port=port,
        api_keys=access.keys(),
        insecure=access.insecure,
        base_url=access.base_url.rstrip("/"),
        allowed_hosts=access.allow_host,
        allowed_origins=access.allow_origin,
        allowed_folders=access.allow_folder,
        devices=devices,
        engine=engine,
        precision=precision,
        memory_gib=memory_gib,
        threads=threads_given(),
        cache_folder=networks_folder(),
        limits=allowance.limits(),
        watch=watching.settings(),
        debug=logging.getLogger("sagittal").isEnabledFor(logging.DEBUG),
    )
    require_safe(settings)
    print(RESEARCH_USE, file=sys.stderr)
    keep_private()
    require_writable(folder)
    with locked(folder):
        return run(settings, ServedModels.read(bundles), _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
