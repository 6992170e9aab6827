"""Models that an MLflow server has under a name: `models:/NAME@ALIAS` and `models:/NAME/VERSION`, to a bundle.

The driver asks once. It copies the bundle to `paths.models`, from where every task reads it as it reads any other.
"""

import re
import tempfile
from pathlib import Path

from helpers.bundle.manifest import MANIFEST, Bundle, load_bundle
from helpers.config import Config
from helpers.errors import BundleError, first_line
from helpers.storage import LocalStorage, open_storage
from helpers.tracking.mlflow import DATABRICKS, UNITY_CATALOG, connect, server

SCHEME = "models:/"
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
LOADER = "helpers.pipeline.pyfunc"  # the module with which MLflow loads a bundle
DIGEST = "bundle"  # the tag of a version with the bundle's digest
FOLDER = "registered"  # of copies, below `paths.models`


def pin(uri: str, config: Config) -> str:
    """A model's location with the version in the place of the alias; other locations stay as they are.

    Raises ConfigError if there is no server, and BundleError if it does not answer, or has no such model, version or
    alias.
    """
    if not uri.startswith(SCHEME):
        return uri
    name, version, _ = _find(uri, config)
    return f"{SCHEME}{name}/{version}"


def fetch(uri: str, config: Config) -> Bundle:
    """The bundle of a registered model, below `paths.models`; copied from the server unless it is there already.

    Raises:
        BundleError: as for `pin`; the model is no bundle, or damaged.
        ConfigError: there is no server.
        StorageError: `paths.models` cannot be written.
    """
    name, version, digest = _find(uri, config)
    registered = f"{name}/{version}"
    target = open_storage(f"{config.paths.models}/{FOLDER}/{name}-{version}-{digest}", config)
    if not target.exists(MANIFEST):
        with tempfile.TemporaryDirectory() as folder:
            bundle = load_bundle(LocalStorage(_download(name, version, folder, config)))
            if bundle.manifest.digest != digest:
                other = f"holds the bundle {bundle.manifest.digest}, and was registered as {digest}"
                raise BundleError(f"{SCHEME}{registered} {other}: register it again")
            for file in bundle.manifest.files:
                target.write(file, bundle.read(file))
            target.write(MANIFEST, bundle.storage.read(MANIFEST))  # the last, so that a folder with it is complete
    return Bundle(target, load_bundle(target).manifest, registered)


def _find(uri: str, config: Config) -> tuple[str, str, str]:
    """Name, version and the bundle's digest."""
    parts = REFERENCE.fullmatch(uri)
    if parts is None:
        raise BundleError(f"{uri} names no registered model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    client = connect(config.tracking.mlflow)
    from mlflow.exceptions import MlflowException

    name, alias, version = parts["name"], parts["alias"], parts["version"]
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        remedy = "or register a model there with `python -m helpers export --register NAME --alias ALIAS`"
        raise BundleError(f"{uri} cannot be looked up ({first_line(error)}); look at the server, {remedy}") from None
    if not re.fullmatch("[0-9a-f]{12}", found.tags.get(DIGEST, "")):  # it becomes a folder's name
        raise BundleError(f"{uri} is no bundle: register one with `python -m helpers export --register {name}`")
    return name, str(found.version), found.tags[DIGEST]


def _download(name: str, version: str, folder: str, config: Config) -> str:
    """Copy a version's files into a folder, and return where the bundle is among them."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    client, uri, place = connect(config.tracking.mlflow), server(config.tracking.mlflow), f"{SCHEME}{name}/{version}"
    try:
        if uri == DATABRICKS:  # Unity Catalog lends credentials to who asks by the model's name
            folder = download_artifacts(place, dst_path=folder, tracking_uri=uri, registry_uri=UNITY_CATALOG)
        else:
            source = client.get_model_version_download_uri(name, version)
            folder = download_artifacts(source, dst_path=folder, tracking_uri=uri)
        flavor = Model.load(folder).flavors["python_function"]
    except MlflowException as error:
        raise BundleError(f"{place} cannot be downloaded ({first_line(error)}); look at the server") from None
    if flavor.get("loader_module") != LOADER:
        remedy = f"register one with `python -m helpers export --register {name}`"
        raise BundleError(f"{place} is no bundle of this project: {remedy}")
    return str(Path(folder, flavor["data"]))
