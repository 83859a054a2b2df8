"""Tables 1 (left) and 6: the networks trained on ImageNet 2012 (section 5.2)."""

from collections.abc import Mapping
from dataclasses import replace

from relaylab.recipes import windows
from relaylab.recipes.schema import (
    UNMENTIONED,
    AugmentationConfig,
    DecayConfig,
    EvaluationConfig,
    ImagesConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    PlateauConfig,
    Recipe,
    ReportedErrors,
    Scheme,
)

CLASSES = 1000
IMAGES = ImagesConfig(data_set="ImageNet 2012", short_side=256, sampling="shuffled")
NAMES = "the paper, section 5.2: inception4a to 4d, in torchvision's names by our reading"
PATIENCE = "ours: the papers say 'when the error plateaus'"
NOT_GIVEN = "ours: no paper mentions it"
SHARED: Mapping[str, str] = {
    **dict.fromkeys(UNMENTIONED, NOT_GIVEN),
    "network": "the paper, section 5.2",
    "plan": "the paper, section 5.2",
    "scheme": "the paper, Table 6",
    "images": "the paper, section 5.2: no scale jitter",
    "images.data_set": "the paper, section 5.2",
    "images.sampling": "ours: ImageNet's classes are nearly balanced, and no paper says otherwise",
    "augmentation.divide": NOT_GIVEN,
    "loss": "ours: softmax, as usual; the paper does not say",
    "optimizer.evaluate_every": "ours: no paper says",
}


def _vgg(depth: int, top1: float, top5: float) -> Recipe:
    architecture = f"vgg{depth}"
    schedule = PlateauConfig(patience=4, least=0.001)
    return Recipe(
        name=f"table1-vgg{depth}-imagenet",
        row=f"Table 1, VGGNet-{depth}, ImageNet 2012",
        network=NetworkConfig(architecture=architecture, num_classes=CLASSES, image_size=224, width=64),
        plan=windows.vgg(depth),
        scheme="standard",
        images=IMAGES,
        augmentation=AugmentationConfig(mean="channel"),
        optimizer=OptimizerConfig(lr=0.01, weight_decay=0.0005, iterations=370_000, schedule=schedule),
        evaluation=EvaluationConfig(protocol="dense", scales=(224, 256, 288)),
        reported=ReportedErrors(top1=top1, top5=top5),
        sources={
            **SHARED,
            "network": "[5], configurations B, D and E",
            "plan": "ours: as in Table 2 for model A; standard BP does not use it",
            "scheme": "[5]",
            "images": "[5], section 3.1, S = 256",
            "augmentation": "[5], section 3.1",
            "optimizer": "[5], section 3.1",
            "optimizer.schedule.patience": PATIENCE,
            "optimizer.schedule.least": "[5], section 3.1: the rate fell three times",
            "evaluation": "[5], Table 4, whose errors Table 1 repeats",
        },
    )


def _resnet50(scheme: Scheme, method: str, top1: float, top5: float) -> Recipe:
    schedule = PlateauConfig(patience=6, least=0.0001)
    return Recipe(
        name=f"table6-resnet50-{scheme}",
        row=f"Table 6, ResNet-50, {method}",
        network=NetworkConfig(architecture="resnet50", num_classes=CLASSES, image_size=224),
        plan=windows.RESNET_50,
        scheme=scheme,
        images=IMAGES,
        augmentation=AugmentationConfig(),
        optimizer=OptimizerConfig(lr=0.1, weight_decay=0.0001, iterations=600_000, schedule=schedule),
        evaluation=EvaluationConfig(protocol="dense", scales=(224, 256, 384, 480, 640)),
        reported=ReportedErrors(top1=top1, top5=top5),
        sources={
            **SHARED,
            "plan.auxiliary.aux.head": "ours: its layers are not given; GoogLeNet's, with batch normalisation",
            "images.short_side": "ours: the least of [27]'s scales, since the paper leaves scale jitter out",
            "augmentation": "[27], section 3.4",
            "optimizer": "[27], section 3.4",
            "optimizer.schedule.patience": PATIENCE,
            "optimizer.schedule.least": "ours: not given",
            "evaluation": "[27], section 3.4",
        },
    )


def _inception_v3(scheme: Scheme, name: str, method: str, top1: float, top5: float) -> Recipe:
    return Recipe(
        name=f"table6-inception-v3-{name}",
        row=f"Table 6, Inception-v3, {method}",
        network=NetworkConfig(architecture="inception_v3", num_classes=CLASSES, image_size=299),
        plan=windows.INCEPTION_V3,
        scheme=scheme,
        images=replace(IMAGES, short_side=342),
        augmentation=AugmentationConfig(mean="channel", divide=True, colour_shift=0.0),
        optimizer=OptimizerConfig(
            lr=0.045,
            weight_decay=0.00004,
            iterations=500_000,
            schedule=DecayConfig(factor=0.94, every=10_000),
            clip_norm=2.0,
        ),
        loss=LossConfig(label_smoothing=0.1),
        evaluation=EvaluationConfig(protocol="dense", scales=(299, 342, 384, 427, 512)),
        reported=ReportedErrors(top1=top1, top5=top5),
        sources={
            **SHARED,
            "network.image_size": "[26], section 6",
            "plan.primary.bottom": NAMES,
            "plan.auxiliary.aux.top": NAMES,
            "plan.auxiliary.aux.head": "[26], section 4, by torchvision; 'standard BP' trains it too",
            "scheme": "the paper, section 5.2: Inception-v3 carries an auxiliary loss already",
            "images.short_side": "ours: not given; 299 / 0.875",
            "augmentation": "ours: [26] gives none",
            "augmentation.flip": "ours: [26] gives none; [25]'s",
            "optimizer": "ours: [26] trains with RMSProp, the paper with 'standard SGD' and no more said",
            "optimizer.lr": "[26], section 8, for RMSProp",
            "optimizer.iterations": "[26], section 8: 100 epochs",
            "optimizer.schedule": "[26], section 8: every two epochs",
            "loss.label_smoothing": "[26], section 7",
            "optimizer.clip_norm": "[26], section 8",
            "evaluation": "ours: [26] averages 144 crops; dense evaluation at five scales stands for them",
        },
    )


ROWS: tuple[Recipe, ...] = (
    _vgg(13, 28.2, 9.6),  # Table 1, where the paper repeats [5]
    _vgg(16, 26.6, 8.6),
    _vgg(19, 26.9, 8.7),
    _resnet50("standard", "standard BP (re-implement)", 21.17, 5.37),  # Table 6
    _resnet50("relay", "Relay BP", 20.26, 4.93),
    # "standard BP" keeps Inception-v3's own auxiliary loss, so that it is multi-loss here.
    _inception_v3("multi_loss", "standard", "standard BP (re-implement)", 19.18, 4.43),
    _inception_v3("relay", "relay", "Relay BP", 18.52, 3.97),
)
