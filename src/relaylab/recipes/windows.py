"""The paper's plans, in terms of the networks' module names."""

from itertools import accumulate

from relaylab.recipes.schema import VGG_CONVOLUTIONS, AuxiliaryConfig, PlanConfig, PrimaryConfig

# Table 2: both losses train the layers on 28x28 maps, and the auxiliary classifier follows their pooling.
MODEL_A = PlanConfig(primary=PrimaryConfig(bottom="segment4"), auxiliary={"aux": AuxiliaryConfig(top="segment4")})
MODEL_B = PlanConfig(primary=PrimaryConfig(bottom="segment3"), auxiliary={"aux": AuxiliaryConfig(top="segment3")})

# Section 5.2: both losses train conv4.1 to conv4.4.
RESNET_50 = PlanConfig(primary=PrimaryConfig(bottom="layer3.0"), auxiliary={"aux": AuxiliaryConfig(top="layer3.3")})

# Section 5.2: both losses train inception4a to inception4d. In GoogLeNet's naming, Mixed_6a, which reduces the map,
# ends the previous stage. The head is Inception-v3's own.
INCEPTION_V3 = PlanConfig(
    primary=PrimaryConfig(bottom="Mixed_6b"),
    auxiliary={"aux": AuxiliaryConfig(top="Mixed_6e", head="inception")},
)


def vgg(depth: int) -> PlanConfig:
    """Return Table 2's plan for model A on a plain VGGNet: both losses train the layers on 28x28 maps."""
    pools = _pools(depth)
    return PlanConfig(primary=PrimaryConfig(after=pools[2]), auxiliary={"aux": AuxiliaryConfig(top=pools[3])})


def vgg_figure_2(depth: int = 19) -> PlanConfig:
    """Return Figure 2's plan: two auxiliary losses train segments 1 to 3 and 3 to 4, the primary loss 4 to 5."""
    pools = _pools(depth)
    auxiliary = {"aux1": AuxiliaryConfig(top=pools[2]), "aux2": AuxiliaryConfig(after=pools[1], top=pools[3])}
    return PlanConfig(primary=PrimaryConfig(after=pools[2]), auxiliary=auxiliary)


def _pools(depth: int) -> list[str]:
    """Return the modules that end a VGGNet's segments: a ReLU follows each convolution, a pooling each segment."""
    ends = accumulate(2 * count + 1 for count in VGG_CONVOLUTIONS[depth])
    return [f"features.{end - 1}" for end in ends]
