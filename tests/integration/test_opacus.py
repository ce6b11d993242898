"""opacus' private training, whose optimizer wraps texp.SGD."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.integration.training import (
    EXPONENTIAL,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    copied,
    fold,
    ids,
    loader,
    network,
)
from texp.integrations.wrapped import texp_sgd

opacus = pytest.importorskip("opacus", reason="opacus is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),  # as tests must have it
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # of torch, for the hook of the first layer
]


def trained(form: Form, noise: float, clip: float) -> dict[str, torch.Tensor]:
    model = network(nn.LayerNorm)  # a BatchNorm mixes the samples
    optimizer = form.optimizer(model)
    private, wrapped, batches = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader(), noise_multiplier=noise, max_grad_norm=clip,
        poisson_sampling=False, noise_generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(wrapped, T_max=20)
    torch.manual_seed(6)  # of the order of the batches
    for _ in range(5):
        for x, y in batches:
            wrapped.zero_grad()
            cross_entropy(private(x), y).backward()
            wrapped.step()
            schedule.step()
    fold(texp_sgd(wrapped) or wrapped)
    return copied(model)


@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_noise_and_clipping(form):
    form.check(trained(form, noise=0.5, clip=0.1), trained(TORCH, noise=0.5, clip=0.1))


def test_the_exponential_form():
    """With neither noise nor clipping, which know nothing of the scale of gradients at Pθ."""
    EXPONENTIAL.check(trained(EXPONENTIAL, noise=0.0, clip=1e9), trained(TORCH, noise=0.0, clip=1e9))
