"""compot-deploy: compress a transformer, ship it to edge devices, prove its accuracy."""

from compot_deploy.silence import silence as _silence

_silence()  # before anything that would report home is imported

from compot_deploy.transformers_plugin import registration as _registration  # noqa: E402

__version__ = "0.1.0"

_registration.install()
