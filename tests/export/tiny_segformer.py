"""Settings that make SegFormer3D as small as it gets."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
}
