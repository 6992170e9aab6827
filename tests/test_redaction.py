"""Random secrets in many places: none of them is ever shown."""

import logging
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyspark.logger.logger import JSONFormatter

import helpers.config
from helpers import cli, redaction
from helpers.config import PROJECT, load_config, parse_assignments
from helpers.errors import StorageError, UserError, first_line
from helpers.redaction import HIDDEN, Redacting, redact
from helpers.session import spark_failure
from helpers.storage import open_storage

BASE64 = string.ascii_letters + string.digits + "+/"
SECRETS = st.text(BASE64, min_size=12, max_size=60).map(lambda text: text + "=" * (-len(text) % 4))
CASES = st.sampled_from([str, str.lower, str.upper, str.title])
ENCODINGS = st.sampled_from([str, lambda text: quote(text, safe=""), lambda text: quote(quote(text, safe=""), safe="")])
NAMES = [
    "sig",
    "token",
    "AccountKey",
    "account_key",
    "access-key",
    "X-Amz-Signature",
    "X-Amz-Security-Token",
    "password",
]
NAMES += [
    "SharedAccessKey",
    "client_secret",
    "access_token",
    "sas",
    "fs.azure.account.key.acct.dfs.core.windows.net",
    "pwd",
]
PLACES = [
    "https://acct.blob.core.windows.net/c/p.png?sv=2024&{name}={secret}&se=2027",
    "abfss://c@acct.dfs.core.windows.net/p?{name}={secret}",
    "sc://host:15002/;{name}={secret};use_ssl=true",
    "DefaultEndpointsProtocol=https;AccountName=a;{name}={secret};EndpointSuffix=core.windows.net",
    "'--conf', 'spark.hadoop.{name}={secret}', 'next'",
    "SOURCE=https://h/c?a=1&{name}={secret}",
    "{{'{name}': '{secret}'}}",
]
USERS = ["wasbs://c:{secret}@acct.blob.core.windows.net/p", "s3://ID:{secret}@bucket/p", "s3a://ID:{secret}@bucket"]
USERS += ["spark://user:{secret}@host:7077", "k8s://https://user:{secret}@host", "ftp://u:{secret}@h/a@b.png"]


@given(SECRETS, st.sampled_from(NAMES), st.sampled_from(PLACES), CASES, ENCODINGS, st.integers(0, 2))
@settings(max_examples=500)
def test_a_named_secret_is_hidden_whatever_its_spelling(secret, name, place, case, encode, encoded_before):
    spell = str if encoded_before == 0 else lambda text: quote(text, safe="")
    assert_hidden(secret, lambda text: f"no: {encode(place.format(name=case(name), secret=spell(text)))} (403)")


@given(SECRETS, st.sampled_from(USERS), ENCODINGS)
@settings(max_examples=300)
def test_a_password_in_an_address_is_hidden_in_any_scheme(secret, place, encode):
    assert_hidden(secret, lambda text: f"no: {encode(place.format(secret=text))}: said Spark")


def assert_hidden(secret: str, write: Callable[[str], str]) -> None:
    """Neither the secret is there nor any half of it, in no encoding."""
    shown, without = redact(write(secret)), redact(write("Z" * 16))
    for part in (secret[: len(secret) // 2], secret[len(secret) // 2 :].rstrip("=")):
        for form in (part, quote(part, safe=""), quote(quote(part, safe=""), safe="")):
            assert form not in shown or form in without, shown
    assert HIDDEN in shown and redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "abfss://container@account.dfs.core.windows.net/a folder/with:colon@sign.png: no such folder",
        "http://host:8080/a and file:///a:b/c@d.jpg and 100% sure, %41 %zz",
        "--set takes KEY=VALUE, for example --set resume=false; name it with storage.credential=env:NAME",
        "it is not base64, and no SAS token (it has no sig=); or use keyvault:VAULT/NAME or secret:SCOPE/KEY",
        "set NAME={{secrets/scope/key}} and inference.memory_megabytes=4096",
        "sigma=1 design=2 passes=3 tokens=4 keyboard=5",
    ],
)
def test_what_is_no_secret_is_shown_as_it_is(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "text", ["a" * 10**5, "a.b-" * 10**5, "://a:" * 10**4, "'key':" * 10**4, "x%41" * 10**4, "key_=" * 10**4]
)
def test_no_text_takes_long(text):
    redact(text)  # pytest's own limit of time would tell


def test_a_resolved_secret_is_hidden_wherever_it_is(monkeypatch):
    monkeypatch.setattr(redaction, "_resolved", set())
    redaction.remember("plain words that are a secret")
    assert redact("because plain words that are a secret were sent") == f"because {HIDDEN} were sent"


def test_every_error_of_ours_and_every_line_of_anothers_is_redacted():
    secret = "https://h/c?sig=PLANTED&x=1"
    texts = [str(UserError(secret)), repr(StorageError(secret)), str(StorageError(secret).args)]
    texts += [first_line(ValueError(secret)), spark_failure(RuntimeError(f"x\nValueError: {secret}"))]
    assert "PLANTED" not in " ".join(texts) and all(HIDDEN in text for text in texts)


def test_the_logs_handler_hides_secrets_in_messages_arguments_and_tracebacks(caplog):
    caplog.handler.addFilter(Redacting())
    try:
        raise ValueError("s3://ID:PLANTED@bucket")
    except ValueError:
        logging.getLogger("other").exception("a %s", "https://h/?sig=PLANTED")
    finally:
        caplog.handler.filters.clear()
    as_json = JSONFormatter().format(caplog.records[-1])
    for text in (caplog.text, as_json):
        assert "PLANTED" not in text and text.count(HIDDEN) >= 2


@pytest.mark.parametrize(
    "uri",
    [
        "s3://ID:PLANTED@bucket/p",
        "wasbs://c:PLANTED@acct.blob.core.windows.net/p",
        "https://acct.blob.core.windows.net/c?SIG=PLANTED",
        "abfss://c:PLANTED@acct.dfs.core.windows.net/p",
        "abfss://c@acct.dfs.core.windows.net/p?Sig=PLANTED",
        "abfss://c@acct.dfs.core.windows.net/p?sv=1%26sig%3DPLANTED",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=PLANTED==",
    ],
)
def test_a_location_with_a_secret_is_refused_without_it(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError) as error:
        list(open_storage(uri).list())
    assert "PLANTED" not in str(error.value)


# ---------------------------------------------------------------- settings

KEYS = [
    "storage.credential",
    "storage.key",
    "storage.endpoint.key",
    "spark.fs.azure.account.key",
    "credential",
    "sas_token",
]
KEYS += ["resume", "pictures", "reader", "spark.mode", "spark.driver_memory", "spark.conf", "inference.threads"]
KEYS += [
    "inference.threads.deep",
    "ingest.suffixes",
    "partitioning",
    "postprocess.top_k.x",
    "max_failed_share",
    "video.every",
]
VALUES = [
    "{secret}",
    "'{secret}'",
    "[{secret}]",
    "{{a: {secret}}}",
    "{secret}: [",
    "!{secret} x",
    "*{secret}",
    "- {secret}\n- {{",
]


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of the profiles, beside which a test may write one."""
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    monkeypatch.setattr(helpers.config, "CONF", tmp_path / "conf")
    return tmp_path / "conf"


def error_of(load) -> str:
    try:
        load()
    except UserError as error:
        return str(error)
    return ""


@given(
    SECRETS, st.sampled_from(KEYS), st.sampled_from(VALUES), st.sampled_from(["set", "environment", "yaml", "widgets"])
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_a_setting_that_cannot_be_is_ever_shown(conf, secret, key, value, origin):
    said, without = (said_of(conf, key, value.format(secret=text), origin) for text in (secret, "Z" * 16))
    assert secret.rstrip("=") not in said or secret.rstrip("=") in without, said


def said_of(conf: Path, key: str, text: str, origin: str) -> str:
    """The error of a setting, from where it comes."""
    with pytest.MonkeyPatch.context() as patch:
        if origin == "set":
            return error_of(lambda: load_config("local", **parse_assignments([f"{key}={text}"])))
        if origin == "yaml":
            (conf / "spoilt.yaml").write_text(nested(key, text))
            return error_of(lambda: load_config("spoilt"))
        if origin == "environment":
            patch.setenv(f"HELPERS_{key.upper().replace('.', '__')}", text)
        else:
            widgets = SimpleNamespace(widgets=SimpleNamespace(getAll=lambda: {key: text}))
            shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(user_ns={"dbutils": widgets}))
            patch.setitem(sys.modules, "IPython", shell)
        return error_of(lambda: load_config("local"))


def nested(key: str, text: str) -> str:
    parts = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(lines) + f" {text}\n"


@given(
    SECRETS, st.sampled_from(["{}", "{}=", "={}", "x{}=1", "storage.{}=1", "storage.credential.{}=1", "resume.{}=1"])
)
@settings(max_examples=200, deadline=None)
def test_a_secret_in_place_of_a_settings_name_is_not_shown(secret, form):
    assume(re.search("[A-Z0-9+/]", secret[:12]))  # else it is a word, and looks like a name
    said = error_of(lambda: load_config("local", **parse_assignments([form.format(secret)])))
    assert said and secret.rstrip("=") not in said, said


@given(SECRETS)
@settings(max_examples=50, deadline=None)
def test_a_secret_in_place_of_a_profile_is_not_shown(secret):
    assume(re.search("[A-Z0-9+/]", secret[:12]))
    assert secret not in error_of(lambda: load_config(secret))


def test_numbers_of_known_settings_are_shown_because_they_help():
    assert "inference.threads = 0 (set in the arguments)" in error_of(lambda: load_config(**{"inference.threads": 0}))
    assert "12345" not in error_of(lambda: load_config(**{"inference.treads": 12345}))
    assert "12345" not in error_of(lambda: load_config(**{"spark.app_name": 12345}))


# ---------------------------------------------------------------- the command line


def test_an_error_that_nobody_has_foreseen_is_shown_without_secrets(monkeypatch, capsys):
    def fail(options, config):
        raise RuntimeError("GET https://h/c?sig=PLANTED failed")

    monkeypatch.setattr(cli, "doctor", fail)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: GET" in said and "PLANTED" not in said


def test_what_follows_an_unknown_option_is_not_repeated(capsys):
    for arguments in (["--sas", "PLANTED"], ["--sas=PLANTED"], ["PLANTED"]):
        with pytest.raises(SystemExit) as exit_code:
            cli.main(["doctor", *arguments])
        assert exit_code.value.code == 2
        said = capsys.readouterr().err
        assert "unrecognized arguments: " in said and "PLANTED" not in said


@pytest.mark.parametrize(
    "master", ["spark://user:PLANTED@host:7077", "spark://u:PLA/NTED@h", "PLANTED", "k8s://https://u:PLANTED@h"]
)
def test_a_master_with_a_secret_is_refused_before_spark_can_repeat_it(master, capfd, tmp_path):
    settings = [f"spark.master={master}", "spark.mode=cluster", f"paths.data={tmp_path}", f"paths.results={tmp_path}"]
    code = cli.main(["doctor", *(part for setting in settings for part in ("--set", setting))])
    answer = capfd.readouterr()
    assert code == 1 and "spark.master" in answer.out
    assert "PLA" not in answer.out + answer.err


JVM_LOG = """
from helpers.config import load_config
from helpers.session import get_spark
spark = get_spark(load_config("local", **{"spark.master": "local[1]"}))
log = spark._jvm.org.apache.logging.log4j.LogManager.getLogger("org.apache.spark.x")
log.error("spark://user:PLANTED@host:7077 https://h/c?SIG=PLANTED&x=1 fs.azure.account.key.a.b=PLANTED seen")
log.error("an exception", spark._jvm.java.lang.RuntimeException("s3a://ID:PLANTED/x@bucket token=PLANTED seen"))
"""


def test_sparks_own_log_hides_secrets_too():
    answer = subprocess.run([sys.executable, "-c", JVM_LOG], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "PLANTED" not in answer.stderr
    assert (
        answer.stderr.count("seen") == 2
        and answer.stderr.count("RuntimeException: s3a://***@bucket token=*** seen") == 1
    )
