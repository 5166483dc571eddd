"""What a matrix can be: grids, stored tensors, packing, bytes. Knows no model and no file format."""
