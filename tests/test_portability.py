"""No file needs Linux or macOS: what only POSIX has is asked for first, and no text depends on a system's encoding.

Cluster and serve are for servers and may. The scan reads the source, since no test of ours runs on Windows; it knows
names, not what a value holds, so a guard has to be seen: an `if` about the system, `hasattr`, or an `except`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sagittal

ROOT = Path(sagittal.__file__).parent
SERVERS = ("cluster", "serve")
MODULES = "crypt fcntl grp posix pty pwd resource syslog termios tty"
NAMES = {
    "os": "WNOHANG O_DIRECTORY O_NOFOLLOW O_NONBLOCK chown chroot fchmod fchown fork forkpty getegid geteuid getgid "
    "getloadavg getpgid getpgrp getpriority getsid getuid killpg lchown mkfifo mknod nice openpty posix_fadvise "
    "posix_fallocate posix_spawn pread preadv pwrite sched_getaffinity sched_setaffinity sendfile setgid setpgid "
    "setpriority setsid setuid statvfs sync sysconf uname wait wait3 wait4",
    "signal": "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pause pthread_kill setitimer sigwait",
    "time": "tzset",
}
PATHS = ("/proc/", "/sys/", "/dev/", "/tmp/", "/etc/")
SYSTEM = ("sys.platform", "os.name", "platform.system", "hasattr(")
FAILURES = {"OSError", "AttributeError", "ImportError", "TypeError", "ModuleNotFoundError", "FileNotFoundError"}


def findings(source: str) -> list[str]:
    """Return `line: what` for everything in a file that Windows lacks and nothing guards."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        what = _needed(node, parents)
        if what is not None and not _guarded(node, parents):
            found.append(f"{getattr(node, 'lineno', 0)}: {what}")
    return found


def _needed(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | None:
    if isinstance(node, ast.Import):
        names = {alias.name.partition(".")[0] for alias in node.names} & set(MODULES.split())
        return f"import {', '.join(sorted(names))}" if names else None
    if isinstance(node, ast.ImportFrom) and node.module:
        names = {alias.name for alias in node.names} & set(NAMES.get(node.module, "").split())
        if node.module in MODULES.split() or names:
            return f"from {node.module} import {', '.join(sorted(names)) or '...'}"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}" if node.attr in NAMES.get(node.value.id, "").split() else None
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(PATHS):
        return None if isinstance(parents[node], ast.Expr) else node.value
    return _needed_by_call(node) if isinstance(node, ast.Call) else None


def _needed_by_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func).rpartition(".")[2]
    first = call.args[0] if call.args else None
    if name == "CDLL" and isinstance(first, ast.Constant) and first.value is None:
        return "CDLL(None)"
    if name == "get_context" and isinstance(first, ast.Constant) and first.value in ("fork", "forkserver"):
        return f"get_context('{first.value}')"
    if {keyword.arg for keyword in call.keywords} & {"preexec_fn", "start_new_session", "pass_fds", "dir_fd"}:
        return "a keyword that only POSIX has"
    encoding_at = {"read_text": 0, "write_text": 1}.get(name)
    if encoding_at is not None and len(call.args) <= encoding_at and "encoding" not in {k.arg for k in call.keywords}:
        return f"{name} without an encoding"
    return None


def _guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    if isinstance(node, ast.Call) and "_text" in ast.unparse(node.func):
        return False
    for inner, outer in _upwards(node, parents):
        if isinstance(outer, ast.If | ast.IfExp) and inner is not outer.test and _asks(outer.test):
            return True
        if isinstance(outer, ast.BoolOp | ast.comprehension) and any(
            _asks(part) for part in ast.iter_child_nodes(outer)
        ):
            return True
        if isinstance(outer, ast.Try) and inner in outer.body and any(map(_catches, outer.handlers)):
            return True
        if isinstance(outer, ast.FunctionDef) and any(_leaves(part) for part in outer.body[: _index(outer, inner)]):
            return True
    return False


def _upwards(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.AST, ast.AST]]:
    while node in parents:
        yield node, parents[node]
        node = parents[node]


def _index(function: ast.FunctionDef, inner: ast.AST) -> int:
    return function.body.index(inner) if inner in function.body else 0


def _asks(test: ast.AST) -> bool:
    return any(word in ast.unparse(test) for word in SYSTEM)


def _catches(handler: ast.ExceptHandler) -> bool:
    return bool(
        FAILURES & {part.id for part in ast.walk(handler.type or ast.Name("OSError")) if isinstance(part, ast.Name)}
    )


def _leaves(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.If)
        and _asks(statement.test)
        and isinstance(statement.body[-1], ast.Return | ast.Raise)
    )


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in SERVERS]


def test_no_file_needs_posix() -> None:
    assert len(FILES) > 150
    wrong = [f"{path.relative_to(ROOT.parent)}:{line}" for path in FILES for line in findings(path.read_text("utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from os import fork",
        "from resource import getrusage",
        "os.sync()",
        "def f():\n    return os.getuid()",
        "x = len(os.sched_getaffinity(0))",
        "code == -signal.SIGKILL",
        "open('/proc/meminfo')",
        "Path('/sys/fs/cgroup')",
        "ctypes.CDLL(None)",
        "get_context('fork')",
        "Popen(command, start_new_session=True)",
        "path.read_text()",
        "try:\n    path.write_text(text)\nexcept OSError:\n    pass",
        "try:\n    os.fork()\nexcept ValueError:\n    pass",
        "if os.name == 'nt':\n    pass\nos.fork()",
        "if done:\n    os.fork()",
    ],
)
def test_the_scan_sees_what_only_posix_has(line: str) -> None:
    assert len(findings(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "if sys.platform == 'linux':\n    import fcntl",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1",
        "def f():\n    if os.name == 'nt':\n        return\n    os.fork()",
        "try:\n    text = open('/proc/meminfo')\nexcept OSError:\n    text = ''",
        "path.read_text(encoding='utf-8')",
        "os.replace(one, other)",
        "'''/proc/ is where Linux tells.'''",
    ],
)
def test_the_scan_takes_what_is_guarded(line: str) -> None:
    assert findings(line) == []
