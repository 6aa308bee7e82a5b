"""A SLURM of its own for tests: munged, slurmctld and slurmd in a temporary folder, on this machine, as root.

It needs no systemd, no cgroups and no accounting. Two processors, whatever the machine has, and two partitions: jobs
in `urgent` preempt those in `spare`, which are told by SIGTERM, have a minute, and are put back into the queue.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_STARTS_S = 180.0
"""How long is waited for anything: that a machine is slow, or stands still for a while, is no error."""
_ANSWERS_S = 120.0
_ENDS_S = 10.0
_CONFIGURATION = """\
ClusterName=site
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=60
MessageTimeout=90
BatchStartTimeout=180
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
EnforcePartLimits=ALL
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=60
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=spare Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass
class SlurmSite:
    """A SLURM that runs.

    Attributes:
        folder: of its configuration, logs and state.
        configuration: what the environment variable SLURM_CONF must name.
    """

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    def ask(self, *command: str) -> str:
        """Return what one of SLURM's programs prints; an error where it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_ANSWERS_S, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Return the state of each job in the queue, an array's elements each, by id."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def go_on(self, job: str) -> None:
        """Wait until a job was put back into the queue, and let it start again at once, where SLURM would wait."""
        _wait(lambda: self._restarts(job) > 0, f"{job} was not put back", self.folder)
        _wait(lambda: self.jobs().get(job) in ("PENDING", "RUNNING", None), f"{job} did not end", self.folder)
        with suppress(AssertionError):  # it has started meanwhile, or is through already
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _restarts(self, job: str) -> int:
        """Return how often a job was put back: a number that stays, while a state passes between two looks."""
        found = re.search(r"\bRestarts=(\d+)", self.ask("scontrol", "show", "job", job))
        return int(found[1]) if found else 0

    def hold(self, held: bool) -> None:
        """Let no further job of the partition `spare` begin, or begin again."""
        self.ask("scontrol", "update", "PartitionName=spare", f"State={'DOWN' if held else 'UP'}")

    def empty(self) -> None:
        """End all jobs, and wait until none is left; what was held is not any more."""
        self.hold(False)
        self.ask("scancel", "--user=root")
        _wait(lambda: not self.jobs(), "jobs did not end", self.folder)


def missing() -> str | None:
    """Return why no SLURM can be started here, None where it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no SLURM on this machine ({', '.join(absent)}): apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "a SLURM for tests is started as root"


@contextmanager
def slurm_site(folder: Path) -> Iterator[SlurmSite]:
    """Start a SLURM while the block runs; afterwards neither it nor a job of it is there."""
    site = SlurmSite(folder)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with _held_ports() as (controller_port, daemon_port):
        site.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                folder=folder,
                controller_port=controller_port,
                daemon_port=daemon_port,
            )
        )
        try:
            munge = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
            _start(site, "munged", "--foreground", "--force", f"--key-file={key}", *munge)
            _wait((folder / "munge" / "socket").exists, "munged did not start", folder)
            _start(site, "slurmctld", "-D", "-f", str(site.configuration))
            _start(site, "slurmd", "-D", "-f", str(site.configuration))
            _wait(lambda: _is_idle(site), "no node became idle", folder)
            yield site
        finally:
            _stop(site)


def _start(site: SlurmSite, program: str, *options: str) -> None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    assert found is not None
    environment = {**os.environ, "SLURM_CONF": str(site.configuration), "PATH": path}
    with (site.folder / f"{program}.out").open("ab") as log:
        started = subprocess.Popen([found, *options], env=environment, stdout=log, stderr=log, start_new_session=True)
    site.processes.append(started)


def _stop(site: SlurmSite) -> None:
    """End jobs, then the daemons, the last that was started first."""
    with suppress(AssertionError, subprocess.TimeoutExpired):
        site.empty()
    for process in reversed(site.processes):
        process.terminate()
        try:
            process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            # slurmctld has a second process, in the same session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_idle(site: SlurmSite) -> bool:
    environment = {**os.environ, "SLURM_CONF": str(site.configuration)}
    done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
    return "idle" in done.stdout.split()


@contextmanager
def _held_ports() -> Iterator[tuple[int, int]]:
    """Find two ports, and keep them from other programs: SLURM's may listen there, as both sides allow it."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield first.getsockname()[1], second.getsockname()[1]


def _wait(until: object, what: str, folder: Path) -> None:
    assert callable(until)
    end = time.monotonic() + _STARTS_S
    while not until():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{what} within {_STARTS_S:g} s\n{logs}")
        time.sleep(0.05)
