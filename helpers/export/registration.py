"""Register a bundle on an MLflow server: a model that loads anywhere, with the packages it needs, and without torch."""

import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from helpers.bundle.manifest import MANIFEST, Bundle
from helpers.config import CONF, PACKAGE, Config
from helpers.errors import BundleError, first_line
from helpers.export.conversion import PREVIEW
from helpers.pipeline.pyfunc import COLUMNS, CONTENT, FORMAT, OUTPUT_SCHEMA, PATH
from helpers.tracking.mlflow import MLflow, connect
from helpers.tracking.registry import DIGEST, LOADER

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

# What `helpers.pipeline.pyfunc` imports, and the readers of object storage that a path may need; the last has pydantic.
NEEDS = ("numpy", "pandas", "pyarrow", "opencv-python-headless", "openvino", "pycocotools", "obstore", "mlflow-skinny")
WAIT_SECONDS = 60  # for the server to have a version's files
# What there is in conf/ for the package, but for profiles of the user's own, which are nobody else's.
SETTINGS = ("base.yaml", "cluster.yaml", "colab.yaml", "databricks.yaml", "local.yaml", "log4j2.properties")
MODEL = "model"  # the folder among the run's artifacts


def publish(bundle: Bundle, config: Config, name: str | None = None, alias: str | None = None) -> str:
    """Write an export as a run: what the bundle is, what quantization has cost it, and its preview; and register it.

    Without a name, `CATALOG.SCHEMA.NAME` in Unity Catalog, the bundle is not registered, and a server that fails is a
    warning. An alias is given to this version, and taken from another.

    Returns:
        The version; empty without a name.

    Raises:
        ConfigError: there is no server.
        BundleError: the server refuses the model, or does not answer.
    """
    manifest = bundle.manifest
    facts = ("name", "architecture", "task", "decoder", "precision", "arithmetic", "flops", "digest", "checkpoint")
    losses = {name: value for name, value in manifest.quantization.items() if isinstance(value, int | float)}
    with MLflow(config.tracking.mlflow, f"export-{manifest.name}") as run:
        run.log_settings({name: getattr(manifest, name) for name in facts} | {"bundle": bundle.storage.root})
        run.log_scalars({f"quantization/{name}": value for name, value in losses.items()}, 0)
        if bundle.storage.exists(PREVIEW):
            run.log_picture(PREVIEW, bundle.storage.read(PREVIEW))
        return _register(bundle, run.identify(), name, alias, config) if name else ""


def _register(bundle: Bundle, run: str, name: str, alias: str | None, config: Config) -> str:
    """Register a bundle as the next version of a model, from the artifacts of a run, and return that version."""
    client = connect(config.tracking.mlflow)
    from mlflow.exceptions import MlflowException

    if not run:
        raise BundleError(f"{name} cannot be registered: the server has no run of the export, as said above")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, MODEL)
        _save(bundle, folder, Path(temporary))
        try:
            client.log_artifacts(run, str(folder), MODEL)
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source, tags = f"runs:/{run}/{MODEL}", {DIGEST: bundle.manifest.digest}
            made = client.create_model_version(name, source, run, tags, await_creation_for=WAIT_SECONDS)
            if alias:
                client.set_registered_model_alias(name, alias, made.version)
        except (MlflowException, OSError) as error:
            raise BundleError(f"{name} cannot be registered: {first_line(error)}; look at the server") from None
    return str(made.version)


def signature() -> "ModelSignature":
    """Paths or bytes in, and the results' own columns out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    inputs = [ColSpec(DataType.string, PATH, required=False), ColSpec(DataType.binary, CONTENT, required=False)]
    outputs = [ColSpec(_type_of(field.type), field.name, required=False) for field in OUTPUT_SCHEMA]
    params = ParamSchema([ParamSpec(FORMAT, DataType.string, COLUMNS)])
    return ModelSignature(Schema(inputs), Schema(outputs), params)


def _type_of(kind: pa.DataType) -> Any:
    """MLflow's type for Arrow's."""
    from mlflow.types import DataType
    from mlflow.types.schema import Array, Object, Property

    if pa.types.is_list(kind):
        return Array(_type_of(kind.value_type))
    if pa.types.is_struct(kind):
        return Object([Property(field.name, _type_of(field.type), required=False) for field in kind])
    return {pa.int32(): DataType.integer, pa.float32(): DataType.float, pa.string(): DataType.string}[kind]


def _save(bundle: Bundle, folder: Path, temporary: Path) -> None:
    """Write MLflow's model: the bundle, its signature, its environment, and this package."""
    from mlflow.pyfunc import save_model

    data = temporary / "bundle"
    data.mkdir()
    for file in bundle.manifest.files:
        (data / file).write_bytes(bundle.read(file))
    (data / MANIFEST).write_bytes(bundle.storage.read(MANIFEST))
    # MLflow puts it first on the path of the process that loads the model, and whatever that does needs it whole.
    code = temporary / PACKAGE.name
    shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__", "conf"))
    shutil.copytree(CONF / "cards", code / "conf" / "cards")
    for name in SETTINGS:
        shutil.copy(CONF / name, code / "conf")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")  # the signature says it all
        save_model(
            str(folder),
            loader_module=LOADER,
            data_path=str(data),
            code_paths=[str(code)],
            pip_requirements=[f"{package}=={version(package)}" for package in NEEDS],
            signature=signature(),
            metadata={DIGEST: bundle.manifest.digest},
        )
