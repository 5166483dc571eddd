"""Whitening, factorization, joint quantization: pure functions of tensors."""
