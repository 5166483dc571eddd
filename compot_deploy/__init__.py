"""compot-deploy: compress a transformer, ship it to edge devices, prove its accuracy."""

from compot_deploy.transformers_plugin import registration as _registration

__version__ = "0.1.0"

_registration.install()
