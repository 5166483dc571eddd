"""compot-deploy: compress a transformer, ship it to edge devices, prove its accuracy."""

__version__ = "0.1.0"
