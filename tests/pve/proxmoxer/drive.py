#!/usr/bin/env python3
"""The client that most people use drives a Proxmox VE API: list, create, start, tasks, config, delete.

drive.py URL TOKEN_FILE CA_FILE NODE STORAGE TEMPLATE

Prints one line a check and one line with the sum, in the form of Rust's tests; makes one CT, the lowest free one, and removes it.
"""
import sys
import time
import urllib.parse

from proxmoxer import ProxmoxAPI, ResourceException
from proxmoxer.tools import Tasks

url, token_file, ca, node, storage, template = sys.argv[1:]
with open(token_file, encoding="ascii") as file:
    token, secret = file.read().strip().split("=", 1)
user, name = token.split("!", 1)
where = urllib.parse.urlsplit(url)
api = ProxmoxAPI(where.hostname, port=where.port, user=user, token_name=name, token_value=secret, verify_ssl=ca, timeout=60)
passed = failed = 0


def check(what, holds):
    global passed, failed
    passed, failed = passed + bool(holds), failed + (not holds)
    print(f"test proxmoxer: {what} ... {'ok' if holds else 'FAILED'}")


def done(upid):
    status = Tasks.blocking_status(api, upid, timeout=120, polling_interval=0.1)
    log = Tasks.decode_log(api.nodes(node).tasks(upid).log.get())
    return status is not None and status["exitstatus"] == "OK" and log.splitlines()[-1] == "TASK OK"


check("version", api.version.get()["release"].startswith("9."))
check("the host is listed", node in [n["node"] for n in api.nodes.get()])
check("the storage is listed", storage in [s["storage"] for s in api.nodes(node).storage.get()])
vmid = int(api.cluster.nextid.get())
ct = api.nodes(node).lxc(vmid)
created = api.nodes(node).lxc.create(
    vmid=vmid, ostemplate=template, storage=storage, hostname="proxmoxer", memory=128, unprivileged=1, description="two\nlines"
)
check("create", done(created))
check("the CT is listed", vmid in [int(c["vmid"]) for c in api.nodes(node).lxc.get()])
ct.config.put(cores=1, tags="a;b")
config = ct.config.get()
check("config", (config["hostname"], config["cores"], config["tags"], config["description"]) == ("proxmoxer", 1, "a;b", "two\nlines\n"))
check("start", done(ct.status.start.post()))
check("it runs", ct.status.current.get()["status"] == "running")
check("interfaces", "lo" in [i["name"] for i in ct.interfaces.get()])
try:
    ct.status.start.post()
    check("a second start is refused", False)
except ResourceException as refused:
    check("a second start is refused", refused.status_code == 500 and f"CT {vmid} already running" in str(refused))
check("its tasks are listed", {"vzcreate", "vzstart"} <= {t["type"] for t in api.nodes(node).tasks.get(vmid=vmid)})
check("shutdown", done(ct.status.shutdown.post(timeout=30, forceStop=1)))
check("delete", done(ct.delete(purge=1)))
try:
    ct.config.get()
    check("it is gone", False)
except ResourceException as gone:
    check("it is gone", gone.status_code == 500 and "does not exist" in str(gone))
try:
    api.nodes(node).lxc.create(vmid=5)
    check("refused parameters are named", False)
except ResourceException as refused:
    check("refused parameters are named", refused.status_code == 400 and {"vmid", "ostemplate"} <= refused.errors.keys())
print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed;")
sys.exit(failed != 0)
