"""fastai's Learner, which changes lr and momentum at every step; in float32, since it cannot take another loss."""

import pytest
import torch
from torch import nn

import texp
from tests.integration.training import (
    ARGUMENTS,
    BATCH,
    EXPONENTIAL,
    FORMS,
    TORCH,
    Form,
    copied,
    data,
    fold,
    ids,
    network,
)

basics = pytest.importorskip("fastai.basics", reason="fastai is not installed")
pytest.importorskip("fastai.callback.schedule", reason="fastai is not installed")  # gives Learner its fit_one_cycle

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated")  # named among what may be loaded


def learner(form: Form, folder, **options) -> "basics.Learner":
    loaders = [basics.DataLoader(data(torch.float32), bs=BATCH, shuffle=False, num_workers=0) for _ in range(2)]

    def optimizer(groups, lr, **hyper):
        arguments = {**ARGUMENTS, **form.options, "lr": lr}
        if form is EXPONENTIAL:
            return basics.OptimWrapper(opt=texp.SGD(form.groups(model), **arguments))
        return basics.OptimWrapper(groups, torch.optim.SGD if form is TORCH else texp.SGD, **arguments)

    model = network(dtype=torch.float32)
    return basics.Learner(
        basics.DataLoaders(*loaders, device=torch.device("cpu")), model, nn.CrossEntropyLoss(), opt_func=optimizer,
        path=folder, train_bn=True, **options,
    )  # fmt: skip


def weights(this: "basics.Learner") -> dict[str, torch.Tensor]:
    fold(this.opt.opt)
    return copied(this.model)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_fit_one_cycle(form, tmp_path):
    results = []
    for f in (form, TORCH):
        this = learner(f, tmp_path)
        with this.no_bar(), this.no_logging():
            this.fit_one_cycle(5, 0.1)
        results.append(weights(this))
    form.check(*results)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_saved_and_loaded(form, tmp_path):
    """With its optimizer, into another learner, which goes on."""
    results = []
    for f in (form, TORCH):
        this = learner(f, tmp_path)
        with this.no_bar(), this.no_logging():
            this.fit(2, 0.1)
            path = this.save(f.name)
        this = learner(f, tmp_path)
        this.create_opt()
        this.load(f.name, with_opt=True)
        assert path.exists()
        with this.no_bar(), this.no_logging():
            this.fit(3, 0.05)
        results.append(weights(this))
    form.check(*results)
