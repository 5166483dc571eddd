"""Work that is divided: the same function of many inputs, in this process or on the machines of a Ray cluster.

Whoever divides work knows `Workers` alone. What is divided is a pure function of values that can be sent, its results
come in the order of its inputs, and each is computed with as many threads of torch as this process has: so the result
is bit for bit the same, whoever computes it.
"""

from compot_deploy.cluster.workers import ALONE, Alone, Workers

__all__ = ["ALONE", "Alone", "Workers"]
