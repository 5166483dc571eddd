"""Write GGUF files and run them in llama.cpp (the xllamacpp wheel; nothing is compiled).

The dense file is for every llama.cpp. The factorized one keeps dictionaries and codes and runs in the same prebuilt
library through a small plug-in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from compot_deploy.pipeline.deploy import deploy
from compot_deploy.pipeline.generate import generate

PROMPT = "Return a"


def main() -> None:
    """Export both layouts, and let both write."""
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ("dense", "factorized"):
            (deployment,) = deploy(
                None,
                format=["gguf"],
                gguf_layout=layout,
                out=str(Path(scratch) / layout),
                samples=8,
                length=128,
                rounds=5,
                evaluation_tokens=256,
            )
            (file,) = deployment.folder.rglob("*.gguf")
            written = generate(deployment.folder, PROMPT, tokens=24, threads=1)
            print(
                f"{layout}: {file.name}, {file.stat().st_size:,} bytes, {written.tokens_per_second:.0f} tokens/s"
            )
            print(f"  {PROMPT}{written.text!r}")


if __name__ == "__main__":
    main()
