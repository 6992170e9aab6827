import os
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

import helpers.config
from helpers.config import PROJECT, load_config, parse_assignments
from helpers.errors import ConfigError

PROFILES = sorted(path.stem for path in (PROJECT / "conf").glob("*.yaml") if path.stem != "base")
SECRET = "c2VjcmV0LWtleS1vZi1hbi1hY2NvdW50MTIzNDU2Nzg5MA=="


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HELPERS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def conf(monkeypatch, tmp_path) -> Path:
    """A copy of conf/ that a test may spoil."""
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    monkeypatch.setattr(helpers.config, "CONF", tmp_path / "conf")
    return tmp_path / "conf"


def append(file: Path, text: str) -> None:
    file.write_text(f"{file.read_text()}\n{text}\n")


def test_there_are_profiles_for_the_hosts():
    assert {"local", "colab", "databricks", "cluster"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_in_conf_loads(profile):
    assert load_config(profile).profile == profile


def test_later_layers_win(conf, monkeypatch):
    append(conf / "local.yaml", "inference: {max_batch: 7, threads: 7, batch_megabytes: 7}")
    monkeypatch.setenv("HELPERS_INFERENCE__THREADS", "8")
    monkeypatch.setenv("HELPERS_INFERENCE__BATCH_MEGABYTES", "8")
    inference = load_config("local", **{"inference.batch_megabytes": 9}).inference
    assert (inference.max_batch, inference.threads, inference.batch_megabytes) == (7, 8, 9)
    assert inference.precision is None  # from base


def test_a_layer_changes_only_the_keys_it_names():
    config = load_config("local", spark={"app_name": "mine"}, partitioning={"partitions": 3})
    assert config.spark.app_name == "mine" and config.spark.driver_memory == load_config("local").spark.driver_memory
    assert config.partitioning.partitions == 3 and config.partitioning.target_images == 1000


def test_nested_and_dotted_overrides_mean_the_same():
    assert load_config("local", **{"spark.master": "local[3]"}) == load_config("local", spark={"master": "local[3]"})


def test_spark_settings_keep_their_dots_and_join_the_profiles(monkeypatch):
    monkeypatch.setenv("HELPERS_SPARK__CONF__SPARK__EXECUTOR__MEMORY", "2g")
    settings = {"spark.sql.shuffle.partitions": 7, "spark.speculation": True}
    dotted = load_config("local", **{f"spark.conf.{key}": value for key, value in settings.items()})
    nested = load_config("local", spark={"conf": settings})
    assert dotted.spark.conf == nested.spark.conf
    assert dotted.spark.conf["spark.sql.shuffle.partitions"] == "7"
    assert dotted.spark.conf["spark.speculation"] == "true"
    assert dotted.spark.conf["spark.executor.memory"] == "2g"


def test_a_profile_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("HELPERS_PROFILE", "cluster")
    assert load_config().profile == "cluster"
    assert load_config("local").profile == "local"


def test_databricks_is_recognized(monkeypatch):
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    assert load_config().profile == "databricks"


def test_assignments_are_typed_as_in_yaml():
    overrides = parse_assignments(["resume=false", "postprocess.top_k=5", "spark.master=local[1]", "pictures=0"])
    config = load_config("local", **overrides)
    assert config.resume is False and config.pictures == 0 and config.spark.master == "local[1]"
    assert config.postprocess["top_k"] == 5 and isinstance(config.postprocess["top_k"], int)


def test_a_value_with_an_equals_sign_is_kept_whole():
    assert parse_assignments(["storage.endpoint=http://host/?a=b"]) == {"storage.endpoint": "http://host/?a=b"}


@pytest.mark.parametrize("assignment", ["resume", "=false", ""])
def test_an_assignment_without_key_or_value_is_explained(assignment):
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments([assignment])


@pytest.mark.parametrize("value", ["[", "@x", "{a", "%x", "'x"])
def test_an_assignment_that_is_not_yaml_names_its_key(value):
    with pytest.raises(ConfigError, match=r"spark\.app_name"):
        load_config("local", **parse_assignments([f"spark.app_name={value}"]))


def test_an_environment_value_that_is_not_yaml_names_its_key(monkeypatch):
    monkeypatch.setenv("HELPERS_SPARK__APP_NAME", "[")
    with pytest.raises(ConfigError, match=r"(?i)spark(\.|__)app_name"):
        load_config("local")


def test_the_profile_cannot_be_given_twice():
    with pytest.raises(ConfigError, match="profile"):
        load_config("local", **parse_assignments(["profile=cluster"]))


WRONG = {
    "unknown key": ("inference.treads", 2, "no such setting"),
    "wrong type": ("inference.threads", "many", "integer"),
    "fraction of a thread": ("inference.threads", 1.5, "integer"),
    "impossible value": ("inference.threads", 0, "greater than 0"),
    "longer than a value may be": ("ingest.max_bytes", 2**31, "less than or equal to 2000000000"),
    "more than a batch may have": ("inference.batch_megabytes", 2048, "less than or equal to 1024"),
    "share above one": ("max_failed_share", 1.5, "less than or equal to 1"),
    "not one of the choices": ("spark.mode", "yarn", "'local', 'sail', 'auto', 'connect', 'cluster' or 'databricks'"),
    "malformed": ("spark.driver_memory", "lots", "pattern"),
}


OUT_OF_RANGE = ("impossible value", "longer than a value may be", "more than a batch may have", "share above one")


@pytest.mark.parametrize("origin", ["conf/local.yaml", "the environment", "the arguments"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_named_with_key_and_origin_and_a_number_with_its_value(wrong, origin, conf, monkeypatch):
    key, value, problem = WRONG[wrong]
    overrides = {}
    if origin == "the environment":
        monkeypatch.setenv(f"HELPERS_{key.upper().replace('.', '__')}", str(value))
    elif origin == "the arguments":
        overrides = {key: value}
    else:
        section, _, name = key.rpartition(".")
        file = conf / "local.yaml"
        if section == "spark":
            file.write_text(
                file.read_text().replace("spark:\n", f"spark:\n  {name}: {value}\n").replace("mode: auto", "")
            )
        else:
            append(file, f"{section}:\n  {name}: {value}" if section else f"{name}: {value}")
    with pytest.raises(ConfigError) as error:
        load_config("local", **overrides)
    message = str(error.value)
    assert message.startswith(key) and origin in message and problem in message
    assert (f"{key} = {value!r}" in message) == (wrong in OUT_OF_RANGE)


def test_an_unknown_section_is_named_with_what_is_in_it():
    with pytest.raises(ConfigError, match=r"inferense\b.*the arguments.*no such setting"):
        load_config("local", **{"inferense.threads": 2})


def test_a_mistake_in_base_is_placed_there(conf):
    append(conf / "base.yaml", "color: blue")
    with pytest.raises(ConfigError, match="color .*conf/base.yaml"):
        load_config("local")


def test_every_mistake_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        load_config("local", pictures=-1, resume="perhaps")
    assert "pictures = -1" in str(error.value) and "resume (set in the arguments)" in str(error.value)


@pytest.mark.parametrize(
    ("typo", "meant"), [("spark.mastr", "spark.master"), ("resum", "resume"), ("ingest.max_pixel", "ingest.max_pixels")]
)
def test_a_typing_error_gets_a_suggestion(typo, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?"):
        load_config("local", **{typo: 1})


def test_a_setting_below_a_single_value_is_explained():
    with pytest.raises(ConfigError, match=r"resume\.always .*resume is a single value"):
        load_config("local", **{"resume.always": True})


def test_a_value_in_place_of_a_section_is_explained():
    with pytest.raises(ConfigError, match="spark .*the arguments"):
        load_config("local", spark=5)


@pytest.mark.parametrize(
    "key", ["storage.credential", "storage.credentials", "storage.account_key", "storage.credential.key", "storage"]
)
@pytest.mark.parametrize("origin", ["arguments", "environment"])
def test_a_secret_in_place_of_its_reference_is_never_repeated(key, origin, monkeypatch):
    overrides = {key: SECRET}
    if origin == "environment":
        monkeypatch.setenv(f"HELPERS_{key.upper().replace('.', '__')}", SECRET)
        overrides = {}
    with pytest.raises(ConfigError) as error:
        load_config("local", **overrides)
    assert SECRET not in str(error.value)
    assert "storage" in str(error.value)


@pytest.mark.parametrize("reference", ["default", "env:STORAGE_KEY", "secret:my scope/key", "keyvault:vault/name"])
def test_references_to_credentials_are_accepted(reference):
    assert load_config("local", **{"storage.credential": reference}).storage.credential == reference


def test_settings_cannot_be_changed():
    config = load_config("local")
    with pytest.raises(ValidationError):
        config.resume = False
    with pytest.raises(ValidationError):
        config.spark.master = "local[1]"
    with pytest.raises(AttributeError):
        config.storage.credential = "env:X"


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no profile laptop") as error:
        load_config("laptop")
    assert all(profile in str(error.value) for profile in PROFILES)


@pytest.mark.parametrize("content", ["spark: [unclosed", "spark:\n\tmode: local", "- a\n- list", "just text"])
def test_a_broken_profile_is_named(conf, content):
    (conf / "local.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"conf/local\.yaml"):
        load_config("local")


def test_an_empty_profile_is_base_alone(conf):
    (conf / "empty.yaml").write_text("# nothing differs\n")
    assert load_config("empty").spark == load_config("empty", spark={"mode": "local"}).spark


def test_relative_paths_start_at_the_project_whatever_the_working_directory(monkeypatch, tmp_path):
    before = load_config("local").paths
    monkeypatch.chdir(tmp_path)
    assert load_config("local").paths == before
    assert before.results == str(PROJECT / "out" / "results")
    assert load_config("databricks").paths.data.startswith("/Volumes/")
