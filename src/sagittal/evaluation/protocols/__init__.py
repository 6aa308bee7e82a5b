"""How others score: a protocol per file, each with that tool's own definitions, rules for empty masks and means."""

from sagittal.evaluation.protocols.acdc import ACDC
from sagittal.evaluation.protocols.brats2021 import BRATS2021
from sagittal.evaluation.protocols.brats2023 import PROTOCOLS_2023
from sagittal.evaluation.protocols.monai import MONAI
from sagittal.evaluation.protocols.msd import MSD
from sagittal.evaluation.protocols.nnformer_synapse import NNFORMER_SYNAPSE
from sagittal.evaluation.protocols.nnunet import NNUNET
from sagittal.evaluation.protocols.protocol import Means, Protocol

PROTOCOLS: dict[str, Protocol] = {
    "nnunet": NNUNET,
    "monai": MONAI,
    "brats2021": BRATS2021,
    **PROTOCOLS_2023,
    "msd": MSD,
    "nnformer-synapse": NNFORMER_SYNAPSE,
    "acdc": ACDC,
}
"""Every protocol by the name that `EvaluationSettings.protocol` takes."""

__all__ = ["PROTOCOLS", "Means", "Protocol"]
