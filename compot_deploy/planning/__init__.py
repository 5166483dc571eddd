"""Which scheme each matrix gets for its bytes, and making what was chosen."""
