"""The model card: README.md of an exported folder, in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compot_deploy.exporters.manifest import Manifest
from compot_deploy.report.document import Report
from compot_deploy.report.markdown import to_markdown

_USE = {
    "onnx": """```python
import onnxruntime_genai as og  # pip install onnxruntime-genai

model = og.Model("this-folder")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Hello"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

The same folder loads in plain onnxruntime (`onnx/model.onnx`) and in optimum (`ORTModelForCausalLM`), and is laid
out as transformers.js reads it.""",
}


def model_card(report: Report, manifest: Manifest) -> str:
    """Markdown with a metadata header: what this is, the verdict, the tables, how to run it, where it is from.

    Args:
        report: of the accuracy check.
        manifest: of the folder.
    """
    recipe = manifest.recipe
    factorized = sum(record.kind == "factorized" for record in manifest.matrices)
    header = [
        "---",
        "library_name: onnx" if manifest.exporter == "onnx" else f"library_name: {manifest.exporter}",
        "pipeline_tag: text-generation",
        f"tags: [compot, quantized{', factorized' if factorized else ''}]",
        "---",
    ]
    body = f"""
# {report.model}, compressed

{manifest.model_type} model, made extremely small by compot-deploy {manifest.package}: {factorized} of \
{len(manifest.matrices)} matrices are a dictionary times codes (COMPOT, arXiv 2602.15200), quantized as
`--quant {recipe.get("quant")} {_budget(recipe)} --quantizer {recipe.get("quantizer")}`, in the format \
{manifest.exporter}.

## Accuracy and size

{to_markdown(report)}
## How to run it

{_USE.get(manifest.exporter, "See the documentation of compot-deploy.")}

## Where it is from

* Calibration: {manifest.metadata.get("calibration")}, tokens sha256 `{manifest.calibration}`, seed {manifest.seed}.
* Original weights and configuration: sha256 `{manifest.metadata.get("source")}`.
* Every option: `compot/recipe.toml`. Every file with its sha256, every matrix with its bits: `compot/manifest.json`.
* All figures: `compot/report.json`. Check it again with `compot-deploy check this-folder`.
"""
    return "\n".join(header) + "\n" + body


def _budget(recipe: Mapping[str, Any]) -> str:
    """The flag that decided the size."""
    name = next((name for name in ("bits", "size") if recipe.get(name) is not None), "ratio")
    return f"--{name} {recipe.get(name)}"
