"""The paper's networks, without their auxiliary heads, with modules in forward order."""

from relaylab.models.inception import inception_v3
from relaylab.models.model_a import model_a, model_a_printed
from relaylab.models.model_b import model_b
from relaylab.models.resnet import resnet50
from relaylab.models.small import small_vgg
from relaylab.models.vgg import vgg

__all__ = ["inception_v3", "model_a", "model_a_printed", "model_b", "resnet50", "small_vgg", "vgg"]
