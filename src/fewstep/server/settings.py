"""How a server listens, whom it answers, and what it keeps."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ..errors import RequestError

KEY = re.compile(r"[!-~]{8,}")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Settings:
    """Safe by default: this machine alone, no other web site, nothing fetched."""

    host: str = "127.0.0.1"
    port: int = 7860
    api_key: str | None = None
    insecure: bool = False  # others may come without a key
    hosts: tuple[str, ...] = ()  # names beside its own that it may be called by, without a port
    origins: tuple[str, ...] = ()  # of a proxy in front of it, such as https://draw.example
    allow_urls: bool = False  # pictures may be given as addresses
    threads: int = 2  # that decode and encode pictures
    body_seconds: float = 30.0  # for a request's body to arrive
    head_seconds: float = 10.0  # for a request's head to arrive
    write_seconds: float = 60.0  # in which a client must take some of what waits for it
    drain_seconds: float = 30.0  # to finish pictures at the end
    connections: int = 1024  # half of them of one address
    held_bytes: int = 256 << 20  # of all bodies that are being read or answered
    picture_bytes: int = 512 << 20  # of all decoded pictures that orders came with
    file_bytes: int = 64 << 20  # of pictures that are handed out by an address
    file_seconds: float = 3600.0

    def checked(self) -> Settings:
        """The settings. Raises RequestError for those that would let anyone in."""
        if self.api_key is not None and not KEY.fullmatch(self.api_key):
            raise RequestError(
                "--api-key: has fewer than 8 characters, or blanks or others that no header "
                "carries; give 8 or more ASCII letters, digits and signs"
            )
        if not self.is_loopback and self.api_key is None and not self.insecure:
            raise RequestError(
                f"--host {self.host}: anyone who reaches this machine could draw; give --api-key, "
                "or --insecure if that is meant"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_everywhere(self) -> bool:
        """Whether it listens at all addresses of this machine."""
        return self.host.strip("[]") in ("0.0.0.0", "::")

    def address(self, port: int) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host.strip("[]"))
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def answers_to(self, name: str) -> bool:
        """Whether it may be called by `name`, a host without its port.

        Only names can be made to point here by a web site of someone else, so beyond loopback any
        address will do.
        """
        if name in LOOPBACK or name == self.host.lower() or name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return not self.is_loopback
