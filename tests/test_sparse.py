"""Sparse gradients."""

import pytest
import torch
from torch import nn

import texp
import texp.step.checks
from tests.conftest import relative_error, same_bits
from tests.states import assert_unchanged, param, snapshot


class TestSparse:
    def test_a_backend_that_is_named_does_not_fall_back(self):
        if (reason := texp.backends.available()["cpu"]) != "ok":
            pytest.skip(reason)
        dense, p = param(), self.table()
        dense.grad, p.grad = torch.ones_like(dense), self.grad(1)
        optimizer = texp.SGD([dense, p], lr=0.1, backend="cpu")
        before = snapshot(optimizer)
        with pytest.raises(
            RuntimeError, match=r"backend='cpu' was requested, .* of shape \(6, 3\) .* its gradient is not strided"
        ):
            optimizer.step()
        assert_unchanged(optimizer, before)

    ROWS = 6

    def grad(self, *rows: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.arange(1.0, 3 * len(rows) + 1, dtype=torch.float64).view(-1, 3) / scale
        return torch.sparse_coo_tensor([rows], values, (self.ROWS, 3), check_invariants=True)

    def table(self, device="cpu") -> nn.Parameter:
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(self.ROWS, 3, dtype=torch.float64).to(device))

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("nesterov", [False, True])
    def test_as_in_torch(self, general, momentum, nesterov):
        """Momentum is coalesced here, so that a row that is given twice is summed before it is rounded into the
        weights: 3 steps round at most 20 times, by at most half an ulp of numbers below 16."""
        tables = self.table(general.device), self.table(general.device)
        arguments = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
        optimizers = general.sgd([tables[0]], **arguments), torch.optim.SGD([tables[1]], **arguments)
        for rows in ((0, 2), (2, 3, 2), (5,)):
            for p, optimizer in zip(tables, optimizers, strict=True):
                p.grad = self.grad(*rows).to(general.device)
                optimizer.step()
        if momentum == 0:
            assert torch.equal(*tables)
        assert torch.allclose(*tables, rtol=0, atol=20 * 8 * torch.finfo(torch.float64).eps)

    def test_weight_decay_without_touching_rows_that_have_no_gradient(self, general):
        """The decay goes into P: a row without a gradient keeps its bits from step to step, except that the whole
        table is halved, exactly, whenever P passes 2. SGD with a dense decay is matched."""
        lr, decay = 0.1, 0.5
        p, q = self.table(general.device), self.table(general.device)
        ours = general.sgd([p], lr=lr, weight_decay=decay, scale_invariant=True)
        theirs = torch.optim.SGD([q], lr=lr, weight_decay=decay)
        for t in range(40):
            rows = (t % 3, 4)
            untouched = [row for row in range(self.ROWS) if row not in rows]
            before, exponent = p.detach().clone(), ours.param_groups[0]["scale_exponent"]
            p.grad = self.grad(*rows, scale=ours.param_groups[0]["scale"]).to(general.device)
            q.grad = self.grad(*rows).to_dense().to(general.device)
            ours.step()
            theirs.step()
            halved = 2.0 ** (exponent - ours.param_groups[0]["scale_exponent"])
            assert halved in (1.0, 0.5)
            assert same_bits(p[untouched], before[untouched] * halved)
        assert ours.param_groups[0]["scale_exponent"] >= 2
        ours.fold()
        assert relative_error(p, q) < 1e-13

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weight_decay": 0.1}, "need a scale_invariant group without momentum"),
            ({"weight_decay": 0.1, "momentum": 0.9, "scale_invariant": True}, "need a scale_invariant group without"),
            ({"weight_decay": 9.0, "scale_invariant": True}, r"at most 0\.5 .* lr = 0\.1, weight_decay = 9\.0"),
        ],
        ids=["ordinary", "momentum", "too strong"],
    )
    def test_other_weight_decay_is_refused_before_anything_changes(self, general, arguments, message):
        dense, p = param(device=general.device), self.table(general.device)
        dense.grad, p.grad = torch.ones_like(dense), self.grad(1).to(general.device)
        optimizer = general.sgd(
            [{"params": [dense], "scale_invariant": True, "weight_decay": 0.1}, {"params": [p], **arguments}], lr=0.1
        )
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"parameter group 1: .*{message}"):
            optimizer.step()
        assert_unchanged(optimizer, before)

    def test_a_row_that_would_make_a_table_dense_is_refused(self):
        hyper = texp.theory.Hyperparameters(0.1, scale_invariant=True)
        with pytest.raises(RuntimeError, match="no decay may be carried in the momentum"):
            texp.step.checks.check_sparse(0, hyper, texp.theory.Row(a_p=0.1))
        texp.step.checks.check_sparse(0, hyper, texp.theory.Row(a_g=1.0))

    def test_a_sparse_buffer_of_a_tensor_without_a_grad(self, general):
        """Its group begins to decay while it stands still: its momentum would become dense."""
        dense, p = param(device=general.device), self.table(general.device)
        optimizer = general.sgd([dense, p], lr=0.1, momentum=0.9, scale_invariant=True)
        dense.grad, p.grad = torch.ones_like(dense), self.grad(1)
        optimizer.step()
        p.grad = None
        optimizer.param_groups[0]["weight_decay"] = 0.1
        before = dense.detach().clone(), p.detach().clone()
        with pytest.raises(RuntimeError, match="sparse gradients with weight_decay"):
            optimizer.step()
        assert same_bits(dense, before[0])
        assert same_bits(p, before[1])
