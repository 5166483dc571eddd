"""Serve a GGUF file or an exported ONNX folder over HTTP, in the manner of OpenAI's API.

::

    python -m compot_deploy.serving DIR --port 8080

    limits      what clients may take of the machine
    request     a body, read and checked
    templates   messages to text; render: the process in which a template of the file runs
    engines     a GGUF file or an ONNX folder: text to ids, ids to more ids, ids to text
    generation  an answer, piece by piece: turns, draws, stops
    reply       a piece, as OpenAI's clients read it
    server      HTTP
"""
