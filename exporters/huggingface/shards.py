"""Tensors to safetensors files of limited size, an index where there are several, and what their bytes are spent on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compot_deploy.core.disk import safetensors_errors
from compot_deploy.core.json_files import write_object
from compot_deploy.transformers_plugin.weight_files import INDEX, SAFETENSORS_TYPES, WEIGHTS


class Shards:
    """Tensors to files of limited size, and an index where there are several."""

    def __init__(self, folder: Path, limit: int, counted: bool = False) -> None:
        self._folder, self._limit, self._counted = folder, limit, counted
        self.missing = 0
        """Bytes of tensors that were counted, not written."""
        self._pending: dict[str, Tensor] = {}
        self._closed: list[tuple[str, ...]] = []
        self._bytes, self._total = 0, 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self._pending and self._bytes + tensor.nbytes > self._limit:
            self._close()
        stored = tensor.to("meta") if self._counted else tensor.contiguous()
        # safetensors refuses names that share memory, a tied bias for example.
        shared = any(
            stored.data_ptr() == other.data_ptr() for other in self._pending.values() if other.numel()
        )
        self._pending[name] = stored.clone() if shared and not self._counted else stored
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their names, write the index."""
        self._close()
        if len(self._closed) == 1:
            self._part(0).rename(self._folder / WEIGHTS)
            return
        placed: dict[str, str] = {}
        for number, names in enumerate(self._closed):
            file = f"model-{number + 1:05d}-of-{len(self._closed):05d}.safetensors"
            self._part(number).rename(self._folder / file)
            placed |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        write_object(self._folder / INDEX, index, indent=1)

    def _close(self) -> None:
        part = self._part(len(self._closed))
        if self._counted:
            part.write_bytes(bytes(_header_bytes(self._pending)))
            self.missing += self._bytes
        else:
            # transformers refuses files without this note.
            with safetensors_errors(part):
                save_file(self._pending, part, metadata={"format": "pt"})
            part.chmod((self._folder.stat().st_mode & 0o444) | 0o200)  # safetensors lets nobody else read it
        self._closed.append(tuple(self._pending))
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f".part-{number}.safetensors"


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What stands before the tensors of a safetensors file: a length of 8 bytes, then JSON up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The order in which safetensors lays tensors out, which decides how many digits their places have.
    order = {dtype: -place for place, dtype in enumerate(SAFETENSORS_TYPES)}
    for name, tensor in sorted(tensors.items(), key=lambda item: (order[item[1].dtype], item[0])):
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


@dataclass(frozen=True)
class FileAccount:
    """What the bytes of the tensor files of a folder are spent on; the three add up to the files.

    Attributes:
        matrices: the manifest's.
        others: norms, biases, and what else is stored beside the matrices.
        headers: names, types and places of the tensors, in front of them.
    """

    matrices: int
    others: int
    headers: int


def account(folder: Path, matrices: int) -> FileAccount:
    """Split the bytes of the safetensors files of a folder.

    Args:
        folder: verified.
        matrices: bytes of all matrices, from the manifest.
    """
    tensors = headers = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")  # its length stands in front of it
        headers += header
        tensors += path.stat().st_size - header
    return FileAccount(matrices, tensors - matrices, headers)
