"""The hosts that the guest of scripts/guest plays: see guest-main."""

from typing import NamedTuple


class Host(NamedTuple):
    device: str
    netdev: str
    port: str  # of the switch
    switch: str
    ipv4: str
    ipv6: str


def _adapter(pair, end):
    i = 2 * pair + end
    return Host(f"rxe{i}", f"eth{i}", f"port{i}", f"switch{pair}", f"10.9.{pair}.{end + 1}", f"fd09:{pair}::{end + 1}")


HOSTS = [_adapter(0, 0), _adapter(0, 1)]
SECOND = [_adapter(1, 0), _adapter(1, 1)]  # the second adapter of each
