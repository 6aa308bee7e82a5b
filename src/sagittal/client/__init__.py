"""Ask a Sagittal service to segment scans, with the standard library alone."""

from sagittal.client.client import Client, Prediction

__all__ = ["Client", "Prediction"]
