"""Credentials by reference: resolved in the process that uses them, never pickled, logged or shown.

    default             azure-identity's chain: environment, workload or managed identity, developer tools
    env:NAME            an environment variable: an account key, or a SAS token (begins with `?` or has `sig=`)
    secret:SCOPE/KEY    a Databricks secret, with either in it; Databricks gives secrets to the driver only
    keyvault:VAULT/NAME an Azure Key Vault secret, with either in it, fetched with `default`; VAULT is a name or a host

Spark tasks resolve the reference again, on the machine they run on; what only the driver has is no help to them.
Executors import this module.
"""

import base64
import logging
import os
import re
import socket
from typing import Any
from urllib.parse import parse_qs, quote

from helpers.errors import StorageError, first_line

HIDDEN = "***"
STORAGE_SCOPE = "https://storage.azure.com/.default"
IN_A_URL = re.compile(r"(?<=\bsig=)[^&\s'\"<>)]+")

_resolved: set[str] = set()  # every secret that this process has seen, in each form in which it could be shown


def resolve(reference: str, account: str) -> Any:
    """Return what the storage SDK takes as a credential.

    Args:
        reference: as above.
        account: the storage account, for its key.

    Raises:
        StorageError: there is no such secret in this process's reach, or it is neither a key nor a SAS token. The
            message names the reference, never the value.
    """
    kind, _, name = reference.partition(":")
    if kind == "default":
        return _checked(_identity())
    secret = _FETCH[kind](name).strip()
    _remember(secret)
    if secret.startswith("?") or "sig=" in secret:
        return secret.removeprefix("?")
    from azure.core.credentials import AzureNamedKeyCredential

    try:
        base64.b64decode(secret, validate=True)
    except ValueError:
        raise StorageError(
            f"{reference} holds neither an account key (it is not base64) nor a SAS token (it has no sig=); set it anew"
        ) from None
    return AzureNamedKeyCredential(account, secret)


def redact(text: str) -> str:
    """A text without any secret that this process has resolved, and without the signature of any SAS token."""
    for secret in _resolved:
        text = text.replace(secret, HIDDEN)
    return IN_A_URL.sub(HIDDEN, text)


class Redacting(logging.Filter):
    """For the logger of a library that logs the URLs it asks for."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place, and keep it."""
        record.msg, record.args = redact(record.getMessage()), None
        return True


def _remember(secret: str) -> None:
    forms = [secret, secret.removeprefix("?"), *parse_qs(secret.removeprefix("?")).get("sig", [])]
    # What is too short is no secret, and would hide parts of every text.
    _resolved.update(form for text in forms for form in (text, quote(text), quote(text, safe="")) if len(form) > 7)


def _identity() -> Any:
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()


def _checked(identity: Any) -> Any:
    """Fetch a token, which is kept: without an identity the storage SDK would go on trying for a minute."""
    from azure.core.exceptions import ClientAuthenticationError

    try:
        identity.get_token(STORAGE_SCOPE)
    except ClientAuthenticationError as error:
        raise StorageError(
            f"default: this process has no identity in Azure ({redact(first_line(error))}); give the host a managed "
            "identity, log in with `az login`, set AZURE_CLIENT_ID and its like, or name another storage.credential"
        ) from None
    return identity


def _from_environment(name: str) -> str:
    value = os.environ.get(name, "")
    if value.strip():
        return value
    where = f"this task runs in on {socket.gethostname()}" if _in_task() else "of this process"
    remedy = (
        "set it in the environment of every Spark worker (on Databricks: the cluster's environment variables), \
or use a reference that resolves there: default or keyvault:VAULT/NAME"
        if _in_task()
        else f"export {name}"
    )
    raise StorageError(f"env:{name}: the environment {where} has no {name}, or an empty one; {remedy}")


def _from_databricks(name: str) -> str:
    scope, _, key = name.partition("/")
    try:
        from databricks.sdk.runtime import dbutils

        return dbutils.secrets.get(scope=scope, key=key)
    except ImportError:
        raise StorageError(
            f"secret:{name}: there is no dbutils here; only Databricks has secret scopes, elsewhere use env:NAME, "
            "keyvault:VAULT/NAME or default"
        ) from None
    except Exception as error:  # dbutils raises Java's errors, and on executors its own
        remedy = (
            f"Databricks gives secrets to the driver only: set the cluster's environment variable "
            f"NAME={{{{secrets/{scope}/{key}}}}} and use env:NAME"
            if _in_task()
            else "check the scope, the key and your permission to read it"
        )
        raise StorageError(f"secret:{name} cannot be read ({redact(first_line(error))}); {remedy}") from None


def _from_key_vault(name: str) -> str:
    from azure.core.exceptions import AzureError
    from azure.keyvault.secrets import SecretClient

    vault, _, secret = name.partition("/")
    host = vault if re.search(r"[.:]", vault) else f"{vault}.vault.azure.net"
    try:
        with SecretClient(f"https://{host}", _identity()) as client:
            return client.get_secret(secret).value or ""
    except AzureError as error:
        raise StorageError(
            f"keyvault:{name} cannot be read ({redact(first_line(error))}); check the vault, the secret's name, and "
            "that the identity of this process may get secrets"
        ) from None


_FETCH = {"env": _from_environment, "secret": _from_databricks, "keyvault": _from_key_vault}


def _in_task() -> bool:
    from pyspark import TaskContext

    return TaskContext.get() is not None
