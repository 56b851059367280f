"""Training on a task: float models, and the codebooks of quantized ones.

``trainer`` needs the packages of the extra ``tasks``: it is imported where it is used.
"""

from lexibit.training.grid import best_of
from lexibit.training.settings import Settings

__all__ = ["Settings", "best_of"]
