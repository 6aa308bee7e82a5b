"""What every network promises. A network's test class inherits `NetworkContract` and says how to build a small one.

A 2D network sets `spatial_dims = 2`: sizes then lose their first axis. A network whose parameters know positions (a
table of biases, say) extends `swap`. The promises about graphs (compile, export, ONNX) are in `network_graphs.py`.
"""

from __future__ import annotations

import copy
import io
from abc import abstractmethod
from collections.abc import Iterator

import pytest
import torch
from network_graphs import IN_CHANNELS, NUM_CLASSES, GraphContract, assert_near, train_once
from torch import Tensor, nn

from sagittal.errors import DataError

__all__ = ["IN_CHANNELS", "NUM_CLASSES", "SIZES", "NetworkContract"]

SIZES = [(1, 1, 1), (5, 17, 33), (16, 32, 16), (13, 9, 30)]


class NetworkContract(GraphContract):
    """Tests that every network passes; sizes are never cubes where it matters."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return a small network of IN_CHANNELS channels and NUM_CLASSES classes."""

    def swap(self, network: nn.Module) -> nn.Module:
        """Return a copy whose convolution kernels have their first and last spatial axes exchanged."""
        swapped = copy.deepcopy(network)
        with torch.no_grad():
            for parameter in swapped.parameters():
                if parameter.ndim == self.spatial_dims + 2:
                    parameter.copy_(parameter.transpose(2, -1).clone())
        return swapped

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

    @pytest.fixture
    def deterministic(self) -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(2)  # one thread would always add up in the same order
        yield
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)

    def image(self, *sizes: int, batch: int = 1) -> Tensor:
        """Return a reproducible image of these sizes, without the first in 2D."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, IN_CHANNELS, *sizes[-self.spatial_dims :], generator=generator)

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_output_has_the_input_size_in_eval_mode(
        self, network: nn.Module, sizes: tuple[int, int, int], batch: int
    ) -> None:
        image = self.image(*sizes, batch=batch)
        with torch.inference_mode():
            logits = network(image)
        assert isinstance(logits, Tensor)
        assert logits.shape == (batch, NUM_CLASSES, *image.shape[2:])
        assert logits.is_contiguous()
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_every_parameter_learns_in_train_mode(
        self, network: nn.Module, sizes: tuple[int, int, int], batch: int
    ) -> None:
        network.train()
        image = self.image(*sizes, batch=batch)
        scales = network.multiscale(image)
        for scale, logits in enumerate(scales):
            assert logits.shape == (batch, NUM_CLASSES, *(-(-size // 2**scale) for size in image.shape[2:]))
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

    def test_inference_repeats_bit_for_bit_and_leaves_the_input_alone(self, network: nn.Module) -> None:
        image = self.image(17, 20, 33)
        before = image.clone()
        with torch.inference_mode():
            assert torch.equal(network(image), network(image))
        assert torch.equal(image, before)

    @pytest.mark.usefixtures("deterministic")
    def test_training_repeats_bit_for_bit(self, network: nn.Module) -> None:
        image = self.image(17, 20, 33, batch=2)
        network.train()
        first, second = (train_once(copy.deepcopy(network), image) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_cases_of_a_batch_do_not_mix(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33, batch=3)
        with torch.inference_mode():
            together = network(image)
            apart = torch.cat([network(case[None]) for case in image])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)

    def test_memory_format_of_the_input_changes_nothing(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33)
        strided = image.transpose(2, -1).contiguous().transpose(2, -1)
        with torch.inference_mode():
            logits = network(image)
            assert torch.equal(network(image.contiguous(memory_format=self.channels_last)), logits)
            assert torch.equal(network(strided), logits)

    def test_channels_last_weights_train_the_same(self, network: nn.Module) -> None:
        image = self.image(16, 20, 33, batch=2)
        network.train()
        expected = train_once(copy.deepcopy(network), image)
        assert_near(train_once(network.to(memory_format=self.channels_last), image), expected)

    @property
    def channels_last(self) -> torch.memory_format:
        """Return the memory format of this network's images in which the channels lie side by side."""
        return torch.channels_last_3d if self.spatial_dims == 3 else torch.channels_last

    @pytest.mark.parametrize(
        ("sizes", "dtype", "tolerance"), [((32, 64, 96), torch.float32, 1e-5), ((16, 32, 48), torch.float64, 1e-12)]
    )
    def test_swapped_axes_swap_the_output(
        self, network: nn.Module, sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float
    ) -> None:
        network = network.to(dtype)
        image = self.image(*sizes).to(dtype)
        with torch.inference_mode():
            logits = network(image)
            swapped = self.swap(network)(image.transpose(2, -1).contiguous())
        assert (swapped.transpose(2, -1) - logits).abs().max() < tolerance * logits.abs().max()
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
        sizes = (16,) * self.spatial_dims
        with pytest.raises(DataError, match="channels"):
            network(torch.zeros(1, IN_CHANNELS + 1, *sizes))
        with pytest.raises(DataError, match=f"{self.spatial_dims + 1} axes"):
            network(torch.zeros(IN_CHANNELS, *sizes))
        with pytest.raises(DataError, match="empty"):
            network.multiscale(torch.zeros(1, IN_CHANNELS, *sizes[1:], 0))
        with pytest.raises(DataError, match="floating-point"):
            network(torch.zeros(1, IN_CHANNELS, *sizes, dtype=torch.int16))
