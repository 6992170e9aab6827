"""The models of a run: their bundles, their parameters, and their names in the results. On the driver."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from helpers.bundle.manifest import Bundle, load_bundle
from helpers.config import Config
from helpers.errors import ConfigError
from helpers.pipeline.task import RunModel
from helpers.pipeline.views import Cascade
from helpers.storage import open_storage
from helpers.tasks import has_boxes, parameter_names, parameters_for
from helpers.tracking import registry


def open_models(uris: Sequence[str], config: Config) -> tuple[RunModel, ...]:
    """Open the bundles of a run, each with its parameters and its name in the results.

    Raises:
        ConfigError: a model is named twice, or a setting is none of its parameters.
        BundleError: a model cannot be used.
    """
    bundles = [open_bundle(uri, config) for uri in uris]
    models: list[RunModel] = []
    for bundle, parameters in zip(bundles, parameters_of(bundles, config), strict=True):
        detector = models[0].identity if config.cascade.enabled and models else None
        models.append(RunModel(bundle, model_identity(bundle, parameters, config, detector), parameters))
    if len({model.identity for model in models}) < len(models):
        raise ConfigError("--model names the same model twice; name each once")
    return tuple(models)


def open_bundle(uri: str, config: Config) -> Bundle:
    """Open a bundle, or the one of a registered model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        BundleError: it cannot be used, or there is no such model.
        ConfigError: a registered model needs a server that is not set.
    """
    return registry.fetch(uri, config) if uri.startswith(registry.SCHEME) else load_bundle(open_storage(uri, config))


def parameters_of(bundles: Sequence[Bundle], config: Config) -> list[dict[str, Any]]:
    """The post-processing parameters of each model: what it has of those for all, and its own below its name.

    Raises:
        ConfigError: a setting is a parameter of no model, or of a model that the run does not have.
    """
    manifests = [bundle.manifest for bundle in bundles]
    shared = {name: value for name, value in config.postprocess.items() if not isinstance(value, dict)}
    own = {name: value for name, value in config.postprocess.items() if isinstance(value, dict)}
    if strangers := sorted(set(own) - {manifest.name for manifest in manifests}):
        known = ", ".join(manifest.name for manifest in manifests)
        raise ConfigError(f"postprocess.{strangers[0]}: no model of this run has that name; there is {known}")
    names = [parameter_names(manifest) for manifest in manifests]
    nobodys = set(shared).difference(*names)  # which `parameters_for` has an error for
    return [
        parameters_for(
            manifest,
            {name: shared[name] for name in shared if name in known or name in nobodys} | own.get(manifest.name, {}),
        )
        for manifest, known in zip(manifests, names, strict=True)
    ]


def model_identity(bundle: Bundle, parameters: dict[str, Any], config: Config, detector: str | None = None) -> str:
    """Name a model in the results so that whatever changes its predictions changes its name.

    The name is the bundle's, and of a registered model `NAME/VERSION`; a digest follows it.

    Args:
        bundle: the model.
        parameters: of its post-processing.
        config: of the run.
        detector: the identity of the model whose detections it looks at.
    """
    settings: list[Any] = [bundle.manifest.digest, parameters, config.inference.precision]
    if config.inference.device != "CPU":
        settings.append(config.inference.device)
    if detector is not None:
        settings += [detector, config.cascade.model_dump()]
    elif config.tiling.factor:
        settings.append(config.tiling.model_dump())
    text = json.dumps(settings, sort_keys=True)
    return f"{bundle.registered or bundle.manifest.name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def cascade_of(models: tuple[RunModel, ...], config: Config) -> Cascade | None:
    """What of the first model's detections the second one looks at; None where both look at whole images.

    Raises:
        ConfigError: the models are not two, or of tasks that do not go together.
    """
    settings = config.cascade
    if not settings.enabled:
        return None
    tasks = [model.bundle.manifest.task for model in models]
    if len(tasks) != 2:
        raise ConfigError(
            f"cascade.enabled needs two models, and this run has {len(tasks)}; name a detector and another"
        )
    if not has_boxes(tasks[0]):
        raise ConfigError(f"cascade.enabled: the first model is for {tasks[0]}; name one that gives boxes first")
    if tasks[1] == "embedding":
        raise ConfigError("cascade.enabled: the second model gives embeddings, and a row has one; name another model")
    return Cascade(settings.min_score, settings.padding, settings.max_crops)
