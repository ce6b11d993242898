"""What the tests with other frameworks share: a torchvision that can be imported beside a torch for CPUs."""

import importlib
import importlib.util
import warnings

import pytest
import torch


def _import_torchvision() -> None:
    """timm and fastai import torchvision, and Lightning's torchmetrics does where there is one. PyPI's wheels are
    linked against a torch for GPUs; beside one for CPUs its operators cannot be loaded, and since two of them are
    given a meta function all the same, its import fails. With the two declared the import succeeds, and all that is
    in Python works."""
    for declared in (False, True):
        if declared:
            for name in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            if declared or "torchvision::nms does not exist" not in str(error):
                raise


if importlib.util.find_spec("torchvision") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of torch.jit
        _import_torchvision()


@pytest.fixture(autouse=True)
def _the_rounding_of_one_thread():
    """Frameworks set the number of threads; sums would be rounded otherwise in tests that come later."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
