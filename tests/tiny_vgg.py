"""A VGG in its frame that has two convolutions only; a plugin of the benchmarks."""

from torch import nn

from covcli.models.architectures import MODELS, Vgg, model

if "tiny-vgg" not in MODELS:

    @model("tiny-vgg")
    def tiny_vgg(classes: int, pretrained: bool) -> nn.Module:
        layers = [
            nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 512, 3, 2, 1), nn.ReLU(inplace=True),
        ]  # fmt: skip
        return Vgg(nn.Sequential(*layers), classes)
