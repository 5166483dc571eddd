"""Compress a model, write an ONNX folder, and read what it cost.

The model is the one that ships with the package; give a folder or hub id as the first argument for another one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from compot_deploy.pipeline.deploy import deploy


def main(model: str | None = None) -> None:
    """Deploy, and print the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        (deployment,) = deploy(
            model,
            quant="int4",
            ratio=0.2,  # linears 20 % smaller than plain int4
            format=["onnx"],
            out=str(Path(scratch) / "model"),
            samples=16,  # 16 windows of 128 tokens to calibrate on; 128 of 256 is the default
            length=128,
            evaluation_tokens=1024,
        )
        report = deployment.report
        sizes, accuracy = report.sizes, report.accuracy
        print("passed the gate" if deployment.passed else "did not pass the gate")
        print(f"{sizes.weights:,} bytes of weights; plain int4 {sizes.plain_int4:,}, fp16 {sizes.fp16:,}")
        for name, loss in {
            "method": accuracy.method,
            "export": accuracy.export_deployed,
            "total": accuracy.total,
        }.items():
            if loss is not None:
                found = loss.comparison
                print(
                    f"{name:>6} loss: perplexity x {found.perplexity_ratio.value:.4f}, "
                    f"KL divergence {found.divergence.mean.value:.5f} nats, NMSE {found.nmse:.1e}"
                )
        print("in the folder:", ", ".join(sorted(path.name for path in deployment.folder.iterdir())))


if __name__ == "__main__":
    main(*sys.argv[1:2])
