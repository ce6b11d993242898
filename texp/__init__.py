"""texp: SGD with momentum in the exponential-learning-rate form of Li & Arora (ICLR 2020)."""

from texp import backends, schedules, theory
from texp.clipping import clip_grad_norm_
from texp.invariance.audit import Audit, audit, param_groups
from texp.invariance.equations import AuditError
from texp.lars import LARS
from texp.sgd import SGD
from texp.step.norm_stats import NormStat

__all__ = [
    "LARS",
    "SGD",
    "Audit",
    "AuditError",
    "NormStat",
    "audit",
    "backends",
    "clip_grad_norm_",
    "param_groups",
    "schedules",
    "theory",
]
__version__ = "0.1.0"
