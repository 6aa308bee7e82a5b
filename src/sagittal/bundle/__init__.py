"""The model folder: weights, plan and metrics under hashes. Torch-free; see `bundle.manifest` for the rules."""

from sagittal.bundle.archive import is_package
from sagittal.bundle.manifest import FORMAT, SCHEMA_VERSION, Manifest, looks_like_bundle
from sagittal.bundle.package import pack, unpack
from sagittal.bundle.read import Bundle, read_bundle
from sagittal.bundle.write import hash_case, write_bundle

__all__ = [
    "FORMAT",
    "SCHEMA_VERSION",
    "Bundle",
    "Manifest",
    "hash_case",
    "is_package",
    "looks_like_bundle",
    "pack",
    "read_bundle",
    "unpack",
    "write_bundle",
]
