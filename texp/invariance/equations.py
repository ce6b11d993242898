"""The equations that a scale-invariant set solves: their rank, their exact form, the largest set that solves them.

Unknowns: d_i for each of n parameters, 1 if it is in the set and 0 if not, and for each of K norms with running
statistics the power D_k of P with which its input grows.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from texp.invariance.probe import Row

Bounds = tuple[float | None, float | None]
FREE = (None, None)  # the bounds of an unknown power


class AuditError(RuntimeError):
    """The numbers do not say which parameters are scale-invariant; the message has them."""


class Equations:
    """Rows over n parameters and K norms, and what is needed to tell them from rounding errors."""

    def __init__(self, n: int, K: int, dtype: torch.dtype) -> None:
        self.n, self.K = n, K
        self.eps = torch.finfo(dtype).eps
        # Cosines below the first are rounding errors, those above the second are not; in float64 4e-10 and 5e-7.
        self.tol, self.clear = self.eps**0.6, self.eps**0.4
        self.rows: list[Row] = []

    def reached(self) -> list[int]:
        """For each parameter, how many rows have a gradient of it."""
        return torch.stack([row.sizes > 0 for row in self.rows]).sum(0).tolist()

    def effects(self) -> tuple[Tensor, Tensor]:
        """For each parameter, whether outputs depend on it, and whether running statistics do."""
        depends = torch.stack([row.sizes / row.sizes.max().clamp_min(1e-300) > self.tol for row in self.rows])
        of_output = torch.tensor([row.of_output for row in self.rows])
        return depends[of_output].any(0), depends[~of_output].any(0)

    def singular(self, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Singular values and right singular vectors of the first rows, or of all, and the units of their columns.

        A row is taken in units of its largest ‖p_i‖‖g_i‖, a column then in units of their root mean square: what is
        left are cosines between parameters and gradients, next to which rounding errors are a few ε.
        """
        rows = self.rows[:first]
        A = torch.stack([torch.cat([row.products, -row.degrees]) for row in rows])
        sizes = torch.stack([torch.cat([row.sizes, row.degrees.abs()]) for row in rows])
        largest = sizes.amax(1, keepdim=True).clamp_min(1e-300)
        units = (sizes / largest).square().mean(0).sqrt()
        units[units <= self.tol] = 1  # nothing depends on these, as far as can be told: not to be blown up
        _, s, V = torch.linalg.svd(A / largest / units, full_matrices=False)
        return s / math.sqrt(len(rows)), V, units

    def rank(self, first: int | None = None) -> int:
        return int((self.singular(first)[0] > self.tol).sum())

    def reduced(self) -> tuple[Tensor, float]:
        """The equations in reduced row echelon form, (rank, n + K), with their rounding errors cut off; the gap.

        Raises AuditError where a singular value is between what is rounding error and what is not.
        """
        s, V, units = self.singular()
        rank = int((s > self.tol).sum())
        kept = s[rank - 1].item() if rank else 1.0
        dropped = s[rank].item() if rank < len(s) else 0.0
        if kept < self.clear:
            raise AuditError(
                f"the rank of the equations is not clear: singular value {rank} of {len(s)} is {kept:.2e} and the "
                f"next {dropped:.2e}, where less than {self.tol:.1e} is rounding error and more than "
                f"{self.clear:.1e} is not. Does the forward pass, or this audit, use a lower precision than "
                "float64, or does a norm add an eps that is no attribute?"
            )
        # Reduced in the units in which rounding errors are small, then brought to those of d and D.
        reduced = _echelon(V[:rank], self.clear) * units
        reduced /= reduced.abs().amax(1, keepdim=True)
        return _exact(reduced, self.clear), kept / max(dropped, self.eps)


def largest(reduced: Tensor, sizes: list[int], bounds: list[Bounds], whole: bool = True) -> list[float]:
    """Maximises Σ sizes[i]·d_i with `reduced`·(d, D) = 0, over d_i in bounds, 0 or 1 (if `whole`) but where
    unbounded; returns d and D."""
    K = reduced.shape[1] - len(sizes)
    total = max(sum(sizes), 1)
    answer = scipy_optimize().linprog(
        [-size / total for size in sizes] + [0.0] * K,
        A_eq=reduced.numpy(),
        b_eq=[0.0] * len(reduced),
        bounds=[*bounds, *[FREE] * K],
        integrality=[int(whole and b != FREE) for b in bounds] + [0] * K,
        method="highs",
    )
    if not answer.success:
        raise AuditError(f"the integer programme of {len(sizes)} parameters was not solved: {answer.message}")
    return answer.x.tolist()


def parts(reduced: Tensor, chosen: list[bool], free: list[bool]) -> list[list[int]]:
    """Takes the chosen set apart into those that solve the equations alone, as indices."""
    S = [i for i, c in enumerate(chosen) if c]
    if not S:
        return []
    others = [i for i, f in enumerate(free) if f] + list(range(len(chosen), reduced.shape[1]))
    # First the unknown powers: the rows that are left without them are equations between parameters alone.
    ordered = _exact(_echelon(reduced[:, others + S], first=len(others)), 1e-6)
    between = ordered[(ordered[:, : len(others)] == 0).all(1), len(others) :]
    label = list(range(len(S)))
    for row in between:
        linked = {label[j] for j in row.nonzero().flatten().tolist()}
        label = [min(linked) if x in linked else x for x in label]
    return [[i for i, x in zip(S, label, strict=True) if x == part] for part in sorted(set(label))]


def _echelon(A: Tensor, noise: float = 1e-6, first: int = 0) -> Tensor:
    """Reduced row echelon form, without rows of less than `noise`; each pivot is the largest entry that is left, in
    the first `first` columns while they have any."""
    A = A.clone()
    for done in range(len(A)):
        left = A[done:].abs()
        if first and left[:, :first].max() > noise:
            left = left[:, :first]
        if left.max() <= noise:
            return A[:done]
        row, column = divmod(int(left.argmax()), left.shape[1])
        A[[done, done + row]] = A[[done + row, done]]
        A[done] /= A[done, column].item()
        factors = A[:, column].clone()
        factors[done] = 0
        A -= factors[:, None] * A[done]
    return A


def _exact(A: Tensor, noise: float) -> Tensor:
    """Coefficients without their rounding errors: powers of a scale are ratios of small integers."""
    exact = A.clone().apply_(lambda x: float(Fraction(x).limit_denominator(24)) if abs(x) > noise else 0.0)
    error = (A - exact).abs().max().item() if len(A) else 0.0
    if error > noise:
        raise AuditError(
            f"the equations are not clear: a coefficient is {error:.1e} from a ratio of small integers, where less "
            f"than {noise:.1e} is rounding error"
        )
    return exact


def scipy_optimize():
    try:
        from scipy import optimize
    except ImportError as error:
        why = "texp.audit solves an integer programme with scipy 1.9 or newer: pip install scipy"
        raise ImportError(why) from error
    return optimize
