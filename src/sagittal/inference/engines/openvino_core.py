"""OpenVINO's core, one for the life of the process.

On processors with AMX its CPU plugin gives the thread that loads it a stack of its own for signals, and unmaps that
stack when the plugin goes. Where another thread lets the plugin go, the first thread is left with a stack that is no
more, and its next signal, SIGTERM for example, ends the process in the middle of whatever it does. So it never goes.
"""

from __future__ import annotations

from functools import cache

import openvino


@cache
def core() -> openvino.Core:
    """Return the core; the same for every caller."""
    return openvino.Core()
