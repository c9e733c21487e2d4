"""Adapt torchvision's ResNet-18 to images of 32 x 32."""

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

# The channels of torchvision's first stage. The other stages have multiples of it.
_WIDTH = 64


class CIFARResNet18(ResNet):
    """Build ResNet-18 with a 3x3 stem of stride 1, no max-pool, and any width.

    Four stages of two blocks have ``width``, 2, 4 and 8 times ``width`` channels, with 1x1 projection shortcuts. Every
    layer has PyTorch's default initialisation, not that of torchvision's ResNet.

    Args:
        classes: number of logits, at least 2.
        width: channels of the first stage, at least 1.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        # torchvision passes 64, 128, 256 and 512 planes for any stem.
        if planes == _WIDTH:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // _WIDTH, *args, **options)
