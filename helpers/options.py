"""How object storage is reached: a section of the configuration that tasks carry. Executors import this module."""

import re
from dataclasses import dataclass

CREDENTIAL_REFERENCE = re.compile(r"default|env:\w+|secret:[^/]+/.+|keyvault:[^/]+/.+")


@dataclass(frozen=True)
class StorageOptions:
    """Where object storage answers and where its credential is found; never the credential itself."""

    __pydantic_config__ = {"extra": "forbid"}  # read when the configuration is validated; executors ignore it

    endpoint: str | None = None
    credential: str = "default"
    region: str | None = None  # of an S3 bucket; by default as the environment says, or us-east-1

    def __post_init__(self) -> None:
        if not CREDENTIAL_REFERENCE.fullmatch(self.credential):
            # The value may be a secret set here by mistake, so it is not repeated.
            raise ValueError("not a reference: use default, env:NAME, secret:SCOPE/KEY or keyvault:VAULT/NAME")
        if self.endpoint and re.search(r"[?@]", self.endpoint):
            raise ValueError("an endpoint is an address, without a SAS token: name that with storage.credential")
