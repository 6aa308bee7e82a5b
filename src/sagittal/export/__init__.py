"""Bundles for other people's software: ONNX, OpenVINO, torch.export, and a JSON with everything around the network."""

# Shuts OpenVINO's telemetry before anything of this room can import OpenVINO.
import sagittal.inference.engines  # noqa: F401 - for what importing it does
