"""Tables 1 (right), 3, 4 and 5, and Figure 2: the networks trained on Places2 (section 5.1)."""

from collections.abc import Mapping
from dataclasses import replace

from relaylab.recipes import windows
from relaylab.recipes.schema import (
    SCHEMES,
    UNMENTIONED,
    AugmentationConfig,
    Ensemble,
    EvaluationConfig,
    ImagesConfig,
    NetworkConfig,
    OptimizerConfig,
    PlanConfig,
    PlateauConfig,
    Recipe,
    ReportedErrors,
    Scheme,
    changed,
)

DENSE = EvaluationConfig(protocol="dense", scales=(224, 256, 320, 384, 448))
NOT_GIVEN = "ours: the paper mentions none"
SOURCES: Mapping[str, str] = {
    **dict.fromkeys(UNMENTIONED, NOT_GIVEN),
    "network": "the paper, section 5.1 and Table 2",
    "plan": "the paper, Table 2",
    "plan.auxiliary.aux.weight": "the paper, section 5.1",
    "plan.auxiliary.aux.head": "ours: the paper does not give its layers; GoogLeNet's, for maps of any size",
    "scheme": "the paper, Table 3",
    "images": "the paper, section 5.1",
    "augmentation": "the paper, section 5.1",
    "augmentation.colour_shift": "the paper, section 5.1, after AlexNet's",
    "augmentation.divide": NOT_GIVEN,
    "optimizer": "the paper, section 5.1",
    "optimizer.schedule.patience": "ours: the paper says 'when the error plateaus'",
    "optimizer.schedule.least": "ours: the paper does not state how often the rate falls",
    "optimizer.evaluate_every": "ours: the paper does not say",
    "loss": "ours: softmax, as usual; the paper does not say",
    "evaluation": "the paper, section 5.1",
}


def _places2(
    name: str,
    row: str,
    architecture: str,
    plan: PlanConfig,
    scheme: Scheme,
    reported: ReportedErrors,
    pyramid: tuple[int, ...] | None = (7, 3, 2, 1),
) -> Recipe:
    return Recipe(
        name=name,
        row=row,
        network=NetworkConfig(architecture=architecture, num_classes=401, image_size=224, width=64, pyramid=pyramid),
        plan=plan,
        scheme=scheme,
        images=ImagesConfig(data_set="Places2 challenge", short_side=256, sampling="class-aware"),
        augmentation=AugmentationConfig(),
        optimizer=OptimizerConfig(lr=0.01, weight_decay=0.0002, iterations=800_000, schedule=PlateauConfig(patience=8)),
        evaluation=EvaluationConfig(),
        reported=reported,
        sources=SOURCES,
    )


def _table3(letter: str, scheme: Scheme, top1: float, top5: float) -> Recipe:
    architecture = "model_a" if letter == "A" else "model_b"
    plan = windows.MODEL_A if letter == "A" else windows.MODEL_B
    name = f"table3-model-{letter.lower()}-{scheme.replace('_', '-')}"
    row = f"Table 3, model {letter}, {SCHEMES[scheme]}"
    recipe = _places2(name, row, architecture, plan, scheme, ReportedErrors(top1=top1, top5=top5))
    if letter == "A":
        filters = "the paper, section 5.1 (VGGNet-19 plus three layers); Table 2 prints 256 filters on 14x14 maps"
        recipe = replace(recipe, sources={**recipe.sources, "network.architecture": filters})
    return recipe


def _dense(recipe: Recipe, top1: float, top5: float) -> Recipe:
    name, row = recipe.name.replace("table3", "table4"), recipe.row.replace("Table 3", "Table 4")
    dense = changed(recipe, "the paper, section 5.1", {"evaluation": DENSE})
    return replace(dense, name=name, row=row, reported=ReportedErrors(top1=top1, top5=top5), trained_as=recipe.name)


def _table1(depth: int, top1: float, top5: float) -> Recipe:
    architecture = f"vgg{depth}"
    name, row = f"table1-vgg{depth}-places2", f"Table 1, VGGNet-{depth}, Places2"
    errors = ReportedErrors(top1=top1, top5=top5)
    recipe = _places2(name, row, architecture, windows.vgg(depth), "standard", errors, pyramid=None)
    sources = {
        **recipe.sources,
        "network": "the paper, Table 1 and [5]",
        "plan": "ours: as in Table 2 for model A; standard BP does not use it",
        "plan.auxiliary.aux.weight": "ours: as in section 5.1; standard BP does not use it",
        "scheme": "the paper, section 1",
        "optimizer": "ours: as in section 5.1, which describes it for models A and B",
        "evaluation": "ours: Table 1 does not say; its errors are like Table 4's and not like Table 3's",
    }
    if depth > 19:
        sources["network.architecture"] = "ours: the paper adds 3 and 6 layers to VGGNet-19, not where; as in model A"
    return replace(recipe, evaluation=DENSE, sources=sources)


def _enlarged(recipe: Recipe) -> Recipe:
    """On images of 320 pixels: the pyramid fits them, and 320 is a scale of section 5.1."""
    name, row = recipe.name.replace("table3", "table5") + "-320", recipe.row.replace("Table 3", "Table 5")
    dense = changed(recipe, "the paper, section 5.1", {"evaluation": DENSE})
    larger = changed(dense, "ours: a different input scale for Table 5", {
        "network.image_size": 320, "images.short_side": 366,
        "evaluation.scales": tuple(round(side * 320 / 224) for side in DENSE.scales),
    })  # fmt: skip
    return replace(larger, name=name, row=f"{row} at 320 pixels", reported=None)


def _printed(recipe: Recipe) -> Recipe:
    plain = changed(recipe, "the paper, Table 2 as printed", {"network.architecture": "model_a_printed"})
    name, row = "table5-model-a-printed-relay", "Table 5, model A as printed in Table 2, Relay BP"
    return replace(plain, name=name, row=row, reported=None, trained_as=None)


def _figure2(vgg19: Recipe) -> Recipe:
    """Two auxiliary losses; the paper shows the network and reports no errors."""
    recipe = replace(vgg19, name="figure2-vgg19-relay", row="Figure 2, VGGNet-19, Relay BP with two branches")
    recipe = changed(recipe, "the paper, Figure 2", {"plan": windows.vgg_figure_2(), "scheme": "relay"})
    sources = dict(recipe.sources)
    for name in recipe.plan.auxiliary:
        sources[f"plan.auxiliary.{name}.weight"] = "ours: as in section 5.1, which has one branch"
        sources[f"plan.auxiliary.{name}.head"] = SOURCES["plan.auxiliary.aux.head"]
    return replace(recipe, reported=None, sources=sources)


TABLE_1 = (_table1(19, 48.5, 17.1), _table1(22, 48.7, 17.2), _table1(25, 48.9, 17.4))
TABLE_3 = (
    _table3("A", "standard", 50.91, 19.00),
    _table3("A", "multi_loss", 50.72, 18.84),
    _table3("A", "relay", 49.75, 17.83),
    _table3("B", "standard", 50.62, 18.69),
    _table3("B", "multi_loss", 50.59, 18.68),
    _table3("B", "relay", 49.77, 17.86),
)
_ERRORS_OF_TABLE_4 = ((48.67, 17.19), (48.55, 17.05), (47.86, 16.33), (48.29, 16.89), (48.27, 16.89), (47.72, 16.36))
TABLE_4 = tuple(_dense(row, *errors) for row, errors in zip(TABLE_3, _ERRORS_OF_TABLE_4, strict=True))
ROWS: tuple[Recipe, ...] = (*TABLE_1, *TABLE_3, *TABLE_4, _figure2(TABLE_1[0]))

_A, _B = TABLE_3[2], TABLE_3[5]
ENSEMBLE = Ensemble(  # "five models of different architectures and input scales" (section 5.1)
    name="table5-ensemble",
    row="Table 5, WM (model ensemble)",
    members=(TABLE_4[2], TABLE_4[5], _enlarged(_A), _enlarged(_B), _printed(TABLE_4[2])),
    combine="product",
    reported=ReportedErrors(top5=16.87, split="test"),
    validation=ReportedErrors(top5=15.74),
    sources={
        "members": "ours: the paper says five models of different architectures and input scales, not which",
        "combine": "ILSVRC 2015's result page: product 16.87, learnt weights 16.87, mean 16.89",
    },
)
