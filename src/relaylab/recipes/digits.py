"""Our own rows, for demonstrations: a small VGG on handwritten digits, and on the user's photographs."""

from collections.abc import Mapping
from dataclasses import replace

from relaylab.recipes.schema import (
    UNMENTIONED,
    AugmentationConfig,
    AuxiliaryConfig,
    EvaluationConfig,
    ImagesConfig,
    NetworkConfig,
    OptimizerConfig,
    PlanConfig,
    PrimaryConfig,
    Recipe,
    StepsConfig,
    changed,
)

NOT_GIVEN = "ours: the paper mentions none"
SOURCES: Mapping[str, str] = {
    **dict.fromkeys(UNMENTIONED, NOT_GIVEN),
    "network": "ours: model A (the paper, Table 2) with fewer and narrower layers",
    "plan": "ours: as in Table 2 for model A, head and overlap at the last segment but one",
    "plan.auxiliary.aux.weight": "the paper, section 5.1",
    "plan.auxiliary.aux.head": "ours: the smallest head; GoogLeNet's has more weights than this whole network",
    "scheme": "ours: the paper's method",
    "images.data_set": "ours: scikit-learn's handwritten digits, installed with the lab",
    "images.short_side": "ours: the 8x8 digits with a margin of one pixel, so that crops shift",
    "images.sampling": "the paper, section 5.1",
    "images": "ours: all images",
    "augmentation.mean": "the paper, section 5.1",
    "augmentation.flip": "ours: a mirrored digit is another character",
    "augmentation.colour_shift": "ours: the digits are grey",
    "augmentation.crop": "the paper, section 5.1",
    "augmentation.divide": "ours: networks of any size then learn at the same rate",
    "optimizer": "the paper, section 5.1",
    "optimizer.lr": "ours: for a small network and few iterations",
    "optimizer.batch_size": "ours: for a CPU",
    "optimizer.iterations": "ours: 30 epochs of 31 batches",
    "optimizer.schedule": "ours: the paper divides by 10 when the error stops falling; fixed points need no patience",
    "optimizer.evaluate_every": "ours: once per epoch",
    "loss": "ours: softmax, as usual; the paper does not say",
    "evaluation": "the paper, section 5.1: single centre crop",
    "evaluation.scales": "ours: the size of the images",
}


def _plan(segment: str) -> PlanConfig:
    return PlanConfig(
        primary=PrimaryConfig(bottom=segment), auxiliary={"aux": AuxiliaryConfig(top=segment, head="linear")}
    )


DIGITS = Recipe(  # takes seconds to train
    name="digits",
    row="ours, handwritten digits",
    network=NetworkConfig(architecture="small_vgg", num_classes=10, image_size=8, width=32, convs=3),
    plan=_plan("segment2"),
    scheme="relay",
    images=ImagesConfig(data_set="digits", short_side=10, sampling="class-aware"),
    augmentation=AugmentationConfig(flip=False, colour_shift=0.0, divide=True),
    optimizer=OptimizerConfig(
        lr=0.02, weight_decay=0.0002, batch_size=32, iterations=930, schedule=StepsConfig(), evaluate_every=31
    ),
    evaluation=EvaluationConfig(scales=(10,)),
    sources=SOURCES,
)
_FOR_PHOTOS = "ours: for photographs on a CPU; classes and iterations as in 12 epochs of MiniPlaces"
_LARGER = changed(DIGITS, _FOR_PHOTOS, {
    "network.num_classes": 100, "network.image_size": 64, "network.width": 16, "network.convs": 2,
    "images.data_set": "any", "images.short_side": 72,
    "optimizer.lr": 0.01, "optimizer.batch_size": 64, "optimizer.iterations": 18_744,
    "optimizer.evaluate_every": 1_562, "evaluation.scales": (72,),
})  # fmt: skip
_COLOURED = changed(_LARGER, "the paper, section 5.1", {"augmentation.flip": True, "augmentation.colour_shift": 0.1})
PHOTOS = replace(_COLOURED, name="photos", row="ours, photographs", plan=_plan("segment4"))
ROWS: tuple[Recipe, ...] = (DIGITS, PHOTOS)
