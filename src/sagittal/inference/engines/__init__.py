"""What computes the network in a prediction: PyTorch or OpenVINO, behind one protocol (`engine.py`).

`import openvino` imports its conversion tools, which send "general_import" to a server by way of a package of their own
where that is installed, and it is a dependency of the wheel. Scans are patients' data, and machines that hold them
send nothing: whoever imports anything of this room finds that package shut, for the whole process.
"""

from __future__ import annotations

import sys

# None is what makes Python refuse an import; the conversion tools then take a stub that sends nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
