"""Files on disk: staging a folder so that it appears whole or not at all, and its manifest.

A manifest names every file with its size and sha256, so damage is found before a runtime reads it.
"""
