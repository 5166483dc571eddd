"""Healing: scales and norms of a compressed model tuned until it says again what the original says.

Integers stay as they are, and so do the bytes of the file. What is tuned is what is stored: float16 scales of grids, of
dictionaries and of codes, and vectors such as norm weights and biases in their own type.
"""

from compot_deploy.healing.heal import Healed, Patient, heal

__all__ = ["Healed", "Patient", "heal"]
