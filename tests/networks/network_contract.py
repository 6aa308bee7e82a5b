"""What every network promises. A network's test class inherits `NetworkContract` and says how to build a small one."""

from __future__ import annotations

import copy
import io
from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import DataError

IN_CHANNELS = 2
NUM_CLASSES = 3
SIZES = [(1, 1, 1), (5, 17, 33), (16, 32, 16), (13, 9, 30)]


def swap_depth_and_width(network: nn.Module) -> nn.Module:
    """Return a copy whose convolution kernels have their first and last spatial axes exchanged."""
    swapped = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in swapped.parameters():
            if parameter.ndim == 5:
                parameter.copy_(parameter.transpose(2, 4).clone())
    return swapped


class NetworkContract(ABC):
    """Tests that every network passes; sizes are never cubes where it matters."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a small network of IN_CHANNELS channels and NUM_CLASSES classes."""

    @pytest.fixture
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = self.build()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                # Initial GRN weights, biases and norms are 0 or 1, which would hide that they are swapped or unused.
                parameter.add_(0.1 * torch.randn(parameter.shape))
                assert torch.isfinite(parameter).all(), name
        return network.eval()

    @staticmethod
    def image(*sizes: int, batch: int = 1) -> Tensor:
        return torch.randn(batch, IN_CHANNELS, *sizes, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_output_has_the_input_size_in_eval_mode(
        self, network: nn.Module, sizes: tuple[int, int, int], batch: int
    ) -> None:
        with torch.inference_mode():
            logits = network(self.image(*sizes, batch=batch))
        assert isinstance(logits, Tensor)
        assert logits.shape == (batch, NUM_CLASSES, *sizes)
        assert logits.is_contiguous()
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("batch", [1, 2])
    def test_every_parameter_learns_in_train_mode(
        self, network: nn.Module, sizes: tuple[int, int, int], batch: int
    ) -> None:
        network.train()
        scales = network.multiscale(self.image(*sizes, batch=batch))
        for scale, logits in enumerate(scales):
            assert logits.shape == (batch, NUM_CLASSES, *(-(-size // 2**scale) for size in sizes))
        sum(logits.square().mean() for logits in scales).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    def test_forward_is_the_first_scale_or_in_training_all(self, network: nn.Module) -> None:
        image = self.image(16, 32, 16)
        with torch.inference_mode():
            assert torch.equal(network(image), network.multiscale(image)[0])
        network.train()
        output = network(image)
        scales = output if isinstance(output, list) else [output]
        assert len(scales) == len(network.multiscale(image))
        assert isinstance(output, list) == network.deep_supervision

    def test_repeats_bit_for_bit_and_leaves_the_input_alone(self, network: nn.Module) -> None:
        image = self.image(17, 20, 33)
        before = image.clone()
        with torch.inference_mode():
            assert torch.equal(network(image), network(image))
        assert torch.equal(image, before)

    def test_cases_of_a_batch_do_not_mix(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33, batch=2)
        with torch.inference_mode():
            together = network(image)
            apart = torch.cat([network(image[:1]), network(image[1:])])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)

    def test_memory_format_of_the_input_changes_nothing(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33)
        strided = image.transpose(2, 4).contiguous().transpose(2, 4)
        with torch.inference_mode():
            logits = network(image)
            assert torch.equal(network(image.contiguous(memory_format=torch.channels_last_3d)), logits)
            assert torch.equal(network(strided), logits)

    def test_swapped_axes_swap_the_output(self, network: nn.Module) -> None:
        network = network.double()
        image = self.image(16, 32, 48).double()
        with torch.inference_mode():
            logits = network(image)
            swapped = swap_depth_and_width(network)(image.transpose(2, 4).contiguous())
        torch.testing.assert_close(swapped.transpose(2, 4), logits, rtol=1e-9, atol=1e-10)
        assert not torch.allclose(logits, logits.flip(2))

    def test_survives_save_and_load(self, network: nn.Module) -> None:
        file = io.BytesIO()
        torch.save(network.state_dict(), file)
        file.seek(0)
        other = self.build().eval()
        image = self.image(16, 20, 17)
        with torch.inference_mode():
            assert not torch.equal(other(image), network(image))
            other.load_state_dict(torch.load(file, weights_only=True))
            assert torch.equal(other(image), network(image))

    def test_deep_copy_is_equal_and_independent(self, network: nn.Module) -> None:
        image = self.image(16, 20, 17)
        twin = copy.deepcopy(network)
        with torch.inference_mode():
            logits = network(image)
            assert torch.equal(twin(image), logits)
            for parameter in twin.parameters():
                parameter.mul_(2)
            assert torch.equal(network(image), logits)
            assert not torch.equal(twin(image), logits)

    def test_float64_agrees_with_float32(self, network: nn.Module) -> None:
        image = self.image(16, 20, 17)
        with torch.inference_mode():
            single = network(image)
            double = network.double()(image.double())
        assert double.dtype == torch.float64
        assert (double - single).abs().max() < 1e-4 * double.abs().max()

    def test_bfloat16_autocast_trains_and_stays_close(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33, batch=2)
        with torch.inference_mode():
            exact = network(image)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rough = network(image)
        assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
        network.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(logits.float().square().mean() for logits in network.multiscale(image))
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())

    def test_refuses_what_is_not_a_batch_of_its_channels(self, network: nn.Module) -> None:
        with pytest.raises(DataError, match="channels"):
            network(torch.zeros(1, IN_CHANNELS + 1, 16, 16, 16))
        with pytest.raises(DataError, match="4 axes"):
            network(torch.zeros(IN_CHANNELS, 16, 16, 16))
        with pytest.raises(DataError, match="empty"):
            network.multiscale(torch.zeros(1, IN_CHANNELS, 16, 0, 16))
        with pytest.raises(DataError, match="floating-point"):
            network(torch.zeros(1, IN_CHANNELS, 16, 16, 16, dtype=torch.int16))
