"""Settings: a YAML profile a host over a common base, overridden by the environment and by arguments.

Later layers win: `conf/base.yaml`, `conf/PROFILE.yaml`, `HELPERS_SECTION__KEY` environment variables, the widgets of a
Databricks notebook (which a job's parameters fill), arguments (`--set section.key=value` or
`load_config(**overrides)`). The result is frozen. Executors never see it: what a stage needs travels as plain values.
"""

import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from helpers.errors import ConfigError
from helpers.options import StorageOptions

DISTRIBUTION = "spark-vision"
PACKAGE = Path(__file__).resolve().parent
INSTALLED = not (PACKAGE.parent / "conf" / "base.yaml").is_file()  # by pip, without a checkout around it
PROJECT = Path.cwd() if INSTALLED else PACKAGE.parent  # where relative locations begin
CONF = PACKAGE / "conf" if INSTALLED else PROJECT / "conf"
ENVIRONMENT_PREFIX = "HELPERS_"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of the time, where PyYAML has libyaml
SHOWN_NAME = re.compile(r"[a-z][a-z_]{0,30}(\.[a-z_]{1,30}){0,3}")
NUMBER_PROBLEMS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Large = Annotated[int, Field(gt=0, lt=2**50)]
Seconds = Annotated[float, Field(ge=1e-6, le=10**6)]
Value = float | int | str | bool | list[float | int | str]
NAMES_WITH_DOTS = ("spark.conf.", "source.options.")  # what is below these stays one key each
COPIES = 4  # of a file in a task's memory, at most: as it was read, in Arrow, in a decoder, and the next one read ahead


class _Section(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_text(values: Any) -> Any:
    # Spark takes text; YAML and Python give true, 2 and 0.5.
    if not isinstance(values, Mapping):
        return values
    return {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in values.items()}


SparkOptions = Annotated[dict[str, str], BeforeValidator(_as_text)]


class SparkSettings(_Section):
    """How to get a Spark session on this host."""

    mode: Literal["local", "sail", "auto", "connect", "cluster", "databricks"]
    master: str
    app_name: str
    driver_memory: Annotated[str, Field(pattern=r"^\d+[kmgt]$")]
    task_attempts: Positive
    wait_seconds: Positive
    environment: str | None
    conf: SparkOptions


class PathSettings(_Section):
    """Where data, models, TensorBoard runs and results go."""

    data: str
    models: str
    runs: str
    results: str

    @field_validator("*")
    @classmethod
    def _absolute(cls, value: str) -> str:
        # Workers on a cluster have another working directory, and notebooks run in their own folder.
        return value if "://" in value or value.startswith(("dbfs:", "file:")) else str(PROJECT / value)


class IngestSettings(_Section):
    """Which files are images or archives of them, and how large an image may be."""

    suffixes: tuple[str, ...]
    archives: tuple[str, ...]
    outside_links: bool
    # A row of Arrow or Spark; `Config.max_image_bytes` may be less.
    max_bytes: Annotated[int, Field(gt=0, le=2 * 10**9)]
    max_pixels: Large


class SourceSettings(_Section):
    """The columns of a source that is a table, and how Auto Loader looks for new files."""

    path: str | None
    content: str | None
    key: str | None
    modified: str | None
    root: str | None
    keep: tuple[str, ...]
    options: SparkOptions


class VideoSettings(_Section):
    """Which files are videos, and which of their frames are images."""

    suffixes: tuple[str, ...]
    every: Positive


class PartitionSettings(_Section):
    """How images are divided into tasks."""

    slice_images: Positive
    partitions: Positive | None
    target_bytes: Large
    target_images: Positive
    target_seconds: Seconds
    image_seconds: Seconds
    gflops: Annotated[float, Field(ge=1e-3, le=10**9)]


class InferenceSettings(_Section):
    """How OpenVINO, or ONNX Runtime, runs in a task."""

    device: Literal["CPU", "GPU", "NPU", "AUTO", "CUDA"]
    gpu_share: Annotated[float, Field(gt=0, le=1)]
    precision: Literal["f32", "bf16", "f16"] | None
    threads: Annotated[int, Field(gt=0, le=1024)]
    batch_megabytes: Annotated[int, Field(gt=0, le=1024)]  # half of what Arrow can hold
    max_batch: Positive
    memory_megabytes: Positive


class ResultSettings(_Section):
    """Where tasks leave what a table of the catalog takes, and how long files stay that the results have removed."""

    staging: str | None
    retention_days: Annotated[float, Field(ge=0, le=36_500)]


class TilingSettings(_Section):
    """Which images are cut into tiles."""

    factor: Annotated[float, Field(ge=0, le=10**6)]
    overlap: Annotated[float, Field(ge=0, le=0.9)]


class CascadeSettings(_Section):
    """Which detections of a first model a second one looks at."""

    enabled: bool
    min_score: Fraction
    padding: Annotated[float, Field(ge=0, le=10)]
    max_crops: Positive


class TrackingSettings(_Section):
    """Who is told of a run, beside TensorBoard."""

    mlflow: str
    hook: str | None
    prometheus: Annotated[str, Field(pattern=r"\.prom$")] | None
    drift: Fraction

    @field_validator("mlflow", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads it


class Config(_Section):
    """Every setting of a run; `conf/base.yaml` documents each."""

    profile: str
    spark: SparkSettings
    storage: StorageOptions
    paths: PathSettings
    reader: Literal["auto", "files", "spark"]
    resume: bool
    pictures: Annotated[int, Field(ge=0, le=10_000)]
    report: Annotated[int, Field(ge=0, le=1000)]
    max_failed_share: Fraction
    source: SourceSettings
    ingest: IngestSettings
    video: VideoSettings
    partitioning: PartitionSettings
    inference: InferenceSettings
    results: ResultSettings
    tiling: TilingSettings
    cascade: CascadeSettings
    tracking: TrackingSettings
    postprocess: dict[str, Value | dict[str, Value]]

    @property
    def max_image_bytes(self) -> int:
        """How long an image file may be, so that its copies leave half of a task's memory to the rest."""
        return min(self.ingest.max_bytes, self.inference.memory_megabytes * 2**20 // (2 * COPIES))


def load_config(profile: str | None = None, **overrides: Any) -> Config:
    """Read, merge and validate the settings of one host.

    Args:
        profile: a file in `conf/` without its suffix; by default `HELPERS_PROFILE`, or the host found out.
        overrides: nested mappings (`spark={"master": "local[1]"}`) or dotted names (`**{"spark.master": ...}`).

    Raises:
        ConfigError: an unknown profile or key, a wrong type or an impossible value; the message names the key and
            where it was set, and the value only where it can be no secret.
    """
    profile = profile or os.environ.get(f"{ENVIRONMENT_PREFIX}PROFILE") or detect_profile()
    layers = {
        "conf/base.yaml": _read_profile("base"),
        f"conf/{profile}.yaml": _read_profile(profile),
        "the environment": _from_environment(),
        "the widgets": _from_widgets(),
        "the arguments": overrides,
    }
    values: dict[str, Any] = {"profile": profile}
    origins: dict[str, str] = {}
    for origin, layer in layers.items():
        _merge(values, layer, origin, origins)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def detect_profile() -> str:
    """Name the profile of the host this process runs on."""
    if "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return "databricks"
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "local"


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Turn `["resume=false", "postprocess.top_k=3"]` into overrides; values are read as YAML."""
    overrides = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(
                "--set takes KEY=VALUE, for example --set resume=false, and one of them has no KEY or no ="
            )
        if key == "profile":
            raise ConfigError("the profile is not a setting: name it with --profile")
        overrides[key] = _value(key, value)
    return overrides


def _read_profile(name: str) -> dict[str, Any]:
    path = CONF / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "base")
        raise ConfigError(f"no profile {_shown(name)} in conf/; there are {', '.join(known)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # What YAML says about it repeats the text that it stands in.
        mark = getattr(error, "problem_mark", None)
        where = f", at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"conf/{name}.yaml is not valid YAML{where}: look at its indentation and quotes") from None
    if not isinstance(content, dict):
        raise ConfigError(f"conf/{name}.yaml must hold settings as `key: value` lines, not a {type(content).__name__}")
    return content


def _from_environment() -> dict[str, Any]:
    settings = {}
    for name, value in os.environ.items():
        if name.startswith(ENVIRONMENT_PREFIX) and name != f"{ENVIRONMENT_PREFIX}PROFILE":
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            settings[key] = _value(key, value)
    return settings


def _from_widgets() -> dict[str, Any]:
    """The widgets of a Databricks notebook that are named like settings, such as `paths.data`; filled ones only.

    A widget with the name of a whole section is none: `source` may be a job's own parameter.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    dbutils = shell.user_ns.get("dbutils") if shell else None
    widgets = dbutils.widgets.getAll() if dbutils else {}
    kinds = {name: field.annotation for name, field in Config.model_fields.items() if name != "profile"}
    sections = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, _Section)}
    names = {key for key in widgets if key.partition(".")[0] in kinds} - sections
    return {key: _value(key, text) for key, text in widgets.items() if text and key in names}


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{_shown(key)}: its value is not valid YAML; put quotes around text with special characters"
        ) from None


def _merge(
    values: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str], above: str = ""
) -> None:
    """Set what a layer has below a section in its values, and note where each comes from."""
    for key, value in layer.items():
        first, dot, rest = ("" if above in NAMES_WITH_DOTS else key).partition(".")
        key, value = (first, {rest: value}) if dot else (key, value)
        if not isinstance(value, Mapping) or above in NAMES_WITH_DOTS:
            values[key], origins[f"{above}{key}"] = value, origin
            continue
        section = values.setdefault(key, {})
        if not isinstance(section, dict):
            below = _shown(".".join([f"{above}{key}", *value][:2]))
            raise ConfigError(f"{below} (set in {origin}): {above}{key} is a single value, nothing can stand below it")
        _merge(section, value, origin, origins, f"{above}{key}.")


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        matches = [name for name in origins if key == name or key.startswith(f"{name}.")] or [
            name for name in origins if name.startswith(f"{key}.")
        ]
        origin = origins[max(matches, key=len)] if matches else "conf/base.yaml"
        # The value is shown if it is a number where one belongs: what is of another kind may be a secret.
        value = f" = {problem['input']!r}" if problem["type"] in NUMBER_PROBLEMS else ""
        named = f"{_shown(key)}{value} (set in {origin})"
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = difflib.get_close_matches(key, [name for name in origins if name != key], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; conf/base.yaml lists every setting"
            lines.append(f"{named}: no such setting{hint}")
        else:
            lines.append(f"{named}: {problem['msg']}")
    return "\n".join(lines)


def _shown(name: str) -> str:
    """A name of a setting or a profile; what does not look like one may be a secret that was set in its place."""
    return name if SHOWN_NAME.fullmatch(name) else "a name that is not shown"
