"""Networks that people have, of torchvision, timm and our own, at their own input size.

How many points each has is counted in its paper's blocks.
"""

import pytest
import torch

from covcli.core.progress import Silent
from covcli.data.images import in_memory
from covcli.evaluation.explain import explain
from covcli.methods import make_method
from covcli.models import architectures
from covcli.models.architectures import ModelSpec, architecture
from covcli.models.sweep import sweep
from covcli.signature.fit import How, fit_judge, fit_signature
from covcli.signature.monitor import Monitor

# Points, and the shape of the first and the last.
POINTS = {
    "vgg19": (16 + 2, (64, 32, 32), (512,)),
    "vgg11": (8 + 2, (64, 32, 32), (512,)),
    "resnet18": (1 + 8 * 2, (64, 32, 32), (512, 4, 4)),
    "torchvision:resnet18": (1 + 8 * 2, (64, 112, 112), (512, 7, 7)),
    "torchvision:vit_b_16": (12 * 2, (197, 3072), (197, 768)),
    "torchvision:swin_t": (12 * 2, (56, 56, 384), (7, 7, 768)),
    "torchvision:convnext_tiny": (3 + 3 + 9 + 3, (56, 56, 384), (7, 7, 3072)),
    # Two to a block, one in the first stage, and one in each squeeze.
    "torchvision:efficientnet_b0": (1 + 15 * 2 + 1 + 16 + 1, (32, 112, 112), (1280, 7, 7)),
    "torchvision:mobilenet_v3_small": (1 + 10 * 2 + 1 + 9 + 1 + 1, (16, 112, 112), (1024,)),
    "torchvision:densenet121": (1 + 2 * (6 + 12 + 24 + 16) + 3 + 1, (64, 112, 112), (1024, 7, 7)),
    "torchvision:squeezenet1_1": (1 + 8 * 3 + 1, (64, 111, 111), (4, 13, 13)),
    "torchvision:googlenet": (3 + 9 * 6, (64, 112, 112), (128, 7, 7)),
    "torchvision:inception_v3": (94, (32, 149, 149), (192, 8, 8)),  # every convolution has one
    "torchvision:regnet_y_400mf": (1 + 16 * 4, (32, 112, 112), (440, 7, 7)),
    "timm:resnet18": (1 + 8 * 2, (64, 112, 112), (512, 7, 7)),
    "timm:vit_tiny_patch16_224": (12 * 2, (197, 768), (197, 192)),
    "timm:convnextv2_atto": (2 + 2 + 6 + 2, (160, 56, 56), (1280, 7, 7)),
    "timm:mobilenetv4_conv_small": (30, (32, 112, 112), (1280, 1, 1)),
}
SMALL = ["timm:mobilenetv4_conv_small", "torchvision:mobilenet_v3_small", "timm:convnextv2_atto"]


def network(name: str) -> architectures.Classifier:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    known = architecture(name)
    torch.manual_seed(0)
    return architectures.build(
        ModelSpec(name, 4, known.shape, *known.statistics, preprocess=known.shape.preprocess)
    )


@pytest.mark.parametrize("name", POINTS)
def test_what_is_watched_of_a_network(name: str) -> None:
    chosen = network(name).survey("channel").choose()
    count, first, last = POINTS[name]
    assert len(chosen) == len({c.point.name for c in chosen}) == count
    assert (chosen[0].shape, chosen[-1].shape) == (first, last)
    for each in chosen:
        channels = each.shape[each.point.channel_dim - (each.point.channel_dim > 0)]
        assert each.point.neurons == channels * (2 if len(each.shape) > 1 else 1)


def settled(model: architectures.Classifier, images: torch.Tensor) -> architectures.Classifier:
    """Let a network of random weights normalise by statistics of images, as a trained one does."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_signed_scored_and_explained_at_its_own_size(name: str) -> None:
    model = network(name)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (56, *model.spec.shape), generator=generator)
    pixels = (pixels * torch.rand(56, 3, 1, 1, generator=generator)).to(torch.uint8)
    settled(model, pixels[:16] / 255)
    unlabelled = in_memory("noise", pixels, None, ready=True)
    swept = sweep(model, unlabelled, [], "channel", Silent(), "")
    predicted = torch.cat([batch.logits.argmax(1) for batch in swept])
    images = in_memory("noise", pixels, predicted, ready=True)
    trusted, held_out = images.select(torch.arange(24)), images.select(torch.arange(24, 56))
    how = How(make_method("src"), threshold=0.0)
    signature, _, accuracy = fit_signature(model, trusted, how, Silent())
    assert accuracy > 0.9
    monitor = Monitor(fit_judge(model, signature, held_out, Silent()))
    alone = torch.cat([monitor(image[None]).score for image in pixels[:3]])
    torch.testing.assert_close(monitor(pixels[:3]).score, alone, rtol=1e-2, atol=1e-2)
    black = in_memory("black", torch.zeros_like(pixels[:1]), None, ready=True)
    usual = int(predicted[:24].bincount().argmax())  # a class of some images
    row = predicted[:24].tolist().index(usual)
    inside, outside = explain(monitor.judge, trusted, [row]) + explain(monitor.judge, black, [0])
    assert len(inside.points) == len(outside.points) == POINTS[name][0]
    left = [sum(point.left for point in each.points) for each in (inside, outside)]
    assert 2 * left[0] < left[1]
