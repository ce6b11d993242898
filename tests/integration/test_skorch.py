"""skorch's NeuralNetClassifier, which gives step() a closure."""

import pytest
import torch

import texp
from tests.integration.training import (
    ARGUMENTS,
    BATCH,
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    REFERENCE,
    TORCH,
    Form,
    copied,
    data,
    fold,
    ids,
    network,
)

skorch = pytest.importorskip("skorch", reason="skorch is not installed")
callbacks = pytest.importorskip("skorch.callbacks", reason="skorch is not installed")


class Net(skorch.NeuralNetClassifier):
    """Whose groups are those of `form`."""

    def get_params_for_optimizer(self, prefix, named_parameters):
        args, kwargs = super().get_params_for_optimizer(prefix, named_parameters)
        return ((self.form.groups(self.module_),) if self.form is EXPONENTIAL else args), kwargs


def made(form: Form, *, epochs: int = 5, extra=()) -> Net:
    options = {**ARGUMENTS, **form.options}
    schedule = callbacks.LRScheduler(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    net = Net(
        network, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.SGD if form is TORCH else texp.SGD,
        lr=options.pop("lr"), **{f"optimizer__{name}": value for name, value in options.items()}, max_epochs=epochs,
        batch_size=BATCH, train_split=None, iterator_train__shuffle=False, verbose=0,
        callbacks=[("schedule", schedule), *extra],
    )  # fmt: skip
    net.form = form
    return net


def weights(net: Net) -> dict[str, torch.Tensor]:
    fold(net.optimizer_)
    return copied(net.module_)


def arrays() -> tuple:
    inputs, labels = data().tensors
    return inputs.numpy(), labels.numpy()


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_fit(form):
    form.check(*(weights(made(f).fit(*arrays())) for f in (form, TORCH)))


@pytest.mark.parametrize("form", [REFERENCE, ORDINARY], ids=ids)
def test_clipped_gradients(form):
    clip = ("clip", callbacks.GradientNormClipping(0.1))
    found, expected = (weights(made(f, extra=[clip]).fit(*arrays())) for f in (form, TORCH))
    form.check(found, expected)
    with pytest.raises(AssertionError):  # that it clips
        form.check(found, weights(made(TORCH).fit(*arrays())))


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_checkpoint(form, tmp_path):
    """Of weights and optimizer, loaded into another net, which goes on."""
    results = []
    for f in (form, TORCH):
        saving = ("saving", callbacks.Checkpoint(dirname=tmp_path / f.name, monitor=None))
        made(f, epochs=3, extra=[saving]).fit(*arrays())
        net = made(f, epochs=2).initialize()
        net.load_params(checkpoint=saving[1])
        net.partial_fit(*arrays())
        results.append(weights(net))
    form.check(*results)
