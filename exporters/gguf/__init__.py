"""GGUF files: dense ones for every llama.cpp, factorized ones for the plug-in."""
