"""Generate a short program with the network, plan, heads and optimizer of a recipe, for custom training loops."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.inception import InceptionAux

from relaybackprop.heads import AuxiliaryHead, LinearHead, TokenHead
from relaylab.models.building import AUTO, build_relay
from relaylab.recipes.schema import LossConfig, NetworkConfig, OptimizerConfig, PlanConfig, Recipe, ends_of

CODE = "relay.py"  # file in the folder of a comparison

OTHER_IMPORTS = {  # of heads that are not in relaybackprop
    "InceptionAux": "from torchvision.models.inception import InceptionAux",
    "build_head": "from relaylab.models.building import build_head",
}


def snippet(recipe: Recipe) -> str:
    """Return a program that builds the network, plan, heads and optimizer of a recipe, and makes one update.

    The program runs as is, on random images. It omits augmentation, schedule, clipping, class weights, weight averages,
    and per-parameter learning rates and weight decays.
    """
    config, size = recipe.network, recipe.network.image_size
    imports, network = _network(config)
    if config.pretrained:
        imports = ["from relaylab.models.pretrained import load_pretrained", *imports]
        network.append(f"load_pretrained(model, Path({_text(config.pretrained)}))")
    head_imports, heads = _heads(recipe)
    loss_imports, loss = _loss(recipe.loss)
    method = {"multi_loss": ".multi_loss()", "isolated": ".isolated()"}.get(recipe.scheme, "")
    names = sorted({"Plan", "Relay", "RelayLoss", "Window", *head_imports})
    gains = [("model", config.gain), *((f'heads["{name}"]', own.gain) for name, own in recipe.plan.auxiliary.items())]
    gain_lines = [f'set_gain({module}, "{gain}", {config.num_classes})' for module, gain in gains if gain is not None]
    if gain_lines:
        imports = [*imports, "from relaylab.models.layers import set_gain"]
    lines = [
        *(["import sys"] if "" in imports else []),
        *(["from pathlib import Path"] if config.pretrained else []),
        *([""] if "" in imports or config.pretrained else []),
        "import torch",
        f"from relaybackprop import {', '.join(names)}",
        "from torch import nn",
        *(line for name, line in OTHER_IMPORTS.items() if name in "".join(heads)),
        *loss_imports,
        *imports,
        "",
        *network,
        f"example = torch.randn(2, 3, {size}, {size})  # a batch of your images",
        f"plan = {_plan(recipe.plan)}{method}",
        *heads,
        *gain_lines,
        "relay = Relay(model, plan, heads)",
        f"criterion = RelayLoss({loss})",
        *([] if recipe.optimizer.decay_norms_and_biases else ["# The run had no weight decay on norms and biases."]),
        f"optimizer = {_optimizer(recipe.optimizer)}",
        "",
        f"images, labels = example, torch.randint({config.num_classes}, (2,))  # in your loop: each batch",
        "loss = criterion(relay(images), labels)",
        "loss.backward()",
        "optimizer.step()",
        "optimizer.zero_grad()",
        "",
        "model.eval()  # after training: your network, without the heads",
    ]
    return "\n".join([*lines, ""])


def _network(config: NetworkConfig) -> tuple[list[str], list[str]]:
    """Return the imports and lines that build the network."""
    module, _, name = config.architecture.rpartition(":")
    options = "".join(f", {key}={_text(value)}" for key, value in config.options.items())
    match module:
        case "timm":
            return ["import timm"], [f'model = timm.create_model("{name}", num_classes={config.num_classes}{options})']
        case "torchvision":
            call = f'models.get_model("{name}", num_classes={config.num_classes}{options})'
            return ["from torchvision import models"], [f"model = {call}"]
        case "":
            given = ("width", "convs", "pyramid")
            options = "".join(f", {key}={_text(value)}" for key in given if (value := getattr(config, key)) is not None)
            call = (
                f'NETWORKS["{name}"].build(num_classes={config.num_classes}, image_size={config.image_size}{options})'
            )
            return ["from relaylab.models.building import NETWORKS"], [f"model = {call}"]
        case _ if module.endswith(".py"):
            path = Path(module)
            lines = ["", f"sys.path.insert(0, {_text(str(path.parent))})", f"from {path.stem} import {name}"]
            if not path.stem.isidentifier():
                lines[-1] = f"{name} = import_module({_text(path.stem)}).{name}"
                lines.insert(0, "from importlib import import_module")
        case _:
            lines = [f"from {module} import {name}"]
    return lines, [f"model = {name}(num_classes={config.num_classes}{options})"]


def _plan(plan: PlanConfig) -> str:
    auxiliary = (
        f'"{name}": Window({_ends(window.bottom, window.after, window.top)}, weight={window.weight:g})'
        for name, window in plan.auxiliary.items()
    )
    return f"Plan(Window({_ends(plan.primary.bottom, plan.primary.after)}), {{{', '.join(auxiliary)}}})"


def _ends(bottom: str | None, after: str | None, top: str | None = None) -> str:
    """Format the arguments of a window; several names form a tuple."""
    parts = [f"top={_text(top)}"] if top else []
    parts += [f"bottom={_text(bottom)}"] if bottom else []
    parts += [f"after={_text(ends_of(after))}"] if after else []
    return ", ".join(parts)


def _heads(recipe: Recipe) -> tuple[set[str], list[str]]:
    """Return the imports and lines that build the heads."""
    classes, auxiliary = recipe.network.num_classes, recipe.plan.auxiliary
    if all(window.head == AUTO for window in auxiliary.values()):
        return {"head_for"}, [f"heads = head_for(model, plan, example, num_classes={classes})"]
    heads = {name: _call(head, classes) for name, head in build_relay(recipe, on_meta=True).heads.items()}
    imports = {call.partition("(")[0] for call in heads.values()} - {*OTHER_IMPORTS}
    pairs = (f'"{name}": {call}' for name, call in heads.items())
    return imports, [f"heads = {{{', '.join(pairs)}}}"]


def _call(head: nn.Module, classes: int) -> str:
    """Return the call that builds an equal head."""
    match head:
        case LinearHead():
            return f"LinearHead({head.channels}, {classes})"
        case AuxiliaryHead():
            norm = ", batch_norm=True" if isinstance(head.norm, nn.BatchNorm2d) else ""
            return f"AuxiliaryHead({head.channels}, {classes}{norm})"
        case nn.Sequential():  # the recipes' head "conv"
            convolution = head.get_submodule("conv")
            shape, batch_norm = (convolution.in_channels, 1, 1), isinstance(head.get_submodule("norm"), nn.BatchNorm2d)
            return f'build_head("conv", {shape}, {classes}, batch_norm={batch_norm})'
        case TokenHead():
            return f"TokenHead({head.channels}, {classes}, pool={_text(head.pool)})"
        case _:
            assert isinstance(head, InceptionAux)
            return f"InceptionAux({head.conv0.conv.in_channels}, {classes})"  # pyright: ignore


def _loss(config: LossConfig) -> tuple[list[str], str]:
    """Return the imports and the call that builds the criterion."""
    smoothing = f"label_smoothing={config.label_smoothing:g}" if config.label_smoothing else ""
    if config.function == "binary":
        return ["from relaylab.models.losses import BinaryCrossEntropy"], f"BinaryCrossEntropy({smoothing})"
    return [], f"nn.CrossEntropyLoss({smoothing})"


def _optimizer(config: OptimizerConfig) -> str:
    values = f"lr={config.lr:g}, weight_decay={config.weight_decay:g}"
    if config.algorithm == "adamw":
        eps = f", eps={config.eps:g}" if config.eps != 1e-8 else ""
        return f"torch.optim.AdamW(relay.parameters(), {values}, betas={config.betas}{eps})"
    return f"torch.optim.SGD(relay.parameters(), {values}, momentum={config.momentum:g})"


def _text(value: Any) -> str:
    """Return the repr of a value, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
