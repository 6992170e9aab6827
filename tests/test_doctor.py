"""For every host, what is missing is named with the one step that mends it."""

import base64
import contextlib
import socket

import pytest

from helpers import doctor
from helpers.config import load_config
from helpers.doctor import Finding, examine
from studies.cluster import LOOPBACK


def look(name: str, profile: str, **settings: str) -> Finding:
    (finding,) = examine(load_config(profile, **settings), [name])
    return finding


@pytest.fixture
def listening():
    """The address of something that accepts connections."""
    with contextlib.closing(socket.create_server((LOOPBACK, 0))) as server:
        yield f"{LOOPBACK}:{server.getsockname()[1]}"


@pytest.fixture
def silent() -> str:
    with contextlib.closing(socket.create_server((LOOPBACK, 0))) as server:
        return f"{LOOPBACK}:{server.getsockname()[1]}"


@pytest.mark.parametrize(("mode", "scheme"), [("cluster", "spark"), ("connect", "sc"), ("cluster", "k8s://https")])
def test_a_master_that_answers_is_found(mode, scheme, listening):
    master = f"{scheme}://{listening}"
    finding = look("spark", "cluster", **{"spark.mode": mode, "spark.master": master})
    assert finding.ok and master in finding.detail


@pytest.mark.parametrize(("mode", "scheme"), [("cluster", "spark"), ("connect", "sc"), ("cluster", "k8s://https")])
def test_a_master_that_does_not_answer_is_named(mode, scheme, silent):
    finding = look("spark", "cluster", **{"spark.mode": mode, "spark.master": f"{scheme}://{silent}"})
    assert not finding.ok and silent in finding.detail and "spark.master" in finding.detail


def test_yarn_needs_its_configuration(monkeypatch):
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    monkeypatch.delenv("YARN_CONF_DIR", raising=False)
    assert "set HADOOP_CONF_DIR" in look("spark", "cluster", **{"spark.master": "yarn"}).detail
    monkeypatch.setenv("HADOOP_CONF_DIR", "conf")
    assert look("spark", "cluster", **{"spark.master": "yarn"}).ok


def test_the_packed_environment_of_a_cluster_is_looked_for(tmp_path):
    missing = look("workers", "cluster", **{"spark.environment": str(tmp_path / "vision.tar.gz")})
    assert not missing.ok and "make pack" in missing.detail
    (tmp_path / "vision.tar.gz").write_bytes(b"")
    assert look("workers", "cluster", **{"spark.environment": str(tmp_path / "vision.tar.gz")}).ok
    assert "make pack" in look("workers", "cluster").detail


def test_databricks_is_told_from_another_host(monkeypatch):
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    assert "--profile" in look("spark", "databricks").detail
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18")
    assert look("spark", "databricks").ok
    assert "not needed" in look("java", "databricks").detail


def test_a_volume_that_is_not_there_is_not_made():
    finding = look("storage", "databricks", **{"paths.results": "/Volumes/no/such/volume/results"})
    assert not finding.ok
    assert "/Volumes/no/such/volume" in finding.detail and "bundle deploy" in finding.detail


@pytest.mark.parametrize(
    ("profile", "remedy"), [("local", "make setup"), ("colab", "first cell"), ("databricks", "first cell")]
)
def test_a_missing_package_has_the_hosts_remedy(monkeypatch, profile, remedy):
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed" if name == "tqdm" else found(name))
    finding = look("packages", profile)
    assert not finding.ok and "tqdm not installed" in finding.detail and remedy in finding.detail


def test_bundles_are_listed_and_their_absence_stops_nothing(bundle_uri, tmp_path):
    (tmp_path / "one").symlink_to(bundle_uri)
    assert "one in " in look("models", "local", **{"paths.models": str(tmp_path)}).detail
    none = look("models", "local", **{"paths.models": str(tmp_path / "none")})
    assert none.ok and "make run" in none.detail


def test_a_credential_is_looked_for_and_never_shown(monkeypatch):
    secret = base64.b64encode(b"planted").decode()
    monkeypatch.setenv("A_KEY", secret)
    found = look("secret", "local", **{"storage.credential": "env:A_KEY"})
    assert found.ok and secret not in str(found)
    monkeypatch.delenv("A_KEY")
    missing = look("secret", "local", **{"storage.credential": "env:A_KEY"})
    assert not missing.ok and "A_KEY" in missing.detail


def test_a_remotes_token_is_not_shown(listening):
    master = f"sc://{listening}/;token=planted"
    finding = look("spark", "cluster", **{"spark.mode": "connect", "spark.master": master})
    assert finding.ok and listening in finding.detail and "planted" not in str(finding)
