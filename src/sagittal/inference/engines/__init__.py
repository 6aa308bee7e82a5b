"""What computes the network in a prediction: PyTorch or OpenVINO, behind one protocol."""
