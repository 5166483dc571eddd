"""What a model is: its folder, its tokens, its matrices, and how it runs block by block."""
