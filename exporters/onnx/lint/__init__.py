"""Structural lint of an ONNX folder: what a runtime would refuse, compute wrongly, or run slowly."""
