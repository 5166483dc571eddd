"""What Auto classes find under our type: doors that lead to the compressed class of the right base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import transformers

from compot_deploy.errors import ArtifactError, InputError
from compot_deploy.transformers_plugin.configuration import CompotConfig
from compot_deploy.transformers_plugin.folder import AUTO_CLASSES, door_name
from compot_deploy.transformers_plugin.modeling import compressed_class
from compot_deploy.transformers_plugin.weight_files import check_tensors


class Door:
    """What an Auto class finds under our type: it leads to the compressed class of the right base.

    Attributes:
        auto_class: name of the Auto class.
    """

    config_class = CompotConfig
    auto_class: str = "AutoModel"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: CompotConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load a compressed model; see ``transformers.AutoModel.from_pretrained`` for the arguments.

        Raises:
            ArtifactError: the files and the configuration disagree, or something is missing.
            InputError: an argument that would replace packed matrices.
        """
        if config is None:
            config = CompotConfig.from_pretrained(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            raise InputError(
                "A compressed model is quantized already: load it without quantization_config, or quantize the "
                "original."
            )
        kwargs.pop("ignore_mismatched_sizes", None)
        entries, base = config.entries(), cls._base(config, kwargs)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            check_tensors(folder, entries, str(folder / "config.json"))
        with_info = kwargs.pop("output_loading_info", False)
        concrete = cls._class(base)
        model, info = concrete.from_pretrained(
            pretrained_model_name_or_path, *args, config=base, output_loading_info=True, **kwargs
        )
        _refuse_gaps(model, info, str(config.compot["architecture"]), str(pretrained_model_name_or_path))
        return (model, info) if with_info else model

    @classmethod
    def _from_config(cls, config: CompotConfig, **kwargs: Any) -> Any:
        config.entries()
        base = cls._base(config, kwargs)
        return cls._class(base)._from_config(base, **kwargs)

    @classmethod
    def _base(cls, config: CompotConfig, kwargs: dict[str, Any]) -> Any:
        """The base configuration, with what the caller asked for."""
        base = config.base()
        for key in list(kwargs):
            if key != "dtype" and hasattr(base, key):
                setattr(base, key, kwargs.pop(key))
        # What an Auto class took for our configuration is meant for the base model.
        if config.id2label != CompotConfig().id2label:
            base.id2label, base.label2id = config.id2label, config.label2id
        for key in ("_attn_implementation", "output_attentions", "output_hidden_states"):
            if getattr(config, key, None):
                setattr(base, key, getattr(config, key))
        base.compot = config.compot
        return base

    @classmethod
    def _class(cls, base: Any) -> Any:
        mapping = getattr(transformers, cls.auto_class)._model_mapping
        if type(base) not in mapping:
            raise ArtifactError(
                f"A compressed {base.model_type} has no {cls.auto_class}: use the class that it was made from."
            )
        found = mapping[type(base)]
        if isinstance(found, tuple):
            names = base.architectures or ()
            found = next((kind for kind in found if kind.__name__ in names), found[0])
        return compressed_class(found, door_name(cls.auto_class))


DOORS: Final[Mapping[str, type[Door]]] = MappingProxyType(
    {
        door_name(name): type(door_name(name), (Door,), {"auto_class": name, "__doc__": Door.__doc__})
        for name in AUTO_CLASSES
    }
)
"""By their own names, as ``auto_map`` has them."""


def _refuse_gaps(model: Any, info: Mapping[str, Any], saved: str, where: str) -> None:
    """Nothing that belongs to the model may be missing: transformers fills gaps with random numbers."""
    same = model._compot_base.__name__ == saved
    inside = f"{model.base_model_prefix}."
    has_head = hasattr(model, model.base_model_prefix)
    for problem, keys in (("lacks", info["missing_keys"]), ("has another size of", info["mismatched_keys"])):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        # A head of another class than the one saved is new: that is what fine-tuning begins with.
        gaps = [name for name in names if same or not has_head or name.startswith(inside)]
        if gaps:
            raise ArtifactError(
                f"{where} {problem} {gaps[0]} and {len(gaps) - 1} more tensors: nothing was loaded, because they "
                "would hold random numbers. Copy or export the model again."
            )


for _door in DOORS.values():
    getattr(transformers, _door.auto_class).register(CompotConfig, _door, exist_ok=True)
