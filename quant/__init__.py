"""Quantizers: matrix in, matrix out. torch only; they know nothing of models, files or formats."""
