"""ONNX folders that onnxruntime, onnxruntime-genai, optimum and transformers.js read."""
