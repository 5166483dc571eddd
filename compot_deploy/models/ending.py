"""Whether a model ends with its head: then what its head reads says everything, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compot_deploy.models.example import example_of
from compot_deploy.models.skeleton import ValuesUnknown
from compot_deploy.models.source import ModelSource


def ends_with_head(source: ModelSource) -> bool:
    """Whether the output is the very product of the head, found by one forward pass of shapes.

    Not where logits are scaled or capped behind it, nor where a model has no head.
    """
    path, model = source.layout.head, source.meta
    if path is None:
        return False
    products: list[Tensor] = []

    def note(_module: Any, _args: Any, product: Tensor) -> None:
        products.append(product)

    watched = model.get_submodule(path).register_forward_hook(note)
    try:
        with ValuesUnknown(), torch.no_grad():
            output = source.task.output(model(**example_of(model, source.task)))
    except Exception:  # whatever a model's own code says: nothing is known then
        return False
    finally:
        watched.remove()
    if len(products) != 1:
        return False
    (product,) = products
    same = product.untyped_storage()._cdata == output.untyped_storage()._cdata
    # Ways of writing into the product, such as dividing it in place, count.
    return same and product.shape == output.shape and product._version == 0
