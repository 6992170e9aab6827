"""Credentials by reference: resolved in the process that uses them, never pickled, logged or shown.

    default             what the host has: on Azure azure-identity's chain (environment, workload or managed identity,
                        developer tools), on AWS and GCP the environment, or the identity of the machine or the pod
    env:NAME            an environment variable
    secret:SCOPE/KEY    a Databricks secret; Databricks gives secrets to the driver only
    keyvault:VAULT/NAME an Azure Key Vault secret, fetched with `default`; VAULT is a name or a host

What they lead to is, for Azure, an account key or a SAS token (begins with `?` or has `sig=`); for S3
`ACCESS_KEY_ID:SECRET_ACCESS_KEY`, with `:SESSION_TOKEN` where there is one; for GCS the JSON key of a service account.

Spark tasks resolve the reference again, on the machine they run on; what only the driver has is no help to them.
Executors import this module.
"""

import base64
import functools
import os
import re
import socket
from typing import Any

from helpers.errors import StorageError, first_line
from helpers.redaction import remember

ELSEWHERE = "only Databricks has secret scopes, elsewhere use env:NAME, keyvault:VAULT/NAME or default"
STORAGE_SCOPE = "https://storage.azure.com/.default"


def resolve(reference: str, account: str) -> Any:
    """Return a credential of Azure in the form that its storage SDK takes; the account is for its key.

    Raises StorageError if there is no such secret in this process's reach, or it is neither a key nor a SAS token. The
    message names the reference, never the value.
    """
    if reference == "default":
        from azure.core.exceptions import ClientAuthenticationError

        identity = _identity()
        try:
            identity.get_token(STORAGE_SCOPE)  # it is kept; without an identity the storage SDK would try for a minute
        except ClientAuthenticationError as error:
            raise StorageError(
                f"default: this process has no identity in Azure ({first_line(error)}); give the host a managed "
                "identity, log in with `az login`, set AZURE_CLIENT_ID and its like, or name another storage.credential"
            ) from None
        return identity
    secret = fetch(reference)
    if secret.startswith("?") or "sig=" in secret:
        return secret.removeprefix("?")
    from azure.core.credentials import AzureNamedKeyCredential

    try:
        base64.b64decode(secret, validate=True)
    except ValueError:
        forms = "neither an account key (it is not base64) nor a SAS token (it has no sig=)"
        raise StorageError(f"{reference} holds {forms}; set it anew") from None
    return AzureNamedKeyCredential(account, secret)


def fetch(reference: str) -> str:
    """Return the secret that a reference other than `default` leads to, hidden from now on, or raise StorageError."""
    kind, _, name = reference.partition(":")
    secret = _FETCH[kind](name).strip()
    remember(secret)
    return secret


def forget_identity() -> None:
    """Look for the host's identity anew when it is needed next."""
    _identity.cache_clear()


@functools.cache  # it keeps its tokens
def _identity() -> Any:
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()


def _from_environment(name: str) -> str:
    value = os.environ.get(name, "")
    if value.strip():
        return value
    where, remedy = "of this process", f"export {name}"
    if _in_task():
        where = f"this task runs in on {socket.gethostname()}"
        remedy = "set it in the environment of every Spark worker (on Databricks: the cluster's environment variables),"
        remedy += " or use a reference that resolves there: default or keyvault:VAULT/NAME"
    raise StorageError(f"env:{name}: the environment {where} has no {name}, or an empty one; {remedy}")


def _from_databricks(name: str) -> str:
    scope, _, key = name.partition("/")
    try:
        from databricks.sdk.runtime import dbutils

        return dbutils.secrets.get(scope=scope, key=key)
    except ImportError:
        raise StorageError(f"secret:{name}: there is no dbutils here; {ELSEWHERE}") from None
    except Exception as error:  # dbutils raises Java's errors, and on executors its own
        remedy = (
            f"Databricks gives secrets to the driver only: set the cluster's environment variable "
            f"NAME={{{{secrets/{scope}/{key}}}}} and use env:NAME"
            if _in_task()
            else "check the scope, the key and your permission to read it"
            if "DATABRICKS_RUNTIME_VERSION" in os.environ
            else ELSEWHERE
        )
        raise StorageError(f"secret:{name} cannot be read ({first_line(error)}); {remedy}") from None


def _from_key_vault(name: str) -> str:
    from azure.core.exceptions import AzureError
    from azure.keyvault.secrets import SecretClient

    vault, _, secret = name.partition("/")
    host = vault if re.search(r"[.:]", vault) else f"{vault}.vault.azure.net"
    try:
        with SecretClient(f"https://{host}", _identity()) as client:
            return client.get_secret(secret).value or ""
    except AzureError as error:
        remedy = "check the vault, the secret's name, and that the identity of this process may get secrets"
        raise StorageError(f"keyvault:{name} cannot be read ({first_line(error)}); {remedy}") from None


_FETCH = {"env": _from_environment, "secret": _from_databricks, "keyvault": _from_key_vault}


def _in_task() -> bool:
    from pyspark import TaskContext

    return TaskContext.get() is not None
