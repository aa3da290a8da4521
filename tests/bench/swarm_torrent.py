#!/usr/bin/python3
"""A BitTorrent client on libtorrent, set for one fast network, and what makes the torrent.

  swarm_torrent.py make FILE TORRENT TRACKER         prints the info hash
  swarm_torrent.py seed|super TORRENT DIR ADDRESS    a line on stdout when it serves
  swarm_torrent.py get TORRENT DIR ADDRESS PEER...   a line on stdout when it is ready; begins at a line on stdin;
                                                     a line when the file is whole; seeds on

The peers are told by their addresses, each pair by one side; there is no tracker to wait for.
"""

import os
import sys
import time

import libtorrent

PORT = 6881
PIECE = 1 << 20

SETTINGS = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,  # TCP, as everybody else here
    "enable_incoming_utp": False,
    "in_enc_policy": 2,  # no encryption
    "out_enc_policy": 2,
    "connection_speed": 1000,
    "torrent_connect_boost": 200,
    "smooth_connects": False,
    "min_reconnect_time": 1,
    "peer_connect_timeout": 5,
    "unchoke_slots_limit": 8,
    "unchoke_interval": 2,
    "optimistic_unchoke_interval": 4,
    "initial_picker_threshold": 1,
    "whole_pieces_threshold": 2,
    "request_queue_time": 3,
    "max_out_request_queue": 1500,
    "max_allowed_in_request_queue": 4000,
    "send_buffer_watermark": 4 << 20,
    "send_buffer_low_watermark": 256 << 10,
    "aio_threads": 2,
    "hashing_threads": 1,
    "tick_interval": 100,
    "rate_limit_ip_overhead": False,
}


def make(source, torrent, tracker):
    files = libtorrent.file_storage()
    files.add_file(os.path.basename(source), os.path.getsize(source))
    made = libtorrent.create_torrent(files, PIECE, libtorrent.create_torrent.v1_only)
    made.add_tracker(tracker)
    libtorrent.set_piece_hashes(made, os.path.dirname(source))
    with open(torrent, "wb") as out:
        out.write(libtorrent.bencode(made.generate()))
    print(libtorrent.torrent_info(torrent).info_hash())


def join(torrent, folder, address, flags, wait=lambda: None):
    session = libtorrent.session({**SETTINGS, "listen_interfaces": f"{address}:{PORT}"})
    wanted = libtorrent.add_torrent_params()
    wanted.ti = libtorrent.torrent_info(torrent)
    wanted.save_path = folder
    wanted.trackers = []
    ours = libtorrent.torrent_flags
    wanted.flags = (wanted.flags & ~ours.auto_managed & ~ours.paused) | flags
    wait()
    return session, session.add_torrent(wanted)


def told_to_go():
    print("ready", flush=True)
    sys.stdin.readline()


def get(torrent, folder, address, peers):
    flags = libtorrent.torrent_flags.default_flags
    _session, handle = join(torrent, folder, address, flags, told_to_go)
    tried = 0
    while True:
        status = handle.status()
        if status.is_seeding:
            break
        if status.num_peers < len(peers) and time.monotonic() - tried > 1:
            tried = time.monotonic()
            for peer in peers:
                handle.connect_peer((peer, PORT))
        time.sleep(0.02)
    handle.flush_cache()
    print("whole", flush=True)
    while True:
        time.sleep(60)


def main():
    what, *words = sys.argv[1:]
    if what == "make":
        make(*words)
        return
    if what == "get":
        get(*words[:3], words[3:])
    flags = libtorrent.torrent_flags.seed_mode
    if what == "super":
        flags |= libtorrent.torrent_flags.super_seeding
    _session, _handle = join(*words, flags)  # they live as long as their names
    print("serving", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
