#!/usr/bin/env python3
"""Reduce a capture of Proxmox VE's API description to the facts that the checker needs.

usage: reduce.py CAPTURE.json >pve-9.2.json

CAPTURE.json is what the API viewer of a Proxmox VE installation shows, as {"pve_version": …, "paths": {PATH: {METHOD: {…}}}}.
Kept are names, types, bounds, enumerations, patterns, formats, defaults, and the privileges that a call needs; all prose is dropped, and
so are the parts of the API that have nothing to do with containers."""

import json
import sys

# Names of the schema language; prose and what is only for a user interface is not among them.
KEPT = {
    "type", "optional", "properties", "items", "format", "default", "minimum", "maximum", "minLength", "maxLength",
    "enum", "pattern", "additionalProperties", "requires", "oneOf", "alias", "keyAlias", "default_key", "type-property",
    "instance-types",
}
DROPPED_PATHS = (
    "/access/domains", "/access/openid", "/access/tfa", "/access/groups", "/access/vncticket", "/cluster/acme", "/cluster/backup",
    "/cluster/config/join", "/cluster/mapping", "/cluster/metrics", "/cluster/replication", "/cluster/sdn/", "/nodes/{node}/aplinfo",
    "/nodes/{node}/capabilities", "/nodes/{node}/disks", "/nodes/{node}/firewall", "/nodes/{node}/hardware", "/nodes/{node}/qemu/",
    "/nodes/{node}/replication", "/nodes/{node}/sdn/fabrics", "/nodes/{node}/services", "/nodes/{node}/subscription",
    "/cluster/firewall",
)
DROPPED_CALLS = {("/nodes/{node}/qemu", "POST"), ("/storage", "POST"), ("/storage/{storage}", "PUT")}


def schema(node):
    if isinstance(node, list):
        return [schema(n) for n in node]
    if not isinstance(node, dict):
        return node
    out = {}
    for key, value in node.items():
        if key not in KEPT:
            continue
        if key in ("properties", "format") and isinstance(value, dict):
            value = {name: schema(inner) for name, inner in value.items()}
        elif key == "default" and isinstance(value, str) and " " in value:
            continue  # a sentence, not a value
        else:
            value = schema(value)
        out[key] = value
    return out


def main():
    capture = json.load(open(sys.argv[1], encoding="utf-8"))
    lines = []
    for path, methods in sorted(capture["paths"].items()):
        if path.startswith(DROPPED_PATHS) and not path.startswith("/cluster/sdn/zones"):
            continue
        calls = {}
        for method, call in sorted(methods.items()):
            if (path, method) in DROPPED_CALLS:
                continue
            calls[method] = {"parameters": schema(call.get("parameters") or {}), "returns": schema(call.get("returns") or {})}
            permissions = {k: v for k, v in (call.get("permissions") or {}).items() if k in ("check", "user")}
            if permissions:
                calls[method]["permissions"] = permissions
        lines.append(f"{json.dumps(path)}:{json.dumps(calls, sort_keys=True, separators=(',', ':'))}")
    print(f'{{"version":{json.dumps(capture["pve_version"])},"paths":{{')
    print(",\n".join(lines))
    print("}}")


main()
