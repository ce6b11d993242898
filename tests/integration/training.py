"""What is trained in every framework, by which optimizers, and how near the results must be to torch.optim.SGD's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import texp

ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}
FEATURES, CLASSES, SAMPLES, BATCH = 6, 3, 64, 16


def network(norm: type[nn.Module] = nn.BatchNorm1d, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Its first two layers are scale-invariant, to rounding: the eps of the norms is nothing beside any variance."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 8, bias=False), norm(8, eps=1e-30), nn.ReLU(),
        nn.Linear(8, 8), nn.LayerNorm(8, eps=1e-30), nn.ReLU(), nn.Linear(8, CLASSES),
    ).to(dtype)  # fmt: skip


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator).to(dtype)
    return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def loader(dtype: torch.dtype = torch.float64) -> DataLoader:
    return DataLoader(data(dtype), batch_size=BATCH)


def batches(epochs: int = 5, dtype: torch.dtype = torch.float64) -> Iterator[list[Tensor]]:
    for _ in range(epochs):
        yield from loader(dtype)


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    """For texp.param_groups."""
    return data(dtype).tensors[0][:BATCH]


@dataclass(frozen=True)
class Form:
    """How a model is trained, and how far from torch.optim.SGD it may end, relative to each tensor's norm (or to a
    thousandth of the largest).

    roundings: in units of the dtype's eps. In the runs here, of at most some tens of steps, a rounding is amplified
        less than a hundredfold, and a step makes one or two of its own.
    """

    name: str
    roundings: float
    groups: Callable[[nn.Module], Any]
    options: dict[str, Any]

    def optimizer(self, model: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
        options = {**ARGUMENTS, **self.options, **arguments}
        if self.name == "torch":
            return torch.optim.SGD(self.groups(model), **options)
        return texp.SGD(self.groups(model), **options)

    def check(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Two state dicts of a model, weights and running statistics."""
        assert found.keys() == expected.keys()
        # The bias of an attention's keys changes nothing, gets no gradient but rounding, and is nothing but rounding.
        negligible = 1e-3 * max(tensor.double().norm() for tensor in expected.values())
        for name, tensor in found.items():
            if self.roundings == 0 or not tensor.is_floating_point():
                assert torch.equal(tensor, expected[name]), name
            else:
                bound = self.roundings * torch.finfo(tensor.dtype).eps
                norm = max(expected[name].double().norm(), negligible)
                error = (tensor.double() - expected[name].double()).norm() / norm
                assert error <= bound, f"{name}: {error:.2g} > {bound:.2g}"

    def check_in_mixed_precision(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]
    ) -> None:
        """Activations rounded to eight or eleven bits are rounded otherwise for a weight that differs in its last
        bit, and for one at another scale. That may move the weights as far as mixed precision itself moves them.

        exact: the weights of torch.optim.SGD without mixed precision.
        """
        if self.roundings == 0:
            return self.check(found, expected)
        moved = distance(expected, exact)
        assert distance(found, expected) <= 2 * moved
        return None


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in b) ** 0.5


def _exponential(model: nn.Module) -> list[dict[str, Any]]:
    p = next(model.parameters())
    return texp.param_groups(model, example(p.dtype))


TORCH = Form("torch", 0, nn.Module.parameters, {})
REFERENCE = Form(
    "reference", 0, nn.Module.parameters, {"backend": "reference"}
)  # torch's operations, in torch's order
ORDINARY = Form("ordinary", 1024, nn.Module.parameters, {})  # rounded once a step, where torch rounds several times
EXPONENTIAL = Form("exponential", 16384, _exponential, {})

FORMS = [REFERENCE, ORDINARY, EXPONENTIAL]


def ids(form: Form) -> str:
    return form.name


def fold(optimizer: torch.optim.Optimizer) -> None:
    """Where it is a texp.SGD."""
    if isinstance(optimizer, texp.SGD):
        optimizer.fold()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
