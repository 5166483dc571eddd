"""Run GGUF files in the prebuilt llama.cpp of the extra ``llama``: dense ones as they are, the rest with a plug-in.

with LlamaModel("model.gguf", threads=2) as model:
    print(model.generate("Once upon a time", max_tokens=32).text)
"""

from compot_deploy.exporters.gguf.library import LlamaError, UnsupportedLlamaError
from compot_deploy.llama.generation import Generation
from compot_deploy.llama.model import LlamaModel, generate

__all__ = ["Generation", "LlamaError", "LlamaModel", "UnsupportedLlamaError", "generate"]
