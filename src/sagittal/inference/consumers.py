"""What else may look at a prediction's logits while they pass: probabilities, entropy."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32


@runtime_checkable
class SlabConsumer(Protocol):
    """Take the logits of a prediction slab by slab, each once, in ascending order.

    Logits of whole slabs are made only where there is a consumer. The array is gone after the call: copy what stays.
    """

    def __call__(self, rows: slice, logits: Float32[np.ndarray, "K d H W"]) -> None:
        """Take the logits of `rows` along the network's first axis.

        Args:
            rows: where the slab lies along the first axis of the cropped scan, in the network's axis order.
            logits: (K, rows, H, W) on the cropped scan's grid.
        """
        ...
