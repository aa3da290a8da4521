"""The hosts that the guest of scripts/guest plays: see guest-main."""

from typing import NamedTuple


class Host(NamedTuple):
    device: str
    netdev: str
    ipv4: str
    ipv6: str


HOSTS = [Host(f"rxe{i}", f"eth{i}", f"10.9.0.{i + 1}", f"fd09::{i + 1}") for i in range(2)]
