"""What the host holds of the state that a step on the device advances; here with the CPU as the device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import texp
from texp.step.device_state import DeviceScaleState
from texp.step.groups import check_step

core = texp.backends.core()


class TestDeviceScaleState:
    def make(self):
        params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
        optimizer = texp.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, momentum=0.9)
        optimizer.param_groups[0].update(scale=1.5, scale_exponent=7, carried_decay=0.25)
        for p in params[:2]:
            optimizer.state[p]["momentum_buffer"] = torch.ones(2)
        return optimizer, params, DeviceScaleState(optimizer.param_groups, optimizer.state, torch.device("cpu"))

    def step(self, optimizer, params, device):
        """The second group advances, its parameter starts; the third parameter of the first was skipped."""
        for p in params[2:]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros(2)
        device.scales[1, 0], device.scales.view(torch.int64)[1, 2] = 1.25, 1
        device.momentum_initialized[3] = 1

    def test_holds_what_the_host_knows(self):
        _, _, device = self.make()
        assert device.scales[0, :2].tolist() == [1.5, 0.25]
        assert device.scales.view(torch.int64)[:, 2:].tolist() == [[7, 1], [0, 0]]
        assert device.momentum_initialized.tolist() == [1, 1, 0, 0]

    def test_is_read_back(self):
        optimizer, params, device = self.make()
        self.step(optimizer, params, device)
        device.read_back(optimizer.state)
        first, second = optimizer.param_groups
        assert (first["scale"], first["scale_exponent"], first["carried_decay"]) == (1.5, 7, 0.25)
        assert (second["scale"], second["scale_exponent"], second["carried_decay"]) == (1.25, 1, 0.0)
        assert [p in optimizer.state for p in params] == [True, True, False, True]
        device.restore(optimizer.state)
        assert all(p in optimizer.state for p in params)
        assert device.is_of(optimizer.param_groups)

    def test_is_written_in_place(self):
        optimizer, params, device = self.make()
        at = device.scales.data_ptr(), device.momentum_initialized.data_ptr()
        self.step(optimizer, params, device)
        optimizer._device = device
        optimizer.fold()
        assert (device.scales.data_ptr(), device.momentum_initialized.data_ptr()) == at
        assert device.scales[:, :2].tolist() == [[1.0, 0.0], [1.0, 0.0]]
        assert device.momentum_initialized.tolist() == [1, 1, 0, 1]

    @pytest.mark.skipif(core is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}")
    @pytest.mark.parametrize("change", ["parameter", "exchanged", "group", "flag", "scale", "exponent", "kappa"])
    def test_sees_what_changes_on_the_host(self, change):
        """At the next step, which is then not taken."""
        optimizer, params, device = self.make()
        launches = []
        launcher = SimpleNamespace(step_on_device=lambda version, *_: launches.append(version))
        stepper = core.Stepper(check_scale=check_step, current_stream=None, cpu=launcher, cuda=False)
        groups, params[0].grad = list(optimizer.param_groups), torch.ones(2)

        def step():
            return stepper.step_on_device(groups, {}, optimizer.state, None, device, None, None, False, None)

        assert step() is None
        assert step() is None
        assert len(launches) == 2
        assert launches[0] == launches[1]  # the same tables
        if change == "parameter":
            groups[0]["params"].append(nn.Parameter(torch.ones(1)))
        elif change == "exchanged":
            groups[1]["params"] = [nn.Parameter(torch.ones(2))]
        elif change == "group":
            groups.pop()
        elif change == "flag":
            groups[0]["scale_invariant"] = True
        else:
            key, value = {
                "scale": ("scale", 1.75),
                "exponent": ("scale_exponent", 8),
                "kappa": ("carried_decay", 0.5),
            }[change]
            groups[0][key] = value
            device.scales[0, 0] = 1.875
        assert step() is False
        assert len(launches) == 2
        assert device.is_of(groups) == (change in ("parameter", "exchanged"))  # which P does not depend on
        if change == "scale":
            device.read_back(optimizer.state)
            assert groups[0]["scale"] == 1.75  # what somebody has set is not lost
