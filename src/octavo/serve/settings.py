"""The settings of the server, apart from it: the address is taken before anything heavy is imported."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from octavo.schema import Config


class ServeConfig(Config):
    """Settings of the server."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), description="any of them lets in")
    allow_hosts: tuple[str, ...] = ()
    max_requests: int = Field(default=128, ge=1, description="accepted and not yet answered; more must come back")
    max_sequences: int = Field(default=32, ge=1, description="texts decoded together by a model; others wait")
    max_tokens: int | None = Field(default=None, ge=1, description="tokens of state of a model; default: what fits")
    deterministic: bool = Field(default=False, description="every answer is bit for bit the one it would be alone")
    grace_seconds: float = Field(default=20.0, ge=0, description="how long streams may go on after SIGTERM")
    header_seconds: float = Field(default=10.0, gt=0)
    body_seconds: float = Field(default=30.0, gt=0)
    stall_seconds: float = Field(default=60.0, gt=0, description="a client that reads nothing for so long is dropped")
