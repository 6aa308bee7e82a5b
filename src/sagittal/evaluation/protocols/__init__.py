"""How others score: a protocol per file, each with that tool's own definitions, rules for empty masks and means."""

from sagittal.evaluation.protocols.protocol import Protocol

PROTOCOLS: dict[str, Protocol] = {}
"""Every protocol by the name that `EvaluationSettings.protocol` takes."""

__all__ = ["PROTOCOLS", "Protocol"]
