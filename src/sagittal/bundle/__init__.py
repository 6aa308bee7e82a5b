"""The model folder: weights, plan and metrics under hashes. Torch-free; see `bundle.manifest` for the rules."""

from sagittal.bundle.manifest import FORMAT, SCHEMA_VERSION, Manifest, looks_like_bundle
from sagittal.bundle.read import Bundle, read_bundle
from sagittal.bundle.write import hash_case, write_bundle

__all__ = [
    "FORMAT",
    "SCHEMA_VERSION",
    "Bundle",
    "Manifest",
    "hash_case",
    "looks_like_bundle",
    "read_bundle",
    "write_bundle",
]
