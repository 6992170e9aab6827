"""Initial weights for a YOLACT's training: those of another YOLACT, whatever its classes."""

import io
import re
from typing import Any

import torch

from helpers.errors import BundleError
from helpers.export.architectures import get_architecture
from helpers.export.weights import find_difference, read_weights
from helpers.storage import open_storage
from helpers.training import Group
from helpers.yolact.network import Yolact

CLASS_LAYERS = re.compile(r"prediction_layers\.0\.conf_layer\.|semantic_seg_conv\.")  # whose outputs are classes


def load_initial_weights(network: Yolact, uri: str, group: Group, config: Any = None) -> None:
    """Give a network the weights of a checkpoint, the statistics of its batch norms included; every rank calls it.

    Layers whose number of outputs depends on the classes stay as they are if the checkpoint has another number of
    classes. Rank 0 reads the file for all ranks, and says what it has used.

    Args:
        network: what to change.
        uri: of the checkpoint, a state dictionary like the official ones.
        group: of the ranks.
        config: its `storage` says how object storage is reached.

    Raises:
        BundleError: the checkpoint is missing or damaged, or is of another architecture; names the first weight that
            differs.
    """
    content = group.broadcast(_read(uri, config) if group.rank == 0 else None)
    architecture = get_architecture(network.configuration.name)
    weights = read_weights(architecture, io.BytesIO(content), uri)
    difference = find_difference(_expect(network, weights), weights)
    if difference:
        raise BundleError(f"{uri} is not a checkpoint of {architecture.name}: {difference}")
    own = network.state_dict()
    fresh = {key: value for key, value in own.items() if value.shape != weights[key].shape}
    network.load_state_dict({**weights, **fresh})
    if group.rank == 0:
        layers = " and ".join(dict.fromkeys(key.rpartition(".")[0] for key in fresh))
        exception = f", but for {layers}, which it has for another number of classes" if fresh else ""
        print(f"checkpoint {uri}: the training starts from its weights{exception}", flush=True)


def _read(uri: str, config: Any) -> bytes:
    try:
        return open_storage(uri, config).read("")
    except OSError as error:
        raise BundleError(
            f"{uri}: this checkpoint cannot be read ({error.strerror or error}); name another with "
            "--initial-weights, or none to start from random weights"
        ) from None


def _expect(network: Yolact, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The network's state, its class layers as they would be with as many classes as the checkpoint has."""
    own, key = network.state_dict(), "semantic_seg_conv.bias"
    outputs = tuple(getattr(weights.get(key), "shape", ()))
    if len(outputs) != 1 or outputs == own[key].shape:
        return own
    labels = [str(number) for number in range(outputs[0])]
    with torch.device("meta"):
        other = get_architecture(network.configuration.name, labels).build().state_dict()
    return {name: other[name] if CLASS_LAYERS.match(name) else tensor for name, tensor in own.items()}
