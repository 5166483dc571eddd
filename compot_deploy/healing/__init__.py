"""Healing: scales and norms of a compressed model tuned until it says again what the original says.

Integers stay as they are, and so do the bytes of the file. What is tuned is what is stored: float16 scales of grids, of
dictionaries and of codes, and vectors such as norm weights and biases in their own type.
"""

from compot_deploy.healing.cost import affordable_steps
from compot_deploy.healing.run import Course, Healed, Patient, heal
from compot_deploy.healing.texts import objection, split_texts

__all__ = ["Course", "Healed", "Patient", "affordable_steps", "heal", "objection", "split_texts"]
