"""The paper's windows, by the names of the networks' modules."""

from relaylab.recipes.schema import VGG_CONVOLUTIONS, AuxiliaryConfig, PlanConfig, PrimaryConfig

# Table 2: both losses train the layers on 28x28 maps, and the auxiliary classifier stands behind their pooling.
MODEL_A = PlanConfig(primary=PrimaryConfig(bottom="segment4"), auxiliary={"aux": AuxiliaryConfig(top="segment4")})
MODEL_B = PlanConfig(primary=PrimaryConfig(bottom="segment3"), auxiliary={"aux": AuxiliaryConfig(top="segment3")})

# Section 5.2: both losses train conv4.1 to conv4.4.
RESNET_50 = PlanConfig(primary=PrimaryConfig(bottom="layer3.0"), auxiliary={"aux": AuxiliaryConfig(top="layer3.3")})

# Section 5.2: both losses train inception4a to inception4d. GoogLeNet's way of naming puts the module that shrinks the
# map, Mixed_6a, at the end of the stage before; the head is Inception-v3's own.
INCEPTION_V3 = PlanConfig(
    primary=PrimaryConfig(bottom="Mixed_6b"),
    auxiliary={"aux": AuxiliaryConfig(top="Mixed_6e", head="inception")},
)


def vgg(depth: int) -> PlanConfig:
    """For a plain VGGNet, what Table 2 has for model A: both losses train the layers on 28x28 maps."""
    pools = _pools(depth)
    return PlanConfig(primary=PrimaryConfig(above=pools[2]), auxiliary={"aux": AuxiliaryConfig(top=pools[3])})


def vgg_figure_2(depth: int = 19) -> PlanConfig:
    """Figure 2: two auxiliary losses train segments 1 to 3 and 3 to 4, the primary loss 4 to 5."""
    pools = _pools(depth)
    return PlanConfig(
        primary=PrimaryConfig(above=pools[2]),
        auxiliary={
            "aux1": AuxiliaryConfig(top=pools[2]),
            "aux2": AuxiliaryConfig(above=pools[1], top=pools[3]),
        },
    )


def _pools(depth: int) -> list[str]:
    """The modules that end a VGGNet's segments: each convolution is followed by a ReLU, each segment by a pooling."""
    names: list[str] = []
    at = -1
    for count in VGG_CONVOLUTIONS[depth]:
        at += 2 * count + 1
        names.append(f"features.{at}")
    return names
