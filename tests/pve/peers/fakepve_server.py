#!/usr/bin/env python3
"""Serves fakepve, somebody else's fake of the Proxmox VE API, for the suite: two nodes, a template, one API token.

usage: fakepve_server.py DIRECTORY

Writes into DIRECTORY: `token` (user@realm!id=secret), `url`, and, when it listens, `fingerprint`. Ends with SIGTERM."""

import asyncio
import hashlib
import os
import secrets
import ssl
import sys

from fakepve import FakePve
from fakepve.certs import make_cert

PRIVILEGES = (
    "Datastore.AllocateSpace Datastore.Audit Pool.Allocate Pool.Audit SDN.Audit SDN.Use Sys.Audit Sys.Syslog VM.Allocate VM.Audit "
    "VM.Config.CPU VM.Config.Disk VM.Config.Memory VM.Config.Network VM.Config.Options VM.Migrate VM.PowerMgmt VM.Snapshot"
).split()


def write(directory, name, text):
    path = os.path.join(directory, name)
    with open(path + ".new", "w", encoding="utf-8") as to:
        os.chmod(path + ".new", 0o600)
        to.write(text)
    os.rename(path + ".new", path)


async def main(directory):
    pve = FakePve(host="127.0.0.1", port=0)
    pve.time_scale = 0.01
    pve.add_node("pve1")
    pve.add_node("pve2")
    pve.storages["local"].setdefault("volumes", {})["vztmpl/debian-13-standard_13.1-2_amd64.tar.zst"] = {
        "content": "vztmpl", "format": "tzst", "size": 120000000, "ctime": 1,
    }
    # A CT that is not ours: it must be as it was when the suite has ended.
    pve.add_ct(100, "not-ours", node="pve1", status="stopped", config={"memory": 64})
    pve.grant("suite@pve", "/", *PRIVILEGES)
    secret = secrets.token_hex(16)
    pve.apitokens["suite@pve!moxlet"] = secret
    certificate, key, _ = make_cert(directory, hosts=("127.0.0.1",))
    await pve.start(certificate, key)
    with open(certificate, encoding="ascii") as pem:
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.read())).hexdigest().upper()
    write(directory, "token", f"suite@pve!moxlet={secret}\n")
    write(directory, "url", pve.url)
    write(directory, "fingerprint", ":".join(digest[i : i + 2] for i in range(0, 64, 2)))
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1]))
