"""The configuration of a compressed model: that of the model underneath, and where its matrices went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from compot_deploy.errors import ArtifactError, first_line
from compot_deploy.models.configuration import for_model
from compot_deploy.transformers_plugin.folder import (
    AUTO_MAP,
    BASE_TYPE,
    MODEL_TYPE,
    POINTER,
    check_config,
    reveal,
)
from compot_deploy.transformers_plugin.layout import Entry, from_json


class CompotConfig(PretrainedConfig):
    """See `compot_deploy.transformers_plugin.layout` for the file.

    Attributes:
        base_config: configuration of the base model, as a dictionary, its type under ``base_model_type``.
        compot: the layout.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        base_config: Mapping[str, Any] | None = None,
        compot: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Kept as it came: `entries` refuses what does not point to our own module.
        auto_map = kwargs.pop("auto_map", AUTO_MAP)
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)
        self.base_config = dict(base_config or {})
        self.compot = dict(compot or {})
        self.auto_map = auto_map

    def entries(self) -> tuple[Entry, ...]:
        """The compressed matrices, everything checked.

        Raises:
            ArtifactError: a field that is damaged, or that points elsewhere.
        """
        where = f"{self.name_or_path or 'The configuration'}/config.json".removeprefix("/")
        check_config({**self.__dict__, "model_type": self.model_type}, where)
        return from_json(self.compot, where)

    def base(self) -> Any:
        """The configuration of the base model, a new one at each call.

        Raises:
            ArtifactError: transformers does not know the base model, or refuses its configuration.
        """
        try:
            return for_model(reveal(self.base_config))
        except Exception as error:  # strict validation, KeyError, TypeError: whatever a damaged file provokes
            raise ArtifactError(
                f"transformers cannot make a configuration of {self.base_config.get(BASE_TYPE)!r} of "
                f"base_config: {first_line(error)}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {**super().to_dict(), "hidden_size": POINTER}


AutoConfig.register(MODEL_TYPE, CompotConfig, exist_ok=True)
