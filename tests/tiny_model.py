"""A plugin: a network that places its own coverage layers, registered under a name."""

from torch import Tensor, nn

from covcli import CoverageLayer
from covcli.models.architectures import MODELS, model


class Tiny(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), CoverageLayer())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), CoverageLayer())
        self.head = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), CoverageLayer())
        self.last = nn.Linear(32, classes)
        self.pool = nn.AdaptiveAvgPool2d(4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.second(self.first(x))).flatten(1)
        return self.last(self.head(features))


if "tiny" not in MODELS:

    @model("tiny")
    def tiny(classes: int, pretrained: bool) -> nn.Module:
        return Tiny(classes)
