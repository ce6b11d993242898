"""texp: SGD with momentum in the exponential-learning-rate form of Li & Arora (ICLR 2020)."""

from texp import backends, schedules, theory
from texp.optimizer import SGD

__all__ = ["SGD", "backends", "schedules", "theory"]
__version__ = "0.1.0"
