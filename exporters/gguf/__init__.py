"""GGUF files for llama.cpp: dense for every build of it, factorized and sparse for `compot_deploy.llama`.

Three layouts, from widest to smallest:

``dense``       factors multiplied out, the base architecture, any ggml type. Loads in every llama.cpp.
``factorized``  dictionaries and codes in ggml's Q4_0 / Q8_0, our integers bit-exactly.
``sparse``      every integer in the planes of `planes`: 2, 3, 4 and 8 bits, 2:4 and 4:8 codes.

The last two carry ``general.architecture = "compot"``, because other readers of the base architecture would
fill the missing matrices with random numbers; under an unknown name they all refuse. Rows of a GGUF tensor
are outputs, so integers (in, out) are transposed on the way; for ``llama`` the outputs of q and k are also
reordered to neighbouring rotary pairs, which for a factorized matrix concerns the codes alone.
"""
