"""The network is torchvision's ResNet-18 with another stem.

Its layers are initialised by PyTorch's defaults.
"""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from ars2.param_groups import assign
from modules.cifar_resnet import CIFARResNet18


def test_logits_are_those_of_torchvisions_resnet18_with_the_stem_replaced() -> None:
    torch.manual_seed(0)
    reference = resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()  # type: ignore[assignment]
    network = CIFARResNet18()
    reference.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), reference(images))


def test_full_width_has_the_published_number_of_parameters_and_a_map_of_four_by_four() -> None:
    network = CIFARResNet18()
    assert sum(param.numel() for param in network.parameters()) == 11_173_962
    shapes: list[torch.Size] = []
    network.avgpool.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    network(torch.randn(1, 3, 32, 32))
    assert shapes == [(1, 512, 4, 4)]


@pytest.mark.parametrize("width", [1, 3, 8])
def test_stages_are_multiples_of_the_width(width: int) -> None:
    network = CIFARResNet18(classes=7, width=width)
    channels = [
        stage[-1].bn2.num_features for stage in (network.layer1, network.layer2, network.layer3, network.layer4)
    ]
    assert channels == [width, 2 * width, 4 * width, 8 * width]
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_layers_are_initialised_as_pytorch_does_by_default() -> None:
    """Weights are uniform within 1/sqrt(inputs); BatchNorm starts at 1 and 0.

    torchvision's ResNet draws normal numbers.
    """
    torch.manual_seed(0)
    network = CIFARResNet18(width=32)
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound, name
            # Five standard errors of the deviation of a uniform sample.
            expected = bound / 3**0.5
            assert abs(module.weight.std() / expected - 1) < 5 * (0.2 / module.weight.numel()) ** 0.5 + 1e-6, name
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and not module.bias.any(), name


def test_the_classifier_is_the_output_head() -> None:
    network = CIFARResNet18(width=4)
    roles = {item.name: item.role for item in assign(network)}
    assert roles["fc.weight"] == "output head"
    assert {roles[name] for name in roles if "conv" in name or "downsample.0" in name} == {"convolution"}


@pytest.mark.parametrize("options", [{"classes": 1}, {"width": 0}])
def test_sizes_out_of_range_are_refused_by_name(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
        CIFARResNet18(**options)
