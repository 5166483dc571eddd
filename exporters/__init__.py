"""Exporters: a CompressedModel in, files out. They store exactly what they are given."""
